"""The input rules of `mla::attn_mass`: the same words in eager and at trace time; no tensor data is read."""

from __future__ import annotations

import math

import torch

from mla_ops.checks import (
    FLOAT_DTYPES,
    check_backend_type,
    check_lists,
    check_rank,
    check_scale,
    check_storage,
    check_tensor_types,
    dtype_of,
    is_quantised,
    require,
    require_size,
    shape_of,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.attn_mass.call import AttnMassCall


def check_argument_types(
    q: object, kv: object, indices: object, lse: object, softmax_scale: object, topk_length: object, backend: object
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    check_tensor_types({"q": q, "kv": kv, "indices": indices, "lse": lse}, {"topk_length": topk_length})
    check_scale("softmax_scale", softmax_scale)
    check_backend_type(backend)


def check_inputs(call: AttnMassCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::attn_mass`; shapes in `mla_ops.attn_mass`."""
    q, kv, indices, lse, softmax_scale, topk_length = call
    check_attention(q, kv, lse, softmax_scale, "kv")
    check_lists("q", q, "kv", kv, indices, topk_length)


def check_attention(q: torch.Tensor, kv: torch.Tensor, lse: torch.Tensor, softmax_scale: float, kv_name: str) -> None:
    """Check what attention weights are made of, against each other; `kv_name` is what the caller calls the keys."""
    check_storage(**{"q": q, kv_name: kv, "lse": lse})

    if q.dim() not in (3, 4):
        raise InvalidInputError(
            f"q must be [batch, seq_q, heads, d_total] or [seq_q, heads, d_total], got {shape_of(q)}"
        )
    lead = "batch, " if q.dim() == 4 else ""
    check_rank(kv_name, kv, q.dim(), f"[{lead}seq_kv, kv_group, d_total]")
    check_rank("lse", lse, q.dim() - 1, f"[{lead}seq_q, heads]")

    if q.dtype not in FLOAT_DTYPES:
        fix = "dequantise it with its scales" if is_quantised(q.dtype) else f"use q.to({kv_name}.dtype)"
        raise InvalidInputError(f"q must be bfloat16, float16, float32 or float64, got {dtype_of(q)}; {fix}")
    if kv.dtype != q.dtype:
        fix = "dequantise it with its scales" if is_quantised(kv.dtype) else f"use {kv_name}.to(q.dtype)"
        raise InvalidInputError(f"{kv_name} must have the dtype of q ({dtype_of(q)}), got {dtype_of(kv)}; {fix}")
    if lse.dtype != torch.float32:
        raise InvalidInputError(f"lse must be float32, got {dtype_of(lse)}; use lse.float()")

    *batch, seq_q, heads, d_total = q.shape
    kv_group = kv.shape[-2]
    if batch:
        require_size(kv_name, kv, 0, batch[0], "the batch of q")
        require_size("lse", lse, 0, batch[0], "the batch of q")
    require_size(kv_name, kv, -1, d_total, "d_total of q")
    require_size("lse", lse, -2, seq_q, "seq_q of q")
    require_size("lse", lse, -1, heads, "heads of q")
    require(kv_group >= 1, lambda: f"kv_group ({kv_name}.shape[-2]) must be at least 1, got {kv_name} {shape_of(kv)}")
    require(
        heads % kv_group == 0,
        lambda: f"heads must be a multiple of kv_group, got heads={heads} (q) and kv_group={kv_group} ({kv_name})",
    )
    if not math.isfinite(softmax_scale):
        raise InvalidInputError(f"softmax_scale must be finite, got {softmax_scale}")

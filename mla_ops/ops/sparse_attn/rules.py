"""The operator's input rules: one function, the same words in eager and at trace time.

Nothing here reads tensor data, and nothing here knows what a kernel supports: that is dispatch's business.
"""

from __future__ import annotations

import math

import torch

from mla_ops.checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_backend_type,
    check_index_dtype,
    check_int,
    check_rank,
    check_scale,
    check_storage,
    check_tensor_types,
    dtype_of,
    is_quantised,
    name_of,
    require,
    require_size,
    shape_of,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.call import Gradients, Results, SparseAttnCall


def check_argument_types(
    q: object,
    kv: object,
    indices: object,
    d_v: object,
    softmax_scale: object,
    topk_length: object,
    attn_sink: object,
    backend: object,
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    check_tensor_types({"q": q, "kv": kv, "indices": indices}, {"topk_length": topk_length, "attn_sink": attn_sink})
    check_int("d_v", d_v)
    if softmax_scale is None:
        raise InvalidInputError(
            "softmax_scale must be a float, got NoneType; it has no default because d_total is wider than the trained "
            "head: pass (qk_nope_head_dim + qk_rope_head_dim) ** -0.5, times what rope scaling adds"
        )
    check_scale("softmax_scale", softmax_scale)
    check_backend_type(backend)


def check_inputs(call: SparseAttnCall, *, head_shards: int = 1) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::sparse_attn`; shapes in `mla_ops.sparse_attn`.

    With `head_shards`, `q` and `attn_sink` hold that fraction of the heads, while `kv` and `indices` hold every group.
    """
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
    check_storage(q=q, kv=kv, indices=indices, topk_length=topk_length, attn_sink=attn_sink)

    if q.dim() not in (3, 4):
        raise InvalidInputError(
            f"q must be [batch, seq_q, heads, d_total] or [seq_q, heads, d_total], got {shape_of(q)}"
        )
    lead = "batch, " if q.dim() == 4 else ""
    check_rank("kv", kv, q.dim(), f"[{lead}seq_kv, kv_group, d_total]")
    check_rank("indices", indices, q.dim(), f"[{lead}seq_q, kv_group, topk]")
    if topk_length is not None:
        check_rank("topk_length", topk_length, q.dim() - 2, f"[{lead}seq_q]")
    if attn_sink is not None and attn_sink.dim() != 1:
        raise InvalidInputError(f"attn_sink must be [heads], got {shape_of(attn_sink)}")

    if q.dtype not in FLOAT_DTYPES:
        fix = "quantised inputs have no fused path yet: dequantise them yourself"
        if not is_quantised(q.dtype):
            fix = _swapped("q", q, indices) or "use q.to(kv.dtype)"
        raise InvalidInputError(f"q must be bfloat16, float16, float32 or float64, got {dtype_of(q)}; {fix}")
    if kv.dtype != q.dtype:
        fix = "dequantise it with its scales, a cast would drop them"
        if not is_quantised(kv.dtype):
            fix = _swapped("kv", kv, indices) or "use kv.to(q.dtype)"
        raise InvalidInputError(f"kv must have the dtype of q ({dtype_of(q)}), got {dtype_of(kv)}; {fix}")
    check_index_dtype("indices", indices)
    if topk_length is not None:
        check_index_dtype("topk_length", topk_length)
    if attn_sink is not None and attn_sink.dtype != torch.float32:
        raise InvalidInputError(f"attn_sink must be float32, got {dtype_of(attn_sink)}; use attn_sink.float()")

    *batch, seq_q, heads, d_total = q.shape
    kv_group = kv.shape[-2]
    if batch:
        require_size("kv", kv, 0, batch[0], "the batch of q")
        require_size("indices", indices, 0, batch[0], "the batch of q")
    require_size("kv", kv, -1, d_total, "d_total of q")
    require_size("indices", indices, -3, seq_q, "seq_q of q")
    require_size("indices", indices, -2, kv_group, "kv_group of kv")
    require(kv_group >= 1, lambda: f"kv_group (kv.shape[-2]) must be at least 1, got kv {shape_of(kv)}")
    of_each = "" if head_shards == 1 else f" of each of {head_shards} ranks"
    require(
        heads * head_shards % kv_group == 0,
        lambda: f"heads must be a multiple of kv_group, got heads={heads} (q{of_each}) and kv_group={kv_group} (kv)",
    )
    if topk_length is not None:
        if batch:
            require_size("topk_length", topk_length, 0, batch[0], "the batch of q")
        require_size("topk_length", topk_length, -1, seq_q, "seq_q of q")
    if attn_sink is not None:
        require_size("attn_sink", attn_sink, 0, heads, "heads of q")
    require(d_v >= 1, lambda: f"d_v must be at least 1, got {d_v}")
    require(d_v <= d_total, lambda: f"d_v must be at most d_total ({d_total}, the last size of q), got {d_v}")
    if not math.isfinite(softmax_scale):
        raise InvalidInputError(f"softmax_scale must be finite, got {softmax_scale}")


def check_bwd_inputs(call: SparseAttnCall, results: Results, gradients: Gradients) -> None:
    """Check what `mla::sparse_attn_bwd` takes beyond a call, which `check_inputs` has passed."""
    q, (out, lse), (dout, dlse) = call.q, results, gradients
    out_shape = (*q.shape[:-1], call.d_v)
    for name, value, shape, dtype in (
        ("out", out, out_shape, q.dtype),
        ("dout", dout, out_shape, q.dtype),
        ("lse", lse, q.shape[:-1], torch.float32),
        ("dlse", dlse, q.shape[:-1], torch.float32),
    ):
        if value is None:
            continue
        check_storage(q=q, **{name: value})
        if value.dtype != dtype:
            raise InvalidInputError(f"{name} must be {name_of(dtype)}, got {dtype_of(value)}")
        check_rank(name, value, len(shape), "[..., heads, d_v]" if len(shape) == q.dim() else "[..., heads]")
        for dim, size in enumerate(shape):
            require_size(name, value, dim, size, f"size {dim} of the forward's result")


def _swapped(name: str, tensor: torch.Tensor, indices: torch.Tensor) -> str | None:
    if tensor.dtype in INDEX_DTYPES and indices.dtype in FLOAT_DTYPES:
        return f"{name} and indices look swapped, the order is q, kv, indices"
    return None

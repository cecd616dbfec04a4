"""The input rules of index selection: one function, the same words in eager and at trace time.

Nothing here reads tensor data, and nothing here knows what a kernel supports: that is dispatch's business.
"""

from __future__ import annotations

import torch

from mla_ops.checks import (
    FLOAT_DTYPES,
    check_backend_type,
    check_bool,
    check_index_dtype,
    check_int,
    check_rank,
    check_storage,
    check_tensor_types,
    dtype_of,
    is_quantised,
    require,
    require_size,
    shape_of,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.index_topk.call import IndexTopkCall

FP8 = torch.float8_e4m3fn


def check_argument_types(
    q_idx: object,
    k_idx: object,
    weights: object,
    topk: object,
    starts: object,
    ends: object,
    k_scale: object,
    causal: object,
    relu: object,
    backend: object,
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    check_tensor_types(
        {"q_idx": q_idx, "k_idx": k_idx, "weights": weights}, {"starts": starts, "ends": ends, "k_scale": k_scale}
    )
    check_int("topk", topk)
    check_bool("causal", causal)
    check_bool("relu", relu)
    check_backend_type(backend)


def check_inputs(call: IndexTopkCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::index_topk`; shapes in `mla_ops.index_topk`."""
    q_idx, k_idx, weights, topk, starts, ends, k_scale, _, _ = call
    check_index_tensors(q_idx, k_idx, weights, allow_fp8=True)
    check_storage(q_idx=q_idx, starts=starts, ends=ends, k_scale=k_scale)
    for name, bound in (("starts", starts), ("ends", ends)):
        if bound is not None:
            _check_bound(name, bound, q_idx)
    _check_k_scale(k_scale, k_idx)
    require(topk >= 0, lambda: f"topk must be at least 0, got {topk}")


def check_index_tensors(q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor, *, allow_fp8: bool) -> None:
    """Check what index scores are made of: storage, ranks, dtypes and sizes of the three tensors, against each other.

    With `allow_fp8`, queries and keys may be e4m3 (the scale of the keys is checked by who takes one).
    """
    check_storage(q_idx=q_idx, k_idx=k_idx, weights=weights)

    if q_idx.dim() not in (3, 4):
        raise InvalidInputError(
            "q_idx must be [batch, seq_q, index_heads, index_head_dim] or [seq_q, index_heads, index_head_dim], got "
            f"{shape_of(q_idx)}"
        )
    lead = "batch, " if q_idx.dim() == 4 else ""
    check_rank("k_idx", k_idx, q_idx.dim(), f"[{lead}seq_kv, kv_group, index_head_dim]")
    check_rank("weights", weights, q_idx.dim() - 1, f"[{lead}seq_q, index_heads]")

    if q_idx.dtype not in FLOAT_DTYPES and not (allow_fp8 and q_idx.dtype == FP8):
        fix = "dequantise it with its scales" if is_quantised(q_idx.dtype) else "use q_idx.to(k_idx.dtype)"
        dtypes = "bfloat16, float16, float32, float64" + (" or float8_e4m3fn" if allow_fp8 else "")
        raise InvalidInputError(f"q_idx must be {dtypes}, got {dtype_of(q_idx)}; {fix}")
    if k_idx.dtype != q_idx.dtype:
        is_either_quantised = is_quantised(k_idx.dtype) or is_quantised(q_idx.dtype)
        fix = (
            "quantise both or neither, a cast would drop scales" if is_either_quantised else "use k_idx.to(q_idx.dtype)"
        )
        raise InvalidInputError(f"k_idx must have the dtype of q_idx ({dtype_of(q_idx)}), got {dtype_of(k_idx)}; {fix}")
    if weights.dtype != torch.float32 and (weights.dtype != q_idx.dtype or q_idx.dtype == FP8):
        or_as_q_idx = "" if q_idx.dtype in (torch.float32, FP8) else f" or the dtype of q_idx ({dtype_of(q_idx)})"
        raise InvalidInputError(f"weights must be float32{or_as_q_idx}, got {dtype_of(weights)}; use weights.float()")

    *batch, seq_q, index_heads, index_head_dim = q_idx.shape
    kv_group = k_idx.shape[-2]
    if batch:
        require_size("k_idx", k_idx, 0, batch[0], "the batch of q_idx")
        require_size("weights", weights, 0, batch[0], "the batch of q_idx")
    require_size("k_idx", k_idx, -1, index_head_dim, "index_head_dim of q_idx")
    require_size("weights", weights, -2, seq_q, "seq_q of q_idx")
    require_size("weights", weights, -1, index_heads, "index_heads of q_idx")
    require(kv_group >= 1, lambda: f"kv_group (k_idx.shape[-2]) must be at least 1, got k_idx {shape_of(k_idx)}")
    require(
        index_heads % kv_group == 0,
        lambda: (
            f"index_heads must be a multiple of kv_group, got index_heads={index_heads} (q_idx) and "
            f"kv_group={kv_group} (k_idx)"
        ),
    )


def _check_bound(name: str, bound: torch.Tensor, q_idx: torch.Tensor) -> None:
    """Check `starts` or `ends`: a bound for each query, of every batch element or of all."""
    check_index_dtype(name, bound)
    has_batch = q_idx.dim() == 4
    if bound.dim() != 1 and not (has_batch and bound.dim() == 2):
        shapes = "[batch, seq_q] or [seq_q]" if has_batch else "[seq_q]"
        raise InvalidInputError(f"{name} must be {shapes}, got {shape_of(bound)}")
    if bound.dim() == 2:
        require_size(name, bound, 0, q_idx.shape[0], "the batch of q_idx")
    require_size(name, bound, -1, q_idx.shape[-3], "seq_q of q_idx")


def _check_k_scale(k_scale: torch.Tensor | None, k_idx: torch.Tensor) -> None:
    """Check that e4m3 keys, and only they, come with a scale for each key."""
    if k_scale is None:
        if k_idx.dtype == FP8:
            raise InvalidInputError("k_scale must come with float8_e4m3fn keys, got None; pass ones if they have none")
        return
    if k_idx.dtype != FP8:
        raise InvalidInputError(
            f"k_scale must be None unless k_idx is float8_e4m3fn, got one with {dtype_of(k_idx)} keys; multiply k_idx "
            "by it"
        )
    if k_scale.dtype != torch.float32:
        raise InvalidInputError(f"k_scale must be float32, got {dtype_of(k_scale)}; use k_scale.float()")
    lead = "batch, " if k_idx.dim() == 4 else ""
    check_rank("k_scale", k_scale, k_idx.dim() - 1, f"[{lead}seq_kv, kv_group]")
    for dim in range(k_scale.dim()):
        require_size("k_scale", k_scale, dim, k_idx.shape[dim], f"size {dim} of k_idx")

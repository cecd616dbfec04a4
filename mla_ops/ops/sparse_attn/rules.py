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
from mla_ops.ops.sparse_attn.call import Gradients, Results, Scales, SparseAttnCall


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
    check_constants(d_v, softmax_scale, backend)


def check_constants(d_v: object, softmax_scale: object, backend: object) -> None:
    """Check the Python types of what is no tensor."""
    check_int("d_v", d_v)
    if softmax_scale is None:
        raise InvalidInputError(
            "softmax_scale must be a float, got NoneType; it has no default because d_total is wider than the trained "
            "head: pass (qk_nope_head_dim + qk_rope_head_dim) ** -0.5, times what rope scaling adds"
        )
    check_scale("softmax_scale", softmax_scale)
    check_backend_type(backend)


def check_inputs(call: SparseAttnCall, *, head_shards: int = 1, scales: Scales | None = None) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::sparse_attn`; shapes in `mla_ops.sparse_attn`.

    With `head_shards`, `q` and `attn_sink` hold that fraction of the heads, while `kv` and `indices` hold every group.
    With `scales`, `q`, `kv` or both are payloads.
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

    if scales is None:
        _check_dtypes(q, kv, indices)
    else:
        _check_scales(q, kv, scales)
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


def _check_dtypes(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES:
        fix = 'a payload without its scales is no number: pass its wrapper and quantized="fused" to mla_ops.sparse_attn'
        if not is_quantised(q.dtype):
            fix = _swapped("q", q, indices) or "use q.to(kv.dtype)"
        raise InvalidInputError(f"q must be bfloat16, float16, float32 or float64, got {dtype_of(q)}; {fix}")
    if kv.dtype != q.dtype:
        fix = "dequantise it with its scales, a cast would drop them"
        if not is_quantised(kv.dtype):
            fix = _swapped("kv", kv, indices) or "use kv.to(q.dtype)"
        raise InvalidInputError(f"kv must have the dtype of q ({dtype_of(q)}), got {dtype_of(kv)}; {fix}")


def _check_scales(q: torch.Tensor, kv: torch.Tensor, scales: Scales) -> None:
    if scales.dtype not in FLOAT_DTYPES:
        raise InvalidInputError(f"dtype must be bfloat16, float16, float32 or float64, got {name_of(scales.dtype)}")
    if scales.q is None and scales.kv is None:
        raise InvalidInputError(
            "q_scale or kv_scale must be given, got neither; plain tensors are for mla::sparse_attn, and a wrapper "
            "that dequantised itself on the way (compiled in inference mode) needs mla_ops.fuse_wrapper, or no_grad"
        )
    check_storage(q=q, q_scale=scales.q, kv_scale=scales.kv)
    for name, tensor, scale in (("q", q, scales.q), ("kv", kv, scales.kv)):
        if scale is None:
            if tensor.dtype != scales.dtype:
                raise InvalidInputError(
                    f"{name} must have dtype ({name_of(scales.dtype)}) where it has no scale, got {dtype_of(tensor)}"
                )
            continue
        if tensor.dtype != torch.float8_e4m3fn:
            raise InvalidInputError(f"{name} must be float8_e4m3fn where it has a scale, got {dtype_of(tensor)}")
        if scale.dtype != torch.float32:
            raise InvalidInputError(f"{name}_scale must be float32, got {dtype_of(scale)}")
        if scale.dim() != 0:
            check_rank(f"{name}_scale", scale, tensor.dim(), f"those of {name} with a last size of 1, or none")
            for dim, size in enumerate((*tensor.shape[:-1], 1)):
                require_size(f"{name}_scale", scale, dim, size, f"that of {name}, or 1 for the last,")


def check_logical_dtypes(q: torch.Tensor, kv: torch.Tensor) -> None:
    """Check what `q` and `kv` claim to be, one of which at least is a wrapper."""
    if kv.dtype != q.dtype:
        raise InvalidInputError(
            f"kv must have the dtype of q ({dtype_of(q)}), got {dtype_of(kv)}; quantise both from one dtype"
        )


def check_bwd_inputs(
    call: SparseAttnCall, results: Results, gradients: Gradients, *, scales: Scales | None = None
) -> None:
    """Check what `mla::sparse_attn_bwd` takes beyond a call, which `check_inputs` has passed."""
    q, (out, lse), (dout, dlse) = call.q, results, gradients
    out_shape, out_dtype = (*q.shape[:-1], call.d_v), q.dtype if scales is None else scales.dtype
    for name, value, shape, dtype in (
        ("out", out, out_shape, out_dtype),
        ("dout", dout, out_shape, out_dtype),
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

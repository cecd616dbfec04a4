"""The operator's input rules: one function, the same words in eager and at trace time.

Static facts (ranks, dtypes, devices) are plain `if`s. Sizes may be symbols, so they go through `_require`, which asks
torch to record the condition in the graph instead of specialising on it. Nothing here reads tensor data, and nothing
here knows what a kernel supports: that is dispatch's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.call import Gradients, Results, SparseAttnCall
from mla_ops.wrappers import is_dtensor, is_wrapper, wrapper_error

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INDEX_DTYPES = (torch.int32, torch.int64)
_DEVICE_TYPES = ("cpu", "cuda", "meta")


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
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers.

    Called by the Python front door, where types are still visible: past the dispatcher a wrapper tensor has already
    been handed to its own class, which may dequantise it without a word.
    """
    for name, value in (("q", q), ("kv", kv), ("indices", indices)):
        if not isinstance(value, torch.Tensor):
            raise InvalidInputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    for name, value in (("topk_length", topk_length), ("attn_sink", attn_sink)):
        if value is not None and not isinstance(value, torch.Tensor):
            raise InvalidInputError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
    tensors = {"q": q, "kv": kv, "indices": indices, "topk_length": topk_length, "attn_sink": attn_sink}
    distributed = [name for name, value in tensors.items() if is_dtensor(value)]
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and is_wrapper(type(value)):
            raise wrapper_error(name, type(value))
        if distributed and value is not None and name not in distributed:
            raise InvalidInputError(
                f"{name} must be a DTensor because {distributed[0]} is one, got a plain tensor; if every rank has the "
                f"same, use DTensor.from_local({name}, mesh, [Replicate()])"
            )
    if isinstance(d_v, bool) or not isinstance(d_v, (int, torch.SymInt)):
        raise InvalidInputError(f"d_v must be an int, got {type(d_v).__name__}; use int(d_v)")
    if softmax_scale is None:
        raise InvalidInputError(
            "softmax_scale must be a float, got NoneType; it has no default because d_total is wider than the trained "
            "head: pass (qk_nope_head_dim + qk_rope_head_dim) ** -0.5, times what rope scaling adds"
        )
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise InvalidInputError(
            f"softmax_scale must be a float, got {type(softmax_scale).__name__}; it is a constant, use float(...)"
        )
    if not isinstance(backend, str):
        raise InvalidInputError(f"backend must be a string, got {type(backend).__name__}")


def check_inputs(call: SparseAttnCall, *, head_shards: int = 1) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::sparse_attn`; shapes in `mla_ops.sparse_attn`.

    With `head_shards`, `q` and `attn_sink` hold that fraction of the heads, while `kv` and `indices` hold every group.
    """
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
    _check_storage(q=q, kv=kv, indices=indices, topk_length=topk_length, attn_sink=attn_sink)

    if q.dim() not in (3, 4):
        raise InvalidInputError(f"q must be [batch, seq_q, heads, d_total] or [seq_q, heads, d_total], got {_shape(q)}")
    lead = "batch, " if q.dim() == 4 else ""
    _check_rank("kv", kv, q.dim(), f"[{lead}seq_kv, kv_group, d_total]")
    _check_rank("indices", indices, q.dim(), f"[{lead}seq_q, kv_group, topk]")
    if topk_length is not None:
        _check_rank("topk_length", topk_length, q.dim() - 2, f"[{lead}seq_q]")
    if attn_sink is not None and attn_sink.dim() != 1:
        raise InvalidInputError(f"attn_sink must be [heads], got {_shape(attn_sink)}")

    if q.dtype not in _FLOAT_DTYPES:
        fix = "quantised inputs have no fused path yet: dequantise them yourself"
        if not _is_quantised(q.dtype):
            fix = _swapped("q", q, indices) or "use q.to(kv.dtype)"
        raise InvalidInputError(f"q must be bfloat16, float16, float32 or float64, got {_dtype(q)}; {fix}")
    if kv.dtype != q.dtype:
        fix = "dequantise it with its scales, a cast would drop them"
        if not _is_quantised(kv.dtype):
            fix = _swapped("kv", kv, indices) or "use kv.to(q.dtype)"
        raise InvalidInputError(f"kv must have the dtype of q ({_dtype(q)}), got {_dtype(kv)}; {fix}")
    if indices.dtype not in _INDEX_DTYPES:
        raise InvalidInputError(f"indices must be int32 or int64, got {_dtype(indices)}; use indices.to(torch.int32)")
    if topk_length is not None and topk_length.dtype not in _INDEX_DTYPES:
        raise InvalidInputError(
            f"topk_length must be int32 or int64, got {_dtype(topk_length)}; use topk_length.to(torch.int32)"
        )
    if attn_sink is not None and attn_sink.dtype != torch.float32:
        raise InvalidInputError(f"attn_sink must be float32, got {_dtype(attn_sink)}; use attn_sink.float()")

    *batch, seq_q, heads, d_total = q.shape
    kv_group = kv.shape[-2]
    if batch:
        _require_size("kv", kv, 0, batch[0], "the batch of q")
        _require_size("indices", indices, 0, batch[0], "the batch of q")
    _require_size("kv", kv, -1, d_total, "d_total of q")
    _require_size("indices", indices, -3, seq_q, "seq_q of q")
    _require_size("indices", indices, -2, kv_group, "kv_group of kv")
    _require(kv_group >= 1, lambda: f"kv_group (kv.shape[-2]) must be at least 1, got kv {_shape(kv)}")
    of_each = "" if head_shards == 1 else f" of each of {head_shards} ranks"
    _require(
        heads * head_shards % kv_group == 0,
        lambda: f"heads must be a multiple of kv_group, got heads={heads} (q{of_each}) and kv_group={kv_group} (kv)",
    )
    if topk_length is not None:
        if batch:
            _require_size("topk_length", topk_length, 0, batch[0], "the batch of q")
        _require_size("topk_length", topk_length, -1, seq_q, "seq_q of q")
    if attn_sink is not None:
        _require_size("attn_sink", attn_sink, 0, heads, "heads of q")
    _require(d_v >= 1, lambda: f"d_v must be at least 1, got {d_v}")
    _require(d_v <= d_total, lambda: f"d_v must be at most d_total ({d_total}, the last size of q), got {d_v}")
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
        _check_storage(q=q, **{name: value})
        if value.dtype != dtype:
            raise InvalidInputError(f"{name} must be {_name(dtype)}, got {_dtype(value)}")
        _check_rank(name, value, len(shape), "[..., heads, d_v]" if len(shape) == q.dim() else "[..., heads]")
        for dim, size in enumerate(shape):
            _require_size(name, value, dim, size, f"size {dim} of the forward's result")


def _check_storage(**tensors: torch.Tensor | None) -> None:
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise InvalidInputError(f"{name} must be a dense (strided) tensor, got {tensor.layout}; use .to_dense()")
        if device is None:  # q comes first
            device = tensor.device
            if device.type not in _DEVICE_TYPES:
                raise InvalidInputError(f"{name} must be on one of {', '.join(_DEVICE_TYPES)}, got {device}")
        elif tensor.device != device:
            raise InvalidInputError(f"{name} must be on the device of q ({device}), got {tensor.device}")


def _check_rank(name: str, tensor: torch.Tensor, rank: int, expected: str) -> None:
    if tensor.dim() != rank:
        # [batch, seq_q, topk] is what an indexer returns, and a cache of latent rows has no groups either.
        may_lack_group = "kv_group" in expected and tensor.dim() == rank - 1
        fix = f"; if kv_group is what it lacks, use {name}.unsqueeze(-2)" if may_lack_group else ""
        raise InvalidInputError(f"{name} must have {rank} dimensions, {expected}, got {_shape(tensor)}{fix}")


def _is_quantised(dtype: torch.dtype) -> bool:
    """Whether numbers of `dtype` may stand for others, with scales: int8, uint8 and every 8-bit float."""
    return dtype.itemsize == 1 and dtype != torch.bool


def _swapped(name: str, tensor: torch.Tensor, indices: torch.Tensor) -> str | None:
    if tensor.dtype in _INDEX_DTYPES and indices.dtype in _FLOAT_DTYPES:
        return f"{name} and indices look swapped, the order is q, kv, indices"
    return None


def _require_size(name: str, tensor: torch.Tensor, dim: int, size: int, source: str) -> None:
    _require(
        tensor.shape[dim] == size,
        lambda: f"size {dim} of {name} must equal {source} ({size}), got {name} {_shape(tensor)}",
    )


def _require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    if condition is True:
        return
    if condition is False:
        raise InvalidInputError(message())
    torch._check_with(InvalidInputError, condition, message)


def _shape(tensor: torch.Tensor) -> str:
    return f"shape [{', '.join(map(str, tensor.shape))}]"


def _dtype(tensor: torch.Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

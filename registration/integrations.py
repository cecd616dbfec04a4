"""What the rest of torch may ask of the operators: autocast, vmap, FLOP counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mla_ops.registration.schema import SPARSE_ATTN, SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS


def _autocast_kernel(op: Any, device_type: str) -> Any:
    def cast_and_call(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, *args: Any) -> Any:
        # q and kv only: attn_sink is fp32 by contract (torch.library.register_autocast would cast it too), and fp64 is
        # left alone as everywhere in autocast.
        dtype = torch.get_autocast_dtype(device_type)
        q, kv = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, kv))
        with torch.autocast(device_type, enabled=False):
            return op(q, kv, indices, *args)

    return cast_and_call


def _vmap_sparse_attn(
    info: Any,
    in_dims: tuple[int | None, ...],
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Fold, except that a vmapped sink has no batch to fold into and runs call by call."""
    args = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
    in_dims = (*in_dims, *(None,) * (len(args) - len(in_dims)))  # the dispatcher strips trailing defaults
    if in_dims[6] is not None:
        return _vmap_by_loop(SPARSE_ATTN, info, in_dims, args)
    results = _vmap_by_folding(SPARSE_ATTN, info, in_dims, args, unbatched=(6,))
    return results, (0, 0)


def _vmap_sparse_attn_max_logits(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
    (result,) = _vmap_by_folding(SPARSE_ATTN_MAX_LOGITS, info, in_dims, args)
    return result, 0


def _vmap_by_folding(
    op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], unbatched: tuple[int, ...] = ()
) -> tuple[torch.Tensor, ...]:
    """Fold the vmapped dimension of every tensor into `batch`, except of those at the `unbatched` positions."""

    def fold(tensor: torch.Tensor, in_dim: int | None) -> torch.Tensor:
        if in_dim is None:
            tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
        else:
            tensor = tensor.movedim(in_dim, 0)
        return tensor if not has_batch else tensor.flatten(0, 1)

    has_batch = args[0].dim() - (in_dims[0] is not None) == 4
    folded = [
        fold(value, in_dim) if isinstance(value, torch.Tensor) and position not in unbatched else value
        for position, (value, in_dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    results = op(*folded)
    results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
    if has_batch:
        results = tuple(result.unflatten(0, (info.batch_size, -1)) for result in results)
    return results


def _vmap_sparse_attn_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run call by call: `dkv` and `dsink` are sums over the batch, which folding would add together."""
    return _vmap_by_loop(SPARSE_ATTN_BWD, info, in_dims, args)


def _vmap_by_loop(
    op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    calls = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(column) for column in zip(*calls, strict=True))
    return results, (0,) * len(results)


def sparse_attn_flops(
    q_shape: Sequence[int], kv_shape: Sequence[int], indices_shape: Sequence[int], d_v: int, *args: Any, **kwargs: Any
) -> int:
    """Multiply-adds of the forward, times two: QK^T over d_total, PV over d_v. Invalid slots count as work."""
    return 2 * _logits(q_shape, indices_shape) * (q_shape[-1] + d_v)


def sparse_attn_max_logits_flops(
    q_shape: Sequence[int], kv_shape: Sequence[int], indices_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """FLOPs of the logits alone: QK^T over d_total."""
    return 2 * _logits(q_shape, indices_shape) * q_shape[-1]


def sparse_attn_bwd_flops(
    dout_shape: Sequence[int] | None,
    dlse_shape: Sequence[int] | None,
    q_shape: Sequence[int],
    kv_shape: Sequence[int],
    indices_shape: Sequence[int],
    forward_out_shape: Sequence[int],  # not out_shape: the counter passes this operator's own results by that name
    lse_shape: Sequence[int],
    d_v: int,
    softmax_scale: float,
    topk_length_shape: Sequence[int] | None = None,
    attn_sink_shape: Sequence[int] | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of the backward: QK^T again and dP; dQ and dK over d_total, dV over d_v, where they are needed."""
    d_total = q_shape[-1]
    widths = d_total + d_v + (d_total if need_dq else 0) + (d_total + d_v if need_dkv else 0)
    return 2 * _logits(q_shape, indices_shape) * widths


def _logits(q_shape: Sequence[int], indices_shape: Sequence[int]) -> int:
    *tokens, heads, _ = q_shape
    count = heads * indices_shape[-1]
    for size in tokens:
        count *= size
    return count


def register(library: torch.library.Library) -> None:
    """Attach autocast kernels, vmap rules and FLOP formulas to the operators of `library`."""
    for device_type in ("cpu", "cuda"):
        for name, op in (("sparse_attn", SPARSE_ATTN), ("sparse_attn_max_logits", SPARSE_ATTN_MAX_LOGITS)):
            library.impl(name, _autocast_kernel(op, device_type), f"Autocast{device_type.upper()}")
    torch.library.register_vmap("mla::sparse_attn", _vmap_sparse_attn, lib=library)
    torch.library.register_vmap("mla::sparse_attn_bwd", _vmap_sparse_attn_bwd, lib=library)
    torch.library.register_vmap("mla::sparse_attn_max_logits", _vmap_sparse_attn_max_logits, lib=library)
    register_flop_formula(torch.ops.mla.sparse_attn)(sparse_attn_flops)
    register_flop_formula(torch.ops.mla.sparse_attn_bwd)(sparse_attn_bwd_flops)
    register_flop_formula(torch.ops.mla.sparse_attn_max_logits)(sparse_attn_max_logits_flops)

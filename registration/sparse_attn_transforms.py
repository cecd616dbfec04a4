"""What the rest of torch may ask of the operators of sparse attention: autocast, vmap, FLOP counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.library import LIBRARY
from mla_ops.registration.sparse_attn import SPARSE_ATTN, SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS
from mla_ops.registration.transforms import autocast_kernel, vmap_by_folding, vmap_by_loop


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
        return vmap_by_loop(SPARSE_ATTN, info, in_dims, args)
    results = vmap_by_folding(SPARSE_ATTN, info, in_dims, args, unbatched=(6,))
    return results, (0, 0)


def _vmap_sparse_attn_max_logits(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
    (result,) = vmap_by_folding(SPARSE_ATTN_MAX_LOGITS, info, in_dims, args)
    return result, 0


def _vmap_sparse_attn_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run call by call: `dkv` and `dsink` are sums over the batch, which folding would add together."""
    return vmap_by_loop(SPARSE_ATTN_BWD, info, in_dims, args)


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


def register() -> None:
    """Attach autocast kernels, vmap rules and FLOP formulas to the operators."""
    for device_type in ("cpu", "cuda"):
        for name, op in (("sparse_attn", SPARSE_ATTN), ("sparse_attn_max_logits", SPARSE_ATTN_MAX_LOGITS)):
            LIBRARY.impl(name, autocast_kernel(op, device_type), f"Autocast{device_type.upper()}")
    torch.library.register_vmap("mla::sparse_attn", _vmap_sparse_attn, lib=LIBRARY)
    torch.library.register_vmap("mla::sparse_attn_bwd", _vmap_sparse_attn_bwd, lib=LIBRARY)
    torch.library.register_vmap("mla::sparse_attn_max_logits", _vmap_sparse_attn_max_logits, lib=LIBRARY)
    register_flop_formulas(
        {
            torch.ops.mla.sparse_attn: sparse_attn_flops,
            torch.ops.mla.sparse_attn_bwd: sparse_attn_bwd_flops,
            torch.ops.mla.sparse_attn_max_logits: sparse_attn_max_logits_flops,
        }
    )

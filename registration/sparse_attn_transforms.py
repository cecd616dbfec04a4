"""What the rest of torch may ask of the operators of sparse attention: autocast, vmap, FLOP counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.library import LIBRARY
from mla_ops.registration.sparse_attn import (
    SPARSE_ATTN,
    SPARSE_ATTN_BWD,
    SPARSE_ATTN_MAX_LOGITS,
    sparse_attn_bwd_fake,
    sparse_attn_fake,
    sparse_attn_max_logits_fake,
)
from mla_ops.registration.transforms import (
    AUTOCAST_DEVICES,
    call_without_data,
    cast_by_autocast,
    casting_kernel,
    preserving_kernel,
    vmap_by_folding,
    vmap_by_loop,
)


class _Fold(NamedTuple):
    """Into which dimensions of the arguments and results a vmapped dimension folds; see `vmap_by_folding`."""

    q: int
    kv: int | None
    indices: int | None
    topk_length: int | None
    attn_sink: int | None
    out: int
    lse: int


# What all elements share is not copied where the vmapped dimension joins one that it lacks: kv, indices and topk_length
# have no heads, kv has no query rows. Everything has a batch.
_INTO_HEADS = _Fold(q=-2, kv=None, indices=None, topk_length=None, attn_sink=-1, out=-2, lse=-1)
_INTO_ROWS = _Fold(q=-3, kv=None, indices=-3, topk_length=-1, attn_sink=None, out=-3, lse=-2)
_INTO_BATCH = _Fold(q=-4, kv=-4, indices=-4, topk_length=-2, attn_sink=None, out=-4, lse=-3)


def _choose_fold(in_dims: tuple[int | None, ...], kv: torch.Tensor) -> _Fold:
    kv_dim, indices_dim = in_dims[1:3]
    topk_length_dim = in_dims[5] if len(in_dims) > 5 else None  # the dispatcher strips trailing defaults
    if kv_dim is not None:
        return _INTO_BATCH
    is_of_heads = indices_dim is None and topk_length_dim is None and kv.shape[-2] == 1
    return _INTO_HEADS if is_of_heads else _INTO_ROWS


def _vmap_sparse_attn(
    info: Any, in_dims: tuple[int | None, ...], q: torch.Tensor, kv: torch.Tensor, *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    args = (*cast_by_autocast(q, kv), *args)
    elements = call_without_data(sparse_attn_fake, in_dims, args)
    fold = _choose_fold(in_dims, kv)
    # A sink of each element has only heads to fold into.
    if fold.attn_sink is None and in_dims[6:7] not in ((), (None,)):
        return vmap_by_loop(SPARSE_ATTN, sparse_attn_fake, info, in_dims, args)
    into = (*fold[:3], None, None, fold.topk_length, fold.attn_sink, None)
    return vmap_by_folding(SPARSE_ATTN, info, in_dims, args, elements, into, (fold.out, fold.lse))


def _vmap_sparse_attn_max_logits(
    info: Any, in_dims: tuple[int | None, ...], q: torch.Tensor, kv: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, int]:
    args = (*cast_by_autocast(q, kv), *args)
    elements = call_without_data(sparse_attn_max_logits_fake, in_dims, args)
    fold = _choose_fold(in_dims, kv)
    into = (*fold[:3], None, None, fold.topk_length, None)
    (result,), (out_dim,) = vmap_by_folding(SPARSE_ATTN_MAX_LOGITS, info, in_dims, args, elements, into, (fold.lse,))
    return result, out_dim


def _vmap_sparse_attn_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run call by call: `dkv` and `dsink` are sums over the batch, which folding would add together."""
    return vmap_by_loop(SPARSE_ATTN_BWD, sparse_attn_bwd_fake, info, in_dims, args)


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
    for device_type in AUTOCAST_DEVICES:
        key = f"Autocast{device_type.upper()}"
        LIBRARY.impl("sparse_attn", casting_kernel(SPARSE_ATTN, device_type), key)
        LIBRARY.impl("sparse_attn_bwd", preserving_kernel(SPARSE_ATTN_BWD, device_type), key)
        LIBRARY.impl("sparse_attn_max_logits", casting_kernel(SPARSE_ATTN_MAX_LOGITS, device_type), key)
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

"""What the rest of torch may ask of `mla::index_scores` and its backward: autocast, vmap, FLOP counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.index_scores import (
    INDEX_SCORES,
    INDEX_SCORES_BWD,
    index_scores_bwd_fake,
    index_scores_fake,
)
from mla_ops.registration.library import LIBRARY
from mla_ops.registration.transforms import (
    AUTOCAST_DEVICES,
    call_without_data,
    cast_index_inputs_by_autocast,
    index_casting_kernel,
    preserving_kernel,
    vmap_by_folding,
    vmap_by_loop,
)

# Into which dimensions of q_idx, k_idx, weights, indices, topk_length, relu, backend a vmapped one folds, and of the
# scores (`vmap_by_folding`). Keys that all elements share are not copied where the vmapped dimension joins the rows.
_INTO_ROWS = (-3, None, -2, -3, -1, None, None), (-3,)
_INTO_BATCH = (-4, -4, -3, -4, -2, None, None), (-4,)


def _vmap_index_scores(
    info: Any,
    in_dims: tuple[int | None, ...],
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    *args: Any,
) -> tuple[torch.Tensor, int]:
    args = (*cast_index_inputs_by_autocast(q_idx, k_idx, weights), *args)
    elements = call_without_data(index_scores_fake, in_dims, args)
    into, result_into = _INTO_ROWS if in_dims[1] is None else _INTO_BATCH
    (scores,), (out_dim,) = vmap_by_folding(INDEX_SCORES, info, in_dims, args, elements, into, result_into)
    return scores, out_dim


def _vmap_index_scores_bwd(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run call by call: `dk` is a sum over the rows, which folding would add together."""
    return vmap_by_loop(INDEX_SCORES_BWD, index_scores_bwd_fake, info, in_dims, args)


def index_scores_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    weights_shape: Sequence[int],
    indices_shape: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """Multiply-adds of the products of every head with every named key, times two. Invalid slots count as work."""
    return 2 * math.prod(q_shape) * indices_shape[-1]


def index_scores_bwd_flops(
    dscores_shape: Sequence[int],
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    weights_shape: Sequence[int],
    indices_shape: Sequence[int],
    topk_length_shape: Sequence[int] | None = None,
    relu: bool = True,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dw: bool = True,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of the backward: the products again, dq and dk where they are needed."""
    return (1 + need_dq + need_dk) * index_scores_flops(q_shape, k_shape, weights_shape, indices_shape)


def register() -> None:
    """Attach autocast kernels, vmap rules and FLOP formulas to the operators."""
    for device_type in AUTOCAST_DEVICES:
        key = f"Autocast{device_type.upper()}"
        LIBRARY.impl("index_scores", index_casting_kernel(INDEX_SCORES, device_type), key)
        LIBRARY.impl("index_scores_bwd", preserving_kernel(INDEX_SCORES_BWD, device_type), key)
    torch.library.register_vmap("mla::index_scores", _vmap_index_scores, lib=LIBRARY)
    torch.library.register_vmap("mla::index_scores_bwd", _vmap_index_scores_bwd, lib=LIBRARY)
    register_flop_formulas(
        {
            torch.ops.mla.index_scores: index_scores_flops,
            torch.ops.mla.index_scores_bwd: index_scores_bwd_flops,
        }
    )

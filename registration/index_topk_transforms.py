"""What the rest of torch may ask of index selection: autocast, vmap, FLOP counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.index_topk import INDEX_TOPK, index_topk_fake
from mla_ops.registration.library import LIBRARY
from mla_ops.registration.transforms import (
    AUTOCAST_DEVICES,
    call_without_data,
    cast_index_inputs_by_autocast,
    index_casting_kernel,
    vmap_by_folding,
)

_STARTS, _ENDS = 4, 5  # places among the arguments


def _vmap_index_topk(
    info: Any,
    in_dims: tuple[int | None, ...],
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    *args: Any,
) -> tuple[torch.Tensor, int]:
    """Fold the vmapped dimension into the batch: a query's choice depends on its own batch element only."""
    arguments = [*cast_index_inputs_by_autocast(q_idx, k_idx, weights), *args]
    elements = call_without_data(index_topk_fake, in_dims, tuple(arguments))
    into = [-4, -4, -3, None, None, None, -3, None, None, None]
    dims = list(in_dims)
    for i in (_STARTS, _ENDS):
        bound = arguments[i] if len(arguments) > i else None
        if bound is None or (dims[i] is None and bound.dim() == 1):
            continue  # none, or one that all batch elements of all vmapped elements share
        if dims[i] is not None and bound.dim() == 2 and elements[0].dim() == 4:
            # Each vmapped element has one for all of its batch: [V, Sq] -> [V, B, Sq].
            bound = bound.movedim(dims[i], 0).unsqueeze(1).expand(-1, elements[0].shape[0], -1)
            arguments[i], dims[i] = bound, 0
        into[i] = -2
    (indices,), (out_dim,) = vmap_by_folding(
        INDEX_TOPK, info, tuple(dims), tuple(arguments), elements, tuple(into[: len(dims)]), (-4,)
    )
    return indices, out_dim


def index_topk_flops(q_idx_shape: Sequence[int], k_idx_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of `<q, k>`, times two: every head of every query with every key, as torch counts attention.

    Bounds are data, and the causal one halves nothing, as in torch's own formula. `weights` and the choice count
    nothing.
    """
    return 2 * math.prod(q_idx_shape) * k_idx_shape[-3]


def register() -> None:
    """Attach autocast kernels, the vmap rule and the FLOP formula to the operator."""
    for device_type in AUTOCAST_DEVICES:
        LIBRARY.impl("index_topk", index_casting_kernel(INDEX_TOPK, device_type), f"Autocast{device_type.upper()}")
    torch.library.register_vmap("mla::index_topk", _vmap_index_topk, lib=LIBRARY)
    register_flop_formulas({torch.ops.mla.index_topk: index_topk_flops})

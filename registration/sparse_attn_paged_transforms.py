"""What the rest of torch may ask of `mla::sparse_attn_paged` and its rows: autocast, vmap, FLOP counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.library import LIBRARY
from mla_ops.registration.sparse_attn_paged import SPARSE_ATTN_PAGED, sparse_attn_paged_fake
from mla_ops.registration.transforms import (
    AUTOCAST_DEVICES,
    call_without_data,
    cast_paged_by_autocast,
    shared_pool_message,
    vmap_by_folding,
    vmap_by_loop,
)

_PAGES, _BLOCK_TABLE, _ATTN_SINK, _CACHE_SCALE = 1, 6, 9, 10  # places among the arguments
# Into which dimension of each argument a vmapped one folds, and of the results (`vmap_by_folding`). Row numbers are
# those of one pool, so queries simply join; positions belong to the requests of a batch.
_INTO_ROWS = (-3, None, -3, None, None, None, None, None, -1, None, None, None), (-3, -2)
_INTO_BATCH = (-4, None, -4, None, None, None, -2, -1, -2, None, None, None), (-4, -3)


def _vmap_sparse_attn_paged(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    if in_dims[_PAGES] is not None:
        raise InvalidInputError(shared_pool_message("pages"))
    q = cast_paged_by_autocast(args[0], args[_PAGES])
    args = (q, *args[1:])
    if any(dim is not None for dim in in_dims[_ATTN_SINK : _CACHE_SCALE + 1]):
        return vmap_by_loop(SPARSE_ATTN_PAGED, sparse_attn_paged_fake, info, in_dims, args)
    elements = call_without_data(sparse_attn_paged_fake, in_dims, args)
    has_table = len(args) > _BLOCK_TABLE and args[_BLOCK_TABLE] is not None
    into, results_into = _INTO_BATCH if has_table else _INTO_ROWS
    return vmap_by_folding(SPARSE_ATTN_PAGED, info, in_dims, args, elements, into[: len(args)], results_into)


def sparse_attn_paged_flops(
    q_shape: Sequence[int],
    pages_shape: Sequence[int],
    indices_shape: Sequence[int],
    d_v: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of QK^T over d_total and PV over d_v. Invalid slots count as work; decoding rows does not."""
    *heads, d_total = q_shape
    return 2 * math.prod(heads) * indices_shape[-1] * (d_total + d_v)


def _autocast_kernel(device_type: str) -> Any:
    def cast_and_call(q: torch.Tensor, pages: torch.Tensor, *args: Any) -> Any:
        q = cast_paged_by_autocast(q, pages)
        with torch.autocast(device_type, enabled=False):
            return SPARSE_ATTN_PAGED(q, pages, *args)

    return cast_and_call


def register() -> None:
    """Attach autocast kernels, the vmap rule and the FLOP formula to the operator."""
    for device_type in AUTOCAST_DEVICES:
        LIBRARY.impl("sparse_attn_paged", _autocast_kernel(device_type), f"Autocast{device_type.upper()}")
    torch.library.register_vmap("mla::sparse_attn_paged", _vmap_sparse_attn_paged, lib=LIBRARY)
    register_flop_formulas({torch.ops.mla.sparse_attn_paged: sparse_attn_paged_flops})

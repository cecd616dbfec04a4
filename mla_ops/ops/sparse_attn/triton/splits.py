"""Partial results of a forward whose slots are shared out over programs: room for them, and their merge."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from mla_ops.launching import Wrap, as_it_is, unfilled
from mla_ops.ops.sparse_attn.configs.launch import program_count

# What a program of the merge kernel has in registers at a time.
MERGED_CHANNELS, MERGED_SPLITS = 128, 8


def partial_results(
    partials: tuple[int, int, int], d_v: int | None, like: torch.Tensor, *, is_traced: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return fp32 room for outputs, without `d_v` None, and for lse; `partials` is (rows, splits, heads)."""
    out = None if d_v is None else unfilled((*partials, d_v), torch.float32, like, is_traced=is_traced)
    return out, unfilled(partials, torch.float32, like, is_traced=is_traced)


def merge(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    partials: tuple[int, int, int],
    d_v: int,
    wrap: Wrap = as_it_is,
) -> None:
    """Write what partial results come to; `partials` as above."""
    rows, num_splits, heads = partials
    block_d = min(MERGED_CHANNELS, 1 << (d_v - 1).bit_length())
    block_h = MERGED_CHANNELS // block_d
    wrap(_merge_kernel())[(program_count(rows, heads, 1, block_h) * -(-d_v // block_d),)](
        partial_out, partial_lse, attn_sink, out, lse, num_splits,
        heads, d_v, MERGED_SPLITS, block_h, block_d, num_warps=1,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _merge_kernel() -> Any:
    from mla_ops.ops.sparse_attn.kernels.forward_split import _sparse_attn_merge_kernel

    return _sparse_attn_merge_kernel

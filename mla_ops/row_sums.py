"""Gradients of keys without atomic sums: a backward stores a row for every slot, a second kernel adds those of a key.

Like every launcher, this allocates from shapes, never synchronises and reads no data.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import gcd
from typing import NamedTuple

import torch

from mla_ops.launching import Wrap, as_it_is, outer_strides, unfilled

# Bytes of the rows that may be held at a time; queries are processed in chunks below it.
WORKSPACE_BYTES = 1 << 30

# Counters that slots are sorted with: as many chunks are sorted together as have a counter for each of their keys.
# 16 MiB of them stay in cache: with twice as many a backward at 128/64 with 8 heads takes 1.15 instead of 1.07 ms, with
# half as many the same.
COUNTERS = 1 << 22


def sum_in_query_order(
    keys: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    row_dtype: torch.dtype,
    run_rows: Callable[[torch.Tensor, torch.Tensor, int, int], None],
    head_blocks: int,
    wave_programs: int,
    wrap: Wrap,
    *,
    orders_repeats: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the gradient of `keys`, a sum whose order depends on the indices alone, and on chunks of queries.

    The chunks depend on sizes and device. `keys` is `[batch, seq_kv, kv_group, width]`, or without batch.
    `run_rows(partial, places, first_row, num_rows)` runs the backward kernel over some queries and stores the rows of
    their (slot, head block) pairs in `partial`; `wave_programs` are those of its programs that run at a time.
    `orders_repeats` says that slots of one query that name the same key have rows that differ. `dtype` is that of the
    result, by default that of the keys. Held are

        n * kv_group * topk * head_blocks * width elements of `row_dtype`, for a chunk of n queries (see `cut`): at
            most WORKSPACE_BYTES, unless one query has more
        4 bytes for every slot of all queries
        8 bytes for each of max(COUNTERS, keys of a chunk) counters, and at most as many again
    """
    from mla_ops.kernels.row_sums import _sum_placed_rows_kernel

    is_traced = wrap is not as_it_is
    dtype = dtype or keys.dtype
    seq_q, kv_group, topk = indices.shape[-3:]
    seq_kv, _, width = keys.shape[-3:]
    batch = indices.shape[:-2].numel() // seq_q
    elements_per_row = kv_group * topk * head_blocks * width
    chunk_batch, chunk_queries = cut(
        batch, seq_q, elements_per_row * row_dtype.itemsize, wave_programs, kv_group * head_blocks
    )
    chunk_keys = chunk_batch * seq_kv * kv_group
    places = unfilled(indices.shape, torch.int32, keys, is_traced=is_traced)
    partial = unfilled((chunk_batch * chunk_queries * elements_per_row,), row_dtype, keys, is_traced=is_traced)
    sums = unfilled(keys.shape, dtype if chunk_queries == seq_q else torch.float32, keys, is_traced=is_traced)
    block_d = min(64, 1 << (width - 1).bit_length())
    for slab in slabs(batch, seq_q, chunk_batch, chunk_queries, chunk_keys):
        starts, blocks = _place_slots(
            slab, seq_kv, indices, topk_length, places, chunk_batch, chunk_queries, wrap, orders_repeats
        )
        chunks = product(slab.batches[::chunk_batch], slab.queries[::chunk_queries])
        for chunk, (first_batch, first_query) in enumerate(chunks):
            num_batch = min(chunk_batch, batch - first_batch)
            num_queries = min(chunk_queries, seq_q - first_query)
            run_rows(partial, places, first_batch * seq_q + first_query, num_batch * num_queries)
            num_keys = num_batch * seq_kv * kv_group
            if num_keys > 0:
                wrap(_sum_placed_rows_kernel)[(num_keys * -(-width // block_d),)](
                    partial, starts, sums, chunk, chunk_keys, blocks, first_batch * seq_kv * kv_group,
                    head_blocks, width, 16, block_d, first_query == 0, num_warps=2,
                )  # fmt: skip
    return sums.to(dtype)


class Slab(NamedTuple):
    """Queries whose slots are sorted together: all queries of some batch elements, or some queries of one."""

    batches: range
    queries: range


def slabs(batch: int, seq_q: int, chunk_batch: int, chunk_queries: int, chunk_keys: int) -> list[Slab]:
    """Cut the queries into slabs of whole chunks, one chunk at least, with at most COUNTERS keys."""
    chunks = -(-batch // chunk_batch) * -(-seq_q // chunk_queries)
    most = max(1, COUNTERS // max(1, chunk_keys))
    step_batch, step_queries = batch, seq_q
    if chunks > most:
        is_cut = chunk_queries < seq_q
        step_batch, step_queries = (1, most * chunk_queries) if is_cut else (most * chunk_batch, seq_q)
    return [
        Slab(range(b, min(b + step_batch, batch)), range(i, min(i + step_queries, seq_q)))
        for b, i in product(range(0, batch, step_batch), range(0, seq_q, step_queries))
    ]


def _place_slots(
    slab: Slab,
    seq_kv: int,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    places: torch.Tensor,
    chunk_batch: int,
    chunk_queries: int,
    wrap: Wrap,
    orders_repeats: bool,
) -> tuple[torch.Tensor, int]:
    """Write the places of a slab's slots; return where the slots of each counter start, and counters per key."""
    from mla_ops.kernels.row_sums import _place_slots_kernel, _rank_slots_kernel

    kv_group, topk = indices.shape[-2:]
    strides = outer_strides(indices.stride())
    batch, seq_q = len(slab.batches), len(slab.queries)
    if batch * seq_q < indices.shape[:-2].numel():
        indices, places = _part(indices, slab), _part(places, slab)
        topk_length = None if topk_length is None else _part(topk_length, slab)
    parts = -(-seq_q // chunk_queries)
    chunks, chunk_keys = -(-batch // chunk_batch) * parts, chunk_batch * seq_kv * kv_group
    block_queries = max(1, -(-chunks * chunk_keys * chunk_queries // COUNTERS))
    blocks = -(-chunk_queries // block_queries)
    counters = indices.new_zeros(1 + chunks * chunk_keys * blocks, dtype=torch.int32)
    lengths = (seq_q, seq_kv, topk, chunk_batch, chunk_queries, block_queries)
    constants = (kv_group, min(1024, max(32, 1 << (topk - 1).bit_length())))
    wrap(_rank_slots_kernel)[(batch * parts * blocks * kv_group,)](
        indices, *strides, topk_length, counters, places, *lengths, *constants, orders_repeats, num_warps=4
    )
    starts = counters.cumsum(0, dtype=torch.int32)
    wrap(_place_slots_kernel)[(batch * seq_q * kv_group,)](
        indices, *strides, topk_length, starts, places, *lengths, *constants, num_warps=4
    )
    return starts, blocks


def _part(tensor: torch.Tensor, slab: Slab) -> torch.Tensor:
    """Return a slab of what has a row for every query; of a contiguous tensor it is contiguous."""
    queries = slice(slab.queries.start, slab.queries.stop)
    has_batch = tensor.dim() in (2, 4)  # [B, Sq] and [B, Sq, G, topk], or the same without B
    return tensor[slab.batches.start : slab.batches.stop, queries] if has_batch else tensor[queries]


def cut(batch: int, seq_q: int, row_bytes: int, wave_programs: int, programs_per_row: int) -> tuple[int, int]:
    """Return (batch elements, queries of each) of a chunk that fits WORKSPACE_BYTES: one of the two is all or one.

    Where a chunk is a part of a batch element, whole waves of programs leave no SM idle at its end.
    """
    fitting = max(1, WORKSPACE_BYTES // max(1, row_bytes))
    if fitting >= seq_q:
        return min(batch, fitting // seq_q), seq_q
    wave = wave_programs // gcd(wave_programs, programs_per_row)
    return 1, max(fitting // wave * wave, min(fitting, wave))

"""dkv without atomic sums: the backward kernel stores a row for every slot, and a second kernel adds those of each key.

Like the launchers of `triton.py`, this allocates from shapes, never synchronises and reads no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

# Bytes of the rows that may be held at a time; queries are processed in chunks below it.
WORKSPACE_BYTES = 1 << 30

# Queries that take their places one after the other, at least, and counters there may be: see NOTE [Places].
MIN_BLOCK_ROWS = 16
MAX_COUNTERS = 1 << 24


def dkv_in_query_order(
    run_rows: Callable[[torch.Tensor, torch.Tensor, int, int], None],
    kv: torch.Tensor,
    indices: torch.Tensor,
    index_strides: tuple[int, int, int],
    topk_length: torch.Tensor | None,
    head_blocks: int,
    wrap: Callable[[Any], Any],
    *,
    is_traced: bool,
) -> torch.Tensor:
    """Return dkv as a sum whose order depends on the indices alone (and the chunks, which depend on sizes).

    `run_rows(partial, places, first_row, num_rows)` runs the backward kernel over some queries and stores the rows of
    their (slot, head block) pairs in `partial`. Held at a time, of a chunk (see `chunks`) of n queries:
    `n * kv_group * topk * head_blocks * d_total` elements of `row_dtype`, at most WORKSPACE_BYTES unless one query has
    more; 4 bytes a slot; and 8 bytes each of at most max(MAX_COUNTERS, keys) counters.
    """
    from mla_ops.kernels.backward_reduce import _count_slots_kernel, _place_slots_kernel, _sum_placed_rows_kernel

    seq_q, kv_group, topk = indices.shape[-3:]
    seq_kv, _, d_total = kv.shape[-3:]
    rows = indices.shape[:-2].numel()
    slots_per_row, dtype = kv_group * topk, row_dtype(kv.dtype)
    elements_per_row = slots_per_row * head_blocks * d_total
    spans = list(chunks(rows // seq_q, seq_q, WORKSPACE_BYTES // max(1, elements_per_row * dtype.itemsize)))
    most_rows = max(num_rows for _, num_rows in spans)
    partial = unfilled((most_rows * elements_per_row,), dtype, kv, is_traced=is_traced)
    places = unfilled((most_rows * slots_per_row,), torch.int32, kv, is_traced=is_traced)
    is_summed_once = most_rows >= seq_q
    dkv = unfilled(kv.shape, kv.dtype if is_summed_once else torch.float32, kv, is_traced=is_traced)
    block_slots = min(1024, max(32, 1 << (topk - 1).bit_length()))
    block_d = min(128, 1 << (d_total - 1).bit_length())
    slot_arguments = (indices, *index_strides, topk_length)
    for first_row, num_rows in spans:
        num_keys = -(-num_rows // seq_q) * seq_kv * kv_group
        block_rows = max(MIN_BLOCK_ROWS, -(-num_keys * min(num_rows, seq_q) // MAX_COUNTERS))
        blocks = -(-min(num_rows, seq_q) // block_rows)
        lengths = (seq_q, seq_kv, topk, block_rows, blocks)
        counters = indices.new_zeros(num_keys * blocks + 1, dtype=torch.int32)
        wrap(_count_slots_kernel)[(num_rows * kv_group,)](
            *slot_arguments, counters, first_row, *lengths, kv_group, block_slots, num_warps=4
        )
        counters = counters.cumsum(0, dtype=torch.int32)
        wrap(_place_slots_kernel)[(-(-num_rows // seq_q) * blocks * kv_group,)](
            *slot_arguments, counters, places, first_row, num_rows, *lengths, kv_group, block_slots, num_warps=4
        )
        run_rows(partial, places, first_row, num_rows)
        if num_keys > 0:
            wrap(_sum_placed_rows_kernel)[(num_keys * -(-d_total // block_d),)](
                partial, counters, dkv, first_row // seq_q * seq_kv * kv_group, blocks,
                head_blocks, d_total, 32, block_d, first_row % seq_q == 0, num_warps=4,
            )  # fmt: skip
    return dkv.to(kv.dtype)


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the rows that are held for inputs of `dtype`: bf16 for bf16, else fp32.

    A row in bf16 is one more rounding, by 2^-9 at most, of a sum over heads whose factors, P and dS, were rounded as
    much before they were multiplied. Errors of independent terms add in squares: where the terms of dkv don't cancel
    systematically, those of P and dS, of the rows and of the result are equal, so the whole error grows by
    sqrt(3 / 2). The sum over queries stays fp32. A row in fp16 could overflow where the sum doesn't.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunks(batch: int, seq_q: int, fitting: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, rows) of chunks of about `fitting` queries: whole batch elements, or equal parts of one."""
    if fitting >= seq_q:
        chunk = fitting // seq_q * seq_q
        for first_row in range(0, batch * seq_q, chunk):
            yield first_row, min(chunk, batch * seq_q - first_row)
    else:
        parts = -(-seq_q // max(1, fitting))
        chunk = -(-seq_q // parts)
        for first_of_batch in range(0, batch * seq_q, seq_q):
            for query in range(0, seq_q, chunk):
                yield first_of_batch + query, min(chunk, seq_q - query)


def unfilled(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor, *, is_traced: bool) -> torch.Tensor:
    """Return memory that is written before it is read.

    In deterministic mode `torch.empty` fills what it returns: a write of the whole of it, a tenth of a narrow forward.
    A storage made by hand is left alone. In a trace the compiler allocates and doesn't fill.
    """
    if is_traced or not torch.are_deterministic_algorithms_enabled():
        return like.new_empty(shape, dtype=dtype)
    storage = torch.UntypedStorage(torch.Size(shape).numel() * dtype.itemsize, device=like.device)
    return torch.empty(0, dtype=dtype, device=like.device).set_(storage, 0, shape)

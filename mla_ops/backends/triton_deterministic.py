"""dkv without atomics: the backward kernel stores a row for every slot, and a second kernel sums them in a fixed order.

Like the launchers of `triton.py`, this allocates from shapes, never synchronises and reads no data.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch

# Bytes of the rows that may be held at a time; queries are processed in chunks below it.
WORKSPACE_BYTES = 1 << 30


def dkv_in_index_order(
    run_rows: Callable[[torch.Tensor, int, int], None],
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    index_strides: tuple[int, int, int],
    topk_length: torch.Tensor | None,
    head_blocks: int,
    num_sms: int,
    wrap: Callable[[Any], Any],
    *,
    is_traced: bool,
) -> torch.Tensor:
    """Return dkv as a sum whose order depends on the indices alone (and the chunks, which depend on shapes and device).

    `run_rows(partial, first_row, num_rows)` runs the backward kernel over some queries and stores the fp32 rows of
    their (slot, head block) pairs in `partial`. Held at a time: `rows_per_chunk(...)` queries of
    `4 * kv_group * topk * head_blocks * d_total` bytes, and about 40 bytes a slot while they are sorted.
    """
    from mla_ops.kernels.backward_reduce import _sum_slot_rows_kernel

    if kv.numel() == 0:
        return torch.empty_like(kv, memory_format=torch.contiguous_format)
    kv_group, d_total = kv.shape[-2:]
    rows, slots_per_row = q.shape[:-2].numel(), kv_group * indices.shape[-1]
    floats_per_row = slots_per_row * head_blocks * d_total
    chunk_rows = rows_per_chunk(rows, 4 * floats_per_row, kv_group * head_blocks, num_sms)
    num_chunks = -(-rows // chunk_rows)
    num_keys = kv.numel() // d_total
    order, starts = _slots_by_key(
        indices, index_strides, topk_length, kv, chunk_rows, num_chunks, wrap, is_traced=is_traced
    )
    dkv = kv.new_empty(kv.shape, dtype=kv.dtype if num_chunks == 1 else torch.float32)
    partial = _unfilled(chunk_rows * floats_per_row, torch.float32, q, is_traced=is_traced)
    block_d = 1 << (d_total - 1).bit_length()
    for chunk in range(num_chunks):
        first_row = chunk * chunk_rows
        run_rows(partial, first_row, min(chunk_rows, rows - first_row))
        wrap(_sum_slot_rows_kernel)[(num_keys,)](
            partial, order, starts, dkv, chunk, chunk_rows * slots_per_row,
            head_blocks, d_total, max(1, 4096 // block_d), block_d, chunk == 0, num_warps=4,
        )  # fmt: skip
    return dkv.to(kv.dtype)


def rows_per_chunk(rows: int, bytes_per_row: int, programs_per_row: int, num_sms: int) -> int:
    """Return how many queries fit WORKSPACE_BYTES, one at least; several chunks leave no SM idle at their end."""
    fitting = max(1, WORKSPACE_BYTES // max(1, bytes_per_row))
    if fitting >= rows:
        return rows
    even = num_sms // gcd(num_sms, programs_per_row)
    return max(fitting // even * even, min(fitting, even))


def _slots_by_key(
    indices: torch.Tensor,
    index_strides: tuple[int, int, int],
    topk_length: torch.Tensor | None,
    kv: torch.Tensor,
    rows_per_chunk: int,
    num_chunks: int,
    wrap: Callable[[Any], Any],
    *,
    is_traced: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort all slots by chunk and flat KV row; return the slots and where those of each (chunk, KV row) begin."""
    from mla_ops.kernels.backward_reduce import _slot_keys_kernel

    seq_q, kv_group, topk = indices.shape[-3:]
    seq_kv, num_keys = kv.shape[-3], kv.shape[:-1].numel()
    # A radix sort takes time by the byte.
    dtypes = (torch.int16, torch.int32, torch.int64)
    dtype = next(dtype for dtype in dtypes if num_chunks * num_keys < 1 << torch.iinfo(dtype).bits)
    lowest = torch.iinfo(dtype).min
    sort_keys = _unfilled(indices.numel(), dtype, indices, is_traced=is_traced)
    if topk > 0:
        wrap(_slot_keys_kernel)[(indices.numel() // topk,)](
            indices, *index_strides, topk_length, sort_keys,
            seq_q, seq_kv, topk, rows_per_chunk, num_chunks, num_keys,
            kv_group, lowest, min(1024, max(32, 1 << (topk - 1).bit_length())), num_warps=4,
        )  # fmt: skip
    sort_keys, order = torch.sort(sort_keys, stable=True)
    firsts = torch.arange(lowest, lowest + num_chunks * num_keys + 1, device=indices.device, dtype=dtype)
    return order, torch.searchsorted(sort_keys, firsts)


def _unfilled(count: int, dtype: torch.dtype, like: torch.Tensor, *, is_traced: bool) -> torch.Tensor:
    """Return scratch that is written before it is read.

    In deterministic mode `torch.empty` fills what it returns, a write as long as the workspace itself; a storage made
    by hand is left alone. In a trace the compiler allocates and doesn't fill.
    """
    if is_traced:
        return like.new_empty(count, dtype=dtype)
    storage = torch.UntypedStorage(dtype.itemsize * count, device=like.device)
    return torch.empty(0, dtype=dtype, device=like.device).set_(storage, 0, (count,), (1,))

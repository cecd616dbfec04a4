"""Deterministic sum of the dkv rows that the slots of the backward kernel stored.

NOTE [Places]
A counting sort gives every valid slot its place among all slots of the same key row, in the order of the queries, so
that the rows of a key become neighbours and are read once, in sequence. Counters are `[keys, blocks]` with a block of
consecutive queries each: first the slots are counted, by atomics, whose order doesn't matter to integers; then the
counters are summed; then one program per block counts back and gives its slots their places, the last query first. Only
slots of one query that name the same key row race for their places, and their rows are bitwise the same.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import check_positions


@triton.jit
def first_counter(chunk_row, group, seq_q, seq_kv, block_rows, blocks, KV_GROUP: tl.constexpr):
    """Return the counter that position 0 has in the block of a query; each position further is `KV_GROUP * blocks` on.

    A chunk of queries is whole batch elements or a part of one, so that its row number tells the batch element.
    """
    key = chunk_row // seq_q * seq_kv * KV_GROUP + group
    return key * blocks + chunk_row % seq_q // block_rows


# Lengths change from call to call: one binary serves them all.
@triton.jit(do_not_specialize=["first_row", "seq_q", "seq_kv", "topk", "block_rows", "blocks"])
def _count_slots_kernel(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    counters_ptr,  # int32 [keys, blocks]
    first_row, seq_q, seq_kv, topk, block_rows, blocks,
    KV_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the valid slots of one query and group."""
    program = tl.program_id(0).to(tl.int64)
    chunk_row, group = program // KV_GROUP, program % KV_GROUP
    row = first_row + chunk_row
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        end_slot = tl.minimum(tl.load(topk_length_ptr + row), topk).to(tl.int32)
    indices_ptr += row // seq_q * stride_i_b + row % seq_q * stride_i_s + group * stride_i_g
    counters_ptr += first_counter(chunk_row, group, seq_q, seq_kv, block_rows, blocks, KV_GROUP)
    for start in tl.range(0, end_slot, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        position = tl.load(indices_ptr + slots, mask=slots < end_slot, other=0)
        position, valid = check_positions(position, slots, end_slot, seq_kv, True)
        tl.atomic_add(counters_ptr + position * (KV_GROUP * blocks), 1, mask=valid, sem="relaxed")


@triton.jit(do_not_specialize=["first_row", "num_rows", "seq_q", "seq_kv", "topk", "block_rows", "blocks"])
def _place_slots_kernel(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    counters_ptr,  # int32 [keys, blocks], summed: from the end of its slots each counter goes down to their start
    places_ptr,  # int32 [queries of the chunk, groups, topk]; those of invalid slots stay unwritten
    first_row, num_rows, seq_q, seq_kv, topk, block_rows, blocks,
    KV_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give the slots of a block of queries their places; see NOTE [Places]."""
    program = tl.program_id(0).to(tl.int64)
    block, group = program // KV_GROUP, program % KV_GROUP
    first_of_batch = block // blocks * seq_q
    start_row = first_of_batch + block % blocks * block_rows
    end_row = tl.minimum(tl.minimum(start_row + block_rows, first_of_batch + seq_q), num_rows)
    counters_ptr += first_counter(start_row, group, seq_q, seq_kv, block_rows, blocks, KV_GROUP)
    for chunk_row in tl.range(end_row - 1, start_row - 1, -1):
        row = first_row + chunk_row
        end_slot = topk
        if topk_length_ptr is not None:
            end_slot = tl.minimum(tl.load(topk_length_ptr + row), topk).to(tl.int32)
        row_indices_ptr = indices_ptr + row // seq_q * stride_i_b + row % seq_q * stride_i_s + group * stride_i_g
        row_places_ptr = places_ptr + (chunk_row * KV_GROUP + group) * topk
        for start in tl.range(0, end_slot, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            position = tl.load(row_indices_ptr + slots, mask=slots < end_slot, other=0)
            position, valid = check_positions(position, slots, end_slot, seq_kv, True)
            counter = counters_ptr + position * (KV_GROUP * blocks)
            place = tl.atomic_add(counter, -1, mask=valid, sem="relaxed") - 1
            tl.store(row_places_ptr + slots, place, mask=valid)
        tl.debug_barrier()  # in every counter the query before this one comes next


@triton.jit(do_not_specialize=["first_key", "blocks"])
def _sum_placed_rows_kernel(
    partial_ptr,  # [places * head blocks, d_total], fp32 or bf16
    counters_ptr,  # int32 [keys * blocks + 1]: where the places of each begin, and at last where all end
    dkv_ptr,  # [keys, d_total]
    first_key, blocks,
    HEAD_BLOCKS: tl.constexpr, D_TOTAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Add some channels of the rows of one key in fp32, in order of their places, and to dkv if it has a sum already."""
    COLUMN_BLOCKS: tl.constexpr = (D_TOTAL + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    key, column_block = program // COLUMN_BLOCKS, program % COLUMN_BLOCKS
    first = tl.load(counters_ptr + key * blocks).to(tl.int64) * HEAD_BLOCKS
    end = tl.load(counters_ptr + (key + 1) * blocks).to(tl.int64) * HEAD_BLOCKS
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = cols < D_TOTAL

    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < end)[:, None] & in_row[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * D_TOTAL + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    dkv_ptr += (first_key + key) * D_TOTAL
    if not IS_FIRST:
        total += tl.load(dkv_ptr + cols, mask=in_row, other=0.0)
    tl.store(dkv_ptr + cols, total.to(dkv_ptr.dtype.element_ty), mask=in_row)

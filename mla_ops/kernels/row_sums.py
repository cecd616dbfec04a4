"""Rows that slots give to their keys: added as they come, or stored at their places and summed in a fixed order.

NOTE [Places]
A counting sort gives every valid slot its place among those of its chunk of queries, by key row and then by query, so
that the rows of a key become neighbours and are read once, in sequence. Counters are `[chunks, keys, blocks]` with a
block of consecutive queries each. One program per block counts its slots, one query after the other, and what it finds
in a counter is the slot's rank; summed, the counters say where the ranks of each start. Only slots of one query that
name the same key row race for their ranks. In the attention their rows are bitwise the same, so the order among them
does not matter. Where every slot has a gradient of its own (ORDERS_REPEATS), the program looks at the counters once
more: a slot of a key that is named once finds its rank + 1. Where a slot does not, the ranks of the query are given
anew, slot by slot compared with all others: rare, and never by chance.

A chunk is some whole batch elements, or some queries of one; so its keys are those of `chunk_batch` batch elements.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import check_positions


@triton.jit
def put_rows(
    rows_ptr, row_offsets, valid, tile,
    START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, IS_PLACED: tl.constexpr,
):  # fmt: skip
    """Hand over one fp32 tile of rows: add it to the rows of the keys, or store it as the rows of the slots."""
    cols = START + tl.arange(0, WIDTH)
    mask = valid[:, None]
    if START + WIDTH > END:
        mask = mask & (cols < END)[None, :]
    if IS_PLACED:
        tl.store(rows_ptr + row_offsets[:, None] + cols[None, :], tile.to(rows_ptr.dtype.element_ty), mask=mask)
    else:
        tl.atomic_add(rows_ptr + row_offsets[:, None] + cols[None, :], tile, mask=mask, sem="relaxed")


@triton.jit
def locate_counters(
    row, group, seq_q, seq_kv, chunk_batch, chunk_queries, block_queries, KV_GROUP: tl.constexpr
):  # fmt: skip
    """Return `(first, counter, step)` for a query: the first counter of its chunk, and the one of position 0, from
    which those of the next positions are `step` apart.
    """
    batch, query = row // seq_q, row % seq_q
    parts = (seq_q + chunk_queries - 1) // chunk_queries
    step = KV_GROUP * ((chunk_queries + block_queries - 1) // block_queries)
    first = (batch // chunk_batch * parts + query // chunk_queries) * chunk_batch * seq_kv * step
    counter = (batch % chunk_batch * seq_kv * KV_GROUP + group) * (step // KV_GROUP)
    return first, first + counter + query % chunk_queries // block_queries, step


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(
    do_not_specialize=["stride_i_b", "seq_q", "seq_kv", "topk", "chunk_batch", "chunk_queries", "block_queries"]
)
def _rank_slots_kernel(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    counters_ptr,  # int32 [1 + chunks * keys * blocks], zeros; the first stays 0
    ranks_ptr,  # int32 [rows, groups, topk]; those of invalid slots stay unwritten
    seq_q, seq_kv, topk, chunk_batch, chunk_queries, block_queries,
    KV_GROUP: tl.constexpr, BLOCK: tl.constexpr, ORDERS_REPEATS: tl.constexpr,
):  # fmt: skip
    """Count the valid slots of a block of queries; see NOTE [Places]."""
    program = tl.program_id(0).to(tl.int64)
    group, block = program % KV_GROUP, program // KV_GROUP
    blocks = (chunk_queries + block_queries - 1) // block_queries
    parts = (seq_q + chunk_queries - 1) // chunk_queries
    batch, part = block // (parts * blocks), block // blocks % parts
    first_query = part * chunk_queries + block % blocks * block_queries
    end_query = tl.minimum(tl.minimum(first_query + block_queries, (part + 1) * chunk_queries), seq_q)
    for query in tl.range(first_query, end_query):
        row = batch * seq_q + query
        end_slot = topk  # see NOTE [Loads that become addresses]
        if topk_length_ptr is not None:
            end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
        row_indices_ptr = indices_ptr + batch * stride_i_b + query * stride_i_s + group * stride_i_g
        _, counter, step = locate_counters(
            row, group, seq_q, seq_kv, chunk_batch, chunk_queries, block_queries, KV_GROUP
        )
        for start in tl.range(0, end_slot, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            position = tl.load(row_indices_ptr + slots, mask=slots < end_slot, other=0)
            position, valid = check_positions(position, slots, end_slot, seq_kv, True)
            rank = tl.atomic_add(counters_ptr + 1 + counter + position * step, 1, mask=valid, sem="relaxed")
            tl.store(ranks_ptr + (row * KV_GROUP + group) * topk + slots, rank, mask=valid)
        tl.debug_barrier()  # a query finds what the ones before it counted
        if ORDERS_REPEATS:
            row_counters_ptr = counters_ptr + 1 + counter
            row_ranks_ptr = ranks_ptr + (row * KV_GROUP + group) * topk
            repeats = tl.zeros([BLOCK], tl.int32)
            for start in tl.range(0, end_slot, BLOCK):
                slots = start + tl.arange(0, BLOCK)
                position = tl.load(row_indices_ptr + slots, mask=slots < end_slot, other=0)
                position, valid = check_positions(position, slots, end_slot, seq_kv, True)
                count = tl.load(row_counters_ptr + position * step, mask=valid, other=0, cache_modifier=".cg")
                rank = tl.load(row_ranks_ptr + slots, mask=valid, other=0)
                repeats |= (valid & (rank + 1 != count)).to(tl.int32)
            if tl.max(repeats, 0) != 0:
                for start in tl.range(0, end_slot, 16):
                    slots = start + tl.arange(0, 16)
                    position = tl.load(row_indices_ptr + slots, mask=slots < end_slot, other=0)
                    position, valid = check_positions(position, slots, end_slot, seq_kv, False)
                    # What the counter was before this query, and how many slots before this one name its key.
                    offsets = position.to(tl.int64) * step
                    rank = tl.load(row_counters_ptr + offsets, mask=valid, other=0, cache_modifier=".cg")
                    for first_other in tl.range(0, end_slot, 64):
                        others = first_other + tl.arange(0, 64)
                        other = tl.load(row_indices_ptr + others, mask=others < end_slot, other=0)
                        other, other_valid = check_positions(other, others, end_slot, seq_kv, False)
                        is_same = (position[:, None] == other[None, :]) & other_valid[None, :]
                        rank -= tl.sum((is_same & (others[None, :] >= slots[:, None])).to(tl.int32), 1)
                    tl.store(row_ranks_ptr + slots, rank, mask=valid)
            tl.debug_barrier()  # the next query counts only now


@triton.jit(
    do_not_specialize=["stride_i_b", "seq_q", "seq_kv", "topk", "chunk_batch", "chunk_queries", "block_queries"]
)
def _place_slots_kernel(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    starts_ptr,  # int32: the counters, summed
    places_ptr,  # int32 [rows, groups, topk]: ranks, which become places
    seq_q, seq_kv, topk, chunk_batch, chunk_queries, block_queries,
    KV_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the ranks of one query and group into places in its chunk."""
    program = tl.program_id(0).to(tl.int64)
    row, group = program // KV_GROUP, program % KV_GROUP
    end_slot = topk
    if topk_length_ptr is not None:
        end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
    indices_ptr += row // seq_q * stride_i_b + row % seq_q * stride_i_s + group * stride_i_g
    first, counter, step = locate_counters(
        row, group, seq_q, seq_kv, chunk_batch, chunk_queries, block_queries, KV_GROUP
    )
    first_start = tl.load(starts_ptr + first)
    for start in tl.range(0, end_slot, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        position = tl.load(indices_ptr + slots, mask=slots < end_slot, other=0)
        position, valid = check_positions(position, slots, end_slot, seq_kv, True)
        place = tl.load(starts_ptr + counter + position * step, mask=valid, other=0) - first_start
        place += tl.load(places_ptr + program * topk + slots, mask=valid, other=0)
        tl.store(places_ptr + program * topk + slots, place, mask=valid)


@triton.jit(do_not_specialize=["chunk", "chunk_keys", "blocks", "first_key"])
def _sum_placed_rows_kernel(
    partial_ptr,  # [places of a chunk, head blocks, width], fp32 or bf16
    starts_ptr,  # int32 [chunks * keys * blocks + 1]: where the slots of each begin, and at last where all end
    sums_ptr,  # [keys, width]
    chunk, chunk_keys, blocks, first_key,
    HEAD_BLOCKS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Add some channels of the rows of one key in fp32, in order of their places, and to what the sum has already."""
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0).to(tl.int64)
    key, column_block = program // COLUMN_BLOCKS, program % COLUMN_BLOCKS
    # A cast and not `.to`: an argument that a compiled graph knows to be 1 arrives as a number of Python's.
    starts_ptr += tl.cast(chunk, tl.int64) * chunk_keys * blocks
    first_start = tl.load(starts_ptr)
    first = (tl.load(starts_ptr + key * blocks) - first_start).to(tl.int64) * HEAD_BLOCKS
    end = (tl.load(starts_ptr + (key + 1) * blocks) - first_start).to(tl.int64) * HEAD_BLOCKS
    cols = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = cols < WIDTH

    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < end)[:, None] & in_row[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0)
    sums_ptr += (first_key + key) * WIDTH
    if not IS_FIRST:
        total += tl.load(sums_ptr + cols, mask=in_row, other=0.0)
    tl.store(sums_ptr + cols, total.to(sums_ptr.dtype.element_ty), mask=in_row)

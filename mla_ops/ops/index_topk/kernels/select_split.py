"""Selection of few long rows, each split over many programs, in two launches.

Every split of a row makes the same guess of the threshold from the same sample, gathers the keys of its segment that
reach it, in order, and leaves their number. Then one program a row has all of them in registers and chooses. Segments
follow from the length of the row alone, so the result does not depend on who runs first.

Where more keys reached the guess than the registers of a program hold (a plateau), or fewer than topk, that program
reads the row by itself, as `select_stream.py` does: right, and for a row of 131,072 keys ten times as slow.
"""

import triton
import triton.language as tl

from mla_ops.ops.index_topk.kernels.order import eligible, store_all
from mla_ops.ops.index_topk.kernels.select_stream import (
    guess_threshold,
    kept,
    load_chunk,
    select_from_buffer,
    select_row,
)


@triton.jit(
    do_not_specialize=["first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "row_stride", "capacity"]
)
def _gather_splits_kernel(
    strip_ptr, row_stride, gathered_ptr, capacity, counts_ptr,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    first_plane, first_query, num_queries, seq_q, seq_kv,
    KV_GROUP: tl.constexpr, TOPK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, SAMPLE: tl.constexpr,
    WARPS: tl.constexpr, STRIDE_ALIGN: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Gather a segment's scores and positions at `gathered_ptr`, `capacity` words of each, and store their number."""
    program = tl.program_id(0)
    row, split = program // SPLITS, program % SPLITS
    plane = first_plane + row // num_queries
    query = first_query + row % num_queries
    batch = (plane // KV_GROUP).to(tl.int64)
    starts = query * 0
    ends = starts + seq_kv
    if starts_ptr is not None:
        starts = tl.load(starts_ptr + batch * stride_starts_b + query.to(tl.int64) * stride_starts_s)
    if ends_ptr is not None:
        ends = tl.load(ends_ptr + batch * stride_ends_b + query.to(tl.int64) * stride_ends_s)
    first, past = eligible(query, starts, ends, seq_q, seq_kv, IS_CAUSAL)
    strip_ptr += row * (row_stride // STRIDE_ALIGN * STRIDE_ALIGN)
    bits_ptr = gathered_ptr + program * (2 * capacity)
    positions_ptr = bits_ptr + capacity
    count = past - first
    used = 0
    if count > TOPK:
        floor = -float("inf")
        if count > SAMPLE:
            floor = guess_threshold(strip_ptr, first, count, TOPK, SAMPLE, WARPS)
        base = first // 4 * 4
        segment = tl.cdiv(tl.cdiv(past - base, SPLITS), CHUNK) * CHUNK
        begin = base + split * segment
        end = tl.minimum(begin + segment, past)
        ahead = load_chunk(strip_ptr, begin, end, CHUNK)
        for start in range(begin, end, CHUNK):
            bits = ahead
            ahead = load_chunk(strip_ptr, start + CHUNK, end, CHUNK)
            is_kept = kept(bits, start, first, end, floor, CHUNK)
            place = used + tl.cumsum(is_kept.to(tl.int32), 0) - 1
            tl.store(bits_ptr + place, bits, mask=is_kept)
            tl.store(positions_ptr + place, start + tl.arange(0, CHUNK), mask=is_kept)
            used += tl.sum(is_kept.to(tl.int32), 0)
    tl.store(counts_ptr + program, used)


@triton.jit(
    do_not_specialize=["first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "row_stride", "capacity"]
)
def _select_splits_kernel(
    strip_ptr, row_stride, gathered_ptr, capacity, counts_ptr, buffers_ptr, indices_ptr,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    first_plane, first_query, num_queries, seq_q, seq_kv,
    KV_GROUP: tl.constexpr, TOPK: tl.constexpr, TOPK_BLOCK: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BUFFER: tl.constexpr, SAMPLE: tl.constexpr, WARPS: tl.constexpr, STRIDE_ALIGN: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Choose among what the splits of a row have gathered."""
    row = tl.program_id(0)
    plane = first_plane + row // num_queries
    query = first_query + row % num_queries
    batch = (plane // KV_GROUP).to(tl.int64)
    starts = query * 0
    ends = starts + seq_kv
    if starts_ptr is not None:
        starts = tl.load(starts_ptr + batch * stride_starts_b + query.to(tl.int64) * stride_starts_s)
    if ends_ptr is not None:
        ends = tl.load(ends_ptr + batch * stride_ends_b + query.to(tl.int64) * stride_ends_s)
    first, past = eligible(query, starts, ends, seq_q, seq_kv, IS_CAUSAL)
    indices_ptr += ((batch * seq_q + query) * KV_GROUP + plane % KV_GROUP) * TOPK
    count = past - first
    if count <= TOPK:
        store_all(indices_ptr, first, count, TOPK, TOPK_BLOCK)
    else:
        # Slot i of the buffer is the i-th key gathered: every split that ends before it adds what it left empty.
        slots = tl.arange(0, BUFFER)
        gathered_ptr += row * SPLITS * (2 * capacity)
        places = slots
        used = 0
        for split in tl.static_range(SPLITS):
            in_split = tl.load(counts_ptr + row * SPLITS + split)
            used += in_split
            places += tl.where(slots >= used, 2 * capacity - in_split, 0)
        if (used >= TOPK) & (used <= BUFFER):
            bits = tl.load(gathered_ptr + places, mask=slots < used, other=0)
            positions = tl.load(gathered_ptr + capacity + places, mask=slots < used, other=0)
            select_from_buffer(bits, positions, used, None, indices_ptr, TOPK, WARPS)
        else:
            strip_ptr += row * (row_stride // STRIDE_ALIGN * STRIDE_ALIGN)
            buffers_ptr += row * (2 * BUFFER)
            select_row(strip_ptr, indices_ptr, buffers_ptr, first, past, TOPK, CHUNK, BUFFER, SAMPLE, WARPS)

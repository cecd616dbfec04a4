"""Selection of rows of any length, read once: keys that reach a guessed threshold are gathered in a buffer.

The guess comes from a sample, a margin below where it puts the threshold, so a row of 32,768 keys and topk 2048 leaves
about 2,700 in the buffer. Keys come in the order of their positions, so the buffer is in that order too. A full buffer
keeps its topk best keys, and from then on a key must be above the least of them: of equal keys the first have come.
Where fewer than topk keys reached the guess, the row is read again without one.

So the sample decides how long a row takes, never what is chosen. Rows that rise, fall or are one plateau cost what
random rows cost. A sample that misses the large keys costs a search in the buffer for every `BUFFER - topk` keys that
come too many, at worst for every chunk of the row.
"""

import triton
import triton.language as tl

from mla_ops.ops.index_topk.kernels.order import (
    chosen_places,
    eligible,
    narrow,
    next_above,
    reaches,
    sample_rank,
    store_all,
)

# Keys of a sample that are neighbours.
RUN = tl.constexpr(128)


@triton.jit
def guess_threshold(row_ptr, first, count, TOPK: tl.constexpr, SAMPLE: tl.constexpr, WARPS: tl.constexpr):
    """Return a score that most likely a few more than TOPK of the `count > SAMPLE` keys from `first` on reach."""
    slots = tl.arange(0, SAMPLE)
    run = slots // RUN
    gap = (count - RUN) // (SAMPLE // RUN - 1)
    sample = tl.load(row_ptr + first + run * gap + slots % RUN).to(tl.float32, bitcast=True)
    rank, margin = sample_rank(count, TOPK, SAMPLE)
    wanted = tl.minimum(rank + margin, SAMPLE)
    threshold, _ = narrow(sample, sample, SAMPLE, wanted, margin // 2, WARPS)
    return threshold


@triton.jit
def select_from_buffer(
    bits, positions, count, out_bits_ptr, out_positions_ptr, TOPK: tl.constexpr, WARPS: tl.constexpr
):
    """Store the positions, and the scores where `out_bits_ptr` says where, of the TOPK best of the first `count` slots;
    return the threshold. Positions ascend.
    """
    is_key = tl.arange(0, bits.shape[0]) < count
    values = bits.to(tl.float32, bitcast=True)
    scores = tl.where(is_key, values, -float("inf"))
    threshold, reaching = narrow(scores, values, count, TOPK, 0, WARPS)
    place = chosen_places(scores, is_key, threshold, reaching, TOPK)
    # Every thread has read its scores before one of them is overwritten.
    tl.debug_barrier()
    tl.store(out_positions_ptr + place, positions, mask=place >= 0)
    if out_bits_ptr is not None:
        tl.store(out_bits_ptr + place, bits, mask=place >= 0)
        tl.debug_barrier()
    return threshold


@triton.jit
def load_chunk(row_ptr, start, past, CHUNK: tl.constexpr):
    """Return the bits of the scores of positions `start`, a multiple of 4, to `start + CHUNK`."""
    positions = start + tl.arange(0, CHUNK)
    return tl.load(row_ptr + positions, mask=positions < (past + 3) // 4 * 4, other=0)


@triton.jit
def kept(bits, start, first, past, floor, CHUNK: tl.constexpr):
    """Return which keys of a chunk, those from `first` to `past`, reach `floor`."""
    positions = start + tl.arange(0, CHUNK)
    return reaches(bits.to(tl.float32, bitcast=True), floor) & (positions >= first) & (positions < past)


@triton.jit
def select_row(
    row_ptr, indices_ptr, buffer_ptr, first, past,
    TOPK: tl.constexpr, CHUNK: tl.constexpr, BUFFER: tl.constexpr, SAMPLE: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Store the choice of a row of more than TOPK eligible keys; `buffer_ptr` has 2 * BUFFER words of scratch.

    BUFFER is at least TOPK + CHUNK, so that a chunk always fits behind the best of a full buffer.
    """
    positions_ptr = buffer_ptr + BUFFER
    slots = tl.arange(0, BUFFER)
    base = first // 4 * 4
    # A key is gathered if it reaches `floor`.
    floor = -float("inf")
    if past - first > BUFFER:
        floor = guess_threshold(row_ptr, first, past - first, TOPK, SAMPLE, WARPS)
    used = 0
    is_second = False
    while used < TOPK:
        if is_second:
            floor = -float("inf")
        is_second = True
        used = 0
        ahead = load_chunk(row_ptr, base, past, CHUNK)
        for start in range(base, past, CHUNK):
            bits = ahead
            ahead = load_chunk(row_ptr, start + CHUNK, past, CHUNK)
            is_kept = kept(bits, start, first, past, floor, CHUNK)
            num_kept = tl.sum(is_kept.to(tl.int32), 0)
            if used + num_kept > BUFFER:
                tl.debug_barrier()
                in_buffer = tl.load(buffer_ptr + slots, mask=slots < used, other=0)
                positions = tl.load(positions_ptr + slots, mask=slots < used, other=0)
                threshold = select_from_buffer(in_buffer, positions, used, buffer_ptr, positions_ptr, TOPK, WARPS)
                floor = next_above(threshold)
                used = used * 0 + TOPK
                is_kept = kept(bits, start, first, past, floor, CHUNK)
                num_kept = tl.sum(is_kept.to(tl.int32), 0)
            if num_kept > 0:
                place = used + tl.cumsum(is_kept.to(tl.int32), 0) - 1
                tl.store(buffer_ptr + place, bits, mask=is_kept)
                tl.store(positions_ptr + place, start + tl.arange(0, CHUNK), mask=is_kept)
                used += num_kept
    tl.debug_barrier()
    in_buffer = tl.load(buffer_ptr + slots, mask=slots < used, other=0)
    positions = tl.load(positions_ptr + slots, mask=slots < used, other=0)
    select_from_buffer(in_buffer, positions, used, None, indices_ptr, TOPK, WARPS)


@triton.jit(do_not_specialize=["first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "row_stride"])
def _select_stream_kernel(
    strip_ptr, row_stride, buffers_ptr, indices_ptr,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    first_plane, first_query, num_queries, seq_q, seq_kv,
    KV_GROUP: tl.constexpr, TOPK: tl.constexpr, TOPK_BLOCK: tl.constexpr, CHUNK: tl.constexpr, BUFFER: tl.constexpr,
    SAMPLE: tl.constexpr, WARPS: tl.constexpr, STRIDE_ALIGN: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    row = tl.num_programs(0) - 1 - tl.program_id(0)
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
    buffers_ptr += row * (2 * BUFFER)
    indices_ptr += ((batch * seq_q + query) * KV_GROUP + plane % KV_GROUP) * TOPK
    if past - first <= TOPK:
        store_all(indices_ptr, first, past - first, TOPK, TOPK_BLOCK)
    else:
        select_row(strip_ptr, indices_ptr, buffers_ptr, first, past, TOPK, CHUNK, BUFFER, SAMPLE, WARPS)

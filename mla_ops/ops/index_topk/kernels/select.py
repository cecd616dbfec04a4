"""Selection of rows that fit the registers of a program: exactly the topk largest, ties to the lower position."""

import triton
import triton.language as tl

from mla_ops.ops.index_topk.kernels.order import (
    NO_KEY,
    eligible,
    narrow,
    narrow_all,
    sample_rank,
    store_all,
    taken,
)


@triton.jit
def _threshold(keys, is_key, sample, count, TOPK: tl.constexpr, SAMPLE: tl.constexpr):
    """Return the threshold of a row and how many keys reach it; see NOTE [The threshold].

    A pass over a sample costs a fraction of one over the row. So the sample gives two ends, a little more and a little
    fewer than topk keys apart, which one pass over the row checks. Where an end is on the wrong side, the search starts
    from the end of the row instead: the sample decides how long a search takes, never what it finds.
    """
    if SAMPLE == 0:
        threshold, num_taken = narrow_all(keys, is_key, count, TOPK, 0)
    else:
        rank, margin = sample_rank(count, TOPK, SAMPLE)
        smallest = tl.min(sample, 0)
        largest = tl.max(sample, 0)
        more = tl.minimum(rank + margin, SAMPLE)
        low, in_sample = narrow(sample, more, margin, smallest, SAMPLE, largest, 0)
        fewer = tl.maximum(rank - 2 * margin, 1)
        high, _ = narrow(sample, fewer, tl.maximum(rank - margin - fewer, 0), low, in_sample, largest, 0)
        # Two counts in one sum: a row has fewer than 2**15 keys.
        counts = tl.sum(tl.where(keys >= low, 1, 0) + tl.where(keys >= high, 65536, 0), 0)
        count_low = counts & 65535
        count_high = counts >> 16
        if count_low < TOPK:
            high = low - 1
            count_high = count_low
            low = tl.min(tl.where(is_key, keys, 0x7FFFFFFF), 0)
            count_low = count
        elif count_high >= TOPK:
            low = high
            count_low = count_high
            high = tl.max(keys, 0)
            count_high = count_high * 0
        else:
            high = high - 1
        threshold, num_taken = narrow(keys, TOPK, 0, low, count_low, high, count_high)
    return threshold, num_taken


@triton.jit
def _select(
    row_ptr, indices_ptr, first, past,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Store the choice of a row of up to BLOCK keys, more than TOPK of them eligible."""
    slots = tl.arange(0, BLOCK)
    count = past - first
    if HAS_STARTS:
        # From a multiple of 4 on, and up to one: keys are loaded 16 bytes at a time.
        slots += first // 4 * 4
    is_key = (slots >= first) & (slots < past)
    keys = tl.load(row_ptr + slots, mask=slots < (past + 3) // 4 * 4, other=NO_KEY)
    keys = tl.where(is_key, keys, NO_KEY)
    sample = keys
    if SAMPLE > 0:
        sample = tl.load(row_ptr + first + tl.arange(0, SAMPLE) * count // SAMPLE)
    threshold, num_taken = _threshold(keys, is_key, sample, count, TOPK, SAMPLE)
    is_taken = taken(keys, threshold, num_taken, TOPK)
    place = tl.cumsum(is_taken.to(tl.int32), 0) - 1
    tl.store(indices_ptr + place, slots, mask=is_taken)


@triton.jit(do_not_specialize=["first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "row_stride"])
def _select_kernel(
    strip_ptr, row_stride, indices_ptr,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    first_plane, first_query, num_queries, seq_q, seq_kv,
    KV_GROUP: tl.constexpr, TOPK: tl.constexpr, TOPK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    # The longest causal rows come first, so that the last programs of the grid are short.
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
    indices_ptr += ((batch * seq_q + query) * KV_GROUP + plane % KV_GROUP) * TOPK
    # Short rows take a smaller block: a quarter of the causal rows have a quarter of the keys, or fewer.
    HAS_STARTS: tl.constexpr = starts_ptr is not None
    length = past
    if HAS_STARTS:
        length = past - first // 4 * 4
    if past - first <= TOPK:
        store_all(indices_ptr, first, past - first, TOPK, TOPK_BLOCK)
    elif TOPK < BLOCK // 4 and length <= BLOCK // 4:
        _select(strip_ptr, indices_ptr, first, past, TOPK, BLOCK // 4, 0, HAS_STARTS)
    elif TOPK < BLOCK // 2 and length <= BLOCK // 2:
        _select(strip_ptr, indices_ptr, first, past, TOPK, BLOCK // 2, SAMPLE, HAS_STARTS)
    elif TOPK < BLOCK:
        _select(strip_ptr, indices_ptr, first, past, TOPK, BLOCK, SAMPLE, HAS_STARTS)

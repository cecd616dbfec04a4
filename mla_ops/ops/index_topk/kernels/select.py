"""Selection of rows that fit the registers of a program: exactly the topk largest, ties to the lower position."""

import triton
import triton.language as tl

from mla_ops.ops.index_topk.kernels.order import chosen_places, eligible, narrow, store_all


@triton.jit
def _select(
    row_ptr, indices_ptr, first, past,
    TOPK: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """Store the choice of a row of up to BLOCK keys, more than TOPK of them eligible."""
    slots = tl.arange(0, BLOCK)
    if HAS_STARTS:
        # From a multiple of 4 on, and up to one: scores are loaded 16 bytes at a time.
        slots += first // 4 * 4
    is_key = (slots >= first) & (slots < past)
    values = tl.load(row_ptr + slots, mask=slots < (past + 3) // 4 * 4, other=0).to(tl.float32, bitcast=True)
    scores = tl.where(is_key, values, -float("inf"))
    threshold, reaching = narrow(scores, values, past - first, TOPK, 0, WARPS)
    place = chosen_places(scores, is_key, threshold, reaching, TOPK)
    tl.store(indices_ptr + place, slots, mask=place >= 0)


@triton.jit(do_not_specialize=["first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "row_stride"])
def _select_kernel(
    strip_ptr, row_stride, indices_ptr,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    first_plane, first_query, num_queries, seq_q, seq_kv,
    KV_GROUP: tl.constexpr, TOPK: tl.constexpr, TOPK_BLOCK: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr,
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
        _select(strip_ptr, indices_ptr, first, past, TOPK, BLOCK // 4, WARPS, HAS_STARTS)
    elif TOPK < BLOCK // 2 and length <= BLOCK // 2:
        _select(strip_ptr, indices_ptr, first, past, TOPK, BLOCK // 2, WARPS, HAS_STARTS)
    elif TOPK < BLOCK:
        _select(strip_ptr, indices_ptr, first, past, TOPK, BLOCK, WARPS, HAS_STARTS)

"""The gather of the Hopper forward: the role that brings queries and rows to shared memory; see `hopper_forward.py`.

NOTE [Pairs are looked up ahead]
What a slot names is found in three steps, each for one pair of tiles, each a pair ahead of the next: the positions are
loaded; their pages are, where there is a table; then the rows are located and, with PREFETCHED, asked into L2 by one
instruction a row. So no step waits for what another has just loaded, and rows in HBM have the time of a pair to come.
One thread does this for one slot, and leaves the place of its row in shared memory for the threads that copy it. Of the
head blocks of a query, which read the same rows at the same time, the first two prefetch half of the rows each.

NOTE [Converted rows]
Payloads of e4m3 don't go to their tile by asynchronous copies: shared memory has no room for them to wait in. A thread
loads 16 bytes at a time to registers, multiplies each channel by its scale in fp32, rounds once to the dtype of the
queries and stores. What it converts next is loaded before, one half of one side of a tile ahead. A thread has whole
words of four rows' neighbours, so that the eight threads of a store hit all banks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from mla_ops.kernels.gluon_compat import block_barrier
from mla_ops.kernels.gluon_rows import end_position, load_positions, locate_rows, pages_of
from mla_ops.ops.sparse_attn.kernels.hopper_items import (
    BLOCK_H,
    HALF,
    PAIR,
    ROWS_LAYOUT,
    TILE,
    _copy_rows,
    _known_multiple,
    _locate_share,
    _publish_copies,
    _share_slots,
)

# A thread for every slot of a pair of tiles.
SLOTS_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# Words of four e4m3 channels: eight threads copy 128 bytes of a row, four convert 64.
COPIED_WORDS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
WORDS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
SCALES_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0]))
# Channels that share a scale, and their words.
SCALED = gl.constexpr(128)
SCALED_WORDS = gl.constexpr(32)

# Four e4m3 channels times a scale: exact to fp32, the product in fp32, one rounding. A NaN stays one.
_SCALE_E4M3 = gl.constexpr("""{
    .reg .b16 low, high, h0, h1;
    .reg .b32 pair;
    .reg .f32 f0, f1;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 pair, low;
    mov.b32 {h0, h1}, pair;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    mul.f32 f0, f0, $3;
    mul.f32 f1, f1, $3;
    cvt.rn.TYPEx2.f32 $0, f1, f0;
    cvt.rn.f16x2.e4m3x2 pair, high;
    mov.b32 {h0, h1}, pair;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    mul.f32 f0, f0, $3;
    mul.f32 f1, f1, $3;
    cvt.rn.TYPEx2.f32 $1, f1, f0;
}""")
_SCALE_TO_BF16 = gl.constexpr(_SCALE_E4M3.value.replace("TYPE", "bf16"))
_SCALE_TO_F16 = gl.constexpr(_SCALE_E4M3.value.replace("TYPE", "f16"))


@gluon.jit
def _pair_count(first_slot, end_slot):
    """Return how many pairs of tiles an item has: one at least, because the epilogue ends what it began."""
    return gl.maximum((end_slot - first_slot + PAIR - 1) // PAIR, 1)


@gluon.jit
def _parity(number, BUFFERS: gl.constexpr):
    """Return the parity of the phase that the users of buffer `number % BUFFERS` complete with this number."""
    return (number // BUFFERS) & 1


@gluon.jit
def _first_stage(pair, PAIRS: gl.constexpr):
    """Return the stage of the first tile of a pair."""
    if PAIRS == 1:
        return 0  # known to the compiler: no address depends on the pair
    return pair % PAIRS * 2


@gluon.jit
def _prefetch_lines(ptrs):
    """Bring the lines of some addresses to L2."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _prefetch_rows(ptrs, wanted, ELEMENTS: gl.constexpr, LINE: gl.constexpr):
    """Bring the lines, of LINE elements, of those rows to L2 that are wanted."""
    for at in gl.static_range(0, ELEMENTS + LINE, LINE):
        gl.inline_asm_elementwise(
            """{
                .reg .pred wanted;
                setp.ne.s32 wanted, $2, 0;
                @wanted prefetch.global.L2 [$1];
                mov.u32 $0, 0;
            }""",
            "=r,l,r", [ptrs + min(at, ELEMENTS - 1), wanted], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _query_rows(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, num_splits,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr,
):  # fmt: skip
    """Return pointers to the 64 query rows of an item, and which of them are heads of its group."""
    row, _, first_head, head_count, _ = _locate_share(item, num_splits, HEADS, KV_GROUP, IS_SPLIT)
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    # A masked row is not read, but it is prefetched: it stands for the last head.
    offsets = (first_head + gl.minimum(heads, head_count - 1)).to(gl.int64) * _known_multiple(stride_q_h)
    base = q_ptr + (row // seq_q) * _known_multiple(stride_q_b) + (row % seq_q) * _known_multiple(stride_q_s)
    return base + offsets, heads < head_count


@gluon.jit
def _copy_queries(
    row_ptrs, mask, q_left, q_right, q_tail,
    D_TOTAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Start the copies of an item's queries; those of LEFT are a group of their own."""
    _copy_rows(q_left, row_ptrs, mask, 0, LEFT, D_TOTAL)
    async_copy.commit_group()
    _copy_rows(q_right, row_ptrs, mask, LEFT, RIGHT, D_TOTAL)
    if TAIL > 0:
        _copy_rows(q_tail, row_ptrs, mask, LEFT + RIGHT, TAIL, D_TOTAL)


@gluon.jit
def _prefetch_queries(row_ptrs, D_TOTAL: gl.constexpr):
    """Bring the 128-byte lines of an item's queries to L2."""
    lines = gl.arange(0, 8, layout=gl.SliceLayout(0, ROWS_LAYOUT)) * 64
    _prefetch_lines(row_ptrs[:, None] + gl.minimum(lines, D_TOTAL - 1)[None, :])
    _prefetch_lines(row_ptrs + (D_TOTAL - 1))


@gluon.jit
def _first_pair(item, slots_of, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr):
    """Return a pointer to the positions of an item's query, its first slot and the slot it ends before."""
    indices_ptr, stride_b, stride_s, stride_g, topk_length_ptr, seq_q, topk, slots_per_split, num_splits, _ = slots_of
    row, group, _, _, split = _locate_share(item, num_splits, HEADS, KV_GROUP, IS_SPLIT)
    first, end = _share_slots(topk_length_ptr, row, split, topk, slots_per_split, IS_SPLIT)
    slots_ptr = indices_ptr + (row // seq_q) * stride_b + (row % seq_q) * stride_s + group.to(gl.int64) * stride_g
    return slots_ptr, first, end


@gluon.jit
def _next_pair(
    item, slots_ptr, slot, end, slots_of, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr
):
    """Return item, pointer, slot and end of the pair after a pair; the last item of a program is followed by itself."""
    slot += PAIR
    if slot >= end:
        item = gl.minimum(item + gl.num_programs(0), slots_of[9] - 1)
        slots_ptr, slot, end = _first_pair(item, slots_of, HEADS, KV_GROUP, IS_SPLIT)
    return item, slots_ptr, slot, end


@gluon.jit
def _pages_of_pair(
    positions, item, pool, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr, IS_PAGED: gl.constexpr
):
    """Return the page of each position of a pair of an item."""
    _, _, _, _, table_ptr, stride_table, seq_lens_ptr, num_positions, page_size, _, seq_q, num_splits = pool
    row, _, _, _, _ = _locate_share(item, num_splits, HEADS, KV_GROUP, IS_SPLIT)
    batch = row // seq_q
    end = end_position(seq_lens_ptr, batch, num_positions)
    return pages_of(positions, end, page_size, table_ptr, stride_table, batch, IS_PAGED)


@gluon.jit
def _places_of_pair(
    positions, pages, item, pool, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr,
    IS_PAGED: gl.constexpr, UNIT: gl.constexpr, PREFETCHED: gl.constexpr,
):  # fmt: skip
    """Return where the rows of a pair start, in UNIT elements, -1 for none; bring PREFETCHED bytes of each to L2."""
    HEAD_BLOCKS: gl.constexpr = (HEADS // KV_GROUP + BLOCK_H - 1) // BLOCK_H
    kv_ptr, stride_b, stride_s, stride_g, _, _, _, _, page_size, num_pages, seq_q, num_splits = pool
    row, group, _, _, _ = _locate_share(item, num_splits, HEADS, KV_GROUP, IS_SPLIT)
    offsets, is_valid = locate_rows(
        positions, pages, num_pages, page_size, stride_b // UNIT, stride_s // UNIT, IS_PAGED
    )
    offsets += group.to(gl.int64) * (stride_g // UNIT)
    if not IS_PAGED:
        offsets += (row // seq_q) * (stride_b // UNIT)
    if PREFETCHED > 0:
        is_mine = is_valid
        if HEAD_BLOCKS > 1:
            is_mine = is_mine & (gl.arange(0, PAIR, layout=SLOTS_LAYOUT) % 2 == item % HEAD_BLOCKS)
        _prefetch_rows(kv_ptr + offsets * UNIT, is_mine.to(gl.int32), PREFETCHED * UNIT // 16, 8 * UNIT)
    return gl.where(is_valid, offsets, -1)


@gluon.jit
def _look_ahead(
    ahead, places, slots_of, pool, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr,
    IS_PAGED: gl.constexpr, UNIT: gl.constexpr, PREFETCHED: gl.constexpr,
):  # fmt: skip
    """Store the places of the next pair, and look up those after it; see NOTE [Pairs are looked up ahead]."""
    positions1, pages1, item1, positions2, item2, slots_ptr, slot, end = ahead
    places.store(
        _places_of_pair(positions1, pages1, item1, pool, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, PREFETCHED)
    )
    pages2 = _pages_of_pair(positions2, item2, pool, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED)
    item3, slots_ptr, slot, end = _next_pair(item2, slots_ptr, slot, end, slots_of, HEADS, KV_GROUP, IS_SPLIT)
    positions3 = load_positions(slots_ptr, slot, end, PAIR, SLOTS_LAYOUT)
    return positions2, pages2, item2, positions3, item3, slots_ptr, slot, end


@gluon.jit
def _copy_words(
    kv_ptr, places, words, tail, tail_words, scales, IS_TAIL_CONVERTED: gl.constexpr,
    PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr, SCALES_AT: gl.constexpr, TAIL_AT: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile of rows of e4m3: `words` of four channels, their scales, and the tail."""
    rows = places.load(gl.SliceLayout(1, COPIED_WORDS_LAYOUT))
    mask = (rows >= 0)[:, None]
    words_ptr = (kv_ptr + rows * 16).to(gl.pointer_type(gl.int32), bitcast=True)
    cols = gl.arange(0, words.shape[1], layout=gl.SliceLayout(0, COPIED_WORDS_LAYOUT))
    async_copy.async_copy_global_to_shared(words, words_ptr[:, None] + cols[None, :], mask=mask)
    if IS_TAIL_CONVERTED:
        VALUE_WORDS: gl.constexpr = words.shape[1]
        cols = gl.arange(0, tail_words.shape[1], layout=gl.SliceLayout(0, COPIED_WORDS_LAYOUT))
        mask = mask & (cols < PAYLOAD // 4 - VALUE_WORDS)[None, :]
        async_copy.async_copy_global_to_shared(
            tail_words, (words_ptr + VALUE_WORDS)[:, None] + cols[None, :], mask=mask
        )
    elif D_TAIL > 0:
        rows = places.load(gl.SliceLayout(1, ROWS_LAYOUT))
        tail_ptrs = (kv_ptr + rows * 16 + TAIL_AT).to(gl.pointer_type(tail.dtype), bitcast=True)
        _copy_rows(tail, tail_ptrs, rows >= 0, 0, tail.shape[1], D_TAIL)
    if SCALES_AT > 0:
        rows = places.load(gl.SliceLayout(0, SCALES_LAYOUT))
        scales_ptr = (kv_ptr + rows * 16 + SCALES_AT).to(gl.pointer_type(gl.float32), bitcast=True)
        numbers = gl.arange(0, scales.shape[0], layout=gl.SliceLayout(1, SCALES_LAYOUT))
        async_copy.async_copy_global_to_shared(
            scales, scales_ptr[None, :] + numbers[:, None], mask=(rows >= 0)[None, :] & (numbers >= 0)[:, None]
        )
    async_copy.commit_group()


@gluon.jit
def _convert(words, scales, number, cache_scale, HAS_SCALES: gl.constexpr, IS_BF16: gl.constexpr):
    """Return words of two channels for words of four; `scales.index(number)` are the scales of their rows."""
    if HAS_SCALES:
        scale = scales.index(number).load(gl.SliceLayout(1, words.type.layout))[:, None]
    else:
        scale = cache_scale
    low, high = gl.inline_asm_elementwise(
        _SCALE_TO_BF16 if IS_BF16 else _SCALE_TO_F16, "=r,=r,r,f", [words, scale],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])


@gluon.jit
def _gather(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, table_ptr, stride_table, seq_lens_ptr, cache_scale_ptr,
    seq_q, num_positions, page_size, num_pages, topk, slots_per_split, num_splits, num_items,
    q_left, q_right, q_tail, k_left, k_right, k_tail, valid, places, scales,
    left_full, rest_full, free, q_left_full, q_rest_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, PAIRS: gl.constexpr, IS_SPLIT: gl.constexpr,
    IS_PAGED: gl.constexpr, PREFETCHED: gl.constexpr,
    PAYLOAD: gl.constexpr, SCALES_AT: gl.constexpr, TAIL_AT: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = gl.SliceLayout(1, ROWS_LAYOUT)
    # Elements in 16 bytes: places count them.
    UNIT: gl.constexpr = 128 // kv_ptr.dtype.element_ty.primitive_bitwidth
    CONVERTS: gl.constexpr = PAYLOAD > 0
    VALUE: gl.constexpr = LEFT + RIGHT
    CONVERTS_TAIL: gl.constexpr = PAYLOAD > VALUE
    IS_BF16: gl.constexpr = q_ptr.dtype.element_ty == gl.bfloat16
    places_of_pairs = places._reinterpret(gl.int64, [2, PAIR], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    slots_of = (
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr, seq_q, topk, slots_per_split, num_splits,
        num_items,
    )  # fmt: skip
    pool = (
        kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g, table_ptr, stride_table, seq_lens_ptr, num_positions, page_size,
        num_pages, seq_q, num_splits,
    )  # fmt: skip
    SLOTS: gl.constexpr = SLOTS_LAYOUT
    item0 = gl.program_id(0)
    # Nothing is busy yet: queries come while the first positions do.
    query_rows, query_mask = _query_rows(
        q_ptr, stride_q_b, stride_q_s, stride_q_h, item0, seq_q, num_splits, HEADS, KV_GROUP, IS_SPLIT
    )
    _copy_queries(query_rows, query_mask, q_left, q_right, q_tail, D_TOTAL, LEFT, RIGHT, TAIL)
    async_copy.commit_group()
    slots_ptr, slot, end = _first_pair(item0, slots_of, HEADS, KV_GROUP, IS_SPLIT)
    positions0 = load_positions(slots_ptr, slot, end, PAIR, SLOTS)
    item1, slots_ptr, slot, end = _next_pair(item0, slots_ptr, slot, end, slots_of, HEADS, KV_GROUP, IS_SPLIT)
    positions1 = load_positions(slots_ptr, slot, end, PAIR, SLOTS)
    item2, slots_ptr, slot, end = _next_pair(item1, slots_ptr, slot, end, slots_of, HEADS, KV_GROUP, IS_SPLIT)
    positions2 = load_positions(slots_ptr, slot, end, PAIR, SLOTS)
    pages0 = _pages_of_pair(positions0, item0, pool, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED)
    # These rows are copied at once, and queries with them: to ask for more would delay both.
    places_of_pairs.index(0).store(
        _places_of_pair(positions0, pages0, item0, pool, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, 0)
    )
    pages1 = _pages_of_pair(positions1, item1, pool, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED)
    ahead = (positions1, pages1, item1, positions2, item2, slots_ptr, slot, end)

    if CONVERTS:
        cache_scale = 1.0
        if cache_scale_ptr is not None:
            cache_scale = gl.load(cache_scale_ptr)
        WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
        STAGES: gl.constexpr = 2 * PAIRS
        PIECES: gl.constexpr = LEFT // SCALED
        w_left = k_left._reinterpret(gl.int32, [STAGES, TILE, LEFT // 2], WORDS)
        w_right = k_right._reinterpret(gl.int32, [STAGES, TILE, RIGHT // 2], WORDS)
        w_tail = k_tail._reinterpret(gl.int32, [STAGES, TILE, k_tail.shape[2] // 2], WORDS)
        scales_of_tiles = scales
        SCALES: gl.constexpr = scales.shape[0] // STAGES
        if SCALES_AT > 0:
            scales_of_tiles = scales._reinterpret(
                gl.float32, [STAGES, SCALES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
            )
        places_of_tiles = places._reinterpret(gl.int64, [4, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        valid_of_tiles = valid._reinterpret(gl.int32, [STAGES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        _copy_words(
            kv_ptr, places_of_tiles.index(0), w_right.index(0), k_tail.index(0), w_tail.index(0), scales_of_tiles.index(0),
            CONVERTS_TAIL, PAYLOAD, D_TOTAL - PAYLOAD, SCALES_AT, TAIL_AT,
        )  # fmt: skip
    pair = 0
    parity_q = 1
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row, _, _, _, split = _locate_share(item, num_splits, HEADS, KV_GROUP, IS_SPLIT)
        first_slot, end_slot = _share_slots(topk_length_ptr, row, split, topk, slots_per_split, IS_SPLIT)
        num_pairs = _pair_count(first_slot, end_slot)
        query_rows, query_mask = _query_rows(
            q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, num_splits, HEADS, KV_GROUP, IS_SPLIT
        )
        for i in range(num_pairs):
            parity_free = _parity(pair, PAIRS) ^ 1
            stage0 = _first_stage(pair, PAIRS)
            for s in gl.static_range(2):
                stage = stage0 + s
                if CONVERTS and s == 1:
                    ahead = _look_ahead(
                        ahead, places_of_pairs.index((pair & 1) ^ 1), slots_of, pool,
                        HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, PREFETCHED,
                    )  # fmt: skip
                left, right, tail = k_left.index(stage), k_right.index(stage), k_tail.index(stage)
                if CONVERTS:
                    if s == 0:
                        if (i == 0) & (item > item0):
                            mbarrier.wait(q_free, parity_q)
                            _copy_queries(query_rows, query_mask, q_left, q_right, q_tail, D_TOTAL, LEFT, RIGHT, TAIL)
                        else:
                            async_copy.commit_group()
                        async_copy.commit_group()
                    async_copy.wait_group(2 if s == 0 else 0)
                    block_barrier()
                    # The words of the row are in RIGHT: those of LEFT are converted first, then those of RIGHT move up.
                    for c in gl.static_range(PIECES):
                        words = w_right.index(stage).slice(c * SCALED_WORDS, SCALED_WORDS, 1).load(WORDS_LAYOUT)
                        words = _convert(words, scales, stage * SCALES + c, cache_scale, SCALES_AT > 0, IS_BF16)
                        w_left.index(stage).slice(2 * c * SCALED_WORDS, 2 * SCALED_WORDS, 1).store(words)
                    fence_async_shared()
                    block_barrier()
                    mbarrier.arrive(left_full.index(stage), count=1)
                    for c in gl.static_range(PIECES):
                        words = (
                            w_right.index(stage).slice((PIECES + c) * SCALED_WORDS, SCALED_WORDS, 1).load(WORDS_LAYOUT)
                        )
                        words = _convert(
                            words, scales, stage * SCALES + PIECES + c, cache_scale, SCALES_AT > 0, IS_BF16
                        )
                        w_right.index(stage).slice(2 * c * SCALED_WORDS, 2 * SCALED_WORDS, 1).store(words)
                    if CONVERTS_TAIL:
                        both = w_tail.index(stage).load(WORDS_LAYOUT)
                        words, _rest = both.reshape([TILE, 2, TAIL // 4]).permute([0, 2, 1]).split()
                        words = _convert(
                            words, scales, stage * SCALES + 2 * PIECES, cache_scale, SCALES_AT > 0, IS_BF16
                        )
                        w_tail.index(stage).store(words)
                    is_valid = places_of_tiles.index((pair & 1) * 2 + s).load(SLOTS_LAYOUT) >= 0
                    valid_of_tiles.index(stage).store(is_valid.to(gl.int32))
                    _publish_copies(rest_full.index(stage), 0, True)
                    if s == 0:
                        mbarrier.arrive(q_left_full, count=1, pred=i == 0)
                        mbarrier.arrive(q_rest_full, count=1, pred=i == 0)
                    if s == 0:
                        next_stage = stage + 1
                        next_tile = (pair & 1) * 2 + 1
                        parity_next = parity_free
                    else:
                        next_stage = _first_stage(pair + 1, PAIRS)
                        next_tile = ((pair & 1) ^ 1) * 2
                        parity_next = _parity(pair + 1, PAIRS) ^ 1
                    for part in gl.static_range(4):
                        mbarrier.wait(free.index(4 * next_stage + part), parity_next)
                    _copy_words(
                        kv_ptr, places_of_tiles.index(next_tile), w_right.index(next_stage), k_tail.index(next_stage),
                        w_tail.index(next_stage), scales_of_tiles.index(next_stage),
                        CONVERTS_TAIL, PAYLOAD, D_TOTAL - PAYLOAD, SCALES_AT, TAIL_AT,
                    )  # fmt: skip
                else:
                    half0 = (pair & 1) * 4 + 2 * s
                    first = places.index(half0).load(ROWS)
                    second = places.index(half0 + 1).load(ROWS)
                    first_valid = first >= 0
                    second_valid = second >= 0
                    first_rows = kv_ptr + first * UNIT
                    second_rows = kv_ptr + second * UNIT
                    # Left and right take turns: the compiler puts a barrier between two copies into one allocation.
                    mbarrier.wait(free.index(4 * stage), parity_free)
                    _copy_rows(left.slice(0, HALF), first_rows, first_valid, 0, LEFT, D_TOTAL)
                    mbarrier.wait(free.index(4 * stage + 1), parity_free)
                    _copy_rows(right.slice(0, HALF), first_rows, first_valid, LEFT, RIGHT, D_TOTAL)
                    mbarrier.wait(free.index(4 * stage + 2), parity_free)
                    _copy_rows(left.slice(HALF, HALF), second_rows, second_valid, 0, LEFT, D_TOTAL)
                    async_copy.commit_group()
                    mbarrier.wait(free.index(4 * stage + 3), parity_free)
                    _copy_rows(right.slice(HALF, HALF), second_rows, second_valid, LEFT, RIGHT, D_TOTAL)
                    if TAIL > 0:
                        _copy_rows(tail.slice(0, HALF), first_rows, first_valid, LEFT + RIGHT, TAIL, D_TOTAL)
                        _copy_rows(tail.slice(HALF, HALF), second_rows, second_valid, LEFT + RIGHT, TAIL, D_TOTAL)
                    async_copy.commit_group()
                    valid.index(2 * stage).store(first_valid.to(gl.int32))
                    valid.index(2 * stage + 1).store(second_valid.to(gl.int32))
                    if s == 1:
                        # While the rows are under way.
                        ahead = _look_ahead(
                            ahead, places_of_pairs.index((pair & 1) ^ 1), slots_of, pool,
                            HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, PREFETCHED,
                        )  # fmt: skip
                    if PAIRS > 1 and s == 0:
                        # The tile before, whose rows come while these are asked for: see NOTE [Tiles in flight].
                        before = _first_stage(pair + PAIRS - 1, PAIRS) + 1
                        _publish_copies(left_full.index(before), 3, pair > 0)
                        _publish_copies(rest_full.index(before), 2, pair > 0)
                    if s == 0:
                        # Rows go before queries: their buffers are free first. Without queries both groups are empty.
                        if (i == 0) & (item > item0):
                            mbarrier.wait(q_free, parity_q)
                            _copy_queries(query_rows, query_mask, q_left, q_right, q_tail, D_TOTAL, LEFT, RIGHT, TAIL)
                        else:
                            async_copy.commit_group()
                        async_copy.commit_group()
                    if PAIRS == 1:
                        _publish_copies(left_full.index(stage), 3 if s == 0 else 1, True)
                        _publish_copies(rest_full.index(stage), 2 if s == 0 else 0, True)
                        if s == 0:
                            _publish_copies(q_left_full, 1, i == 0)
                            _publish_copies(q_rest_full, 0, i == 0)
                    elif s == 1:
                        _publish_copies(left_full.index(stage0), 5, True)
                        _publish_copies(rest_full.index(stage0), 4, True)
                        _publish_copies(q_left_full, 3, i == 0)
                        _publish_copies(q_rest_full, 2, i == 0)
            if i == num_pairs // 2:
                next_item = gl.minimum(item + gl.num_programs(0), num_items - 1)
                next_rows, _next_mask = _query_rows(
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, next_item, seq_q, num_splits, HEADS, KV_GROUP, IS_SPLIT
                )
                _prefetch_queries(next_rows, D_TOTAL)
            pair += 1
        parity_q ^= 1
    if PAIRS > 1 and not CONVERTS:
        last = _first_stage(pair + PAIRS - 1, PAIRS) + 1
        _publish_copies(left_full.index(last), 1, True)
        _publish_copies(rest_full.index(last), 0, True)
    if CONVERTS:
        async_copy.wait_group(0)

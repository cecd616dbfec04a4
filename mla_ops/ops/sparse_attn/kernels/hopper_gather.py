"""The gather of the Hopper forward: the role that brings queries and rows to shared memory; see `hopper_forward.py`.

NOTE [Pairs are looked up ahead]
What a slot names is found in three steps, each for one pair of tiles, each a pair ahead of the next: the positions are
loaded; their pages are, where there is a table; then the rows are located, and with PREFETCHED their lines asked into
L2. So no step waits for what another has just loaded. One thread does this for one slot, and leaves the place of its
row in shared memory for the threads that copy it. Of the head blocks of a query, which read the same rows at the same
time, the first two prefetch half of the rows each.

NOTE [Converted rows]
A row of e4m3 is copied as it is stored into RIGHT of its tile, where its bytes just fit. Then the bytes of LEFT are
converted into LEFT. Those of RIGHT follow, 128 channels at a time, in place: what is converted first moves to where the
bytes of LEFT were, what is converted last is in registers before anything is stored over it. A channel is multiplied by
its scale in fp32 and rounded once to the dtype of the queries. A thread converts 16 bytes of a row, and the eight
threads that store at a time have halves of two rows, which the swizzle of a tile puts into different banks.
"""

from typing import Any, NamedTuple

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
# Words of four e4m3 channels: eight threads copy 128 bytes of a row, four threads convert 64.
COPIED_WORDS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
WORDS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
# Scales by number and row: neighbouring threads copy the scales of a row.
SCALES_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [1, 4], [0, 1]))
# Channels that share a scale, and the words that hold them.
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


class Queries(NamedTuple):
    """The queries of a call."""

    ptr: Any
    stride_b: Any
    stride_s: Any
    stride_h: Any


class Slots(NamedTuple):
    """The slots of every query, and how they are shared out over work items."""

    indices_ptr: Any
    stride_b: Any
    stride_s: Any
    stride_g: Any
    topk_length_ptr: Any
    seq_q: Any
    topk: Any
    slots_per_split: Any
    num_splits: Any
    num_items: Any


class Rows(NamedTuple):
    """The rows of a call and how positions become rows; see `gluon_rows.py`."""

    ptr: Any
    stride_b: Any  # of batch elements or pages
    stride_s: Any
    stride_g: Any
    table_ptr: Any
    stride_table: Any
    seq_lens_ptr: Any
    cache_scale_ptr: Any
    num_positions: Any
    page_size: Any
    num_pages: Any


class Tiles(NamedTuple):
    """Queries or rows in shared memory."""

    left: Any
    right: Any
    tail: Any


class Ahead(NamedTuple):
    """Pairs that are looked up: the second and the third after that whose rows are copied."""

    positions1: Any
    pages1: Any
    item1: Any
    positions2: Any
    item2: Any
    slots_ptr: Any
    slot: Any  # the first of the third pair
    end: Any


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
def _query_rows(queries, slots, item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr):
    """Return pointers to the 64 query rows of an item, and which of them are heads of its group."""
    row, _, first_head, head_count, _ = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    # A masked row is not read, but it is prefetched: it stands for the last head.
    offsets = (first_head + gl.minimum(heads, head_count - 1)).to(gl.int64) * _known_multiple(queries.stride_h)
    base = queries.ptr + (row // slots.seq_q) * _known_multiple(queries.stride_b)
    base += (row % slots.seq_q) * _known_multiple(queries.stride_s)
    return base + offsets, heads < head_count


@gluon.jit
def _copy_queries(
    queries, q, slots, item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, TAIL: gl.constexpr,
    IS_SPLIT: gl.constexpr,
):  # fmt: skip
    """Start the copies of an item's queries in two groups, LEFT and what is right of it."""
    LEFT: gl.constexpr = q.left.shape[1]
    RIGHT: gl.constexpr = q.right.shape[1]
    row_ptrs, mask = _query_rows(queries, slots, item, HEADS, KV_GROUP, IS_SPLIT)
    _copy_rows(q.left, row_ptrs, mask, 0, LEFT, D_TOTAL)
    async_copy.commit_group()
    _copy_rows(q.right, row_ptrs, mask, LEFT, RIGHT, D_TOTAL)
    if TAIL > 0:
        _copy_rows(q.tail, row_ptrs, mask, LEFT + RIGHT, TAIL, D_TOTAL)
    async_copy.commit_group()


@gluon.jit
def _prefetch_queries(
    queries, slots, item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, IS_SPLIT: gl.constexpr
):
    """Bring the 128-byte lines of the queries of the next item to L2."""
    item = gl.minimum(item + gl.num_programs(0), slots.num_items - 1)
    row_ptrs, _ = _query_rows(queries, slots, item, HEADS, KV_GROUP, IS_SPLIT)
    lines = gl.arange(0, 8, layout=gl.SliceLayout(0, ROWS_LAYOUT)) * 64
    _prefetch_lines(row_ptrs[:, None] + gl.minimum(lines, D_TOTAL - 1)[None, :])
    _prefetch_lines(row_ptrs + (D_TOTAL - 1))


@gluon.jit
def _first_pair(slots, item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr):
    """Return a pointer to the positions of an item's query, its first slot and the slot it ends before."""
    row, group, _, _, split = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
    first, end = _share_slots(slots.topk_length_ptr, row, split, slots.topk, slots.slots_per_split, IS_SPLIT)
    slots_ptr = slots.indices_ptr + (row // slots.seq_q) * slots.stride_b + (row % slots.seq_q) * slots.stride_s
    return slots_ptr + group.to(gl.int64) * slots.stride_g, first, end


@gluon.jit
def _next_pair(slots, item, slots_ptr, slot, end, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr):
    """Return item, pointer, slot and end of the pair after a pair; the last item of a program is followed by itself."""
    slot += PAIR
    if slot >= end:
        item = gl.minimum(item + gl.num_programs(0), slots.num_items - 1)
        slots_ptr, slot, end = _first_pair(slots, item, HEADS, KV_GROUP, IS_SPLIT)
    return item, slots_ptr, slot, end


@gluon.jit
def _pages_of_pair(
    positions, slots, rows, item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr,
    IS_PAGED: gl.constexpr,
):  # fmt: skip
    """Return the page of each position of a pair of an item."""
    row, _, _, _, _ = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
    batch = row // slots.seq_q
    end = end_position(rows.seq_lens_ptr, batch, rows.num_positions)
    return pages_of(positions, end, rows.page_size, rows.table_ptr, rows.stride_table, batch, IS_PAGED)


@gluon.jit
def _places_of_pair(
    positions, pages, slots, rows, item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr,
    IS_PAGED: gl.constexpr, UNIT: gl.constexpr, PREFETCHED: gl.constexpr,
):  # fmt: skip
    """Return where the rows of a pair start, in UNIT elements, -1 for none; bring PREFETCHED bytes of each to L2."""
    HEAD_BLOCKS: gl.constexpr = (HEADS // KV_GROUP + BLOCK_H - 1) // BLOCK_H
    row, group, _, _, _ = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
    stride_b, stride_s = rows.stride_b // UNIT, rows.stride_s // UNIT
    offsets, is_valid = locate_rows(positions, pages, rows.num_pages, rows.page_size, stride_b, stride_s, IS_PAGED)
    offsets += group.to(gl.int64) * (rows.stride_g // UNIT)
    if not IS_PAGED:
        offsets += (row // slots.seq_q) * stride_b
    if PREFETCHED > 0:
        is_mine = is_valid
        if HEAD_BLOCKS > 1:
            is_mine = is_mine & (gl.arange(0, PAIR, layout=SLOTS_LAYOUT) % 2 == item % HEAD_BLOCKS)
        _prefetch_rows(rows.ptr + offsets * UNIT, is_mine.to(gl.int32), PREFETCHED * UNIT // 16, 8 * UNIT)
    return gl.where(is_valid, offsets, -1)


@gluon.jit
def _look_first(
    slots, rows, places, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr, IS_PAGED: gl.constexpr,
    UNIT: gl.constexpr,
):  # fmt: skip
    """Store the places of the first pair, and look up those after it."""
    item0 = gl.program_id(0)
    slots_ptr, slot, end = _first_pair(slots, item0, HEADS, KV_GROUP, IS_SPLIT)
    positions0 = load_positions(slots_ptr, slot, end, PAIR, SLOTS_LAYOUT)
    item1, slots_ptr, slot, end = _next_pair(slots, item0, slots_ptr, slot, end, HEADS, KV_GROUP, IS_SPLIT)
    positions1 = load_positions(slots_ptr, slot, end, PAIR, SLOTS_LAYOUT)
    item2, slots_ptr, slot, end = _next_pair(slots, item1, slots_ptr, slot, end, HEADS, KV_GROUP, IS_SPLIT)
    positions2 = load_positions(slots_ptr, slot, end, PAIR, SLOTS_LAYOUT)
    pages0 = _pages_of_pair(positions0, slots, rows, item0, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED)
    # These rows are copied at once: to prefetch them would delay them.
    places.store(_places_of_pair(positions0, pages0, slots, rows, item0, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, 0))
    pages1 = _pages_of_pair(positions1, slots, rows, item1, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED)
    return Ahead(positions1, pages1, item1, positions2, item2, slots_ptr, slot, end)


@gluon.jit
def _look_ahead(
    ahead, slots, rows, places, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr,
    IS_PAGED: gl.constexpr, UNIT: gl.constexpr, PREFETCHED: gl.constexpr,
):  # fmt: skip
    """Store the places of the next pair, and look up those after it; see NOTE [Pairs are looked up ahead]."""
    positions1, pages1, item1, positions2, item2, slots_ptr, slot, end = ahead
    places.store(
        _places_of_pair(positions1, pages1, slots, rows, item1, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, PREFETCHED)
    )
    pages2 = _pages_of_pair(positions2, slots, rows, item2, HEADS, KV_GROUP, IS_SPLIT, IS_PAGED)
    item3, slots_ptr, slot, end = _next_pair(slots, item2, slots_ptr, slot, end, HEADS, KV_GROUP, IS_SPLIT)
    positions3 = load_positions(slots_ptr, slot, end, PAIR, SLOTS_LAYOUT)
    return Ahead(positions2, pages2, item2, positions3, item3, slots_ptr, slot, end)


@gluon.jit
def _gather_stored(
    queries, slots, rows, q, k, valid, places,
    left_full, rest_full, free, q_left_full, q_rest_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, TAIL: gl.constexpr, PAIRS: gl.constexpr,
    IS_SPLIT: gl.constexpr, IS_PAGED: gl.constexpr,
):  # fmt: skip
    """Copy rows that are stored as they are multiplied."""
    ROWS: gl.constexpr = gl.SliceLayout(1, ROWS_LAYOUT)
    UNIT: gl.constexpr = 8
    LEFT: gl.constexpr = k.left.shape[2]
    RIGHT: gl.constexpr = k.right.shape[2]
    places_of_pairs = places._reinterpret(gl.int64, [2, PAIR], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Nothing is busy yet: the first queries come while the first positions do.
    _copy_queries(queries, q, slots, gl.program_id(0), HEADS, KV_GROUP, D_TOTAL, TAIL, IS_SPLIT)
    ahead = _look_first(slots, rows, places_of_pairs.index(0), HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT)
    pair = 0
    parity_q = 1
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        row, _, _, _, split = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
        first_slot, end_slot = _share_slots(
            slots.topk_length_ptr, row, split, slots.topk, slots.slots_per_split, IS_SPLIT
        )
        num_pairs = _pair_count(first_slot, end_slot)
        for i in range(num_pairs):
            parity_free = _parity(pair, PAIRS) ^ 1
            stage0 = _first_stage(pair, PAIRS)
            for s in gl.static_range(2):
                stage = stage0 + s
                half = (pair & 1) * 4 + 2 * s
                first = places.index(half).load(ROWS)
                second = places.index(half + 1).load(ROWS)
                first_valid = first >= 0
                second_valid = second >= 0
                first_rows = rows.ptr + first * UNIT
                second_rows = rows.ptr + second * UNIT
                left, right, tail = k.left.index(stage), k.right.index(stage), k.tail.index(stage)
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
                        ahead, slots, rows, places_of_pairs.index((pair & 1) ^ 1),
                        HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, 0,
                    )  # fmt: skip
                if PAIRS > 1 and s == 0:
                    # The tile before, whose rows come while these are asked for: see NOTE [Tiles in flight].
                    before = _first_stage(pair + PAIRS - 1, PAIRS) + 1
                    _publish_copies(left_full.index(before), 3, pair > 0)
                    _publish_copies(rest_full.index(before), 2, pair > 0)
                if s == 0:
                    # Rows go before queries: their buffers are free first. Without queries both groups are empty.
                    if (i == 0) & (pair > 0):
                        mbarrier.wait(q_free, parity_q)
                        _copy_queries(queries, q, slots, item, HEADS, KV_GROUP, D_TOTAL, TAIL, IS_SPLIT)
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
                _prefetch_queries(queries, slots, item, HEADS, KV_GROUP, D_TOTAL, IS_SPLIT)
            pair += 1
        parity_q ^= 1
    if PAIRS > 1:
        last = _first_stage(pair + PAIRS - 1, PAIRS) + 1
        _publish_copies(left_full.index(last), 1, True)
        _publish_copies(rest_full.index(last), 0, True)


@gluon.jit
def _copy_words(
    rows_ptr, places, words, tail, tail_words, scales,
    PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr, SCALES_AT: gl.constexpr, TAIL_AT: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile of rows of e4m3: `words` of four channels, their scales, and the tail."""
    VALUE_WORDS: gl.constexpr = words.shape[1]
    row_places = places.load(gl.SliceLayout(1, COPIED_WORDS_LAYOUT))
    mask = (row_places >= 0)[:, None]
    words_ptr = (rows_ptr + row_places * 16).to(gl.pointer_type(gl.int32), bitcast=True)
    cols = gl.arange(0, VALUE_WORDS, layout=gl.SliceLayout(0, COPIED_WORDS_LAYOUT))
    async_copy.async_copy_global_to_shared(words, words_ptr[:, None] + cols[None, :], mask=mask)
    if PAYLOAD > 4 * VALUE_WORDS:
        cols = gl.arange(0, tail_words.shape[1], layout=gl.SliceLayout(0, COPIED_WORDS_LAYOUT))
        mask = mask & (cols < PAYLOAD // 4 - VALUE_WORDS)[None, :]
        tail_ptrs = (words_ptr + VALUE_WORDS)[:, None] + cols[None, :]
        async_copy.async_copy_global_to_shared(tail_words, tail_ptrs, mask=mask)
    elif D_TAIL > 0:
        row_places = places.load(gl.SliceLayout(1, ROWS_LAYOUT))
        tail_ptrs = (rows_ptr + row_places * 16 + TAIL_AT).to(gl.pointer_type(tail.dtype), bitcast=True)
        _copy_rows(tail, tail_ptrs, row_places >= 0, 0, tail.shape[1], D_TAIL)
    if SCALES_AT > 0:
        row_places = places.load(gl.SliceLayout(0, SCALES_LAYOUT))
        scales_ptr = (rows_ptr + row_places * 16 + SCALES_AT).to(gl.pointer_type(gl.float32), bitcast=True)
        numbers = gl.arange(0, scales.shape[0], layout=gl.SliceLayout(1, SCALES_LAYOUT))
        mask = (row_places >= 0)[None, :] & (numbers >= 0)[:, None]
        async_copy.async_copy_global_to_shared(scales, scales_ptr[None, :] + numbers[:, None], mask=mask)
    async_copy.commit_group()


@gluon.jit
def _convert(words, scales, number, cache_scale, HAS_SCALES: gl.constexpr, IS_BF16: gl.constexpr):
    """Return words of two channels for words of four; `scales.index(number)` are the scales of their rows, if any."""
    scale = cache_scale
    if HAS_SCALES:
        scale = scales.index(number).load(gl.SliceLayout(1, words.type.layout))[:, None]
    low, high = gl.inline_asm_elementwise(
        _SCALE_TO_BF16 if IS_BF16 else _SCALE_TO_F16, "=r,=r,r,f", [words, scale],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])


@gluon.jit
def _gather_converted(
    queries, slots, rows, q, k, valid, places, scales,
    left_full, rest_full, free, q_left_full, q_rest_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, TAIL: gl.constexpr, PAIRS: gl.constexpr,
    IS_SPLIT: gl.constexpr, IS_PAGED: gl.constexpr, PREFETCHED: gl.constexpr,
    PAYLOAD: gl.constexpr, SCALES_AT: gl.constexpr, TAIL_AT: gl.constexpr,
):  # fmt: skip
    """Convert rows of e4m3; see NOTE [Converted rows]. LEFT and RIGHT are equally wide."""
    STAGES: gl.constexpr = 2 * PAIRS
    SIDE_WORDS: gl.constexpr = k.left.shape[2] // 2
    PIECES: gl.constexpr = k.left.shape[2] // SCALED
    CONVERTS_TAIL: gl.constexpr = 2 * k.left.shape[2] < PAYLOAD
    IS_BF16: gl.constexpr = k.left.dtype == gl.bfloat16
    UNIT: gl.constexpr = 16
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    left = k.left._reinterpret(gl.int32, [STAGES, TILE, SIDE_WORDS], WORDS)
    right = k.right._reinterpret(gl.int32, [STAGES, TILE, SIDE_WORDS], WORDS)
    tail = k.tail._reinterpret(gl.int32, [STAGES, TILE, k.tail.shape[2] // 2], WORDS)
    places_of_pairs = places._reinterpret(gl.int64, [2, PAIR], FLAT)
    places_of_tiles = places._reinterpret(gl.int64, [4, TILE], FLAT)
    valid_of_tiles = valid._reinterpret(gl.int32, [STAGES, TILE], FLAT)
    cache_scale = 1.0
    if rows.cache_scale_ptr is not None:
        cache_scale = gl.load(rows.cache_scale_ptr)
    SCALES: gl.constexpr = scales.shape[0] // STAGES if SCALES_AT > 0 else 1
    scales_of_tiles = k.tail
    if SCALES_AT > 0:
        scales_of_tiles = scales._reinterpret(
            gl.float32, [STAGES, SCALES, TILE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )

    _copy_queries(queries, q, slots, gl.program_id(0), HEADS, KV_GROUP, D_TOTAL, TAIL, IS_SPLIT)
    ahead = _look_first(slots, rows, places_of_pairs.index(0), HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT)
    _copy_words(
        rows.ptr, places_of_tiles.index(0), right.index(0), k.tail.index(0), tail.index(0), scales_of_tiles.index(0),
        PAYLOAD, D_TOTAL - PAYLOAD, SCALES_AT, TAIL_AT,
    )  # fmt: skip
    pair = 0
    parity_q = 1
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        row, _, _, _, split = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
        first_slot, end_slot = _share_slots(
            slots.topk_length_ptr, row, split, slots.topk, slots.slots_per_split, IS_SPLIT
        )
        num_pairs = _pair_count(first_slot, end_slot)
        for i in range(num_pairs):
            for s in gl.static_range(2):
                stage = _first_stage(pair, PAIRS) + s
                tile = (pair & 1) * 2 + s
                if s == 0:
                    # Without queries both groups are empty.
                    if (i == 0) & (pair > 0):
                        mbarrier.wait(q_free, parity_q)
                        _copy_queries(queries, q, slots, item, HEADS, KV_GROUP, D_TOTAL, TAIL, IS_SPLIT)
                    else:
                        async_copy.commit_group()
                        async_copy.commit_group()
                else:
                    ahead = _look_ahead(
                        ahead, slots, rows, places_of_pairs.index((pair & 1) ^ 1),
                        HEADS, KV_GROUP, IS_SPLIT, IS_PAGED, UNIT, PREFETCHED,
                    )  # fmt: skip
                async_copy.wait_group(2 if s == 0 else 0)
                block_barrier()
                for c in gl.static_range(PIECES):
                    words = right.index(stage).slice(c * SCALED_WORDS, SCALED_WORDS, 1).load(WORDS_LAYOUT)
                    words = _convert(words, scales, stage * SCALES + c, cache_scale, SCALES_AT > 0, IS_BF16)
                    left.index(stage).slice(2 * c * SCALED_WORDS, 2 * SCALED_WORDS, 1).store(words)
                fence_async_shared()
                block_barrier()
                mbarrier.arrive(left_full.index(stage), count=1)
                # The next tile is asked for while this one is converted; after the last one, a tile that nobody reads.
                next_pair = pair + s
                next_stage = _first_stage(next_pair, PAIRS) + (1 - s)
                next_tile = (next_pair & 1) * 2 + (1 - s)
                for part in gl.static_range(4):
                    mbarrier.wait(free.index(4 * next_stage + part), _parity(next_pair, PAIRS) ^ 1)
                _copy_words(
                    rows.ptr, places_of_tiles.index(next_tile), right.index(next_stage), k.tail.index(next_stage),
                    tail.index(next_stage), scales_of_tiles.index(next_stage),
                    PAYLOAD, D_TOTAL - PAYLOAD, SCALES_AT, TAIL_AT,
                )  # fmt: skip
                for c in gl.static_range(PIECES, 2 * PIECES):
                    words = right.index(stage).slice(c * SCALED_WORDS, SCALED_WORDS, 1).load(WORDS_LAYOUT)
                    words = _convert(words, scales, stage * SCALES + c, cache_scale, SCALES_AT > 0, IS_BF16)
                    right.index(stage).slice(2 * (c - PIECES) * SCALED_WORDS, 2 * SCALED_WORDS, 1).store(words)
                if CONVERTS_TAIL:
                    # The first half of the room for the tail holds its bytes.
                    words = tail.index(stage).load(WORDS_LAYOUT).reshape([TILE, 2, tail.shape[2] // 2])
                    words, _empty = words.permute([0, 2, 1]).split()
                    words = _convert(words, scales, stage * SCALES + 2 * PIECES, cache_scale, SCALES_AT > 0, IS_BF16)
                    tail.index(stage).store(words)
                is_valid = places_of_tiles.index(tile).load(SLOTS_LAYOUT) >= 0
                valid_of_tiles.index(stage).store(is_valid.to(gl.int32))
                _publish_copies(rest_full.index(stage), 1, True)
                if s == 0:
                    mbarrier.arrive(q_left_full, count=1, pred=i == 0)
                    mbarrier.arrive(q_rest_full, count=1, pred=i == 0)
            if i == num_pairs // 2:
                _prefetch_queries(queries, slots, item, HEADS, KV_GROUP, D_TOTAL, IS_SPLIT)
            pair += 1
        parity_q ^= 1
    async_copy.wait_group(0)


@gluon.jit
def _gather(
    queries, slots, rows, q, k, valid, places, scales,
    left_full, rest_full, free, q_left_full, q_rest_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, TAIL: gl.constexpr, PAIRS: gl.constexpr,
    IS_SPLIT: gl.constexpr, IS_PAGED: gl.constexpr, PREFETCHED: gl.constexpr,
    PAYLOAD: gl.constexpr, SCALES_AT: gl.constexpr, TAIL_AT: gl.constexpr,
):  # fmt: skip
    """Bring queries and rows, of which PAYLOAD channels are e4m3, to shared memory."""
    if PAYLOAD > 0:
        _gather_converted(
            queries, slots, rows, q, k, valid, places, scales,
            left_full, rest_full, free, q_left_full, q_rest_full, q_free,
            HEADS, KV_GROUP, D_TOTAL, TAIL, PAIRS, IS_SPLIT, IS_PAGED, PREFETCHED, PAYLOAD, SCALES_AT, TAIL_AT,
        )  # fmt: skip
    else:
        _gather_stored(
            queries, slots, rows, q, k, valid, places,
            left_full, rest_full, free, q_left_full, q_rest_full, q_free,
            HEADS, KV_GROUP, D_TOTAL, TAIL, PAIRS, IS_SPLIT, IS_PAGED,
        )  # fmt: skip

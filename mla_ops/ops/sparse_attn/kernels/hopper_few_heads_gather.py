"""How rows come to the shared memory of the forward for few heads; see the notes of `hopper_few_heads.py`."""

# ruff: noqa: RUF005, SIM113 (Triton has no starred tuples and no enumerate)

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from mla_ops.kernels.gluon_rows import convert_e4m3, end_position, load_positions, locate_rows, pages_of
from mla_ops.ops.sparse_attn.kernels.hopper_items import (
    ROWS_LAYOUT,
    TILE,
    _copy_rows,
    _end_slot,
    _known_multiple,
    _publish_copies,
)

# Channels of a part of a row, which share a scale; the last part of the value may have half as many.
PART = gl.constexpr(128)
# Channels of the tail that are multiplied by a scale at a time.
PIECE = gl.constexpr(64)


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


class Pool(NamedTuple):
    """How positions become rows; see `gluon_rows.py`."""

    table_ptr: Any
    stride_table: Any
    seq_lens_ptr: Any
    num_positions: Any
    page_size: Any
    num_pages: Any


class Cursor(NamedTuple):
    """A tile of a work item."""

    item: Any
    tiles_left: Any
    slots_ptr: Any  # to the position of its first slot
    slots_left: Any
    batch: Any
    group: Any


@gluon.constexpr_function
def _part_start(part, value):
    """Return the first channel of a part: parts of the value have 128 channels, the tail begins where they end."""
    return min(part * PART.value, value)


@gluon.constexpr_function
def _words_layout(num_words):
    """Return the layout of [64, num_words] words of 32 or 16 of a row: 16 bytes a thread.

    Eight threads that store together have 64 channels of two rows, which the swizzle of a tile puts into different
    banks. 16 words are held twice, so that both layouts have the same rows.
    """
    wide = [0, 16] if num_words == 32 else [0, 0]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [16, 0], [32, 0]], lane_bases=[[0, 4], [0, 8], [1, 0], wide, [2, 0]],
        warp_bases=[[4, 0], [8, 0]], block_bases=[], shape=[64, num_words],
    )  # fmt: skip


@gluon.constexpr_function
def _scales_layout(num_scales):
    """Return the layout of [64, num_scales] scales of 4 or 8 of a row, with the same rows: one a thread."""
    wide = [0, 4] if num_scales == 8 else [0, 0]
    return gl.DistributedLinearLayout(
        reg_bases=[[16, 0], [32, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], wide, [2, 0]],
        warp_bases=[[4, 0], [8, 0]], block_bases=[], shape=[64, num_scales],
    )  # fmt: skip


@gluon.constexpr_function
def _held_scales(num_scales):
    """Return for how many scales of a row there is room."""
    return 8 if num_scales > 4 else 4


@gluon.jit
def _locate_item(item, slots, KV_GROUP: gl.constexpr):
    """Return `(row, batch, query, group, split)` of a work item: a share of the slots of one (batch, query, group).

    In 32 bits, because a division in 64 bits takes as long as the rows of a tile.
    """
    split = item % slots.num_splits
    row = item // slots.num_splits // KV_GROUP
    group = item // slots.num_splits % KV_GROUP
    return row, row // slots.seq_q, row % slots.seq_q, group, split


@gluon.jit
def _first_tile(item, slots, KV_GROUP: gl.constexpr):
    """Return the cursor of the first tile of an item; an item has one at least, which may have no slots."""
    row, batch, query, group, split = _locate_item(item, slots, KV_GROUP)
    first = split * slots.slots_per_split
    end = gl.minimum(first + slots.slots_per_split, _end_slot(slots.topk_length_ptr, row, slots.topk))
    num_tiles = gl.maximum((end - first + TILE - 1) // TILE, 1)
    batch = batch.to(gl.int64)
    slots_ptr = slots.indices_ptr + batch * slots.stride_b + query.to(gl.int64) * slots.stride_s
    slots_ptr += group.to(gl.int64) * slots.stride_g
    return Cursor(item, num_tiles, slots_ptr + first, end - first, batch, group)


@gluon.jit
def _next_tile(cursor, slots, KV_GROUP: gl.constexpr):
    """Return the cursor of the tile after a tile; the last item of a program is followed by itself."""
    item, tiles_left, slots_ptr, slots_left, batch, group = cursor
    tiles_left -= 1
    slots_ptr += TILE
    slots_left -= TILE
    if tiles_left == 0:
        item = gl.minimum(item + gl.num_programs(0), slots.num_items - 1)
        item, tiles_left, slots_ptr, slots_left, batch, group = _first_tile(item, slots, KV_GROUP)
    return Cursor(item, tiles_left, slots_ptr, slots_left, batch, group)


@gluon.jit
def _load_slots(cursor, LAYOUT: gl.constexpr):
    """Return the positions of a tile."""
    return load_positions(cursor.slots_ptr, 0, cursor.slots_left, TILE, LAYOUT)


@gluon.jit
def _load_pages(positions, cursor, pool, IS_PAGED: gl.constexpr):
    """Return the page of each position of a tile."""
    end = end_position(pool.seq_lens_ptr, cursor.batch, pool.num_positions)
    return pages_of(positions, end, pool.page_size, pool.table_ptr, pool.stride_table, cursor.batch, IS_PAGED)


@gluon.jit
def _copy_parts(parts, buffer, row_ptrs, mask, VALUE: gl.constexpr, D_TOTAL: gl.constexpr):
    """Start the copy of some rows into their parts."""
    for i in gl.static_range(len(parts)):
        _copy_rows(parts[i].index(buffer), row_ptrs, mask, _part_start(i, VALUE), parts[i].shape[2], D_TOTAL)


@gluon.jit
def _copy_queries(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, item, slots, q, buffer,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, VALUE: gl.constexpr,
):  # fmt: skip
    """Start the copy of the queries of an item."""
    _, batch, query, group, _ = _locate_item(item, slots, KV_GROUP)
    heads = gl.arange(0, q[0].shape[1], layout=gl.SliceLayout(1, ROWS_LAYOUT))
    q_ptr += batch.to(gl.int64) * _known_multiple(stride_q_b) + query.to(gl.int64) * _known_multiple(stride_q_s)
    q_ptr += (group * (HEADS // KV_GROUP)).to(gl.int64) * _known_multiple(stride_q_h)
    row_ptrs = q_ptr + heads.to(gl.int64) * _known_multiple(stride_q_h)
    _copy_parts(q, buffer, row_ptrs, heads < HEADS // KV_GROUP, VALUE, D_TOTAL)


@gluon.jit
def _gather(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    slots, pool, q, k, valid, full, free, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, IS_PAGED: gl.constexpr,
):  # fmt: skip
    """Copy the rows of every tile, and the queries of every item, with cp.async."""
    SLOTS_LAYOUT: gl.constexpr = gl.SliceLayout(1, ROWS_LAYOUT)
    cursor = _first_tile(gl.program_id(0), slots, KV_GROUP)
    positions = _load_slots(cursor, SLOTS_LAYOUT)
    pages = _load_pages(positions, cursor, pool, IS_PAGED)
    cursor = _next_tile(cursor, slots, KV_GROUP)
    ahead = _load_slots(cursor, SLOTS_LAYOUT)
    count = 0
    items = 0
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        first = _first_tile(item, slots, KV_GROUP)
        rows_ptr = kv_ptr + first.group.to(gl.int64) * _known_multiple(stride_kv_g)
        if not IS_PAGED:
            rows_ptr += first.batch * _known_multiple(stride_kv_b)
        for tile in range(first.tiles_left):
            stage = count % STAGES
            offsets, is_valid = locate_rows(
                positions,
                pages,
                pool.num_pages,
                pool.page_size,
                _known_multiple(stride_kv_b),
                _known_multiple(stride_kv_s),
                IS_PAGED,
            )
            positions = ahead
            pages = _load_pages(positions, cursor, pool, IS_PAGED)
            cursor = _next_tile(cursor, slots, KV_GROUP)
            ahead = _load_slots(cursor, SLOTS_LAYOUT)

            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            _copy_parts(k, stage, rows_ptr + offsets, is_valid, VALUE, D_TOTAL)
            async_copy.commit_group()
            valid.index(stage).store(is_valid.to(gl.int32))
            # The tile before, whose rows come while these are asked for.
            _publish_copies(full.index((count + STAGES - 1) % STAGES), 1, count > 0)
            if tile == 0:
                # The queries arrive with the first tile of their item, after the last tile of the item before.
                buffer = items % Q_BUFFERS
                mbarrier.wait(q_free.index(buffer), ((items // Q_BUFFERS) & 1) ^ 1)
                _copy_queries(
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, item, slots, q, buffer, HEADS, KV_GROUP, D_TOTAL, VALUE
                )
                async_copy.commit_group()
            count += 1
        items += 1
    _publish_copies(full.index((count + STAGES - 1) % STAGES), 0, True)


@gluon.jit
def _load_words(row_ptrs, is_valid, START: gl.constexpr, END: gl.constexpr, NUM_WORDS: gl.constexpr):
    """Start the load of 16 or 32 words of some rows; those of invalid rows and from END on are 0."""
    LAYOUT: gl.constexpr = _words_layout(NUM_WORDS)
    row_ptrs = gl.convert_layout(row_ptrs, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    mask = gl.convert_layout(is_valid, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
    cols = gl.arange(0, NUM_WORDS, layout=gl.SliceLayout(0, LAYOUT))
    if START + NUM_WORDS > END:
        mask = mask & (cols < END - START)[None, :]
    return gl.load((row_ptrs + START)[:, None] + cols[None, :], mask=mask, other=0)


@gluon.jit
def _load_rows(
    row_ptrs, is_valid, k,
    VALUE: gl.constexpr, D_PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr, TAIL_OFFSET: gl.constexpr,
):  # fmt: skip
    """Start the loads of the words of every part of some rows, of a tail in 16 bits among them."""
    parts = ()
    NUM_PAYLOADS: gl.constexpr = len(k) - (1 if D_TAIL > 0 else 0)
    for i in gl.static_range(NUM_PAYLOADS):
        words = _load_words(row_ptrs, is_valid, _part_start(i, VALUE) // 4, D_PAYLOAD // 4, k[i].shape[2] // 4)
        parts = parts + (words,)
    if D_TAIL > 0:
        for j in gl.static_range(k[NUM_PAYLOADS].shape[2] // PIECE):
            words = _load_words(row_ptrs, is_valid, TAIL_OFFSET // 4 + 32 * j, TAIL_OFFSET // 4 + D_TAIL // 2, 32)
            parts = parts + (words,)
    return parts


@gluon.jit
def _load_scales(row_ptrs, is_valid, NUM_SCALES: gl.constexpr, SCALE_OFFSET: gl.constexpr):
    """Start the load of the scales of some rows."""
    scales = ()
    if NUM_SCALES > 0:
        LAYOUT: gl.constexpr = _scales_layout(_held_scales(NUM_SCALES))
        row_ptrs = gl.convert_layout(row_ptrs, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        mask = gl.convert_layout(is_valid, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
        cols = gl.arange(0, _held_scales(NUM_SCALES), layout=gl.SliceLayout(0, LAYOUT))
        scale_ptrs = (row_ptrs + SCALE_OFFSET // 4).to(gl.pointer_type(gl.float32), bitcast=True)
        mask = mask & (cols < NUM_SCALES)[None, :]
        scales = (gl.load(scale_ptrs[:, None] + cols[None, :], mask=mask, other=0.0),)
    return scales


@gluon.jit
def _store_rows(parts, scales, is_valid, k, k_words, valid, row_scales, stage, D_TAIL: gl.constexpr):
    """Store the rows of a tile as 16-bit channels without their scales, and the scales."""
    NUM_PAYLOADS: gl.constexpr = len(k) - (1 if D_TAIL > 0 else 0)
    for i in gl.static_range(NUM_PAYLOADS):
        k_words[i].index(stage).store(convert_e4m3(parts[i], k[i].dtype))
    for j in gl.static_range(len(parts) - NUM_PAYLOADS):
        k_words[NUM_PAYLOADS].index(stage).slice(32 * j, 32, 1).store(parts[NUM_PAYLOADS + j])
    valid.index(stage).store(is_valid.to(gl.int32))
    if len(scales) > 0:
        row_scales.index(stage).permute([1, 0]).store(scales[0])


@gluon.jit
def _prefetch_rows(row_ptrs, is_valid, ROW_WORDS: gl.constexpr):
    """Bring some rows to L2: eight threads hold a row, and each asks for a line of 128 bytes of it."""
    LAYOUT: gl.constexpr = _scales_layout(8)
    row_ptrs = gl.convert_layout(row_ptrs, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    mask = gl.convert_layout(is_valid, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    words = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT)) * 32
    # A row need not begin with a line, so its last word may be in one more.
    wanted = (mask[:, None] & (words < ROW_WORDS + 31)[None, :]).to(gl.int32)
    ptrs, wanted = gl.broadcast(row_ptrs[:, None] + gl.minimum(words, ROW_WORDS - 1)[None, :], wanted)
    gl.inline_asm_elementwise(
        """{
            .reg .pred wanted;
            setp.ne.s32 wanted, $2, 0;
            @wanted prefetch.global.L2 [$1];
            mov.u32 $0, 0;
        }""",
        "=r,l,r", [ptrs, wanted], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _gather_converting(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    slots, pool, q, k, k_words, valid, row_scales, full, free, q_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, IS_PAGED: gl.constexpr,
    D_PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr,
    NUM_SCALES: gl.constexpr, SCALE_OFFSET: gl.constexpr, TAIL_OFFSET: gl.constexpr, PARITY: gl.constexpr,
):  # fmt: skip
    """Load the rows of every second tile, convert and store them; the first group copies the queries of every item."""
    SLOTS_LAYOUT: gl.constexpr = gl.SliceLayout(1, _words_layout(32))
    # Strides in words: rows begin at multiples of 16 bytes.
    ROW_WORDS: gl.constexpr = (TAIL_OFFSET + 2 * D_TAIL + 15) // 16 * 4
    stride_page, stride_row, stride_group = stride_kv_b // 16 * 4, stride_kv_s // 16 * 4, stride_kv_g // 16 * 4
    words_ptr = kv_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    cursor = _first_tile(gl.program_id(0), slots, KV_GROUP)
    if PARITY == 1:
        cursor = _next_tile(cursor, slots, KV_GROUP)
    positions = _load_slots(cursor, SLOTS_LAYOUT)
    pages = _load_pages(positions, cursor, pool, IS_PAGED)
    offsets, is_valid = locate_rows(positions, pages, pool.num_pages, pool.page_size, stride_page, stride_row, IS_PAGED)
    row_ptrs = words_ptr + cursor.group.to(gl.int64) * stride_group + offsets
    parts = _load_rows(row_ptrs, is_valid, k, VALUE, D_PAYLOAD, D_TAIL, TAIL_OFFSET)
    scales = _load_scales(row_ptrs, is_valid, NUM_SCALES, SCALE_OFFSET)
    cursor = _next_tile(_next_tile(cursor, slots, KV_GROUP), slots, KV_GROUP)
    positions = _load_slots(cursor, SLOTS_LAYOUT)
    first_count = 0
    items = 0
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        num_tiles = _first_tile(item, slots, KV_GROUP).tiles_left
        if PARITY == 0:
            # One group for the queries of all items: who skipped some would take one phase of q_free for another.
            buffer = items % Q_BUFFERS
            mbarrier.wait(q_free.index(buffer), ((items // Q_BUFFERS) & 1) ^ 1)
            _copy_queries(
                q_ptr, stride_q_b, stride_q_s, stride_q_h, item, slots, q, buffer, HEADS, KV_GROUP, D_TOTAL, VALUE
            )
            async_copy.commit_group()
            _publish_copies(q_full.index(buffer), 0, True)
        for tile in range((first_count + PARITY) % 2, num_tiles, 2):
            count = first_count + tile
            stage = count % STAGES
            # Pages of this group's next tile, and positions of the one after it, come while this tile is converted.
            pages = _load_pages(positions, cursor, pool, IS_PAGED)
            group = cursor.group
            cursor = _next_tile(_next_tile(cursor, slots, KV_GROUP), slots, KV_GROUP)
            ahead = _load_slots(cursor, SLOTS_LAYOUT)
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            # The rows of this group's next tile come to L2 while this one is converted, and from there while the other
            # group converts: from memory they would come as late as they are asked for.
            next_offsets, next_valid = locate_rows(
                positions, pages, pool.num_pages, pool.page_size, stride_page, stride_row, IS_PAGED
            )
            row_ptrs = words_ptr + group.to(gl.int64) * stride_group + next_offsets
            _prefetch_rows(row_ptrs, next_valid, ROW_WORDS)
            _store_rows(parts, scales, is_valid, k, k_words, valid, row_scales, stage, D_TAIL)
            _publish_copies(full.index(stage), 0, True)
            is_valid = next_valid
            parts = _load_rows(row_ptrs, is_valid, k, VALUE, D_PAYLOAD, D_TAIL, TAIL_OFFSET)
            scales = _load_scales(row_ptrs, is_valid, NUM_SCALES, SCALE_OFFSET)
            positions = ahead
        first_count += num_tiles
        items += 1

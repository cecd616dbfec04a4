"""Forward kernel for wide rows and few heads on sm90, in Gluon: keys are rows of its products, heads are columns."""

# ruff: noqa: RUF005, SIM113 (Triton has no starred tuples and no enumerate)

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_ops.kernels.gluon_compat import block_barrier
from mla_ops.kernels.gluon_rows import convert_e4m3, end_position, load_positions, locate_rows, pages_of
from mla_ops.ops.sparse_attn.kernels.hopper_items import (
    LN_2,
    LOG2_E,
    RESCALE_ABOVE,
    ROWS_LAYOUT,
    TILE,
    _copy_rows,
    _end_slot,
    _known_multiple,
    _publish_copies,
)

# Channels of a part of a row, and of what shares a scale; the last part of the value may have half as many.
PART = gl.constexpr(128)
# Channels of the tail that share a scale with no other part.
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
def _scale_of(piece, value):
    """Return which of a row's scales is that of a piece: parts of the value, then 64 channels each."""
    num_values = -(-value // PART.value)
    return piece if piece < num_values else (value + (piece - num_values) * PIECE.value) // PART.value


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
    VALUE: gl.constexpr, D_PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr,
    NUM_SCALES: gl.constexpr, SCALE_OFFSET: gl.constexpr, TAIL_OFFSET: gl.constexpr,
):  # fmt: skip
    """Start the loads of some rows: the words of every part, of a tail in 16 bits among them, and the scales."""
    parts = ()
    NUM_PAYLOADS: gl.constexpr = len(k) - (1 if D_TAIL > 0 else 0)
    for i in gl.static_range(NUM_PAYLOADS):
        words = _load_words(row_ptrs, is_valid, _part_start(i, VALUE) // 4, D_PAYLOAD // 4, k[i].shape[2] // 4)
        parts = parts + (words,)
    if D_TAIL > 0:
        for j in gl.static_range(k[NUM_PAYLOADS].shape[2] // PIECE):
            words = _load_words(row_ptrs, is_valid, TAIL_OFFSET // 4 + 32 * j, TAIL_OFFSET // 4 + D_TAIL // 2, 32)
            parts = parts + (words,)
    scales = ()
    if NUM_SCALES > 0:
        LAYOUT: gl.constexpr = _scales_layout(_held_scales(NUM_SCALES))
        row_ptrs = gl.convert_layout(row_ptrs, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        mask = gl.convert_layout(is_valid, gl.SliceLayout(1, LAYOUT), assert_trivial=True)[:, None]
        cols = gl.arange(0, _held_scales(NUM_SCALES), layout=gl.SliceLayout(0, LAYOUT))
        scale_ptrs = (row_ptrs + SCALE_OFFSET // 4).to(gl.pointer_type(gl.float32), bitcast=True)
        mask = mask & (cols < NUM_SCALES)[None, :]
        scales = (gl.load(scale_ptrs[:, None] + cols[None, :], mask=mask, other=0.0),)
    return parts, scales


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
def _gather_converting(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    slots, pool, q, k, k_words, valid, row_scales, full, free, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, VALUE: gl.constexpr,
    STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, IS_PAGED: gl.constexpr,
    D_PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr,
    NUM_SCALES: gl.constexpr, SCALE_OFFSET: gl.constexpr, TAIL_OFFSET: gl.constexpr, PARITY: gl.constexpr,
):  # fmt: skip
    """Load the rows of every second tile, convert and store them; copy the queries of items that begin with one."""
    SLOTS_LAYOUT: gl.constexpr = gl.SliceLayout(1, _words_layout(32))
    # Strides in words: rows begin at multiples of 16 bytes.
    stride_page, stride_row, stride_group = stride_kv_b // 16 * 4, stride_kv_s // 16 * 4, stride_kv_g // 16 * 4
    words_ptr = kv_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    cursor = _first_tile(gl.program_id(0), slots, KV_GROUP)
    if PARITY == 1:
        cursor = _next_tile(cursor, slots, KV_GROUP)
    positions = _load_slots(cursor, SLOTS_LAYOUT)
    pages = _load_pages(positions, cursor, pool, IS_PAGED)
    offsets, is_valid = locate_rows(positions, pages, pool.num_pages, pool.page_size, stride_page, stride_row, IS_PAGED)
    parts, scales = _load_rows(
        words_ptr + cursor.group.to(gl.int64) * stride_group + offsets, is_valid, k,
        VALUE, D_PAYLOAD, D_TAIL, NUM_SCALES, SCALE_OFFSET, TAIL_OFFSET,
    )  # fmt: skip
    cursor = _next_tile(_next_tile(cursor, slots, KV_GROUP), slots, KV_GROUP)
    positions = _load_slots(cursor, SLOTS_LAYOUT)
    first_count = 0
    items = 0
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        num_tiles = _first_tile(item, slots, KV_GROUP).tiles_left
        for tile in range((first_count + PARITY) % 2, num_tiles, 2):
            count = first_count + tile
            stage = count % STAGES
            # Pages of this group's next tile, and positions of the one after it, come while this tile is converted.
            pages = _load_pages(positions, cursor, pool, IS_PAGED)
            group = cursor.group
            cursor = _next_tile(_next_tile(cursor, slots, KV_GROUP), slots, KV_GROUP)
            ahead = _load_slots(cursor, SLOTS_LAYOUT)
            if tile == 0:
                # The queries arrive with the first tile of their item.
                buffer = items % Q_BUFFERS
                mbarrier.wait(q_free.index(buffer), ((items // Q_BUFFERS) & 1) ^ 1)
                _copy_queries(
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, item, slots, q, buffer, HEADS, KV_GROUP, D_TOTAL, VALUE
                )
                async_copy.commit_group()
            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            _store_rows(parts, scales, is_valid, k, k_words, valid, row_scales, stage, D_TAIL)
            _publish_copies(full.index(stage), 0, True)
            # The rows of the next tile come while the other group converts.
            offsets, is_valid = locate_rows(
                positions, pages, pool.num_pages, pool.page_size, stride_page, stride_row, IS_PAGED
            )
            parts, scales = _load_rows(
                words_ptr + group.to(gl.int64) * stride_group + offsets, is_valid, k,
                VALUE, D_PAYLOAD, D_TAIL, NUM_SCALES, SCALE_OFFSET, TAIL_OFFSET,
            )  # fmt: skip
            positions = ahead
        first_count += num_tiles
        items += 1


@gluon.jit
def _piece(k, n, buffer, VALUE: gl.constexpr, IS_CUT: gl.constexpr):
    """Return what shares a scale: a part, or 64 channels of a tail that is cut."""
    NUM_VALUES: gl.constexpr = (VALUE + PART - 1) // PART
    if n < NUM_VALUES or not IS_CUT:
        piece = k[n].index(buffer)
    else:
        piece = k[NUM_VALUES].index(buffer).slice((n - NUM_VALUES) * PIECE, PIECE, 1)
    return piece


@gluon.jit
def _dense_scores(q, k, zero, buffer, stage):
    """Return K Q^T of a tile."""
    scores = zero
    for n in gl.static_range(len(k)):
        scores = warpgroup_mma(
            k[n].index(stage), q[n].index(buffer).permute([1, 0]), scores, use_acc=n > 0, is_async=True
        )
    return warpgroup_mma_wait(0, deps=[scores])


@gluon.jit
def _scaled_scores(
    q, k, row_scales, zero, buffer, stage, KEYS_LAYOUT: gl.constexpr,
    VALUE: gl.constexpr, NUM_SCALES: gl.constexpr, D_TAIL: gl.constexpr,
):  # fmt: skip
    """Return K Q^T of a tile whose rows lie there without their scales: each piece times the scale of its key."""
    NUM_VALUES: gl.constexpr = (VALUE + PART - 1) // PART
    HELD: gl.constexpr = _held_scales(NUM_SCALES)
    IS_CUT: gl.constexpr = D_TAIL == 0 and len(k) > NUM_VALUES
    NUM_PIECES: gl.constexpr = NUM_VALUES + k[NUM_VALUES].shape[2] // PIECE if IS_CUT else len(k)
    # As many products at a time as there are registers for: with too few of them ptxas lets every wgmma wait.
    AHEAD: gl.constexpr = NUM_PIECES - 1 if zero.shape[1] == 16 else 1
    scores = zero
    started = ()
    for n in gl.static_range(NUM_PIECES + AHEAD):
        if n < NUM_PIECES:
            k_piece, q_piece = _piece(k, n, stage, VALUE, IS_CUT), _piece(q, n, buffer, VALUE, IS_CUT)
            product = warpgroup_mma(k_piece, q_piece.permute([1, 0]), zero, use_acc=False, is_async=True)
            started = started + (product,)
        if n >= AHEAD:
            done = warpgroup_mma_wait(min(AHEAD, NUM_PIECES + AHEAD - 1 - n), deps=[started[n - AHEAD]])
            if n - AHEAD < NUM_VALUES or D_TAIL == 0:
                scale = row_scales.index(stage * HELD + _scale_of(n - AHEAD, VALUE)).load(KEYS_LAYOUT)
                done = done * scale[:, None]
            scores += done
    return scores


@gluon.jit
def _store_out(out_ptr, staged, acc, HEADS: gl.constexpr, START: gl.constexpr, D_V: gl.constexpr):
    """Store [channels, heads] from START on, transposed through shared memory: 16 bytes a thread, heads in a line."""
    BLOCK_H: gl.constexpr = staged.shape[0]
    WIDTH: gl.constexpr = staged.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    staged.permute([1, 0]).store(acc.to(staged.dtype))
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LAYOUT))
    channels = START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = (heads < HEADS)[:, None] & (channels < D_V)[None, :]
    gl.store((out_ptr + heads * D_V)[:, None] + channels[None, :], staged.load(LAYOUT), mask=mask)


@gluon.jit
def _attend(
    out_ptr, lse_ptr, attn_sink_ptr, cache_scale_ptr, stride_cache, softmax_scale, slots,
    q, k, weights, valid, row_scales, full, free, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_V: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_H: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr,
    NUM_SCALES: gl.constexpr, D_TAIL: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    # One layout for [keys, heads] and [channels, heads]: a thread has the same heads of both.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    KEYS_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    HEADS_PER_GROUP: gl.constexpr = HEADS // KV_GROUP
    NUM_VALUES: gl.constexpr = (VALUE + PART - 1) // PART
    # Positive, and 0 as a number that makes every logit 0: see `forward.py`.
    logit_scale = gl.where(softmax_scale == 0, 1e-37, gl.abs(softmax_scale) * LOG2_E)
    zero = gl.full([TILE, BLOCK_H], 0.0, gl.float32, LAYOUT)
    heads = gl.arange(0, BLOCK_H, layout=HEADS_LAYOUT)
    head_mask = heads < HEADS_PER_GROUP
    count = 0
    items = 0
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        row, _, _, group, split = _locate_item(item, slots, KV_GROUP)
        num_tiles = _first_tile(item, slots, KV_GROUP).tiles_left
        buffer = items % Q_BUFFERS
        row_max = gl.full([BLOCK_H], -float("inf"), gl.float32, HEADS_LAYOUT)
        # Summed over the keys once, at the end of the item.
        sums = gl.full([TILE, BLOCK_H], 0.0, gl.float32, LAYOUT)
        accs = ()
        for i in gl.static_range(NUM_VALUES):
            accs = accs + (gl.full([k[i].shape[2], BLOCK_H], 0.0, gl.float32, LAYOUT),)
        cache_scale = 1.0
        if cache_scale_ptr is not None:
            cache_scale = gl.load(cache_scale_ptr + group * stride_cache)
        for _tile in range(num_tiles):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            if NUM_SCALES > 0:
                scores = _scaled_scores(q, k, row_scales, zero, buffer, stage, KEYS_LAYOUT, VALUE, NUM_SCALES, D_TAIL)
            else:
                scores = _dense_scores(q, k, zero, buffer, stage)
            if cache_scale_ptr is not None:
                scores = scores * cache_scale
            if IS_NEGATIVE_SCALE:
                scores = -scores
            # Replaced, not added to: a NaN query of an empty row must not reach its output.
            is_valid = valid.index(stage).load(KEYS_LAYOUT) != 0
            scores = gl.where(is_valid[:, None], scores, -float("inf"))
            tile_max = gl.max(scores, 0) * logit_scale
            new_max = gl.where(tile_max > row_max + RESCALE_ABOVE, tile_max, row_max)
            # While no slot was valid the maximum is -inf, and -inf - (-inf) would be NaN.
            finite_max = gl.maximum(new_max, -3.4e38)
            p = gl.exp2(scores * logit_scale - finite_max[None, :])
            for i in gl.static_range(NUM_VALUES if NUM_SCALES > 0 else 1):
                scaled = p
                if NUM_SCALES > 0:
                    scaled = p * row_scales.index(stage * _held_scales(NUM_SCALES) + i).load(KEYS_LAYOUT)[:, None]
                weights.index(i).store(scaled.to(q[0].dtype))
            rescale = gl.exp2(row_max - finite_max)
            row_max = new_max
            if gl.min(rescale, 0) < 1.0:
                accs = [acc * rescale[None, :] for acc in accs]
                sums = sums * rescale[None, :]
            sums += p
            fence_async_shared()
            block_barrier()
            added = ()
            for i in gl.static_range(NUM_VALUES):
                added = added + (warpgroup_mma(
                    k[i].index(stage).permute([1, 0]), weights.index(i if NUM_SCALES > 0 else 0), accs[i], is_async=True
                ),)  # fmt: skip
            accs = warpgroup_mma_wait(0, deps=added)
            mbarrier.arrive(free.index(stage), count=1)
            count += 1
        row_sum = gl.sum(sums, 0)
        # Empty is the sum being 0, not "not positive": a NaN in a selected row must reach the output.
        is_empty = row_sum == 0.0
        lse = gl.where(is_empty, -float("inf"), (row_max + gl.log2(row_sum)) * LN_2)
        factor = gl.where(is_empty, 0.0, 1.0 / row_sum)
        first_head = group * HEADS_PER_GROUP
        if attn_sink_ptr is not None:
            sink = gl.load(attn_sink_ptr + first_head + heads, mask=head_mask, other=0.0)
            factor = gl.where(is_empty, 0.0, factor / (1.0 + gl.exp2((sink - lse) * LOG2_E)))
        if cache_scale_ptr is not None:
            factor = gl.where(is_empty, 0.0, factor * cache_scale)
        row_head = (row.to(gl.int64) * slots.num_splits + split) * HEADS + first_head
        gl.store(lse_ptr + row_head + heads, lse, mask=head_mask)
        for i in gl.static_range(NUM_VALUES):
            # Through the queries of the item, which are dead.
            acc = accs[i] * factor[None, :]
            _store_out(out_ptr + row_head * D_V, q[i].index(buffer), acc, HEADS_PER_GROUP, i * PART, D_V)
        mbarrier.arrive(q_free.index(buffer), count=1)
        items += 1


@gluon.jit
def _allocate_parts(
    BUFFERS: gl.constexpr, ROWS: gl.constexpr, VALUE: gl.constexpr, TAIL: gl.constexpr, ELEMENT: gl.constexpr
):
    """Return room for the parts of ROWS rows: 128 channels each, the rest of the value, and the tail."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    parts = ()
    for _ in gl.static_range(VALUE // PART):
        parts = parts + (gl.allocate_shared_memory(ELEMENT, [BUFFERS, ROWS, PART], LAYOUT),)
    if VALUE % PART > 0:
        parts = parts + (gl.allocate_shared_memory(ELEMENT, [BUFFERS, ROWS, PIECE], LAYOUT),)
    if TAIL > 0:
        parts = parts + (gl.allocate_shared_memory(ELEMENT, [BUFFERS, ROWS, TAIL], LAYOUT),)
    return parts


@gluon.jit
def _as_words(parts, BUFFERS: gl.constexpr, ROWS: gl.constexpr):
    """Return the parts of rows as words of two channels."""
    words = ()
    for i in gl.static_range(len(parts)):
        words = words + (
            parts[i]._reinterpret(gl.int32, [BUFFERS, ROWS, parts[i].shape[2] // 2], gl.NVMMASharedLayout(128, 32, 2)),
        )
    return words


# Lengths change from call to call and are not specialised; of a stride it is whether 16 divides it, for the copies.
@gluon.jit(
    do_not_specialize=[
        "stride_table", "seq_q", "num_positions", "page_size", "num_pages",
        "topk", "slots_per_split", "num_splits", "num_items",
    ]
)  # fmt: skip
def _sparse_attn_fwd_few_heads_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,  # in channels, or of e4m3 rows in bytes; _b is of a page, if paged
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    table_ptr, stride_table, seq_lens_ptr,
    cache_scale_ptr, stride_cache,
    out_ptr, lse_ptr,  # [rows, splits, heads, d_v] and [rows, splits, heads]
    softmax_scale, seq_q, num_positions, page_size, num_pages, topk, slots_per_split, num_splits, num_items,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    VALUE: gl.constexpr, TAIL: gl.constexpr, BLOCK_H: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr, IS_PAGED: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
    # Of rows in e4m3: channels of the payload, 0 of other rows; channels in 16 bits behind it; scales of a row.
    D_PAYLOAD: gl.constexpr, D_TAIL: gl.constexpr,
    NUM_SCALES: gl.constexpr, SCALE_OFFSET: gl.constexpr, TAIL_OFFSET: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = q_ptr.dtype.element_ty
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    NUM_WEIGHTS: gl.constexpr = (VALUE + PART - 1) // PART if NUM_SCALES > 0 else 1
    q = _allocate_parts(Q_BUFFERS, BLOCK_H, VALUE, TAIL, ELEMENT)
    k = _allocate_parts(STAGES, TILE, VALUE, TAIL, ELEMENT)
    weights = gl.allocate_shared_memory(ELEMENT, [NUM_WEIGHTS, TILE, BLOCK_H], gl.NVMMASharedLayout(2 * BLOCK_H, 16, 2))
    valid = gl.allocate_shared_memory(gl.int32, [STAGES, TILE], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(Q_BUFFERS):
        mbarrier.init(q_free.index(i), count=1)
    slots = Slots(
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr,
        seq_q, topk, slots_per_split, num_splits, num_items,
    )  # fmt: skip
    pool = Pool(table_ptr, stride_table, seq_lens_ptr, num_positions, page_size, num_pages)
    if D_PAYLOAD > 0:
        HELD: gl.constexpr = _held_scales(NUM_SCALES)
        scales_2d = gl.allocate_shared_memory(
            gl.float32, [STAGES, HELD, TILE], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
        row_scales = scales_2d._reinterpret(gl.float32, [STAGES * HELD, TILE], FLAT)
        k_words = _as_words(k, STAGES, TILE)
        gl.warp_specialize(
            [
                (_attend, (
                    out_ptr, lse_ptr, attn_sink_ptr, cache_scale_ptr, stride_cache, gl.to_tensor(softmax_scale), slots,
                    q, k, weights, valid, row_scales, full, free, q_free,
                    HEADS, KV_GROUP, D_V, VALUE, BLOCK_H, STAGES, Q_BUFFERS, NUM_SCALES, D_TAIL,
                    IS_NEGATIVE_SCALE,
                )),
                (_gather_converting, (
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                    slots, pool, q, k, k_words, valid, scales_2d, full, free, q_free,
                    HEADS, KV_GROUP, D_TOTAL, VALUE, STAGES, Q_BUFFERS, IS_PAGED,
                    D_PAYLOAD, D_TAIL, NUM_SCALES, SCALE_OFFSET, TAIL_OFFSET, gl.constexpr(0),
                )),
                (_gather_converting, (
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                    slots, pool, q, k, k_words, valid, scales_2d, full, free, q_free,
                    HEADS, KV_GROUP, D_TOTAL, VALUE, STAGES, Q_BUFFERS, IS_PAGED,
                    D_PAYLOAD, D_TAIL, NUM_SCALES, SCALE_OFFSET, TAIL_OFFSET, gl.constexpr(1),
                )),
            ],
            [4, 4],
            [GATHER_REGISTERS, GATHER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    out_ptr, lse_ptr, attn_sink_ptr, cache_scale_ptr, stride_cache, gl.to_tensor(softmax_scale), slots,
                    q, k, weights, valid, valid, full, free, q_free,
                    HEADS, KV_GROUP, D_V, VALUE, BLOCK_H, STAGES, Q_BUFFERS, NUM_SCALES, D_TAIL,
                    IS_NEGATIVE_SCALE,
                )),
                (_gather, (
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                    slots, pool, q, k, valid, full, free, q_free,
                    HEADS, KV_GROUP, D_TOTAL, VALUE, STAGES, Q_BUFFERS, IS_PAGED,
                )),
            ],
            [4],
            [GATHER_REGISTERS],
        )  # fmt: skip

"""Forward kernel for wide rows and few heads on sm90, in Gluon: keys are the rows of the products, heads the columns."""

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
from mla_ops.kernels.gluon_rows import end_position, load_positions, locate_rows, pages_of
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


@gluon.jit
def _locate_item(item, num_splits, KV_GROUP: gl.constexpr):
    """Return `(row, group, split)` of a work item: a share of the slots of one (batch, query, group)."""
    row_group = item // num_splits
    return (row_group // KV_GROUP).to(gl.int64), row_group % KV_GROUP, item % num_splits


@gluon.jit
def _item_slots(topk_length_ptr, row, split, topk, slots_per_split):
    """Return the first slot of an item, the slot it ends before, and its tiles: one at least."""
    first = split * slots_per_split
    end = gl.minimum(first + slots_per_split, _end_slot(topk_length_ptr, row, topk))
    return first, end, gl.maximum((end - first + TILE - 1) // TILE, 1)


@gluon.jit
def _next_tile(
    item, tile, num_tiles, slots_ptr, first, end, row, group,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr,
    seq_q, topk, slots_per_split, num_splits, num_items, KV_GROUP: gl.constexpr,
):  # fmt: skip
    """Return what names the tile after a tile; the last one of a program is followed by itself."""
    tile += 1
    if tile == num_tiles:
        tile = 0
        item = gl.minimum(item + gl.num_programs(0), num_items - 1)
        row, group, split = _locate_item(item, num_splits, KV_GROUP)
        first, end, num_tiles = _item_slots(topk_length_ptr, row, split, topk, slots_per_split)
        slots_ptr = indices_ptr + (row // seq_q) * stride_i_b + (row % seq_q) * stride_i_s
        slots_ptr += group.to(gl.int64) * stride_i_g
    return item, tile, num_tiles, slots_ptr, first, end, row, group


@gluon.jit
def _copy_queries(
    q_ptr, stride_q_h, q_left, q_right, q_tail,
    HEADS_PER_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Start the copy of the queries of a group."""
    heads = gl.arange(0, q_left.shape[0], layout=gl.SliceLayout(1, ROWS_LAYOUT))
    row_ptrs = q_ptr + heads.to(gl.int64) * _known_multiple(stride_q_h)
    mask = heads < HEADS_PER_GROUP
    _copy_rows(q_left, row_ptrs, mask, 0, LEFT, D_TOTAL)
    _copy_rows(q_right, row_ptrs, mask, LEFT, RIGHT, D_TOTAL)
    if TAIL > 0:
        _copy_rows(q_tail, row_ptrs, mask, LEFT + RIGHT, TAIL, D_TOTAL)


@gluon.jit
def _gather(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, table_ptr, stride_table, seq_lens_ptr,
    seq_q, num_positions, page_size, num_pages, topk, slots_per_split, num_splits, num_items,
    q_left, q_right, q_tail, k_left, k_right, k_tail, valid, full, free, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr, IS_PAGED: gl.constexpr,
):  # fmt: skip
    SLOTS: gl.constexpr = gl.SliceLayout(1, ROWS_LAYOUT)
    # The tile whose positions are loaded: two tiles ahead of the one whose rows are copied.
    ahead_item = gl.program_id(0)
    row, group, split = _locate_item(ahead_item, num_splits, KV_GROUP)
    first, end, num_tiles = _item_slots(topk_length_ptr, row, split, topk, slots_per_split)
    slots_ptr = indices_ptr + (row // seq_q) * stride_i_b + (row % seq_q) * stride_i_s
    slots_ptr += group.to(gl.int64) * stride_i_g
    ahead_tile = 0 * ahead_item
    positions = load_positions(slots_ptr, first, end, TILE, SLOTS)
    batch = row // seq_q
    end_key = end_position(seq_lens_ptr, batch, num_positions)
    pages = pages_of(positions, end_key, page_size, table_ptr, stride_table, batch, IS_PAGED)
    ahead_item, ahead_tile, num_tiles, slots_ptr, first, end, row, group = _next_tile(
        ahead_item, ahead_tile, num_tiles, slots_ptr, first, end, row, group,
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr,
        seq_q, topk, slots_per_split, num_splits, num_items, KV_GROUP,
    )  # fmt: skip
    ahead = load_positions(slots_ptr, first + ahead_tile * TILE, end, TILE, SLOTS)
    ahead_batch = row // seq_q

    count = 0
    items = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        item_row, item_group, item_split = _locate_item(item, num_splits, KV_GROUP)
        _, _, item_tiles = _item_slots(topk_length_ptr, item_row, item_split, topk, slots_per_split)
        item_batch = item_row // seq_q
        rows_ptr = kv_ptr + item_group.to(gl.int64) * _known_multiple(stride_kv_g)
        if not IS_PAGED:
            rows_ptr += item_batch * _known_multiple(stride_kv_b)
        # Queries arrive with the first tile of their item.
        buffer = items % 2
        mbarrier.wait(q_free.index(buffer), ((items // 2) & 1) ^ 1)
        item_q_ptr = q_ptr + item_batch * _known_multiple(stride_q_b) + (item_row % seq_q) * _known_multiple(stride_q_s)
        item_q_ptr += (item_group * (HEADS // KV_GROUP)).to(gl.int64) * _known_multiple(stride_q_h)
        _copy_queries(
            item_q_ptr, stride_q_h, q_left.index(buffer), q_right.index(buffer), q_tail.index(buffer),
            HEADS // KV_GROUP, D_TOTAL, LEFT, RIGHT, TAIL,
        )  # fmt: skip
        items += 1
        for _tile in range(item_tiles):
            stage = count % STAGES
            offsets, is_valid = locate_rows(
                positions, pages, num_pages, page_size,
                _known_multiple(stride_kv_b), _known_multiple(stride_kv_s), IS_PAGED,
            )  # fmt: skip
            positions = ahead
            end_key = end_position(seq_lens_ptr, ahead_batch, num_positions)
            pages = pages_of(positions, end_key, page_size, table_ptr, stride_table, ahead_batch, IS_PAGED)
            ahead_item, ahead_tile, num_tiles, slots_ptr, first, end, row, group = _next_tile(
                ahead_item, ahead_tile, num_tiles, slots_ptr, first, end, row, group,
                indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr,
                seq_q, topk, slots_per_split, num_splits, num_items, KV_GROUP,
            )  # fmt: skip
            ahead = load_positions(slots_ptr, first + ahead_tile * TILE, end, TILE, SLOTS)
            ahead_batch = row // seq_q

            mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
            row_ptrs = rows_ptr + offsets
            _copy_rows(k_left.index(stage), row_ptrs, is_valid, 0, LEFT, D_TOTAL)
            _copy_rows(k_right.index(stage), row_ptrs, is_valid, LEFT, RIGHT, D_TOTAL)
            if TAIL > 0:
                _copy_rows(k_tail.index(stage), row_ptrs, is_valid, LEFT + RIGHT, TAIL, D_TOTAL)
            async_copy.commit_group()
            valid.index(stage).store(is_valid.to(gl.int32))
            # The tile before, whose rows come while these are asked for.
            _publish_copies(full.index((count + STAGES - 1) % STAGES), 1, count > 0)
            count += 1
    _publish_copies(full.index((count + STAGES - 1) % STAGES), 0, True)


@gluon.jit
def _add_scores(scores, q, k, IS_FIRST: gl.constexpr):
    """Start `scores + k @ q^T`."""
    return warpgroup_mma(k, q.permute([1, 0]), scores, use_acc=not IS_FIRST, is_async=True)


@gluon.jit
def _store_values(out_ptrs, acc, channels, head_mask, factor, D_V: gl.constexpr):
    gl.store(
        out_ptrs[None, :] + channels[:, None],
        (acc * factor[None, :]).to(out_ptrs.dtype.element_ty),
        mask=(channels < D_V)[:, None] & head_mask[None, :],
    )


@gluon.jit
def _attend(
    out_ptr, lse_ptr, attn_sink_ptr, topk_length_ptr, softmax_scale, topk, slots_per_split, num_splits, num_items,
    q_left, q_right, q_tail, k_left, k_right, k_tail, weights, valid, full, free, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, BLOCK_H: gl.constexpr, STAGES: gl.constexpr,
    IS_NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    # One layout for [keys, heads] and [channels, heads]: a thread has the same heads of both.
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    KEYS_LAYOUT: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    HEADS_PER_GROUP: gl.constexpr = HEADS // KV_GROUP
    # Positive, and 0 as a number that makes every logit 0: see `forward.py`.
    logit_scale = gl.where(softmax_scale == 0, 1e-37, gl.abs(softmax_scale) * LOG2_E)
    zero = gl.full([TILE, BLOCK_H], 0.0, gl.float32, LAYOUT)
    heads = gl.arange(0, BLOCK_H, layout=HEADS_LAYOUT)
    head_mask = heads < HEADS_PER_GROUP
    count = 0
    items = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row, group, split = _locate_item(item, num_splits, KV_GROUP)
        _, _, num_tiles = _item_slots(topk_length_ptr, row, split, topk, slots_per_split)
        buffer = items % 2
        row_max = gl.full([BLOCK_H], -float("inf"), gl.float32, HEADS_LAYOUT)
        # Summed over the keys once, at the end of the item.
        sums = gl.full([TILE, BLOCK_H], 0.0, gl.float32, LAYOUT)
        acc_left = gl.full([LEFT, BLOCK_H], 0.0, gl.float32, LAYOUT)
        acc_right = gl.full([RIGHT, BLOCK_H], 0.0, gl.float32, LAYOUT)
        for _tile in range(num_tiles):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            scores = _add_scores(zero, q_left.index(buffer), k_left.index(stage), True)
            scores = _add_scores(scores, q_right.index(buffer), k_right.index(stage), False)
            if TAIL > 0:
                scores = _add_scores(scores, q_tail.index(buffer), k_tail.index(stage), False)
            is_valid = valid.index(stage).load(KEYS_LAYOUT) != 0
            scores = warpgroup_mma_wait(0, deps=[scores])
            if IS_NEGATIVE_SCALE:
                scores = -scores
            # Replaced, not added to: a NaN query of an empty row must not reach its output.
            scores = gl.where(is_valid[:, None], scores, -float("inf"))
            tile_max = gl.max(scores, 0) * logit_scale
            new_max = gl.where(tile_max > row_max + RESCALE_ABOVE, tile_max, row_max)
            # While no slot was valid the maximum is -inf, and -inf - (-inf) would be NaN.
            finite_max = gl.maximum(new_max, -3.4e38)
            p = gl.exp2(scores * logit_scale - finite_max[None, :])
            weights.store(p.to(q_left.dtype))
            rescale = gl.exp2(row_max - finite_max)
            row_max = new_max
            if gl.min(rescale, 0) < 1.0:
                acc_left = acc_left * rescale[None, :]
                acc_right = acc_right * rescale[None, :]
                sums = sums * rescale[None, :]
            sums += p
            fence_async_shared()
            block_barrier()
            acc_left = warpgroup_mma(k_left.index(stage).permute([1, 0]), weights, acc_left, is_async=True)
            acc_right = warpgroup_mma(k_right.index(stage).permute([1, 0]), weights, acc_right, is_async=True)
            acc_left, acc_right = warpgroup_mma_wait(0, deps=[acc_left, acc_right])
            mbarrier.arrive(free.index(stage), count=1)
            count += 1
        mbarrier.arrive(q_free.index(buffer), count=1)
        items += 1
        row_sum = gl.sum(sums, 0)
        # Empty is the sum being 0, not "not positive": a NaN in a selected row must reach the output.
        is_empty = row_sum == 0.0
        lse = gl.where(is_empty, -float("inf"), (row_max + gl.log2(row_sum)) * LN_2)
        factor = gl.where(is_empty, 0.0, 1.0 / row_sum)
        first_head = group * HEADS_PER_GROUP
        if attn_sink_ptr is not None:
            sink = gl.load(attn_sink_ptr + first_head + heads, mask=head_mask, other=0.0)
            factor = gl.where(is_empty, 0.0, factor / (1.0 + gl.exp2((sink - lse) * LOG2_E)))
        row_head = (row * num_splits + split) * HEADS + first_head
        gl.store(lse_ptr + row_head + heads, lse, mask=head_mask)
        out_ptrs = out_ptr + row_head * D_V + heads * D_V
        channels = gl.arange(0, LEFT, layout=KEYS_LAYOUT)
        _store_values(out_ptrs, acc_left, channels, head_mask, factor, D_V)
        channels = LEFT + gl.arange(0, RIGHT, layout=KEYS_LAYOUT)
        _store_values(out_ptrs, acc_right, channels, head_mask, factor, D_V)


# Lengths change from call to call and are not specialised; of a stride it is whether 16 divides it, for the copies.
@gluon.jit(
    do_not_specialize=[
        "stride_table", "seq_q", "num_positions", "page_size", "num_pages",
        "topk", "slots_per_split", "num_splits", "num_items",
    ]
)  # fmt: skip
def _sparse_attn_fwd_few_heads_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    table_ptr, stride_table, seq_lens_ptr,
    out_ptr, lse_ptr,  # [rows, splits, heads, d_v] and [rows, splits, heads]
    softmax_scale, seq_q, num_positions, page_size, num_pages, topk, slots_per_split, num_splits, num_items,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, BLOCK_H: gl.constexpr, STAGES: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr, IS_PAGED: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = q_ptr.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_left = gl.allocate_shared_memory(ELEMENT, [2, BLOCK_H, LEFT], ROWS)
    q_right = gl.allocate_shared_memory(ELEMENT, [2, BLOCK_H, RIGHT], ROWS)
    k_left = gl.allocate_shared_memory(ELEMENT, [STAGES, TILE, LEFT], ROWS)
    k_right = gl.allocate_shared_memory(ELEMENT, [STAGES, TILE, RIGHT], ROWS)
    q_tail = gl.allocate_shared_memory(ELEMENT, [2, BLOCK_H, TAIL], ROWS) if TAIL > 0 else q_left
    k_tail = gl.allocate_shared_memory(ELEMENT, [STAGES, TILE, TAIL], ROWS) if TAIL > 0 else k_left
    weights = gl.allocate_shared_memory(ELEMENT, [TILE, BLOCK_H], gl.NVMMASharedLayout(2 * BLOCK_H, 16, 2))
    valid = gl.allocate_shared_memory(gl.int32, [STAGES, TILE], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_free.index(i), count=1)

    gl.warp_specialize(
        [
            (_attend, (
                out_ptr, lse_ptr, attn_sink_ptr, topk_length_ptr, gl.to_tensor(softmax_scale),
                topk, slots_per_split, num_splits, num_items,
                q_left, q_right, q_tail, k_left, k_right, k_tail, weights, valid, full, free, q_free,
                HEADS, KV_GROUP, D_V, LEFT, RIGHT, TAIL, BLOCK_H, STAGES, IS_NEGATIVE_SCALE,
            )),
            (_gather, (
                q_ptr, stride_q_b, stride_q_s, stride_q_h,
                kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                indices_ptr, stride_i_b, stride_i_s, stride_i_g,
                topk_length_ptr, table_ptr, stride_table, seq_lens_ptr,
                seq_q, num_positions, page_size, num_pages, topk, slots_per_split, num_splits, num_items,
                q_left, q_right, q_tail, k_left, k_right, k_tail, valid, full, free, q_free,
                HEADS, KV_GROUP, D_TOTAL, LEFT, RIGHT, TAIL, STAGES, IS_PAGED,
            )),
        ],
        [4],
        [GATHER_REGISTERS],
    )  # fmt: skip

"""Backward kernel for wide rows on sm90: three warpgroups with a role each, in Gluon."""

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
from mla_ops.kernels.hopper_forward import (
    BLOCK_H,
    HALF,
    LOG2_E,
    ROWS_LAYOUT,
    TILE,
    _copy_rows,
    _end_slot,
    _item_slots,
    _known_multiple,
    _locate_item,
    _publish_copies,
)

SCORES_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
# As ROWS_LAYOUT, but a warp has the sixteen rows that it has in an accumulator.
DOT_LAYOUT = gl.constexpr(gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _load_positions(slots_ptr, first, end_slot):
    slots = first + gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    return gl.load(slots_ptr + slots, mask=slots < end_slot, other=-1)


@gluon.jit
def _gather(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    dout_ptr, stride_do_b, stride_do_s, stride_do_h,
    topk_length_ptr, seq_q, seq_kv, topk,
    q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, do_left, do_right, positions,
    k_full, k_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    VALUE: gl.constexpr = LEFT + RIGHT
    HALF_TAIL: gl.constexpr = TAIL // 2
    item = gl.program_id(0)
    slots_ptr, end_slot = _item_slots(
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr, item, seq_q, topk, HEADS, KV_GROUP
    )
    ahead = _load_positions(slots_ptr, 0, end_slot)
    row, group, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    head_mask = heads < head_count
    heads = (first_head + heads).to(gl.int64)
    q_rows = q_ptr + (row // seq_q) * _known_multiple(stride_q_b) + (row % seq_q) * _known_multiple(stride_q_s)
    q_rows = q_rows + heads * _known_multiple(stride_q_h)
    _copy_rows(q_left.index(0), q_rows, head_mask, 0, LEFT, D_TOTAL)
    _copy_rows(q_right.index(0), q_rows, head_mask, LEFT, RIGHT, D_TOTAL)
    if TAIL > 0:
        _copy_rows(q_tail0.index(0), q_rows, head_mask, VALUE, HALF_TAIL, D_TOTAL)
        _copy_rows(q_tail1.index(0), q_rows, head_mask, VALUE + HALF_TAIL, HALF_TAIL, D_TOTAL)
    if dout_ptr is not None:
        do_rows = dout_ptr + (row // seq_q) * _known_multiple(stride_do_b)
        do_rows += (row % seq_q) * _known_multiple(stride_do_s)
        do_rows = do_rows + heads * _known_multiple(stride_do_h)
        _copy_rows(do_left.index(0), do_rows, head_mask, 0, LEFT, D_V)
        _copy_rows(do_right.index(0), do_rows, head_mask, LEFT, RIGHT, D_V)
    kv_ptr += (row // seq_q) * _known_multiple(stride_kv_b)
    kv_ptr += group.to(gl.int64) * _known_multiple(stride_kv_g)
    for t in range((end_slot + TILE - 1) // TILE):
        # Compared before it is narrowed: 2**40 is not position 0.
        valid = (ahead >= 0) & (ahead < seq_kv)
        k_rows = kv_ptr + ahead.to(gl.int64) * _known_multiple(stride_kv_s)
        position = gl.where(valid, ahead, -1).to(gl.int32)
        ahead = _load_positions(slots_ptr, (t + 1) * TILE, end_slot)
        mbarrier.wait(k_free, (t & 1) ^ 1)
        _copy_rows(k_left.index(0), k_rows, valid, 0, LEFT, D_TOTAL)
        _copy_rows(k_right.index(0), k_rows, valid, LEFT, RIGHT, D_TOTAL)
        if TAIL > 0:
            _copy_rows(k_tail0.index(0), k_rows, valid, VALUE, HALF_TAIL, D_TOTAL)
            _copy_rows(k_tail1.index(0), k_rows, valid, VALUE + HALF_TAIL, HALF_TAIL, D_TOTAL)
        async_copy.commit_group()
        positions.index(t & 1).store(position)
        _publish_copies(k_full, 0, True)


@gluon.jit
def _zero(t):
    """Return 0, in a way that the compiler can't know.

    A product has a descriptor for every 16 channels of its operands. They are the same for every tile, so the compiler would
    keep all of them, two hundred, and spill them.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _row_dots(
    out_ptr, dout_ptr, stride_do_h, first_head, head_count, D_V: gl.constexpr,
):  # fmt: skip
    """Return rowsum(dout * out) of the heads of an item."""
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, DOT_LAYOUT))
    head_mask = heads < head_count
    heads = (first_head + heads).to(gl.int64)
    out_rows = out_ptr + heads * D_V
    do_rows = dout_ptr + heads * _known_multiple(stride_do_h)
    dots = gl.full([BLOCK_H], 0.0, gl.float32, gl.SliceLayout(1, DOT_LAYOUT))
    for start in range(0, D_V, 64):
        cols = start + gl.arange(0, 64, layout=gl.SliceLayout(0, DOT_LAYOUT))
        mask = head_mask[:, None]
        if D_V % 64 != 0:
            mask = mask & (cols < D_V)[None, :]
        out = gl.load(out_rows[:, None] + cols[None, :], mask=mask, other=0.0)
        dout = gl.load(do_rows[:, None] + cols[None, :], mask=mask, other=0.0)
        dots += gl.sum(out.to(gl.float32) * dout.to(gl.float32), 1)
    return dots


@gluon.jit
def _add_scores(scores, q, k, t, SIDE: gl.constexpr, IS_FIRST: gl.constexpr):
    z = _zero(t)
    return warpgroup_mma(
        q.index(z), k.index(z).slice(SIDE * HALF, HALF).permute([1, 0]), scores, use_acc=not IS_FIRST, is_async=True
    )


@gluon.jit
def _start_scores(
    zero, q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, t,
    SIDE: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Start Q K^T for the keys of one side."""
    scores = _add_scores(zero, q_left, k_left, t, SIDE, True)
    scores = _add_scores(scores, q_right, k_right, t, SIDE, False)
    if TAIL > 0:
        scores = _add_scores(scores, q_tail0, k_tail0, t, SIDE, False)
        scores = _add_scores(scores, q_tail1, k_tail1, t, SIDE, False)
    return scores


@gluon.jit
def _start_dweights(zero, k_left, k_right, do_left, do_right, t, SIDE: gl.constexpr):
    dweights = _add_scores(zero, do_left, k_left, t, SIDE, True)
    return _add_scores(dweights, do_right, k_right, t, SIDE, False)


@gluon.jit
def _start_piece(
    dlogits, weights, q_side, q_own_tail, do_side, t,
    c: gl.constexpr, PIECE: gl.constexpr, HALF_TAIL: gl.constexpr, HAS_DOUT: gl.constexpr,
):  # fmt: skip
    if HALF_TAIL > 0 and c == 0:
        tile = _start_dkv(dlogits, weights, q_own_tail, do_side, t, 0, HALF_TAIL, False)
    else:
        tile = _start_dkv(dlogits, weights, q_side, do_side, t, c - (1 if HALF_TAIL > 0 else 0), PIECE, HAS_DOUT)
    return tile


@gluon.jit
def _start_dkv(
    dlogits, weights, q, do, t, c: gl.constexpr, WIDTH: gl.constexpr, HAS_DOUT: gl.constexpr,
):  # fmt: skip
    """Start dS^T q + P^T dout for some channels."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    z = _zero(t)
    tile = gl.full([TILE, WIDTH], 0.0, gl.float32, LAYOUT)
    tile = warpgroup_mma(
        dlogits.index(z).permute([1, 0]), q.index(z).slice(c * WIDTH, WIDTH, 1), tile, use_acc=False, is_async=True
    )
    if HAS_DOUT:
        tile = warpgroup_mma(weights.index(z).permute([1, 0]), do.index(z).slice(c * WIDTH, WIDTH, 1), tile, is_async=True)
    return tile


@gluon.jit
def _add_dkv(
    dkv_ptr, positions, tile,
    START: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr, ROW_STRIDE: gl.constexpr, ATOMICS: gl.constexpr,
):  # fmt: skip
    """Add a tile of dkv to the rows of its keys."""
    LAYOUT: gl.constexpr = _atomic_layout(WIDTH, ATOMICS)
    if ATOMICS > 0:
        tile = gl.convert_layout(tile, _atomic_layout(WIDTH, 1))
    if ATOMICS > 1:
        tile = gl.convert_layout(tile, LAYOUT)
    position = positions.load(gl.SliceLayout(1, LAYOUT))
    rows_ptr = dkv_ptr + START + position.to(gl.int64) * ROW_STRIDE
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = (position >= 0)[:, None]
    if START + WIDTH > END:
        mask = mask & (cols < END - START)[None, :]
    if ATOMICS < 0:
        mask = mask & (tile == 1e30)
    gl.atomic_add(rows_ptr[:, None] + cols[None, :], tile, mask=mask, sem="relaxed")


@gluon.jit
def _store_rows(
    rows_ptr, staged, acc, head_count, OWN: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr,
):  # fmt: skip
    """Store an accumulator as rows, through shared memory that nobody else uses any more."""
    LANES: gl.constexpr = WIDTH // 8 if WIDTH < 256 else 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    staged.store(acc.to(staged.dtype))
    tile = staged.load(LAYOUT)
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LAYOUT))
    cols = START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = (heads < head_count)[:, None]
    if START + WIDTH > END:
        mask = mask & (cols < END)[None, :]
    gl.store((rows_ptr + heads.to(gl.int64) * END)[:, None] + cols[None, :], tile, mask=mask)


@gluon.jit
def _gradients(
    out_ptr, lse_ptr, dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,
    topk_length_ptr, attn_sink_ptr, dq_ptr, dkv_ptr, dsink_ptr, softmax_scale, seq_q, seq_kv, topk,
    q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, do_left, do_right,
    weights, dlogits, positions, k_full, k_free, weights_full, weights_free,
    q_side, q_own_tail, k_side, k_own_tail, do_side,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    TAIL: gl.constexpr, VALUE: gl.constexpr,
    SIDE: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr, CHUNK: gl.constexpr, ATOMICS: gl.constexpr, OVERLAP: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = k_left.dtype
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(1, SCORES_LAYOUT)
    SLOTS_LAYOUT: gl.constexpr = gl.SliceLayout(0, SCORES_LAYOUT)
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    HALF_TAIL: gl.constexpr = TAIL // 2
    PIECE: gl.constexpr = CHUNK if CHUNK < WIDTH else WIDTH
    row, group, first_head, head_count = _locate_item(gl.program_id(0), HEADS, KV_GROUP)
    end_slot = _end_slot(topk_length_ptr, row, topk)
    batch = row // seq_q
    heads = gl.arange(0, BLOCK_H, layout=HEADS_LAYOUT)
    head_mask = heads < head_count
    row_heads = row * HEADS + first_head + heads
    lse = gl.load(lse_ptr + row_heads, mask=head_mask, other=0.0)
    # `shift` is what is subtracted from keep * dP, so it carries the gradient of lse too.
    shift = gl.full([BLOCK_H], 0.0, gl.float32, HEADS_LAYOUT)
    if dout_ptr is not None:
        do_ptr = dout_ptr + batch * _known_multiple(stride_do_b) + (row % seq_q) * _known_multiple(stride_do_s)
        dots = _row_dots(out_ptr + row * HEADS * D_V, do_ptr, stride_do_h, first_head, head_count, D_V)
        shift = gl.convert_layout(dots, HEADS_LAYOUT)
    keep = gl.full([BLOCK_H], 1.0, gl.float32, HEADS_LAYOUT)
    if attn_sink_ptr is not None:
        sink = gl.load(attn_sink_ptr + first_head + heads, mask=head_mask, other=0.0)
        keep = gl.where(lse == -float("inf"), 0.0, 1.0 / (1.0 + gl.exp2((sink - lse) * LOG2_E)))
        if dsink_ptr is not None and SIDE == 0:
            # An empty row adds nothing, also when dout is NaN there.
            dsink = gl.where(lse == -float("inf"), 0.0, (keep - 1.0) * shift)
            gl.store(dsink_ptr + row_heads, dsink, mask=head_mask)
        shift *= keep
    if dlse_ptr is not None:
        shift -= gl.load(dlse_ptr + row_heads, mask=head_mask, other=0.0)
    logit_scale = softmax_scale * LOG2_E
    lse_log2 = lse * LOG2_E

    zero = gl.full([BLOCK_H, HALF], 0.0, gl.float32, SCORES_LAYOUT)
    dq = gl.full([BLOCK_H, WIDTH], 0.0, gl.float32, DQ_LAYOUT)
    if TAIL > 0:
        TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF_TAIL, 16])
        dq_tail = gl.full([BLOCK_H, HALF_TAIL], 0.0, gl.float32, TAIL_LAYOUT)
    if dkv_ptr is not None:
        dkv_ptr += (batch * seq_kv * KV_GROUP + group) * D_TOTAL
    HAS_DOUT: gl.constexpr = dout_ptr is not None
    HAS_TAIL: gl.constexpr = 1 if TAIL > 0 else 0
    PIECES: gl.constexpr = WIDTH // PIECE + HAS_TAIL
    num_tiles = (end_slot + TILE - 1) // TILE
    if EARLY > 0:
        mbarrier.wait(k_full, 0, pred=num_tiles > 0)
        scores = _start_scores(
            zero, q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, num_tiles, SIDE, TAIL
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
    for t in range(num_tiles):
        parity = t & 1
        if EARLY == 0:
            mbarrier.wait(k_full, parity)
            scores = _start_scores(
                zero, q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, t, SIDE, TAIL
            )
        if HAS_DOUT:
            dweights = _start_dweights(zero, k_left, k_right, do_left, do_right, t, SIDE)
        if EARLY == 0:
            scores = warpgroup_mma_wait(2 if HAS_DOUT else 0, deps=[scores])
        valid = positions.index(parity).slice(SIDE * HALF, HALF).load(SLOTS_LAYOUT) >= 0
        # Both selections are needed: an empty row has lse = -inf and may have NaN gradients.
        p = gl.where(valid[None, :], gl.exp2(scores * logit_scale - lse_log2[:, None]), 0.0)
        if HAS_DOUT:
            dweights = warpgroup_mma_wait(0, deps=[dweights])
            ds = keep[:, None] * dweights - shift[:, None]
        else:
            ds = gl.expand_dims(-shift, 1)
        ds = gl.where(valid[None, :], p * ds * softmax_scale, 0.0)
        mbarrier.wait(weights_free, parity ^ 1)
        dlogits.index(0).slice(SIDE * HALF, HALF, 1).store(ds.to(ELEMENT))
        if dkv_ptr is not None and HAS_DOUT:
            weights.index(0).slice(SIDE * HALF, HALF, 1).store((p * keep[:, None]).to(ELEMENT))
        fence_async_shared()
        block_barrier()
        mbarrier.arrive(weights_full, count=1)
        mbarrier.wait(weights_full, parity)
        if dq_ptr is not None:
            z = _zero(t)
            dq = warpgroup_mma(dlogits.index(z), k_side.index(z), dq, is_async=True)
            if TAIL > 0:
                dq_tail = warpgroup_mma(dlogits.index(z), k_own_tail.index(z), dq_tail, is_async=True)
        if OVERLAP > 0 and dkv_ptr is not None:
            tile = _start_piece(dlogits, weights, q_side, q_own_tail, do_side, t, 0, PIECE, HALF_TAIL, HAS_DOUT)
            LATER: gl.constexpr = 2 if TAIL == 0 and HAS_DOUT else 1
        else:
            LATER: gl.constexpr = 0
        if dq_ptr is not None:
            if TAIL > 0:
                dq, dq_tail = warpgroup_mma_wait(LATER, deps=[dq, dq_tail])
            else:
                dq = warpgroup_mma_wait(LATER, deps=[dq])
        mbarrier.arrive(k_free, count=1)
        if dkv_ptr is not None:
            for c in gl.static_range(PIECES):
                if OVERLAP == 0 or (OVERLAP == 2 and c > 0):
                    tile = _start_piece(dlogits, weights, q_side, q_own_tail, do_side, t, c, PIECE, HALF_TAIL, HAS_DOUT)
                    tile = warpgroup_mma_wait(0, deps=[tile])
                elif OVERLAP == 2:
                    tile = warpgroup_mma_wait(0, deps=[tile])
                elif c + 1 < PIECES:
                    following = _start_piece(
                        dlogits, weights, q_side, q_own_tail, do_side, t, c + 1, PIECE, HALF_TAIL, HAS_DOUT
                    )
                    tile = warpgroup_mma_wait(2 if HAS_DOUT else 1, deps=[tile])
                else:
                    tile = warpgroup_mma_wait(0, deps=[tile])
                if c + 1 < PIECES:
                    if c < HAS_TAIL:
                        _add_dkv(
                            dkv_ptr, positions.index(parity), tile, VALUE + SIDE * HALF_TAIL, HALF_TAIL, D_TOTAL,
                            KV_GROUP * D_TOTAL, ATOMICS,
                        )  # fmt: skip
                    else:
                        _add_dkv(
                            dkv_ptr, positions.index(parity), tile, START + (c - HAS_TAIL) * PIECE, PIECE, D_TOTAL,
                            KV_GROUP * D_TOTAL, ATOMICS,
                        )  # fmt: skip
                    if OVERLAP == 1:
                        tile = following
        mbarrier.arrive(weights_free, count=1)
        if EARLY > 0:
            # After the last tile the products are made of what is there, and not used.
            mbarrier.wait(k_full, parity ^ 1, pred=t + 1 < num_tiles)
            scores = _start_scores(
                zero, q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, t, SIDE, TAIL
            )
        if dkv_ptr is not None:
            _add_dkv(
                dkv_ptr, positions.index(parity), tile, START + (WIDTH - PIECE), PIECE, D_TOTAL,
                KV_GROUP * D_TOTAL, ATOMICS,
            )  # fmt: skip
        if EARLY > 0:
            scores = warpgroup_mma_wait(0, deps=[scores])
    if dq_ptr is not None:
        rows_ptr = dq_ptr + (row * HEADS + first_head) * D_TOTAL
        _store_rows(rows_ptr, k_side.index(0), dq, head_count, 0, START, WIDTH, D_TOTAL)
        if TAIL > 0:
            _store_rows(rows_ptr, k_own_tail.index(0), dq_tail, head_count, 0, VALUE + SIDE * HALF_TAIL, HALF_TAIL, D_TOTAL)


@gluon.constexpr_function
def _atomic_layout(width, atomics):
    """Return how a product `[64 keys, width]` is spread over the threads that add it."""
    if atomics <= 0:
        return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    wide = [[0, 1 << b] for b in range(5, width.bit_length() - 1)]
    if atomics == 1:
        # Two lanes of a quad swap a pair: four channels a thread, 64 bytes of a row in a line.
        return gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], *wide],
            lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, width],
        )  # fmt: skip
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [1, 0], *wide],
        lane_bases=[[0, 8], [0, 4], [0, 16], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, width],
    )  # fmt: skip


# Lengths change from call to call: one binary serves them all, and a warm one is warm for any length.
@gluon.jit(do_not_specialize=["seq_q", "seq_kv", "topk"])
def _sparse_attn_bwd_hopper_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    out_ptr, lse_ptr,  # contiguous, as the forward made them
    dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,  # a pointer is None for a gradient that did not arrive
    dq_ptr, dkv_ptr, dsink_ptr,  # contiguous; None for what is not needed; dkv fp32, dsink fp32 [rows, heads]
    softmax_scale, seq_q, seq_kv, topk,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, CHUNK: gl.constexpr, ATOMICS: gl.constexpr, OVERLAP: gl.constexpr, EARLY: gl.constexpr,
    GRADIENT_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = q_ptr.dtype.element_ty
    VALUE: gl.constexpr = LEFT + RIGHT
    HALF_TAIL: gl.constexpr = TAIL // 2
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    TAIL_ROWS: gl.constexpr = gl.NVMMASharedLayout(64 if HALF_TAIL == 32 else 128, 16, 2)
    q_left = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, LEFT], ROWS)
    q_right = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, RIGHT], ROWS)
    k_left = gl.allocate_shared_memory(ELEMENT, [1, TILE, LEFT], ROWS)
    k_right = gl.allocate_shared_memory(ELEMENT, [1, TILE, RIGHT], ROWS)
    do_left = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, LEFT], ROWS)
    do_right = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, RIGHT], ROWS)
    q_tail0 = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, HALF_TAIL], TAIL_ROWS) if TAIL > 0 else q_left
    q_tail1 = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, HALF_TAIL], TAIL_ROWS) if TAIL > 0 else q_left
    k_tail0 = gl.allocate_shared_memory(ELEMENT, [1, TILE, HALF_TAIL], TAIL_ROWS) if TAIL > 0 else k_left
    k_tail1 = gl.allocate_shared_memory(ELEMENT, [1, TILE, HALF_TAIL], TAIL_ROWS) if TAIL > 0 else k_left
    weights = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, TILE], ROWS)
    dlogits = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, TILE], ROWS)
    positions = gl.allocate_shared_memory(gl.int32, [2, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))

    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    weights_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(k_free, count=2)
    mbarrier.init(weights_full, count=2)
    mbarrier.init(weights_free, count=2)
    scale = gl.to_tensor(softmax_scale)

    gl.warp_specialize(
        [
            (_gradients, (
                out_ptr, lse_ptr, dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,
                topk_length_ptr, attn_sink_ptr, dq_ptr, dkv_ptr, dsink_ptr, scale, seq_q, seq_kv, topk,
                q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, do_left, do_right,
                weights, dlogits, positions, k_full, k_free, weights_full, weights_free,
                q_left, q_tail0, k_left, k_tail0, do_left,
                HEADS, KV_GROUP, D_TOTAL, D_V, TAIL, VALUE,
                gl.constexpr(0), gl.constexpr(0), LEFT, CHUNK, ATOMICS, OVERLAP, EARLY,
            )),
            (_gradients, (
                out_ptr, lse_ptr, dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,
                topk_length_ptr, attn_sink_ptr, dq_ptr, dkv_ptr, dsink_ptr, scale, seq_q, seq_kv, topk,
                q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, do_left, do_right,
                weights, dlogits, positions, k_full, k_free, weights_full, weights_free,
                q_right, q_tail1, k_right, k_tail1, do_right,
                HEADS, KV_GROUP, D_TOTAL, D_V, TAIL, VALUE,
                gl.constexpr(1), LEFT, RIGHT, CHUNK, ATOMICS, OVERLAP, EARLY,
            )),
            (_gather, (
                q_ptr, stride_q_b, stride_q_s, stride_q_h,
                kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                indices_ptr, stride_i_b, stride_i_s, stride_i_g,
                dout_ptr, stride_do_b, stride_do_s, stride_do_h,
                topk_length_ptr, seq_q, seq_kv, topk,
                q_left, q_right, q_tail0, q_tail1, k_left, k_right, k_tail0, k_tail1, do_left, do_right, positions,
                k_full, k_free,
                HEADS, KV_GROUP, D_TOTAL, D_V, LEFT, RIGHT, TAIL,
            )),
        ],
        [4, 4],
        [GRADIENT_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip

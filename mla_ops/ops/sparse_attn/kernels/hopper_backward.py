"""Backward kernel for wide rows on sm90: three warpgroups with a role each, in Gluon. The formulas: `backward.py`.

A program is one row of that kernel's grid with 64 heads: a (batch, query, group) and a block of its heads. It goes
through the slots in tiles of 64 keys.

NOTE [Who makes what]
  gather        copies the queries and `dout` once, then the rows of every tile, as the gather of `hopper_forward.py`
                does, and writes the position of every slot, -1 where it is invalid.
  gradients x2  a tile in two steps. First every group makes S = Q K^T and dP = dO V^T for half of the keys, hence P and
                dS in registers, and puts both into shared memory for the other. Then every group makes half of the
                channels: dQ += dS K stays in its registers, dKV = dS^T Q + P^T dO leaves it piece by piece.
A row is cut into value channels 2 * WIDTH wide, which cover d_v, and a tail; each group owns half of both. All are
padded with zeros past `d_total`, `dout` past `d_v`.

NOTE [The order of a tile]
dKV is bound by the atomic additions, which the memory system takes more slowly than the tensor cores make them. So S
of the next tile is started before the last piece of this one is added: 15.9 against 17.3 ms at 576/512 with 128 heads.
Its rows have come by then, because their buffer is free as soon as dQ has been made. dP is not started as early, its
registers are taken: with it, or with two pieces at a time, ptxas makes every product wait for the one before it.
After the last tile that product reads what is there; nobody uses it.

NOTE [Additions in lines]
A thread holds two neighbouring channels of a product. Swapped within a warp, until a thread has four and eight threads
a line of 128 bytes, the same kernel takes a quarter less time: 16.0 to 16.9 against 21.7 ms.

With places (NOTE [Places] in `mla_ops/kernels/row_sums.py`) nothing is added: `positions` holds the place of every
slot, and a piece is stored there. Rows of two-byte channels are swapped once more within the row, not between rows: 16
bytes a thread, 64 bytes of a row at a time.

NOTE [Registers of the gradients]
12 warps start at 168 registers a thread, and `setmaxnreg` gives 232 to a thread of the gradients and 40 to one of the
gather. dQ takes 144 of the 232, and a piece of dKV 32. None is left for descriptors, of which a product has two for
every 16 channels: they are the same for every tile, so the compiler would keep all of them, and spill. `_zero` hides
that they are.

NOTE [Barriers of the backward]
Every tile t completes one phase of each barrier; readers wait for parity t & 1, writers for the opposite one.

  barrier        arrives                                  waits                            guards
  k_full         gather, rows are in (t = 0: all inputs)  gradients, before S              rows, positions[t & 1]
  k_free         gradients x2, after dQ                   gather, before the next rows     rows
  weights_full   gradients x2, P and dS are stored        gradients, before dQ             P, dS
  weights_free   gradients x2, after the last product     gradients, before storing P, dS  P, dS

`positions` is read until the last addition of a tile, after `k_free`; so it is kept twice, and the gather writes it
again after the `k_free` of the tile between, which the additions precede. dQ leaves through the rows' buffer, each
group through its own channels, which are read by nobody else once `weights_full` of the last tile is complete.
What is written for wgmma (rows by the gather, P and dS by the gradients) is fenced by every thread that wrote it,
before the barrier that precedes the arrival; see NOTE [What orders the accesses] in `hopper_forward.py`.
"""

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
from mla_ops.ops.sparse_attn.kernels.hopper_items import (
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

GRADIENT_REGISTERS = gl.constexpr(232)
GATHER_REGISTERS = gl.constexpr(40)
# Channels of dkv that are made and added at a time.
PIECE = gl.constexpr(64)

SCORES_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
# A warp has the sixteen heads that it has of a product.
DOTS_LAYOUT = gl.constexpr(gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0]))


@gluon.constexpr_function
def _product_layout(width):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def _swapped_layout(width, in_lines):
    """Return `_product_layout` of a piece after neighbouring threads have swapped a pair: four channels a thread.

    `in_lines`: after threads of neighbouring keys have swapped a quad as well, so that eight threads have a line.
    """
    register, lane = ([1, 0], [0, 16]) if in_lines else ([0, 16], [1, 0])
    wide = [[0, 1 << b] for b in range(5, width.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], register, *wide],
        lane_bases=[[0, 8], [0, 4], lane, [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, width],
    )  # fmt: skip


@gluon.constexpr_function
def _packed_layout(width):
    """Return `_swapped_layout` after the next swap within a row: eight channels a thread, 16 bytes of a stored row."""
    wide = [[0, 1 << b] for b in range(5, width.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *wide],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, width],
    )  # fmt: skip


@gluon.jit
def _load_positions(slots_ptr, first, end_slot):
    slots = first + gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    return gl.load(slots_ptr + slots, mask=slots < end_slot, other=-1)


@gluon.jit
def _copy_parts(parts, row_ptrs, row_mask, WIDTH: gl.constexpr, HALF_TAIL: gl.constexpr, END: gl.constexpr):
    """Start the copy of some rows into their parts: two of WIDTH channels and, where they have a tail, its halves."""
    _copy_rows(parts[0].index(0), row_ptrs, row_mask, 0, WIDTH, END)
    _copy_rows(parts[1].index(0), row_ptrs, row_mask, WIDTH, WIDTH, END)
    if HALF_TAIL > 0:
        _copy_rows(parts[2].index(0), row_ptrs, row_mask, 2 * WIDTH, HALF_TAIL, END)
        _copy_rows(parts[3].index(0), row_ptrs, row_mask, 2 * WIDTH + HALF_TAIL, HALF_TAIL, END)


@gluon.jit
def _gather(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    dout_ptr, stride_do_b, stride_do_s, stride_do_h,
    topk_length_ptr, places_ptr, first_item, seq_q, seq_kv, topk,
    q_parts, k_parts, do_parts, positions, k_full, k_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    WIDTH: gl.constexpr, HALF_TAIL: gl.constexpr,
):  # fmt: skip
    item = first_item + gl.program_id(0)
    row, group, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
    batch, query = row // seq_q, row % seq_q
    slots_ptr, end_slot = _item_slots(
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr, item, seq_q, topk, HEADS, KV_GROUP
    )
    ahead = _load_positions(slots_ptr, 0, end_slot)
    if places_ptr is not None:
        places_ptr += (row * KV_GROUP + group) * topk
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    head_mask = heads < head_count
    heads = (first_head + heads).to(gl.int64)
    q_ptr += batch * _known_multiple(stride_q_b) + query * _known_multiple(stride_q_s)
    _copy_parts(q_parts, q_ptr + heads * _known_multiple(stride_q_h), head_mask, WIDTH, HALF_TAIL, D_TOTAL)
    if dout_ptr is not None:
        dout_ptr += batch * _known_multiple(stride_do_b) + query * _known_multiple(stride_do_s)
        _copy_parts(do_parts, dout_ptr + heads * _known_multiple(stride_do_h), head_mask, WIDTH, 0, D_V)
    async_copy.commit_group()
    kv_ptr += batch * _known_multiple(stride_kv_b) + group.to(gl.int64) * _known_multiple(stride_kv_g)
    for t in range((end_slot + TILE - 1) // TILE):
        # Compared before it is narrowed: 2**40 is not position 0.
        valid = (ahead >= 0) & (ahead < seq_kv)
        position = gl.where(valid, ahead, -1).to(gl.int32)
        row_ptrs = kv_ptr + ahead.to(gl.int64) * _known_multiple(stride_kv_s)
        ahead = _load_positions(slots_ptr, (t + 1) * TILE, end_slot)
        mbarrier.wait(k_free, (t & 1) ^ 1)
        _copy_parts(k_parts, row_ptrs, valid, WIDTH, HALF_TAIL, D_TOTAL)
        async_copy.commit_group()
        if places_ptr is not None:
            # Loaded while the rows come: a tile ahead of them, as positions are, there are no registers for it.
            position = gl.where(valid, _load_positions(places_ptr, t * TILE, end_slot), -1)
        positions.index(t & 1).store(position)
        _publish_copies(k_full, 0, True)
    # Without tiles nobody has waited for the queries.
    async_copy.wait_group(0)


@gluon.jit
def _dout_dot_out(out_ptr, dout_ptr, stride_do_h, first_head, head_count, D_V: gl.constexpr):
    """Return rowsum(dout * out) of the heads of a program; the pointers are those of its query."""
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, DOTS_LAYOUT))
    mask = (heads < head_count)[:, None]
    heads = (first_head + heads).to(gl.int64)
    out_ptrs = out_ptr + heads * D_V
    do_ptrs = dout_ptr + heads * _known_multiple(stride_do_h)
    products = gl.full([BLOCK_H, 64], 0.0, gl.float32, DOTS_LAYOUT)
    # Unrolled, so that the loads are under way together: nothing else runs while a program starts.
    for start in gl.static_range(0, D_V, 64):
        cols = start + gl.arange(0, 64, layout=gl.SliceLayout(0, DOTS_LAYOUT))
        some = mask & (cols < D_V)[None, :]
        out = gl.load(out_ptrs[:, None] + cols[None, :], mask=some, other=0.0)
        dout = gl.load(do_ptrs[:, None] + cols[None, :], mask=some, other=0.0)
        products += out.to(gl.float32) * dout.to(gl.float32)
    return gl.sum(products, 1)


@gluon.jit
def _zero(t):
    """Return 0 in a way that hides it; see NOTE [Registers of the gradients]."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _start_scores(a_parts, k_parts, t, SIDE: gl.constexpr, COUNT: gl.constexpr):
    """Start `a @ k^T` over COUNT parts of the rows, for the keys of a side."""
    scores = gl.full([BLOCK_H, HALF], 0.0, gl.float32, SCORES_LAYOUT)
    for c in gl.static_range(COUNT):
        zero = _zero(t)
        keys = k_parts[c].index(zero).slice(SIDE * HALF, HALF)
        scores = warpgroup_mma(a_parts[c].index(zero), keys.permute([1, 0]), scores, use_acc=c > 0, is_async=True)
    return scores


@gluon.jit
def _dkv_piece(dlogits, q, weights, dout, t, START: gl.constexpr, WIDTH: gl.constexpr, HAS_DOUT: gl.constexpr):
    """Return dS^T q, plus P^T dout if it HAS_DOUT, for WIDTH channels of a part."""
    zero = _zero(t)
    tile = gl.full([TILE, WIDTH], 0.0, gl.float32, _product_layout(WIDTH))
    q = q.index(zero).slice(START, WIDTH, 1)
    tile = warpgroup_mma(dlogits.index(zero).permute([1, 0]), q, tile, use_acc=False, is_async=True)
    if HAS_DOUT:
        dout = dout.index(zero).slice(START, WIDTH, 1)
        tile = warpgroup_mma(weights.index(zero).permute([1, 0]), dout, tile, is_async=True)
    return warpgroup_mma_wait(0, deps=[tile])


@gluon.jit
def _put_piece(
    dkv_ptr, positions, tile, START: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr, ROW_STRIDE: gl.constexpr,
    IS_PLACED: gl.constexpr,
):  # fmt: skip
    """Add a piece of dkv to the rows of its keys, or store it where they are; see NOTE [Additions in lines]."""
    # Rows of two bytes a channel become 16 bytes a thread where four-byte channels become lines.
    IS_PACKED: gl.constexpr = dkv_ptr.dtype.element_ty.primitive_bitwidth == 16
    LAYOUT: gl.constexpr = _packed_layout(WIDTH) if IS_PACKED else _swapped_layout(WIDTH, True)
    tile = tile.to(dkv_ptr.dtype.element_ty)
    # Two swaps, each between two threads; for both at once the compiler would take shared memory that is not there.
    tile = gl.convert_layout(gl.convert_layout(tile, _swapped_layout(WIDTH, False)), LAYOUT)
    position = positions.load(gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = (position >= 0)[:, None]
    if START + WIDTH > END:
        mask = mask & (cols < END - START)[None, :]
    row_ptrs = dkv_ptr + START + position.to(gl.int64) * ROW_STRIDE
    if IS_PLACED:
        gl.store(row_ptrs[:, None] + cols[None, :], tile, mask=mask)
        # Keeps the stores before the next product: moved into it, they hold registers, and every product would wait.
        block_barrier()
    else:
        gl.atomic_add(row_ptrs[:, None] + cols[None, :], tile, mask=mask, sem="relaxed")


@gluon.jit
def _store_dq(row_ptr, staged, acc, head_count, START: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr):
    """Store channels START.. of dq, 16 bytes a thread, through shared memory."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    staged.store(acc.to(staged.dtype))
    tile = staged.load(LAYOUT)
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LAYOUT))
    cols = START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    mask = (heads < head_count)[:, None] & (cols < END)[None, :]
    gl.store((row_ptr + heads * END)[:, None] + cols[None, :], tile, mask=mask)


@gluon.jit
def _gradients(
    out_ptr, lse_ptr, dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,
    topk_length_ptr, attn_sink_ptr, dq_ptr, dkv_ptr, dsink_ptr, softmax_scale, first_item, seq_q, seq_kv, topk,
    q_parts, k_parts, do_parts, weights, dlogits, positions, k_full, k_free, weights_full, weights_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    WIDTH: gl.constexpr, HALF_TAIL: gl.constexpr, IS_PLACED: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(1, SCORES_LAYOUT)
    ELEMENT: gl.constexpr = k_parts[0].dtype
    HAS_DOUT: gl.constexpr = dout_ptr is not None
    PARTS: gl.constexpr = 4 if HALF_TAIL > 0 else 2
    TAIL_START: gl.constexpr = 2 * WIDTH + SIDE * HALF_TAIL
    item = first_item + gl.program_id(0)
    row, group, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
    batch, query = row // seq_q, row % seq_q
    end_slot = _end_slot(topk_length_ptr, row, topk)
    heads = gl.arange(0, BLOCK_H, layout=HEADS_LAYOUT)
    head_mask = heads < head_count
    row_heads = row * HEADS + first_head + heads
    lse = gl.load(lse_ptr + row_heads, mask=head_mask, other=0.0)
    # `shift` is what is subtracted from keep * dP, so it carries the gradient of lse too.
    shift = gl.full([BLOCK_H], 0.0, gl.float32, HEADS_LAYOUT)
    if HAS_DOUT:
        query_dout_ptr = dout_ptr + batch * _known_multiple(stride_do_b) + query * _known_multiple(stride_do_s)
        dots = _dout_dot_out(out_ptr + row * HEADS * D_V, query_dout_ptr, stride_do_h, first_head, head_count, D_V)
        shift = gl.convert_layout(dots, HEADS_LAYOUT)
    keep = gl.full([BLOCK_H], 1.0, gl.float32, HEADS_LAYOUT)
    if attn_sink_ptr is not None:
        sink = gl.load(attn_sink_ptr + first_head + heads, mask=head_mask, other=0.0)
        keep = gl.where(lse == -float("inf"), 0.0, 1.0 / (1.0 + gl.exp(sink - lse)))
        if dsink_ptr is not None and SIDE == 0:
            # An empty row adds nothing, also when dout is NaN there.
            dsink = gl.where(lse == -float("inf"), 0.0, (keep - 1.0) * shift)
            gl.store(dsink_ptr + row_heads, dsink, mask=head_mask)
        shift *= keep
    if dlse_ptr is not None:
        shift -= gl.load(dlse_ptr + row_heads, mask=head_mask, other=0.0)
    logit_scale = softmax_scale * LOG2_E
    lse_log2 = lse * LOG2_E

    dq = gl.full([BLOCK_H, WIDTH], 0.0, gl.float32, _product_layout(WIDTH))
    if HALF_TAIL > 0:
        dq_tail = gl.full([BLOCK_H, HALF_TAIL], 0.0, gl.float32, _product_layout(HALF_TAIL))
    if dkv_ptr is not None:
        HEAD_BLOCKS: gl.constexpr = (HEADS // KV_GROUP + BLOCK_H - 1) // BLOCK_H
        ROW_STRIDE: gl.constexpr = (HEAD_BLOCKS if IS_PLACED else KV_GROUP) * D_TOTAL
        if IS_PLACED:
            dkv_ptr += item % HEAD_BLOCKS * D_TOTAL
        else:
            dkv_ptr += (batch * seq_kv * KV_GROUP + group) * D_TOTAL
    num_tiles = (end_slot + TILE - 1) // TILE
    mbarrier.wait(k_full, 0, pred=num_tiles > 0)
    scores = warpgroup_mma_wait(0, deps=[_start_scores(q_parts, k_parts, num_tiles, SIDE, PARTS)])
    for t in range(num_tiles):
        parity = t & 1
        if HAS_DOUT:
            dweights = _start_scores(do_parts, k_parts, t, SIDE, 2)
        valid = positions.index(parity).slice(SIDE * HALF, HALF).load(gl.SliceLayout(0, SCORES_LAYOUT)) >= 0
        # Both selections are needed: an empty row has lse = -inf and may have NaN gradients.
        p = gl.where(valid[None, :], gl.exp2(scores * logit_scale - lse_log2[:, None]), 0.0)
        ds = -shift[:, None]
        if HAS_DOUT:
            ds = keep[:, None] * warpgroup_mma_wait(0, deps=[dweights]) - shift[:, None]
        ds = gl.where(valid[None, :], p * ds * softmax_scale, 0.0)
        mbarrier.wait(weights_free, parity ^ 1)
        dlogits.index(0).slice(SIDE * HALF, HALF, 1).store(ds.to(ELEMENT))
        if HAS_DOUT and dkv_ptr is not None:
            weights.index(0).slice(SIDE * HALF, HALF, 1).store((p * keep[:, None]).to(ELEMENT))
        fence_async_shared()
        # All threads have fenced when one of them arrives.
        block_barrier()
        mbarrier.arrive(weights_full, count=1)
        mbarrier.wait(weights_full, parity)

        if dq_ptr is not None:
            zero = _zero(t)
            dq = warpgroup_mma(dlogits.index(zero), k_parts[SIDE].index(zero), dq, is_async=True)
            if HALF_TAIL > 0:
                dq_tail = warpgroup_mma(dlogits.index(zero), k_parts[2 + SIDE].index(zero), dq_tail, is_async=True)
                dq, dq_tail = warpgroup_mma_wait(0, deps=[dq, dq_tail])
            else:
                dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(k_free, count=1)
        if dkv_ptr is not None:
            if HALF_TAIL > 0:
                tail = _dkv_piece(dlogits, q_parts[2 + SIDE], weights, do_parts[SIDE], t, 0, HALF_TAIL, False)
                _put_piece(
                    dkv_ptr, positions.index(parity), tail, TAIL_START, HALF_TAIL, D_TOTAL, ROW_STRIDE, IS_PLACED
                )
            for start in gl.static_range(0, WIDTH, PIECE):
                piece = _dkv_piece(dlogits, q_parts[SIDE], weights, do_parts[SIDE], t, start, PIECE, HAS_DOUT)
                if start + PIECE < WIDTH:
                    _put_piece(
                        dkv_ptr, positions.index(parity), piece, SIDE * WIDTH + start, PIECE, D_TOTAL, ROW_STRIDE,
                        IS_PLACED,
                    )  # fmt: skip
        mbarrier.arrive(weights_free, count=1)
        mbarrier.wait(k_full, parity ^ 1, pred=t + 1 < num_tiles)
        scores = _start_scores(q_parts, k_parts, t, SIDE, PARTS)
        if dkv_ptr is not None:
            _put_piece(
                dkv_ptr, positions.index(parity), piece, (SIDE + 1) * WIDTH - PIECE, PIECE, D_TOTAL, ROW_STRIDE,
                IS_PLACED,
            )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[scores])

    if dq_ptr is not None:
        row_ptr = dq_ptr + (row * HEADS + first_head) * D_TOTAL
        _store_dq(row_ptr, k_parts[SIDE].index(0), dq, head_count, SIDE * WIDTH, WIDTH, D_TOTAL)
        if HALF_TAIL > 0:
            _store_dq(row_ptr, k_parts[2 + SIDE].index(0), dq_tail, head_count, TAIL_START, HALF_TAIL, D_TOTAL)


@gluon.jit
def _allocate_parts(ELEMENT: gl.constexpr, WIDTH: gl.constexpr, HALF_TAIL: gl.constexpr):
    """Return buffers for 64 rows, cut as `_copy_parts` says. The first dimension, of 1, is for `_zero`."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    left = gl.allocate_shared_memory(ELEMENT, [1, TILE, WIDTH], ROWS)
    right = gl.allocate_shared_memory(ELEMENT, [1, TILE, WIDTH], ROWS)
    parts = (left, right)
    if HALF_TAIL > 0:
        TAIL_ROWS: gl.constexpr = gl.NVMMASharedLayout(2 * min(HALF_TAIL, 64), 16, 2)
        tail0 = gl.allocate_shared_memory(ELEMENT, [1, TILE, HALF_TAIL], TAIL_ROWS)
        tail1 = gl.allocate_shared_memory(ELEMENT, [1, TILE, HALF_TAIL], TAIL_ROWS)
        parts = (left, right, tail0, tail1)
    return parts


# Lengths change from call to call and are not specialised; of a stride it is whether 16 divides it, for the copies.
@gluon.jit(do_not_specialize=["first_item", "seq_q", "seq_kv", "topk"])
def _sparse_attn_bwd_hopper_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    out_ptr, lse_ptr,  # contiguous, as the forward made them
    dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,  # a pointer is None for a gradient that did not arrive
    dq_ptr, dkv_ptr, dsink_ptr,  # contiguous; None for what is not needed; dkv fp32, dsink fp32 [rows, heads]
    places_ptr,  # None, or int32 [rows, groups, topk]: where dkv, then [places, head blocks, d_total], has the slots
    softmax_scale, first_item, seq_q, seq_kv, topk,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    WIDTH: gl.constexpr, HALF_TAIL: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = q_ptr.dtype.element_ty
    IS_PLACED: gl.constexpr = places_ptr is not None
    q_parts = _allocate_parts(ELEMENT, WIDTH, HALF_TAIL)
    k_parts = _allocate_parts(ELEMENT, WIDTH, HALF_TAIL)
    do_parts = _allocate_parts(ELEMENT, WIDTH, 0)
    weights = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, TILE], gl.NVMMASharedLayout(128, 16, 2))
    dlogits = gl.allocate_shared_memory(ELEMENT, [1, BLOCK_H, TILE], gl.NVMMASharedLayout(128, 16, 2))
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
                topk_length_ptr, attn_sink_ptr, dq_ptr, dkv_ptr, dsink_ptr, scale, first_item, seq_q, seq_kv, topk,
                q_parts, k_parts, do_parts, weights, dlogits, positions, k_full, k_free, weights_full, weights_free,
                HEADS, KV_GROUP, D_TOTAL, D_V, WIDTH, HALF_TAIL, IS_PLACED, gl.constexpr(0),
            )),
            (_gradients, (
                out_ptr, lse_ptr, dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,
                topk_length_ptr, attn_sink_ptr, dq_ptr, dkv_ptr, dsink_ptr, scale, first_item, seq_q, seq_kv, topk,
                q_parts, k_parts, do_parts, weights, dlogits, positions, k_full, k_free, weights_full, weights_free,
                HEADS, KV_GROUP, D_TOTAL, D_V, WIDTH, HALF_TAIL, IS_PLACED, gl.constexpr(1),
            )),
            (_gather, (
                q_ptr, stride_q_b, stride_q_s, stride_q_h,
                kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                indices_ptr, stride_i_b, stride_i_s, stride_i_g,
                dout_ptr, stride_do_b, stride_do_s, stride_do_h,
                topk_length_ptr, places_ptr, first_item, seq_q, seq_kv, topk,
                q_parts, k_parts, do_parts, positions, k_full, k_free,
                HEADS, KV_GROUP, D_TOTAL, D_V, WIDTH, HALF_TAIL,
            )),
        ],
        [4, 4],
        [GRADIENT_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip

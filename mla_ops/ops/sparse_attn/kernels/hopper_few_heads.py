"""Forward kernel for wide rows and few heads on sm90, in Gluon: keys are rows of its products, heads are columns.

With 16 heads the rows of a tile take longer to gather than to multiply. So one warpgroup multiplies, and everything
else is there to keep rows coming. A program stays on its multiprocessor and takes work items in turn, a work item being
a share of the slots of one (batch, query, group); it goes through them in tiles of 64 slots.

NOTE [Roles of few heads]
  attends    S^T = K Q^T with 64 keys as the rows of wgmma and 16 or 32 heads as its columns, the online softmax over
             the keys, and O^T = V^T P^T, where V^T is the tile that S^T was made of, read the other way round. P^T goes
             through shared memory, as the operand with fewer rows must.
  gathers    Rows in 16 bits: one warpgroup copies the rows of every tile with cp.async, as the gather of
             `hopper_forward.py` does, and the queries of an item. An invalid slot is a copy of zero bytes.
  converts   Rows in e4m3: two warpgroups take tiles in turn. Each loads the rows of a tile into its registers while the
             other converts, and stores them as 16-bit channels. Copies would pass shared memory twice instead.
             A warp waits for all loads that it has started, whatever it needs of them. So what is needed to find the
             next rows is loaded before a tile is converted, and its rows are loaded after it has been published;
             meanwhile they are prefetched to L2.
S^T and O^T have one layout, in which a thread has the same heads of both, so what rescales one rescales the other
without a word between threads.

NOTE [Scales are folded]
A tile of e4m3 rows holds the payload without its scales, which is exact. Channels that share a scale make a product of
their own for S^T, which is multiplied by the scale of its key; for O^T the weights are multiplied by it before they are
rounded, hence a P^T for every 128 channels of the value. So any scale is exact as fp32 is.

NOTE [Barriers of few heads]
Every barrier counts one arrival a phase. Tile number n of a program has stage n % STAGES and completes one phase of
both barriers of it; item number i completes one of q_free[i % Q_BUFFERS].

  barrier        arrives                                     waits                             guards
  full[stage]    gathers, rows are in                        attends, before K Q^T             tile, valid, scales
  free[stage]    attends, after V^T P^T                      gathers, before rows are written  tile, valid, scales
  q_full[n]      the first group that converts               attends, first tile of an item    queries
  q_free[n]      attends, after the results of an item       gathers, before the next queries  queries

Queries that are copied beside rows in 16 bits arrive with the first tile of their item and need no q_full; they are
waited for after the tile before has been announced, which the item before needs to end. Rows in e4m3 have two groups,
of which one copies the queries of all items: a group that skipped items would take one phase of q_free for another.
The results of an item leave through its queries, which are dead then.
The gather asks for the rows of tile n before it announces tile n - 1. The buffers of tile n become free with tile
n - STAGES, which has been announced by then, so there is no cycle.
What is written for wgmma is fenced by every thread that wrote it, before the barrier that precedes the arrival; see
NOTE [What orders the accesses] in `hopper_forward.py`.
"""

# ruff: noqa: RUF005, SIM113 (Triton has no starred tuples and no enumerate)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mla_ops.kernels.gluon_compat import block_barrier
from mla_ops.ops.sparse_attn.kernels.hopper_few_heads_gather import (
    PART,
    PIECE,
    Pool,
    Slots,
    _first_tile,
    _gather,
    _gather_converting,
    _held_scales,
    _locate_item,
)
from mla_ops.ops.sparse_attn.kernels.hopper_items import LN_2, LOG2_E, RESCALE_ABOVE, TILE


@gluon.constexpr_function
def _scale_of(piece, value):
    """Return which of a row's scales is that of a piece: parts of the value, then 64 channels each."""
    num_values = -(-value // PART.value)
    return piece if piece < num_values else (value + (piece - num_values) * PIECE.value) // PART.value


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
    q, k, weights, valid, row_scales, full, free, q_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_V: gl.constexpr, VALUE: gl.constexpr,
    BLOCK_H: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr,
    NUM_SCALES: gl.constexpr, D_TAIL: gl.constexpr, HAS_Q_FULL: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
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
        if HAS_Q_FULL:
            mbarrier.wait(q_full.index(buffer), (items // Q_BUFFERS) & 1)
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
    q_full = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(Q_BUFFERS):
        mbarrier.init(q_full.index(i), count=1)
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
                    q, k, weights, valid, row_scales, full, free, q_full, q_free,
                    HEADS, KV_GROUP, D_V, VALUE, BLOCK_H, STAGES, Q_BUFFERS, NUM_SCALES, D_TAIL,
                    gl.constexpr(True), IS_NEGATIVE_SCALE,
                )),
                (_gather_converting, (
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                    slots, pool, q, k, k_words, valid, scales_2d, full, free, q_full, q_free,
                    HEADS, KV_GROUP, D_TOTAL, VALUE, STAGES, Q_BUFFERS, IS_PAGED,
                    D_PAYLOAD, D_TAIL, NUM_SCALES, SCALE_OFFSET, TAIL_OFFSET, gl.constexpr(0),
                )),
                (_gather_converting, (
                    q_ptr, stride_q_b, stride_q_s, stride_q_h, kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                    slots, pool, q, k, k_words, valid, scales_2d, full, free, q_full, q_free,
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
                    q, k, weights, valid, valid, full, free, q_full, q_free,
                    HEADS, KV_GROUP, D_V, VALUE, BLOCK_H, STAGES, Q_BUFFERS, NUM_SCALES, D_TAIL,
                    gl.constexpr(False), IS_NEGATIVE_SCALE,
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

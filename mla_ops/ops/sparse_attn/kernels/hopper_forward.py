"""Forward kernel for wide rows on sm90: four warpgroups with a role each, in Gluon.

A program stays on its multiprocessor and walks over work items, a work item being one row of the grid of `forward.py`:
64 heads of one (batch, query, group); with IS_SPLIT a share of its slots, whose results are partial. Per
item it goes through the slots in pairs of 64-slot tiles; shared memory holds one or two pairs (PAIRS), a tile a stage.

NOTE [Roles]
  gather     copies the rows of a tile, and at the start of an item its queries, with cp.async; writes which slots are
             valid. An invalid slot is a copy of zero bytes: it reads nothing and fills its row with zeros. Rows of e4m3
             are converted on the way. See `hopper_gather.py`.
  scores     S = Q K^T, the online softmax; P and the factor that rescales the accumulators go through shared memory.
  values x2  O = alpha * O + P V on LEFT and RIGHT channels, where V is the tile that S was made of.
One warpgroup makes S while the other two multiply the tile before it. A row is cut into LEFT + RIGHT + TAIL channels:
LEFT and RIGHT cover the value, all are padded with zeros past `d_total`, and what lies past `d_v` is never stored.

NOTE [Registers]
16 warps start at 128 registers a thread, and `setmaxnreg` shares out 512 per four threads, one of each role: with 256
channels a value group, 136 for scores, 160 for each value group and 56 for the gather. At the 128 of the start ptxas
refuses m64n256, so values are multiplied as m64n128; 256 channels are 128 accumulators, and spill at 152 registers.

NOTE [Buffers and barriers]
Every barrier counts one arrival a phase, and every tile (every item, for the last four) completes one phase of each
barrier of its stage. Pair p has stages 2 * (p % PAIRS) and the next, so a reader waits for parity (p // PAIRS) & 1 and
a writer, whose buffer is free to begin with, for the opposite one.

  barrier             arrives                              waits                           guards
  left_full[stage]    gather, rows are in LEFT             scores, before Q K^T            LEFT channels of the tile
  rest_full[stage]    gather, rows are in RIGHT, TAIL      scores, before Q K^T            RIGHT, TAIL, valid[stage]
  weights[stage]      scores, after P, alpha               values, before P V              P, alpha[stage]
  turn[stage]         scores, most of the next Q K^T done  values, before the second half  nothing; see below
  free[stage, h, s]   values s, half h of P V done         gather, before copies           rows 32h..32h+31
  q_left_full         gather, LEFT of the queries is in    scores, first tile of an item   LEFT channels of the queries
  q_rest_full         gather, all of the queries is in     scores, first tile of an item   the other channels
  q_free              scores, last Q K^T of an item done   gather, before the next queries queries
  factor_full[n]      scores, after the last tile          values, before the epilogue     factor[n], n = item % PAIRS

What has no barrier of its own:
  P lies in TAIL of its tile, dead once S is there. Both value groups read it, so the copy into TAIL waits for all four
  `free` of its stage. So does valid[stage], which scores has read before P existed, and so does alpha[stage] in effect:
  scores writes it again only for a tile that was copied after them.
  The epilogue transposes O through a buffer that its group alone reads, its side of the last tile, and arrives on the
  two `free` of it only then. An item has at least one pair, so scores cannot write the same `factor` again before that:
  PAIRS items later, at least one of them has taken this stage.
`turn` shares the tensor cores: all at once, Q K^T and P V end together and then nothing runs beside the softmax, so the
second half of P V waits until most of the next Q K^T is done. After the last tile of an item there is none to wait for.

NOTE [Tiles in flight]
With one pair of stages, the gather announces tile t before it waits for the buffers of tile t + 1. The arrival of
tile t waits for `free` of tile t - 2. `free` of tile t - 2 waits for `turn`, and `turn` waits for the arrival of tile
t - 1. So there is no cycle, and the rows of one tile are under way at a time.
With two pairs of stages, the gather asks for the rows of tile t before it waits for the rows of tile t - 1, which hides
the latency of L2. The buffers of tile t become free with tile t - 4, whose `free` needs the arrival of tile t - 3, and
tile t - 3 is announced by then.
The gather waits for the queries of an item after it has announced the last tile of the item before, because the scores
free the queries with that last tile. The gather that converts asks for them before it converts the first tile of their
item, and announces them with it; whatever PAIRS is, it announces a tile as soon as that is converted.
Without TAKES_TURNS, `free` of tile t - 2 does not wait for the Q K^T of tile t - 1, and the rows of tile t have the
time of that product to come from HBM. The gather that converts needs it so: it waits for the buffers of tile t + 1
between the sides of tile t, and with turns it would wait for a Q K^T that waits for the other side.

NOTE [What orders the accesses]
wgmma reads shared memory through the async proxy; everything else here goes through the generic proxy.
  Written, then read by wgmma (rows and queries by cp.async, converted rows and P by stores): every writing thread
  waits for its own copies (cp.async.wait_group), executes fence.proxy.async, and meets its warpgroup at a barrier; then
  one thread arrives (release) and the readers wait (acquire). The fence stands between the write and the arrival, hence
  on the causality path to every later wgmma, that of the value groups included, which learn of the rows through
  `weights`. So readers need none. An arrival made by the copies themselves (cp.async.mbarrier.arrive) would ask for a
  fence in every reader of every tile, and would not order the stores of `valid` at all.
  Read by wgmma, then written: wgmma.wait_group 0 and a barrier of the warpgroup come before the arrival, and a read
  that is complete cannot see a later write: no fence.
  `valid`, `alpha`, `factor` and the epilogue stay in the generic proxy: arrive and wait order them alone.
"""

# ruff: noqa: SIM113 (Triton has no enumerate)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

from mla_ops.ops.sparse_attn.kernels.hopper_gather import (
    Queries,
    Rows,
    Slots,
    Tiles,
    _first_stage,
    _gather,
    _pair_count,
    _parity,
)
from mla_ops.ops.sparse_attn.kernels.hopper_items import (
    BLOCK_H,
    HALF,
    LN_2,
    LOG2_E,
    RESCALE_ABOVE,
    TILE,
    _locate_share,
    _share_slots,
)

SCORES_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def _add_scores(scores, q, k, WIDTH: gl.constexpr, IS_FIRST: gl.constexpr):
    """Start `scores + q @ k^T` in pieces of at most 128 channels; a piece is a wgmma group."""
    PIECE: gl.constexpr = 128 if WIDTH > 128 else WIDTH
    for c in gl.static_range(WIDTH // PIECE):
        scores = warpgroup_mma(
            q.slice(c * PIECE, PIECE, 1), k.slice(c * PIECE, PIECE, 1).permute([1, 0]), scores,
            use_acc=not (IS_FIRST and c == 0), is_async=True,
        )  # fmt: skip
    return scores


@gluon.jit
def _scores(
    attn_sink_ptr, lse_ptr, slots, softmax_scale, q, k, valid, alpha, factor,
    left_full, rest_full, weights, turn, q_left_full, q_rest_full, q_free, factor_full,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    PAIRS: gl.constexpr, IS_SPLIT: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(1, SCORES_LAYOUT)
    if IS_SPLIT:
        # The merge may be launched, and waits for the end of this kernel by itself.
        gdc_launch_dependents()
    # LEFT and half of RIGHT are done when this many groups are not.
    LATE_GROUPS: gl.constexpr = (1 if RIGHT > 128 else 0) + (1 if TAIL > 0 else 0)
    # Positive, and 0 as a number that makes every logit 0: see `forward.py`.
    logit_scale = gl.where(softmax_scale == 0, 1e-37, gl.abs(softmax_scale) * LOG2_E)
    zero = gl.full([BLOCK_H, TILE], 0.0, gl.float32, SCORES_LAYOUT)
    pair = 0
    count = 0
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        row, _, first_head, head_count, split = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
        first_slot, end_slot = _share_slots(
            slots.topk_length_ptr, row, split, slots.topk, slots.slots_per_split, IS_SPLIT
        )
        num_pairs = _pair_count(first_slot, end_slot)
        row_max = gl.full([BLOCK_H], -float("inf"), gl.float32, HEADS_LAYOUT)
        row_sum = gl.full([BLOCK_H], 0.0, gl.float32, HEADS_LAYOUT)
        mbarrier.wait(q_left_full, count & 1)
        for i in range(num_pairs):
            parity = _parity(pair, PAIRS)
            stage0 = _first_stage(pair, PAIRS)
            for s in gl.static_range(2):
                stage = stage0 + s
                mbarrier.wait(left_full.index(stage), parity)
                scores = _add_scores(zero, q.left, k.left.index(stage), LEFT, True)
                mbarrier.wait(rest_full.index(stage), parity)
                if s == 0:
                    mbarrier.wait(q_rest_full, count & 1, pred=i == 0)
                scores = _add_scores(scores, q.right, k.right.index(stage), RIGHT, False)
                if TAIL > 0:
                    scores = _add_scores(scores, q.tail, k.tail.index(stage), TAIL, False)
                # Loaded under the products.
                is_valid = valid.index(stage).load(gl.SliceLayout(0, SCORES_LAYOUT)) != 0
                scores = warpgroup_mma_wait(LATE_GROUPS, deps=[scores])
                if s == 1:
                    mbarrier.arrive(turn.index(stage0), count=1)
                else:
                    before = _first_stage(pair + PAIRS - 1, PAIRS) + 1
                    mbarrier.arrive(turn.index(before), count=1, pred=i > 0)
                scores = warpgroup_mma_wait(0, deps=[scores])
                if s == 1:
                    mbarrier.arrive(q_free, count=1, pred=i + 1 == num_pairs)
                if IS_NEGATIVE_SCALE:
                    scores = -scores
                # Replaced, not added to: a NaN query of an empty row must not reach its output.
                scores = gl.where(is_valid[None, :], scores, -float("inf"))
                tile_max = gl.max(scores, 1) * logit_scale
                new_max = gl.where(tile_max > row_max + RESCALE_ABOVE, tile_max, row_max)
                # While no slot was valid the maximum is -inf, and -inf - (-inf) would be NaN.
                finite_max = gl.maximum(new_max, -3.4e38)
                rescale = gl.exp2(row_max - finite_max)
                p = gl.exp2(scores * logit_scale - finite_max[:, None])
                row_max = new_max
                alpha.index(stage).store(rescale)
                k.tail.index(stage).slice(0, TILE, 1).store(p.to(k.tail.dtype))
                fence_async_shared()
                mbarrier.arrive(weights.index(stage), count=1)
                # Kept for the products of the next tile, it would hold 32 registers over them, which then spill.
                row_sum = row_sum * rescale + gl.sum(p, 1)
                if s == 1:
                    mbarrier.arrive(turn.index(stage), count=1, pred=i + 1 == num_pairs)
            pair += 1
        # Empty is the sum being 0, not "not positive": a NaN in a selected row must reach the output.
        is_empty = row_sum == 0.0
        lse = gl.where(is_empty, -float("inf"), (row_max + gl.log2(row_sum)) * LN_2)
        keep = gl.where(is_empty, 0.0, 1.0 / row_sum)
        heads = gl.arange(0, BLOCK_H, layout=HEADS_LAYOUT)
        head_mask = heads < head_count
        if attn_sink_ptr is not None:
            sink = gl.load(attn_sink_ptr + first_head + heads, mask=head_mask, other=0.0)
            keep = gl.where(is_empty, 0.0, keep / (1.0 + gl.exp2((sink - lse) * LOG2_E)))
        factor.index(count % PAIRS).store(keep)
        mbarrier.arrive(factor_full.index(count % PAIRS), count=1)
        count += 1
        if IS_SPLIT:
            row = row * slots.num_splits + split
        gl.store(lse_ptr + row * HEADS + first_head + heads, lse, mask=head_mask)


@gluon.jit
def _values(
    out_ptr, slots,
    k_side, k_tail, alpha, factor, weights, turn, free, factor_full,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_V: gl.constexpr,
    SIDE: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr, PAIRS: gl.constexpr, IS_SPLIT: gl.constexpr,
    TAKES_TURNS: gl.constexpr,
):  # fmt: skip
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if WIDTH > 128 else WIDTH, 16])
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    # Every warp holds all 64 values, so that all of them take the same branch without a word between them.
    REPLICATED: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    # 16 bytes a thread, rows in a line.
    OUT_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    pair = 0
    count = 0
    for item in range(gl.program_id(0), slots.num_items, gl.num_programs(0)):
        row, _, first_head, head_count, split = _locate_share(item, slots.num_splits, HEADS, KV_GROUP, IS_SPLIT)
        first_slot, end_slot = _share_slots(
            slots.topk_length_ptr, row, split, slots.topk, slots.slots_per_split, IS_SPLIT
        )
        num_pairs = _pair_count(first_slot, end_slot)
        acc = gl.full([BLOCK_H, WIDTH], 0.0, gl.float32, ACC_LAYOUT)
        for i in range(num_pairs):
            parity = _parity(pair, PAIRS)
            stage0 = _first_stage(pair, PAIRS)
            for s in gl.static_range(2):
                stage = stage0 + s
                p = k_tail.index(stage)
                v = k_side.index(stage)
                # The last tile of an item frees its buffers in the epilogue.
                frees = (s == 0) | (i + 1 < num_pairs)
                mbarrier.wait(weights.index(stage), parity)
                if gl.min(alpha.index(stage).load(REPLICATED), 0) < 1.0:
                    acc = acc * alpha.index(stage).load(HEADS_LAYOUT)[:, None]
                acc = warpgroup_mma(p.slice(0, HALF, 1), v.slice(0, HALF), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(4 * stage + SIDE), count=1, pred=frees)
                if TAKES_TURNS:
                    mbarrier.wait(turn.index(stage), parity)
                acc = warpgroup_mma(p.slice(HALF, HALF, 1), v.slice(HALF, HALF), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(4 * stage + 2 + SIDE), count=1, pred=frees)
            pair += 1
        mbarrier.wait(factor_full.index(count % PAIRS), _parity(count, PAIRS))
        acc = acc * factor.index(count % PAIRS).load(HEADS_LAYOUT)[:, None]
        count += 1
        last = _first_stage(pair + PAIRS - 1, PAIRS) + 1
        heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, OUT_LAYOUT))
        if IS_SPLIT:
            row = row * slots.num_splits + split
        head_ptrs = out_ptr + (row * HEADS + first_head + heads) * D_V
        staged = k_side.index(last)
        staged.store(acc.to(k_side.dtype))
        tile = staged.load(OUT_LAYOUT)
        mbarrier.arrive(free.index(4 * last + SIDE), count=1)
        mbarrier.arrive(free.index(4 * last + 2 + SIDE), count=1)
        cols = START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT_LAYOUT))
        mask = (heads < head_count)[:, None] & (cols < D_V)[None, :]
        gl.store(head_ptrs[:, None] + cols[None, :], tile, mask=mask)


@gluon.constexpr_function
def _power_of_two(number):
    return 1 << (number - 1).bit_length()


# Lengths change from call to call and are not specialised; of a stride it is whether 16 divides it, for the copies.
@gluon.jit(
    do_not_specialize=[
        "seq_q",
        "num_positions",
        "page_size",
        "num_pages",
        "topk",
        "slots_per_split",
        "num_splits",
        "num_items",
    ]
)
def _sparse_attn_fwd_hopper_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    table_ptr, stride_table, seq_lens_ptr, cache_scale_ptr,  # None likewise
    out_ptr, lse_ptr,  # [rows, heads, d_v] and [rows, heads]; split, [rows, splits, heads, d_v] and so on
    softmax_scale, seq_q, num_positions, page_size, num_pages, topk, slots_per_split, num_splits, num_items,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    PAIRS: gl.constexpr, VALUE_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
    IS_SPLIT: gl.constexpr, IS_PAGED: gl.constexpr, PREFETCHED: gl.constexpr, TAKES_TURNS: gl.constexpr,
    PAYLOAD: gl.constexpr, SCALES_AT: gl.constexpr, TAIL_AT: gl.constexpr,
):  # fmt: skip
    ELEMENT: gl.constexpr = q_ptr.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Without a tail the tile is P alone.
    TAIL_OR_P: gl.constexpr = TAIL if TAIL > 0 else TILE
    STAGES: gl.constexpr = 2 * PAIRS
    q_left = gl.allocate_shared_memory(ELEMENT, [BLOCK_H, LEFT], ROWS)
    q_right = gl.allocate_shared_memory(ELEMENT, [BLOCK_H, RIGHT], ROWS)
    k_left = gl.allocate_shared_memory(ELEMENT, [STAGES, TILE, LEFT], ROWS)
    k_right = gl.allocate_shared_memory(ELEMENT, [STAGES, TILE, RIGHT], ROWS)
    k_tail = gl.allocate_shared_memory(ELEMENT, [STAGES, TILE, TAIL_OR_P], ROWS)
    q_tail = gl.allocate_shared_memory(ELEMENT, [BLOCK_H, TAIL], ROWS) if TAIL > 0 else q_left
    halves_valid = gl.allocate_shared_memory(gl.int32, [2 * STAGES, HALF], FLAT)
    valid = halves_valid._reinterpret(gl.int32, [STAGES, TILE], FLAT)
    alpha = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_H], FLAT)
    factor = gl.allocate_shared_memory(gl.float32, [PAIRS, BLOCK_H], FLAT)
    places = gl.allocate_shared_memory(gl.int64, [8, HALF], FLAT)
    scales = alpha  # stands for none
    if SCALES_AT > 0:
        SCALES: gl.constexpr = _power_of_two((PAYLOAD + 127) // 128)
        scales = gl.allocate_shared_memory(gl.float32, [STAGES * SCALES, TILE], FLAT)

    left_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    rest_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weights = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4 * STAGES, 1], mbarrier.MBarrierLayout())
    q_left_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_rest_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    factor_full = gl.allocate_shared_memory(gl.int64, [PAIRS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(left_full.index(stage), count=1)
        mbarrier.init(rest_full.index(stage), count=1)
        mbarrier.init(weights.index(stage), count=1)
        mbarrier.init(turn.index(stage), count=1)
    for i in gl.static_range(4 * STAGES):
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(PAIRS):
        mbarrier.init(factor_full.index(i), count=1)
    mbarrier.init(q_left_full, count=1)
    mbarrier.init(q_rest_full, count=1)
    mbarrier.init(q_free, count=1)

    queries = Queries(q_ptr, stride_q_b, stride_q_s, stride_q_h)
    slots = Slots(
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr,
        seq_q, topk, slots_per_split, num_splits, num_items,
    )  # fmt: skip
    rows = Rows(
        kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g, table_ptr, stride_table, seq_lens_ptr, cache_scale_ptr,
        num_positions, page_size, num_pages,
    )  # fmt: skip
    q = Tiles(q_left, q_right, q_tail)
    k = Tiles(k_left, k_right, k_tail)
    gl.warp_specialize(
        [
            (_scores, (
                attn_sink_ptr, lse_ptr, slots, gl.to_tensor(softmax_scale), q, k, valid, alpha, factor,
                left_full, rest_full, weights, turn, q_left_full, q_rest_full, q_free, factor_full,
                HEADS, KV_GROUP, LEFT, RIGHT, TAIL, PAIRS, IS_SPLIT, IS_NEGATIVE_SCALE,
            )),
            (_values, (
                out_ptr, slots, k_left, k_tail, alpha, factor, weights, turn, free, factor_full,
                HEADS, KV_GROUP, D_V, gl.constexpr(0), gl.constexpr(0), LEFT, PAIRS, IS_SPLIT, TAKES_TURNS,
            )),
            (_values, (
                out_ptr, slots, k_right, k_tail, alpha, factor, weights, turn, free, factor_full,
                HEADS, KV_GROUP, D_V, gl.constexpr(1), LEFT, RIGHT, PAIRS, IS_SPLIT, TAKES_TURNS,
            )),
            (_gather, (
                queries, slots, rows, q, k, halves_valid, places, scales,
                left_full, rest_full, free, q_left_full, q_rest_full, q_free,
                HEADS, KV_GROUP, D_TOTAL, TAIL, PAIRS, IS_SPLIT, IS_PAGED, PREFETCHED, PAYLOAD, SCALES_AT, TAIL_AT,
            )),
        ],
        [4, 4, 4],
        [VALUE_REGISTERS, VALUE_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip

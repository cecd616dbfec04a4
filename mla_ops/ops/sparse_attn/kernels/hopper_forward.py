"""Forward kernel for wide rows on sm90: four warpgroups with a role each, in Gluon.

A program stays on its multiprocessor and walks over work items, a work item being one row of the grid of `forward.py`:
64 heads of one (batch, query, group). Per item it goes through the slots in pairs of 64-slot tiles; shared memory holds
one or two pairs (PAIRS), a tile per stage.

NOTE [Roles]
  gather     copies the rows of a tile, and at the start of an item its queries, with cp.async; writes which slots are
             valid. An invalid slot is a copy of zero bytes: it reads nothing and fills its row with zeros.
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
free the queries with that last tile.

NOTE [What orders the accesses]
wgmma reads shared memory through the async proxy; everything else here goes through the generic proxy.
  Written, then read by wgmma (rows and queries by cp.async, P by stores): every writing thread waits for its own copies
  (cp.async.wait_group), executes fence.proxy.async, and meets its warpgroup at a barrier; then one thread arrives
  (release) and the readers wait (acquire). The fence stands between the write and the arrival, hence on the causality
  path to every later wgmma, that of the value groups included, which learn of the rows through `weights`. So readers
  need none. An arrival made by the copies themselves (cp.async.mbarrier.arrive) would ask for a fence in every reader
  of every tile, and would not order the stores of `valid` at all.
  Read by wgmma, then written: wgmma.wait_group 0 and a barrier of the warpgroup come before the arrival, and a read
  that is complete cannot see a later write: no fence.
  `valid`, `alpha`, `factor` and the epilogue stay in the generic proxy: arrive and wait order them alone.
"""

# ruff: noqa: SIM113 (Triton has no enumerate)

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

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)

BLOCK_H = gl.constexpr(64)
TILE = gl.constexpr(64)
HALF = gl.constexpr(32)
PAIR = gl.constexpr(128)
# The maximum that weights are relative to follows the true one when that has grown by more than this, in powers of two.
RESCALE_ABOVE = gl.constexpr(8.0)

# Eight threads copy 64 channels of a row, 16 bytes each: a warp copies four rows.
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
SCORES_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def _locate_item(item, HEADS: gl.constexpr, KV_GROUP: gl.constexpr):
    """Return `(row, group, first_head, head_count)` of a work item; see `primitives.locate_program`."""
    HEADS_PER_GROUP: gl.constexpr = HEADS // KV_GROUP
    HEAD_BLOCKS: gl.constexpr = (HEADS_PER_GROUP + BLOCK_H - 1) // BLOCK_H
    group = (item // HEAD_BLOCKS) % KV_GROUP
    row = (item // (HEAD_BLOCKS * KV_GROUP)).to(gl.int64)
    head_in_group = (item % HEAD_BLOCKS) * BLOCK_H
    return row, group, group * HEADS_PER_GROUP + head_in_group, HEADS_PER_GROUP - head_in_group


@gluon.jit
def _end_slot(topk_length_ptr, row, topk):
    """Return how many slots of a row count."""
    end_slot = topk
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = gl.maximum(gl.minimum(gl.load(topk_length_ptr + row), topk), 0).to(gl.int32)
    return end_slot


@gluon.jit
def _pair_count(end_slot):
    """Return how many pairs of tiles an item has: one at least, because the epilogue ends what it began."""
    return gl.maximum((end_slot + PAIR - 1) // PAIR, 1)


@gluon.jit
def _first_stage(pair, PAIRS: gl.constexpr):
    """Return the stage of the first tile of a pair."""
    if PAIRS == 1:
        return 0  # known to the compiler: no address depends on the pair
    return pair % PAIRS * 2


@gluon.jit
def _parity(number, BUFFERS: gl.constexpr):
    """Return the parity of the phase that the users of buffer `number % BUFFERS` complete with this number."""
    return (number // BUFFERS) & 1


@gluon.jit
def _known_multiple(stride):
    """Return `stride`, a multiple of 8 channels, in a form that shows it: see `primitives.known_multiple`."""
    return stride // 8 * 8


@gluon.jit
def _item_slots(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr, item, seq_q, topk,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr,
):  # fmt: skip
    """Return a pointer to the positions of an item, and how many of them count."""
    row, group, _, _ = _locate_item(item, HEADS, KV_GROUP)
    slots_ptr = indices_ptr + (row // seq_q) * stride_i_b + (row % seq_q) * stride_i_s + group.to(gl.int64) * stride_i_g
    return slots_ptr, _end_slot(topk_length_ptr, row, topk)


@gluon.jit
def _load_positions(indices_ptr, first, end_slot):
    slots = first + gl.arange(0, HALF, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    return gl.load(indices_ptr + slots, mask=slots < end_slot, other=-1)


@gluon.jit
def _copy_rows(tile, row_ptrs, row_mask, START: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr):
    """Start the copy of channels START.. of some rows into a tile; masked rows and channels >= END become 0."""
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    mask = row_mask[:, None]
    if START + WIDTH > END:
        mask = mask & (cols < END - START)[None, :]
    # The pointer of a row first, then the channel: the copies of a row differ in an immediate offset.
    async_copy.async_copy_global_to_shared(tile, (row_ptrs + START)[:, None] + cols[None, :], mask=mask)


@gluon.jit
def _prefetch(ptrs):
    """Bring the lines of some addresses to L2."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _query_rows(q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, HEADS: gl.constexpr, KV_GROUP: gl.constexpr):
    """Return pointers to the 64 query rows of an item, and which of them are heads of its group."""
    row, _, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
    heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, ROWS_LAYOUT))
    # A masked row is not read, but it is prefetched: it stands for the last head.
    offsets = (first_head + gl.minimum(heads, head_count - 1)).to(gl.int64) * _known_multiple(stride_q_h)
    base = q_ptr + (row // seq_q) * _known_multiple(stride_q_b) + (row % seq_q) * _known_multiple(stride_q_s)
    return base + offsets, heads < head_count


@gluon.jit
def _copy_queries(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, q_left, q_right, q_tail,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Start the copies of an item's queries; those of LEFT are a group of their own."""
    row_ptrs, mask = _query_rows(q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, HEADS, KV_GROUP)
    _copy_rows(q_left, row_ptrs, mask, 0, LEFT, D_TOTAL)
    async_copy.commit_group()
    _copy_rows(q_right, row_ptrs, mask, LEFT, RIGHT, D_TOTAL)
    if TAIL > 0:
        _copy_rows(q_tail, row_ptrs, mask, LEFT + RIGHT, TAIL, D_TOTAL)


@gluon.jit
def _prefetch_queries(
    q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr,
):  # fmt: skip
    """Bring the 128-byte lines of an item's queries to L2."""
    row_ptrs, _ = _query_rows(q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, HEADS, KV_GROUP)
    lines = gl.arange(0, 8, layout=gl.SliceLayout(0, ROWS_LAYOUT)) * 64
    _prefetch(row_ptrs[:, None] + gl.minimum(lines, D_TOTAL - 1)[None, :])
    _prefetch(row_ptrs + (D_TOTAL - 1))


@gluon.jit
def _publish_copies(full, LATER: gl.constexpr, pred):
    """Arrive once all copies but the LATER last groups are in; see NOTE [What orders the accesses]."""
    async_copy.wait_group(LATER)
    fence_async_shared()
    # The compiler would put the barrier before the fence, where the one thread that arrives fences for all.
    block_barrier()
    mbarrier.arrive(full, count=1, pred=pred)


@gluon.jit
def _gather(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, seq_q, seq_kv, topk, num_items,
    q_left, q_right, q_tail, k_left, k_right, k_tail, valid,
    left_full, rest_full, free, q_left_full, q_rest_full, q_free,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    pair = 0
    parity_q = 1
    slots_ptr, end_slot = _item_slots(
        indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr, gl.program_id(0), seq_q, topk, HEADS, KV_GROUP
    )
    ahead0 = _load_positions(slots_ptr, 0, end_slot)
    ahead1 = _load_positions(slots_ptr, HALF, end_slot)
    ahead2 = _load_positions(slots_ptr, 2 * HALF, end_slot)
    ahead3 = _load_positions(slots_ptr, 3 * HALF, end_slot)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row, group, _, _ = _locate_item(item, HEADS, KV_GROUP)
        rows_ptr = kv_ptr + (row // seq_q) * _known_multiple(stride_kv_b)
        rows_ptr += group.to(gl.int64) * _known_multiple(stride_kv_g)
        num_pairs = _pair_count(end_slot)
        next_item = gl.minimum(item + gl.num_programs(0), num_items - 1)
        for i in range(num_pairs):
            parity_free = _parity(pair, PAIRS) ^ 1
            stage0 = _first_stage(pair, PAIRS)
            for s in gl.static_range(2):
                stage = stage0 + s
                if s == 0:
                    first, second = ahead0, ahead1
                else:
                    first, second = ahead2, ahead3
                # Compared before it is narrowed: 2**40 is not position 0.
                first_valid = (first >= 0) & (first < seq_kv)
                second_valid = (second >= 0) & (second < seq_kv)
                first_rows = rows_ptr + first.to(gl.int64) * _known_multiple(stride_kv_s)
                second_rows = rows_ptr + second.to(gl.int64) * _known_multiple(stride_kv_s)
                if s == 1:
                    # Positions are loaded a pair ahead, those of the next item during the last pair of this one.
                    ahead_slot = (i + 1) * PAIR
                    if i + 1 == num_pairs:
                        ahead_slot = 0
                        slots_ptr, end_slot = _item_slots(
                            indices_ptr, stride_i_b, stride_i_s, stride_i_g, topk_length_ptr, next_item, seq_q, topk,
                            HEADS, KV_GROUP,
                        )  # fmt: skip
                    ahead0 = _load_positions(slots_ptr, ahead_slot, end_slot)
                    ahead1 = _load_positions(slots_ptr, ahead_slot + HALF, end_slot)
                    ahead2 = _load_positions(slots_ptr, ahead_slot + 2 * HALF, end_slot)
                    ahead3 = _load_positions(slots_ptr, ahead_slot + 3 * HALF, end_slot)

                left, right, tail = k_left.index(stage), k_right.index(stage), k_tail.index(stage)
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
                if PAIRS > 1 and s == 0:
                    # The tile before, whose rows come while these are asked for: see NOTE [Tiles in flight].
                    before = _first_stage(pair + PAIRS - 1, PAIRS) + 1
                    _publish_copies(left_full.index(before), 3, pair > 0)
                    _publish_copies(rest_full.index(before), 2, pair > 0)
                if s == 0:
                    # Rows go before queries: their buffers are free first. Without queries both groups are empty.
                    if i == 0:
                        mbarrier.wait(q_free, parity_q)
                        _copy_queries(
                            q_ptr, stride_q_b, stride_q_s, stride_q_h, item, seq_q, q_left, q_right, q_tail,
                            HEADS, KV_GROUP, D_TOTAL, LEFT, RIGHT, TAIL,
                        )  # fmt: skip
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
                _prefetch_queries(q_ptr, stride_q_b, stride_q_s, stride_q_h, next_item, seq_q, HEADS, KV_GROUP, D_TOTAL)
            pair += 1
        parity_q ^= 1
    if PAIRS > 1:
        last = _first_stage(pair + PAIRS - 1, PAIRS) + 1
        _publish_copies(left_full.index(last), 1, True)
        _publish_copies(rest_full.index(last), 0, True)


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
    attn_sink_ptr, lse_ptr, topk_length_ptr, softmax_scale, topk, num_items,
    q_left, q_right, q_tail, k_left, k_right, k_tail, valid, alpha, factor,
    left_full, rest_full, weights, turn, q_left_full, q_rest_full, q_free, factor_full,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    PAIRS: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
):  # fmt: skip
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(1, SCORES_LAYOUT)
    # LEFT and half of RIGHT are done when this many groups are not.
    LATE_GROUPS: gl.constexpr = (1 if RIGHT > 128 else 0) + (1 if TAIL > 0 else 0)
    # Positive, and 0 as a number that makes every logit 0: see `forward.py`.
    logit_scale = gl.where(softmax_scale == 0, 1e-37, gl.abs(softmax_scale) * LOG2_E)
    zero = gl.full([BLOCK_H, TILE], 0.0, gl.float32, SCORES_LAYOUT)
    pair = 0
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row, _, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
        num_pairs = _pair_count(_end_slot(topk_length_ptr, row, topk))
        row_max = gl.full([BLOCK_H], -float("inf"), gl.float32, HEADS_LAYOUT)
        row_sum = gl.full([BLOCK_H], 0.0, gl.float32, HEADS_LAYOUT)
        mbarrier.wait(q_left_full, count & 1)
        for i in range(num_pairs):
            parity = _parity(pair, PAIRS)
            stage0 = _first_stage(pair, PAIRS)
            for s in gl.static_range(2):
                stage = stage0 + s
                mbarrier.wait(left_full.index(stage), parity)
                scores = _add_scores(zero, q_left, k_left.index(stage), LEFT, True)
                mbarrier.wait(rest_full.index(stage), parity)
                if s == 0:
                    mbarrier.wait(q_rest_full, count & 1, pred=i == 0)
                scores = _add_scores(scores, q_right, k_right.index(stage), RIGHT, False)
                if TAIL > 0:
                    scores = _add_scores(scores, q_tail, k_tail.index(stage), TAIL, False)
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
                k_tail.index(stage).slice(0, TILE, 1).store(p.to(q_left.dtype))
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
        gl.store(lse_ptr + row * HEADS + first_head + heads, lse, mask=head_mask)


@gluon.jit
def _values(
    out_ptr, topk_length_ptr, topk, num_items,
    k_side, k_tail, alpha, factor, weights, turn, free, factor_full,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_V: gl.constexpr,
    SIDE: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr, PAIRS: gl.constexpr,
):  # fmt: skip
    ACC_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128 if WIDTH > 128 else WIDTH, 16])
    HEADS_LAYOUT: gl.constexpr = gl.SliceLayout(1, ACC_LAYOUT)
    # Every warp holds all 64 values, so that all of them take the same branch without a word between them.
    REPLICATED: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    # 16 bytes a thread, rows in a line.
    OUT_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    pair = 0
    count = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        row, _, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
        num_pairs = _pair_count(_end_slot(topk_length_ptr, row, topk))
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
                mbarrier.wait(turn.index(stage), parity)
                acc = warpgroup_mma(p.slice(HALF, HALF, 1), v.slice(HALF, HALF), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(free.index(4 * stage + 2 + SIDE), count=1, pred=frees)
            pair += 1
        mbarrier.wait(factor_full.index(count % PAIRS), _parity(count, PAIRS))
        acc = acc * factor.index(count % PAIRS).load(HEADS_LAYOUT)[:, None]
        count += 1
        last = _first_stage(pair + PAIRS - 1, PAIRS) + 1
        staged = k_side.index(last)
        staged.store(acc.to(k_side.dtype))
        tile = staged.load(OUT_LAYOUT)
        mbarrier.arrive(free.index(4 * last + SIDE), count=1)
        mbarrier.arrive(free.index(4 * last + 2 + SIDE), count=1)
        heads = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, OUT_LAYOUT))
        cols = START + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT_LAYOUT))
        mask = (heads < head_count)[:, None] & (cols < D_V)[None, :]
        head_ptrs = out_ptr + (row * HEADS + first_head + heads) * D_V
        gl.store(head_ptrs[:, None] + cols[None, :], tile, mask=mask)


# Lengths change from call to call and are not specialised; of a stride it is whether 16 divides it, for the copies.
@gluon.jit(do_not_specialize=["seq_q", "seq_kv", "topk", "num_items"])
def _sparse_attn_fwd_hopper_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    out_ptr, lse_ptr,  # [rows, heads, d_v] and [rows, heads]
    softmax_scale, seq_q, seq_kv, topk, num_items,
    HEADS: gl.constexpr, KV_GROUP: gl.constexpr, D_TOTAL: gl.constexpr, D_V: gl.constexpr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, TAIL: gl.constexpr,
    PAIRS: gl.constexpr, VALUE_REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr, IS_NEGATIVE_SCALE: gl.constexpr,
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

    gl.warp_specialize(
        [
            (_scores, (
                attn_sink_ptr, lse_ptr, topk_length_ptr, gl.to_tensor(softmax_scale), topk, num_items,
                q_left, q_right, q_tail, k_left, k_right, k_tail, valid, alpha, factor,
                left_full, rest_full, weights, turn, q_left_full, q_rest_full, q_free, factor_full,
                HEADS, KV_GROUP, LEFT, RIGHT, TAIL, PAIRS, IS_NEGATIVE_SCALE,
            )),
            (_values, (
                out_ptr, topk_length_ptr, topk, num_items,
                k_left, k_tail, alpha, factor, weights, turn, free, factor_full,
                HEADS, KV_GROUP, D_V, gl.constexpr(0), gl.constexpr(0), LEFT, PAIRS,
            )),
            (_values, (
                out_ptr, topk_length_ptr, topk, num_items,
                k_right, k_tail, alpha, factor, weights, turn, free, factor_full,
                HEADS, KV_GROUP, D_V, gl.constexpr(1), LEFT, RIGHT, PAIRS,
            )),
            (_gather, (
                q_ptr, stride_q_b, stride_q_s, stride_q_h,
                kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
                indices_ptr, stride_i_b, stride_i_s, stride_i_g,
                topk_length_ptr, seq_q, seq_kv, topk, num_items,
                q_left, q_right, q_tail, k_left, k_right, k_tail, halves_valid,
                left_full, rest_full, free, q_left_full, q_rest_full, q_free,
                HEADS, KV_GROUP, D_TOTAL, LEFT, RIGHT, TAIL, PAIRS,
            )),
        ],
        [4, 4, 4],
        [VALUE_REGISTERS, VALUE_REGISTERS, GATHER_REGISTERS],
    )  # fmt: skip

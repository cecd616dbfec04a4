"""Device functions shared by the forward and the backward kernels.

NOTE [A row is a tuple of chunks]
`tl.arange` needs a power of two and the widths of the operator are none: 576 channels would be loaded as 1024. So a
row is held as a tuple of tiles: NUM_DV tiles of BLOCK_DV channels that cover the value, then NUM_DT tiles of BLOCK_DT
channels for the rest (576/512 is 512 + 64, 144/80 is 5 x 16 + 64). The last value tile may reach past `d_v`: its extra
channels take part in the logits; what they add to the value product is never stored. A value tile is a key tile, so a
row is gathered once for both products.

NOTE [Streamed rows]
Whole rows of keys, and of the queries they are multiplied with, need shared memory in proportion to their width: 220 KB
for 64 heads and two buffers of 64 keys at 576 channels, so that one program has an SM and its loads, products and
exponentials wait for each other. Streamed, both come in pieces of WIDTH channels, in an inner loop that is pipelined by
itself: any width fits, and two or three programs share an SM. The price is that a block of keys reads the queries from
L2 once more: heads / BLOCK_K of the traffic of the keys.

NOTE [Invalid slots]
An invalid slot is masked twice, and both are needed. Its row is not loaded (the tile holds zeros), because a weight of
0 times a NaN row is NaN. Its logit is replaced by -inf, because a zero row has logit 0, which may be the largest.

NOTE [Loads that become addresses]
`indices` and `topk_length` are loaded in the body of a kernel, never in a function it calls. Inductor finds out what a
kernel writes by walking back from its stores; the walk ends at a load but not at a call, and through one it would take
`indices` for an output and copy it.

NOTE [Positions are loaded a step ahead]
The copies of a block's rows cannot start before its positions have arrived, and they are started a step early: with
both in one step, every step would wait once more for the latency of L2. So a loop carries `ahead`, the positions of the
next block, loaded while it works on this one; past the end nothing is loaded. The wide backward does without
(IS_AHEAD): there the registers are worth more, and three stages let the compiler copy positions through shared memory.

NOTE [The scale joins late]
The scale joins inside the exponential, as one fused multiply-add, so the maximum is taken without it: it must be
positive, and a negative scale turns the signs of the logits. A scale of 0 becomes a number small enough to make every
logit 0, because 0 times -inf would be NaN.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate_program(first_row, seq_q, HEADS: tl.constexpr, KV_GROUP: tl.constexpr, BLOCK_H: tl.constexpr):
    """Return `(row, batch, query, group, offs_h, head_mask)` of this program; a row is one (batch, query) pair.

    The grid is flat, because grid.y and grid.z stop at 65535 and a sequence does not. Head blocks of one query are
    neighbours, so that the second finds its KV rows in L2. Row numbers are int64: times a stride they pass 2**31.
    """
    HEADS_PER_GROUP: tl.constexpr = HEADS // KV_GROUP
    HEAD_BLOCKS: tl.constexpr = (HEADS_PER_GROUP + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0)
    group = (program // HEAD_BLOCKS) % KV_GROUP
    row = first_row + (program // (HEAD_BLOCKS * KV_GROUP)).to(tl.int64)
    head_in_group = (program % HEAD_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_h = group * HEADS_PER_GROUP + head_in_group
    return row, row // seq_q, row % seq_q, group, offs_h, head_in_group < HEADS_PER_GROUP


@triton.jit
def known_multiple(stride, STRIDE_ALIGN: tl.constexpr):
    """Return `stride`, a multiple of STRIDE_ALIGN elements, in a form that shows the compiler that it is one.

    By itself the compiler learns of a stride only whether it is a multiple of 16, and nothing of a stride that is not
    specialised. Rows of 72 or 100 channels of 2 bytes need the factor 8 or 4 to be loaded 16 or 8 bytes at a time. A
    `tl.multiple_of` hint is no substitute: the hint gets lost where an addition of zero is folded away.
    """
    return stride // STRIDE_ALIGN * STRIDE_ALIGN


@triton.jit
def check_positions(position, offs_k, end_slot, seq_kv, USE_INT64_OFFSETS: tl.constexpr):
    """Return the KV positions of one block of slots (anything where invalid, never to be read) and which are valid."""
    # Compared before it is narrowed: 2**40 is not position 0.
    valid = (offs_k < end_slot) & (position >= 0) & (position < seq_kv)
    return position.to(tl.int64 if USE_INT64_OFFSETS else tl.int32), valid


@triton.jit
def load_chunks(
    ptr, row_offsets, row_mask,
    START: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Load COUNT tiles `[rows, WIDTH]` of the channels from START on; masked rows and channels >= END are 0."""
    tiles = ()
    for c in tl.static_range(COUNT):
        cols = START + c * WIDTH + tl.arange(0, WIDTH)
        mask = row_mask[:, None]
        if START + (c + 1) * WIDTH > END:
            mask = mask & (cols < END)[None, :]
        tiles = tiles + (tl.load(ptr + row_offsets[:, None] + cols[None, :], mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_chunks(
    ptr, row_offsets, row_mask, tiles,
    START: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """Store what `load_chunks` would load, rounded to the element type of `ptr`."""
    for c in tl.static_range(COUNT):
        cols = START + c * WIDTH + tl.arange(0, WIDTH)
        mask = row_mask[:, None]
        if START + (c + 1) * WIDTH > END:
            mask = mask & (cols < END)[None, :]
        tl.store(ptr + row_offsets[:, None] + cols[None, :], tiles[c].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_chunks(ROWS: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Return COUNT fp32 accumulators `[ROWS, WIDTH]`."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([ROWS, WIDTH], tl.float32),)
    return tiles


@triton.jit
def add_row_products(acc, a_tiles, b_tiles, COUNT: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Return `acc + sum_c a_c @ b_c^T`: products of whole rows, chunk by chunk."""
    for c in tl.static_range(COUNT):
        acc = tl.dot(a_tiles[c], tl.trans(b_tiles[c]), acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def add_streamed_products(
    acc, a_ptr, a_offsets, a_mask, b_ptr, b_offsets, b_mask,
    WIDTH: tl.constexpr, END: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Return `acc + a @ b^T` of rows of END channels; see NOTE [Streamed rows]."""
    for start in tl.range(0, END, WIDTH):
        cols = start + tl.arange(0, WIDTH)
        mask_a, mask_b = a_mask[:, None], b_mask[:, None]
        if END % WIDTH != 0:
            mask_a, mask_b = mask_a & (cols < END)[None, :], mask_b & (cols < END)[None, :]
        a = tl.load(a_ptr + a_offsets[:, None] + cols[None, :], mask=mask_a, other=0.0)
        b = tl.load(b_ptr + b_offsets[:, None] + cols[None, :], mask=mask_b, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def add_weighted_rows(acc_tiles, weights, tiles, COUNT: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Return `acc_c + weights @ tile_c` for every chunk."""
    sums = ()
    for c in tl.static_range(COUNT):
        sums = sums + (tl.dot(weights, tiles[c], acc_tiles[c], input_precision=INPUT_PRECISION),)
    return sums


@triton.jit
def add_transposed_rows(acc_tiles, tiles, weights, COUNT: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """Return `acc_c + tile_c^T @ weights` for every chunk: `add_weighted_rows` of key-major weights, transposed."""
    sums = ()
    for c in tl.static_range(COUNT):
        sums = sums + (tl.dot(tl.trans(tiles[c]), weights, acc_tiles[c], input_precision=INPUT_PRECISION),)
    return sums


@triton.jit
def scale_rows(tiles, factor, COUNT: tl.constexpr):
    """Return every tile with row r multiplied by `factor[r]`."""
    scaled = ()
    for c in tl.static_range(COUNT):
        scaled = scaled + (tiles[c] * factor[:, None],)
    return scaled


@triton.jit
def positive_logit_scale(softmax_scale):
    """Return |softmax_scale| in units of base-2 logits, as a positive number; see NOTE [The scale joins late]."""
    return tl.where(softmax_scale == 0, 1e-37, tl.abs(softmax_scale) * LOG2_E)


@triton.jit
def softmax_step(logits, row_max, row_sum, new_max, logit_scale):
    """Return `(row_sum, weights, rescale)` of an online softmax whose maximum goes from `row_max` to `new_max`."""
    # While no slot was valid the maximum is -inf, and -inf - (-inf) would be NaN. Kept in scaled units, rounded once:
    # the weights of all blocks are then relative to the very same number.
    finite_max = tl.maximum(new_max, -3.4e38)
    weights = tl.exp2(logits * logit_scale - finite_max[:, None])
    rescale = tl.exp2(row_max - finite_max)
    return row_sum * rescale + tl.sum(weights, 1), weights, rescale


@triton.jit
def finished_softmax(row_max, row_sum):
    """Return `(factor, lse)` of finished rows: what the sum of weighted values is multiplied by, and natural lse."""
    # Empty is the sum being 0, not "not positive": a NaN in a selected row must reach the output.
    is_empty = row_sum == 0.0
    factor = tl.where(is_empty, 0.0, 1.0 / row_sum)
    return factor, tl.where(is_empty, -float("inf"), (row_max + tl.log2(row_sum)) * LN_2)


@triton.jit
def sink_keep(lse, attn_sink):
    """Return the share of the softmax that the sink leaves to the keys, exp(lse) / (exp(lse) + exp(sink)).

    As a sigmoid it is exactly 1 at sink = -inf and 0 at sink = +inf. An empty row (lse = -inf) keeps 0.
    """
    keep = 1.0 / (1.0 + tl.exp(attn_sink - lse))
    return tl.where(lse == -float("inf"), 0.0, keep)


@triton.jit
def row_dot_sums(a_tiles, b_tiles, COUNT: tl.constexpr):
    """Return `sum_c rowsum(a_c * b_c)` in fp32; COUNT >= 1."""
    total = tl.sum(a_tiles[0].to(tl.float32) * b_tiles[0].to(tl.float32), 1)
    for c in tl.static_range(1, COUNT):
        total += tl.sum(a_tiles[c].to(tl.float32) * b_tiles[c].to(tl.float32), 1)
    return total


@triton.jit
def transpose_chunks(tiles, COUNT: tl.constexpr):
    """Return every tile transposed."""
    transposed = ()
    for c in tl.static_range(COUNT):
        transposed = transposed + (tl.trans(tiles[c]),)
    return transposed

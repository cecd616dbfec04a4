"""What the Hopper kernels of both sides share: work items, and how rows come to shared memory.

A work item is 64 heads of one (batch, query, group); the forward may share its slots out over several items.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from mla_ops.kernels.gluon_compat import block_barrier

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
# The maximum that weights are relative to follows the true one when that has grown by more than this, in powers of two.
RESCALE_ABOVE = gl.constexpr(8.0)

BLOCK_H = gl.constexpr(64)
TILE = gl.constexpr(64)
HALF = gl.constexpr(32)
PAIR = gl.constexpr(128)

# Eight threads copy 64 channels of a row, 16 bytes each: a warp copies four rows.
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


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
def _locate_share(item, num_splits, HEADS: gl.constexpr, KV_GROUP: gl.constexpr, IS_SPLIT: gl.constexpr):
    """Return `(row, group, first_head, head_count, split)` of a share of a work item.

    Head blocks are neighbours, then splits: what runs at a time reads the same rows.
    """
    split = 0
    if IS_SPLIT:
        HEAD_BLOCKS: gl.constexpr = (HEADS // KV_GROUP + BLOCK_H - 1) // BLOCK_H
        share = item // HEAD_BLOCKS
        split = share % num_splits
        item = share // num_splits * HEAD_BLOCKS + item % HEAD_BLOCKS
    row, group, first_head, head_count = _locate_item(item, HEADS, KV_GROUP)
    return row, group, first_head, head_count, split


@gluon.jit
def _end_slot(topk_length_ptr, row, topk):
    """Return how many slots of a row count."""
    end_slot = topk
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = gl.maximum(gl.minimum(gl.load(topk_length_ptr + row), topk), 0).to(gl.int32)
    return end_slot


@gluon.jit
def _share_slots(topk_length_ptr, row, split, topk, slots_per_split, IS_SPLIT: gl.constexpr):
    """Return the first slot of a share, and the slot it ends before, which may be the smaller one."""
    first = 0
    end = _end_slot(topk_length_ptr, row, topk)
    if IS_SPLIT:
        first = split * slots_per_split
        end = gl.minimum(end, first + slots_per_split)
    return first, end


@gluon.jit
def _known_multiple(stride, MULTIPLE: gl.constexpr = 8):
    """Return `stride`, a multiple of MULTIPLE elements, in a form that shows it: see `primitives.known_multiple`."""
    return stride // MULTIPLE * MULTIPLE


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
def _copy_rows(tile, row_ptrs, row_mask, START: gl.constexpr, WIDTH: gl.constexpr, END: gl.constexpr):
    """Start the copy of channels START.. of some rows into a tile; masked rows and channels >= END become 0."""
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, ROWS_LAYOUT))
    mask = row_mask[:, None]
    if START + WIDTH > END:
        mask = mask & (cols < END - START)[None, :]
    # The pointer of a row first, then the channel: the copies of a row differ in an immediate offset.
    async_copy.async_copy_global_to_shared(tile, (row_ptrs + START)[:, None] + cols[None, :], mask=mask)


@gluon.jit
def _publish_copies(full, LATER: gl.constexpr, pred):
    """Arrive once all copies but the LATER last groups are in; see NOTE [What orders the accesses]."""
    async_copy.wait_group(LATER)
    fence_async_shared()
    # The compiler would put the barrier before the fence, where the one thread that arrives fences for all.
    block_barrier()
    mbarrier.arrive(full, count=1, pred=pred)

"""Merge of partial forward results: the second half of a forward whose slots were shared out over several programs."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mla_ops.kernels.primitives import sink_keep


@triton.jit(do_not_specialize=["num_splits"])
def _sparse_attn_merge_kernel(
    partial_out_ptr, partial_lse_ptr,  # [rows, splits, heads, d_v] in fp32 or 16 bits, and fp32 [rows, splits, heads]
    attn_sink_ptr,
    out_ptr, lse_ptr,
    num_splits,
    HEADS: tl.constexpr, D_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program, of one warp, merges some heads of a row or some channels of a head: the sums of more warps would
    cross them, which took two to four times as long.

    Partial results carry no sink; it enters here, once. A dependent launch (sm90 and later) has begun before the kernel
    that writes the partial results has ended.
    """
    if IS_DEPENDENT:
        gdc_wait()
    HEAD_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    CHANNEL_BLOCKS: tl.constexpr = (D_V + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    row = (program // (HEAD_BLOCKS * CHANNEL_BLOCKS)).to(tl.int64)
    channel_block = program % CHANNEL_BLOCKS
    offs_h = program // CHANNEL_BLOCKS % HEAD_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_d = channel_block * BLOCK_D + tl.arange(0, BLOCK_D)
    head_mask = offs_h < HEADS
    mask = head_mask[:, None] & (offs_d < D_V)[None, :]

    # Online in blocks of splits, as the kernel itself is online in the slots; -inf is the lse of an empty split.
    lse_max = tl.full([BLOCK_H], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in tl.range(0, num_splits, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        split_mask = splits < num_splits
        partials = (row * num_splits + splits)[:, None] * HEADS + offs_h[None, :]
        lse_splits = tl.load(
            partial_lse_ptr + partials, mask=split_mask[:, None] & head_mask[None, :], other=-float("inf")
        )
        out_splits = tl.load(
            partial_out_ptr + partials[:, :, None] * D_V + offs_d[None, None, :],
            mask=split_mask[:, None, None] & mask[None, :, :], other=0.0,
        )  # fmt: skip
        new_max = tl.maximum(lse_max, tl.max(lse_splits, 0))
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        rescale = tl.exp(lse_max - finite_max)
        weights = tl.exp(lse_splits - finite_max[None, :])
        total = total * rescale + tl.sum(weights, 0)
        acc = acc * rescale[:, None] + tl.sum(out_splits * weights[:, :, None], 0)
        lse_max = new_max

    is_empty = total == 0.0
    factor = tl.where(is_empty, 0.0, 1.0 / total)
    lse = tl.where(is_empty, -float("inf"), lse_max + tl.log(total))
    if attn_sink_ptr is not None:
        factor *= sink_keep(lse, tl.load(attn_sink_ptr + offs_h, mask=head_mask, other=0.0))
    row_heads = row * HEADS + offs_h
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_heads[:, None] * D_V + offs_d[None, :], out, mask=mask)
    tl.store(lse_ptr + row_heads, lse, mask=head_mask & (channel_block == 0))

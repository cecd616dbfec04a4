"""Merge of partial forward results: the second half of a forward whose slots were shared out over several programs."""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import sink_keep


@triton.jit(do_not_specialize=["num_splits"])
def _sparse_attn_merge_kernel(
    partial_out_ptr, partial_lse_ptr,  # fp32 [rows, splits, heads, d_v] and [rows, splits, heads]
    attn_sink_ptr,
    out_ptr, lse_ptr,
    num_splits,
    HEADS: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program merges one (row, head). Partial results carry no sink; it enters here, once."""
    program = tl.program_id(0)
    row = (program // HEADS).to(tl.int64)
    head = program % HEADS
    offs_d = tl.arange(0, BLOCK_D)
    partial = row * num_splits * HEADS + head

    # Online in the splits, as the kernel itself is online in the slots; -inf is the lse of an empty split.
    lse_max = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for split in tl.range(0, num_splits):
        lse_split = tl.load(partial_lse_ptr + partial + split * HEADS)
        out_split = tl.load(partial_out_ptr + (partial + split * HEADS) * D_V + offs_d, mask=offs_d < D_V, other=0.0)
        new_max = tl.maximum(lse_max, lse_split)
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        rescale = tl.exp(lse_max - finite_max)
        weight = tl.exp(lse_split - finite_max)
        total = total * rescale + weight
        acc = acc * rescale + out_split * weight
        lse_max = new_max

    is_empty = total == 0.0
    factor = tl.where(is_empty, 0.0, 1.0 / total)
    lse = tl.where(is_empty, -float("inf"), lse_max + tl.log(total))
    if attn_sink_ptr is not None:
        factor *= sink_keep(lse, tl.load(attn_sink_ptr + head))
    out = (acc * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * HEADS + head) * D_V + offs_d, out, mask=offs_d < D_V)
    tl.store(lse_ptr + row * HEADS + head, lse)

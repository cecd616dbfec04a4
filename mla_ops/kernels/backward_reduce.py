"""Deterministic sum of the dkv rows that every slot of the backward kernel stored: one program per key row."""

import triton
import triton.language as tl


@triton.jit
def _sum_slot_rows_kernel(
    partial_ptr,  # fp32 [slots * head blocks, d_total]
    order_ptr,  # slots sorted by the key row they name, equal ones in slot order
    first_ptr,  # [key rows + 1]: where the slots of each key row start in `order`
    dkv_ptr,  # [key rows, d_total]
    HEAD_BLOCKS: tl.constexpr, D_TOTAL: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Add the rows in `order` to a key row; the order, and so the rounding, depends on the indices alone."""
    key = tl.program_id(0).to(tl.int64)
    first = tl.load(first_ptr + key) * HEAD_BLOCKS
    end = tl.load(first_ptr + key + 1) * HEAD_BLOCKS
    offs_d = tl.arange(0, BLOCK_D)
    in_row = offs_d < D_TOTAL

    acc = tl.zeros([BLOCK_SLOTS, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_SLOTS):
        entry = start + tl.arange(0, BLOCK_SLOTS)
        slot = tl.load(order_ptr + entry // HEAD_BLOCKS, mask=entry < end, other=0).to(tl.int64)
        partial_row = slot * HEAD_BLOCKS + entry % HEAD_BLOCKS
        mask = (entry < end)[:, None] & in_row[None, :]
        acc += tl.load(partial_ptr + partial_row[:, None] * D_TOTAL + offs_d[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if not IS_FIRST:
        total += tl.load(dkv_ptr + key * D_TOTAL + offs_d, mask=in_row, other=0.0)
    tl.store(dkv_ptr + key * D_TOTAL + offs_d, total.to(dkv_ptr.dtype.element_ty), mask=in_row)

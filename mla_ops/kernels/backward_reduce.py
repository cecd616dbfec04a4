"""Deterministic sum of the dkv rows that the slots of the backward kernel stored: sort keys, then one program per key.

A sort key says in which chunk of queries a slot is and which key row it names. Sorted once, the slots of every (chunk,
key row) are neighbours, in slot order; invalid slots come last.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import check_positions


@triton.jit(do_not_specialize=["seq_q", "seq_kv", "topk", "rows_per_chunk", "num_chunks", "num_keys"])
def _slot_keys_kernel(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    sort_keys_ptr,  # [rows, groups, topk]
    seq_q, seq_kv, topk, rows_per_chunk, num_chunks, num_keys,
    KV_GROUP: tl.constexpr, LOWEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sort key of every slot of one row and group; the first is LOWEST, so that all of the dtype is used."""
    program = tl.program_id(0).to(tl.int64)
    row, group = program // KV_GROUP, program % KV_GROUP
    batch = row // seq_q
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        end_slot = tl.minimum(tl.load(topk_length_ptr + row), topk).to(tl.int32)
    indices_ptr += batch * stride_i_b + row % seq_q * stride_i_s + group * stride_i_g
    first_key = LOWEST + row // rows_per_chunk * num_keys + batch * seq_kv * KV_GROUP + group
    no_key = LOWEST + num_chunks.to(tl.int64) * num_keys
    for start in tl.range(0, topk, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        position = tl.load(indices_ptr + slots, mask=slots < end_slot, other=0)
        position, valid = check_positions(position, slots, end_slot, seq_kv, True)
        sort_key = tl.where(valid, first_key + position * KV_GROUP, no_key)
        tl.store(sort_keys_ptr + program * topk + slots, sort_key.to(sort_keys_ptr.dtype.element_ty), slots < topk)


@triton.jit(do_not_specialize=["chunk", "slots_per_chunk"])
def _sum_slot_rows_kernel(
    partial_ptr,  # fp32 [slots of a chunk * head blocks, d_total]
    order_ptr,  # slots sorted by chunk and key row, equal ones in slot order
    first_ptr,  # [chunks * key rows + 1]: where the slots of each key row start in `order`
    dkv_ptr,  # [key rows, d_total]
    chunk, slots_per_chunk,
    HEAD_BLOCKS: tl.constexpr, D_TOTAL: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Add the rows of a chunk to a key row in `order`; the order, and so the rounding, depends on the indices alone."""
    key = tl.program_id(0).to(tl.int64)
    first_ptr += tl.num_programs(0).to(tl.int64) * chunk + key
    first = tl.load(first_ptr) * HEAD_BLOCKS
    end = tl.load(first_ptr + 1) * HEAD_BLOCKS
    first_slot = slots_per_chunk.to(tl.int64) * chunk
    offs_d = tl.arange(0, BLOCK_D)
    in_row = offs_d < D_TOTAL

    acc = tl.zeros([BLOCK_SLOTS, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_SLOTS):
        entry = start + tl.arange(0, BLOCK_SLOTS)
        slot = tl.load(order_ptr + entry // HEAD_BLOCKS, mask=entry < end, other=first_slot).to(tl.int64) - first_slot
        partial_row = slot * HEAD_BLOCKS + entry % HEAD_BLOCKS
        mask = (entry < end)[:, None] & in_row[None, :]
        acc += tl.load(partial_ptr + partial_row[:, None] * D_TOTAL + offs_d[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, 0)
    if not IS_FIRST:
        total += tl.load(dkv_ptr + key * D_TOTAL + offs_d, mask=in_row, other=0.0)
    tl.store(dkv_ptr + key * D_TOTAL + offs_d, total.to(dkv_ptr.dtype.element_ty), mask=in_row)

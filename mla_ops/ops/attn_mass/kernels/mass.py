"""The mass kernel: one query and KV group a program, the selected rows as rows of the product, the heads as columns.

With the heads as columns a thread holds several heads of a key, so their sum costs two exchanges between threads; with
the heads as rows it would cost an exchange for every key. The queries of a block of heads stay where the products read
them and rows are gathered BLOCK_K at a time, or pieces of both are streamed (NOTE [Streamed rows]). More heads are a
second pass over the slots, which adds to what the first one stored: a sum in a fixed order, without memory of its own.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import (
    add_row_products,
    add_streamed_products,
    check_positions,
    known_multiple,
    load_chunks,
)

LOG2_E = tl.constexpr(1.4426950408889634)


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(do_not_specialize=["stride_q_b", "stride_kv_b", "stride_i_b", "seq_q", "seq_kv", "topk"])
def _attn_mass_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    lse_ptr,  # fp32 [rows, heads]
    mass_ptr,  # fp32 [rows, groups, topk]
    softmax_scale, seq_q, seq_kv, topk,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, D_TOTAL: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    IS_STREAMED: tl.constexpr, STRIDE_ALIGN: tl.constexpr, USE_INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    HEADS_PER_GROUP: tl.constexpr = HEADS // KV_GROUP
    HEAD_BLOCKS: tl.constexpr = (HEADS_PER_GROUP + BLOCK_H - 1) // BLOCK_H
    NUM_D: tl.constexpr = D_TOTAL // BLOCK_D if D_TOTAL > BLOCK_D else 1
    TAIL: tl.constexpr = NUM_D * BLOCK_D
    NUM_T: tl.constexpr = (D_TOTAL - TAIL + BLOCK_T - 1) // BLOCK_T if D_TOTAL > TAIL else 0

    program = tl.program_id(0).to(tl.int64)
    row, group = program // KV_GROUP, program % KV_GROUP
    batch, query = row // seq_q, row % seq_q
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    stride_kv_s = known_multiple(stride_kv_s, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + query * known_multiple(stride_q_s, STRIDE_ALIGN)
    kv_ptr += batch * known_multiple(stride_kv_b, STRIDE_ALIGN) + group * known_multiple(stride_kv_g, STRIDE_ALIGN)
    indices_ptr += batch * stride_i_b + query * stride_i_s + group * stride_i_g
    mass_ptr += program * topk

    logit_scale = tl.cast(softmax_scale, tl.float32) * LOG2_E
    offs_k = tl.arange(0, BLOCK_K)
    # Without heads one pass stores what an empty sum is.
    for first_head in tl.range(0, HEADS_PER_GROUP if HEADS_PER_GROUP > 0 else 1, BLOCK_H):
        head_in_group = first_head + tl.arange(0, BLOCK_H)
        head_mask = head_in_group < HEADS_PER_GROUP
        offs_h = group * HEADS_PER_GROUP + head_in_group
        q_offsets = offs_h * stride_q_h
        if not IS_STREAMED:
            q_tiles = load_chunks(q_ptr, q_offsets, head_mask, 0, BLOCK_D, NUM_D, D_TOTAL)
            q_tail = load_chunks(q_ptr, q_offsets, head_mask, TAIL, BLOCK_T, NUM_T, D_TOTAL)
            lse = tl.load(lse_ptr + row * HEADS + offs_h, mask=head_mask, other=-float("inf"))

        ahead = tl.load(indices_ptr + offs_k, mask=offs_k < end_slot, other=0)
        for start in tl.range(0, end_slot, BLOCK_K):
            slots = start + offs_k
            position, valid = check_positions(ahead, slots, end_slot, seq_kv, USE_INT64_OFFSETS)
            ahead = tl.load(indices_ptr + slots + BLOCK_K, mask=slots + BLOCK_K < end_slot, other=0)
            kv_offsets = position * stride_kv_s

            logits = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
            if IS_STREAMED:
                logits = add_streamed_products(
                    logits, kv_ptr, kv_offsets, valid, q_ptr, q_offsets, head_mask, BLOCK_D, D_TOTAL, "ieee"
                )
                # Loaded again for every block: kept, it would cost the products 32 registers of a thread.
                lse = tl.load(lse_ptr + row * HEADS + offs_h, mask=head_mask, other=-float("inf"))
            else:
                kv_tiles = load_chunks(kv_ptr, kv_offsets, valid, 0, BLOCK_D, NUM_D, D_TOTAL)
                kv_tail = load_chunks(kv_ptr, kv_offsets, valid, TAIL, BLOCK_T, NUM_T, D_TOTAL)
                logits = add_row_products(logits, kv_tail, q_tail, NUM_T, "ieee")
                logits = add_row_products(logits, kv_tiles, q_tiles, NUM_D, "ieee")
            weights = tl.exp2(logits * logit_scale - (lse * LOG2_E)[None, :])
            # A head without a key, like one that is padding, adds nothing, whatever is in the rows.
            mass = tl.sum(tl.where((lse != -float("inf"))[None, :], weights, 0.0), 1)
            if HEAD_BLOCKS > 1:
                mass += tl.load(mass_ptr + slots, mask=valid & (first_head > 0), other=0.0)
            tl.store(mass_ptr + slots, tl.where(valid, mass, 0.0), mask=slots < topk)
        if HEAD_BLOCKS > 1:
            tl.debug_barrier()  # the next heads read what these stored

    # Blocks past the length.
    for start in tl.range((end_slot + BLOCK_K - 1) // BLOCK_K * BLOCK_K, topk, BLOCK_K):
        slots = start + offs_k
        tl.store(mass_ptr + slots, tl.zeros([BLOCK_K], tl.float32), mask=slots < topk)

"""The score kernel: one query and KV group a program, the selected keys as rows of the product, the heads as columns.

With the heads as columns a thread holds several heads of a key, so their sum costs two exchanges between threads; with
the heads as rows it would cost an exchange for every key. Heads beyond BLOCK_H are a second pass over the slots, which
adds to what the first one stored: a sum in a fixed order, without memory of its own.
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


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(do_not_specialize=["stride_q_b", "stride_k_b", "stride_i_b", "seq_q", "seq_kv", "topk"])
def _index_scores_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    k_ptr, stride_k_b, stride_k_s, stride_k_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    weights_ptr,  # [rows, heads]
    scores_ptr,  # fp32 [rows, groups, topk]
    seq_q, seq_kv, topk,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    IS_STREAMED: tl.constexpr, STRIDE_ALIGN: tl.constexpr, USE_INT64_OFFSETS: tl.constexpr, HAS_RELU: tl.constexpr,
):  # fmt: skip
    HEADS_PER_GROUP: tl.constexpr = HEADS // KV_GROUP
    HEAD_BLOCKS: tl.constexpr = (HEADS_PER_GROUP + BLOCK_H - 1) // BLOCK_H
    NUM_D: tl.constexpr = HEAD_DIM // BLOCK_D if HEAD_DIM > BLOCK_D else 1
    TAIL: tl.constexpr = NUM_D * BLOCK_D
    NUM_T: tl.constexpr = (HEAD_DIM - TAIL + BLOCK_T - 1) // BLOCK_T if HEAD_DIM > TAIL else 0

    program = tl.program_id(0).to(tl.int64)
    row, group = program // KV_GROUP, program % KV_GROUP
    batch, query = row // seq_q, row % seq_q
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    stride_k_s = known_multiple(stride_k_s, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + query * known_multiple(stride_q_s, STRIDE_ALIGN)
    k_ptr += batch * known_multiple(stride_k_b, STRIDE_ALIGN) + group * known_multiple(stride_k_g, STRIDE_ALIGN)
    indices_ptr += batch * stride_i_b + query * stride_i_s + group * stride_i_g
    scores_ptr += program * topk

    offs_k = tl.arange(0, BLOCK_K)
    # Without heads one pass stores what an empty sum is.
    for first_head in tl.range(0, HEADS_PER_GROUP if HEADS_PER_GROUP > 0 else 1, BLOCK_H):
        head_in_group = first_head + tl.arange(0, BLOCK_H)
        head_mask = head_in_group < HEADS_PER_GROUP
        offs_h = group * HEADS_PER_GROUP + head_in_group
        q_offsets = offs_h * stride_q_h
        if not IS_STREAMED:
            q_tiles = load_chunks(q_ptr, q_offsets, head_mask, 0, BLOCK_D, NUM_D, HEAD_DIM)
            q_tail = load_chunks(q_ptr, q_offsets, head_mask, TAIL, BLOCK_T, NUM_T, HEAD_DIM)
        weights = tl.load(weights_ptr + row * HEADS + offs_h, mask=head_mask, other=0.0).to(tl.float32)

        ahead = tl.load(indices_ptr + offs_k, mask=offs_k < end_slot, other=0)
        for start in tl.range(0, end_slot, BLOCK_K):
            slots = start + offs_k
            position, valid = check_positions(ahead, slots, end_slot, seq_kv, USE_INT64_OFFSETS)
            ahead = tl.load(indices_ptr + slots + BLOCK_K, mask=slots + BLOCK_K < end_slot, other=0)
            k_offsets = position * stride_k_s

            matches = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
            if IS_STREAMED:
                matches = add_streamed_products(
                    matches, k_ptr, k_offsets, valid, q_ptr, q_offsets, head_mask, BLOCK_D, HEAD_DIM, "ieee"
                )
            else:
                k_tiles = load_chunks(k_ptr, k_offsets, valid, 0, BLOCK_D, NUM_D, HEAD_DIM)
                k_tail = load_chunks(k_ptr, k_offsets, valid, TAIL, BLOCK_T, NUM_T, HEAD_DIM)
                matches = add_row_products(matches, k_tail, q_tail, NUM_T, "ieee")
                matches = add_row_products(matches, k_tiles, q_tiles, NUM_D, "ieee")
            if HAS_RELU:
                matches = tl.maximum(matches, 0.0, propagate_nan=tl.PropagateNan.ALL)
            shares = matches * weights[None, :]
            if HEADS_PER_GROUP % BLOCK_H != 0 or HEADS_PER_GROUP == 0:
                # An infinite key times a query of padding is NaN.
                shares = tl.where(head_mask[None, :], shares, 0.0)
            scores = tl.sum(shares, 1)
            if HEAD_BLOCKS > 1:
                scores += tl.load(scores_ptr + slots, mask=valid & (first_head > 0), other=0.0)
            tl.store(scores_ptr + slots, tl.where(valid, scores, -float("inf")), mask=slots < topk)
        if HEAD_BLOCKS > 1:
            tl.debug_barrier()  # the next heads read what these stored

    # Blocks past the length.
    for start in tl.range((end_slot + BLOCK_K - 1) // BLOCK_K * BLOCK_K, topk, BLOCK_K):
        slots = start + offs_k
        tl.store(scores_ptr + slots, tl.full([BLOCK_K], -float("inf"), tl.float32), mask=slots < topk)

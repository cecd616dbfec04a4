"""The backward of the scores: a pass over the slots of a query and a block of its heads yields dq, dw, shares of dk.

With s = <q, k>, g the gradient of a slot's score and r' = 1 where s is above 0, or NaN, and without ReLU everywhere:

    dS = g * w * r'         dq = dS^T K         dk = dS q         dw = sum over the slots of g * relu(s)

Gradients of wide rows are made in slabs of columns, a launch each, which keeps its own columns of dq: every slab
repeats the product of whole rows, and streams it (NOTE [Streamed rows]).

Rows of dk are shared by many queries. They are summed with fp32 atomics, or, when the result must be reproducible,
every slot stores its own row at its place and `mla_ops/kernels/row_sums.py` sums the rows of one key in a fixed order.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import (
    add_row_products,
    add_streamed_products,
    add_weighted_rows,
    check_positions,
    known_multiple,
    load_chunks,
    locate_program,
    store_chunks,
    zero_chunks,
)
from mla_ops.kernels.row_sums import put_rows


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(do_not_specialize=["stride_q_b", "stride_k_b", "stride_i_b", "first_row", "seq_q", "seq_kv", "topk"])
def _index_scores_bwd_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    k_ptr, stride_k_b, stride_k_s, stride_k_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr,  # None when the call has none
    weights_ptr,  # [rows, heads]
    dscores_ptr,  # [rows, groups, topk]
    dq_ptr, dk_ptr, dw_ptr,  # contiguous; None for what is not needed; dk fp32
    places_ptr,  # None, or int32 [rows, groups, topk]: where dk, then [places, head blocks, head dim], has the slots
    first_row, seq_q, seq_kv, topk,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    FIRST: tl.constexpr, END: tl.constexpr,  # columns of dq and dk
    STRIDE_ALIGN: tl.constexpr, USE_INT64_OFFSETS: tl.constexpr, HAS_RELU: tl.constexpr,
):  # fmt: skip
    IS_SLAB: tl.constexpr = END - FIRST < HEAD_DIM
    NUM_D: tl.constexpr = (END - FIRST) // BLOCK_D if END - FIRST > BLOCK_D else 1
    TAIL: tl.constexpr = FIRST + NUM_D * BLOCK_D
    NUM_T: tl.constexpr = (END - TAIL + BLOCK_T - 1) // BLOCK_T if END > TAIL else 0
    element = k_ptr.dtype.element_ty

    row, batch, query, group, offs_h, head_mask = locate_program(first_row, seq_q, HEADS, KV_GROUP, BLOCK_H)
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    stride_k_s = known_multiple(stride_k_s, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + query * known_multiple(stride_q_s, STRIDE_ALIGN)
    k_ptr += batch * known_multiple(stride_k_b, STRIDE_ALIGN)
    k_ptr += group.to(tl.int64) * known_multiple(stride_k_g, STRIDE_ALIGN)
    indices_ptr += batch * stride_i_b + query * stride_i_s + group.to(tl.int64) * stride_i_g
    row_slots = (row * KV_GROUP + group) * topk
    dscores_ptr += row_slots
    if dk_ptr is not None:
        if places_ptr is not None:
            HEAD_BLOCKS: tl.constexpr = (HEADS // KV_GROUP + BLOCK_H - 1) // BLOCK_H
            places_ptr += row_slots
            dk_ptr += tl.program_id(0) % HEAD_BLOCKS * HEAD_DIM
        else:
            dk_ptr += (batch * seq_kv * KV_GROUP + group) * HEAD_DIM

    q_offsets = offs_h.to(tl.int64) * stride_q_h
    q_tiles = load_chunks(q_ptr, q_offsets, head_mask, FIRST, BLOCK_D, NUM_D, END)
    q_tail = load_chunks(q_ptr, q_offsets, head_mask, TAIL, BLOCK_T, NUM_T, END)
    row_heads = row * HEADS + offs_h
    weights = tl.load(weights_ptr + row_heads, mask=head_mask, other=0.0).to(tl.float32)
    dq_tiles = zero_chunks(BLOCK_H, BLOCK_D, NUM_D)
    dq_tail = zero_chunks(BLOCK_H, BLOCK_T, NUM_T)
    dw = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)  # summed over its keys once, at the end

    offs_k = tl.arange(0, BLOCK_K)
    ahead = tl.load(indices_ptr + offs_k, mask=offs_k < end_slot, other=0)
    for start in tl.range(0, end_slot, BLOCK_K):
        slots = start + offs_k
        position, valid = check_positions(ahead, slots, end_slot, seq_kv, USE_INT64_OFFSETS)
        ahead = tl.load(indices_ptr + slots + BLOCK_K, mask=slots + BLOCK_K < end_slot, other=0)
        dscores = tl.load(dscores_ptr + slots, mask=valid, other=0.0).to(tl.float32)
        if places_ptr is not None:
            place = tl.load(places_ptr + slots, mask=valid, other=0)
        k_offsets = position * stride_k_s
        k_tiles = load_chunks(k_ptr, k_offsets, valid, FIRST, BLOCK_D, NUM_D, END)
        k_tail = load_chunks(k_ptr, k_offsets, valid, TAIL, BLOCK_T, NUM_T, END)

        matches = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        if IS_SLAB:
            matches = add_streamed_products(
                matches, k_ptr, k_offsets, valid, q_ptr, q_offsets, head_mask, BLOCK_D, HEAD_DIM, "ieee"
            )
        else:
            matches = add_row_products(matches, k_tail, q_tail, NUM_T, "ieee")
            matches = add_row_products(matches, k_tiles, q_tiles, NUM_D, "ieee")
        dmatches = dscores[:, None] * weights[None, :]
        if HAS_RELU:
            # NaN is not below 0: it passes, as in torch. The gradient is selected and not multiplied: it may be NaN.
            dmatches = tl.where(matches <= 0.0, 0.0, dmatches)
            matches = tl.maximum(matches, 0.0, propagate_nan=tl.PropagateNan.ALL)
        # Selected, because 0 times NaN is NaN: a query or a weight for invalid slots, a gradient or a key for padding.
        if dw_ptr is not None:
            dw += tl.where(valid[:, None], dscores[:, None] * matches, 0.0)
        live = valid[:, None]
        if HEADS // KV_GROUP % BLOCK_H != 0:
            live = live & head_mask[None, :]
        dmatches = tl.where(live, dmatches, 0.0).to(element)

        if dq_ptr is not None:
            dmatches_h = tl.trans(dmatches)
            dq_tiles = add_weighted_rows(dq_tiles, dmatches_h, k_tiles, NUM_D, "ieee")
            dq_tail = add_weighted_rows(dq_tail, dmatches_h, k_tail, NUM_T, "ieee")
        if dk_ptr is not None:
            if places_ptr is not None:
                dk_offsets = place.to(position.dtype) * (HEAD_BLOCKS * HEAD_DIM)
            else:
                dk_offsets = position * (KV_GROUP * HEAD_DIM)
            for c in tl.static_range(NUM_D):
                tile = tl.dot(dmatches, q_tiles[c], input_precision="ieee")
                put_rows(dk_ptr, dk_offsets, valid, tile, FIRST + c * BLOCK_D, BLOCK_D, END, places_ptr is not None)
            for c in tl.static_range(NUM_T):
                tile = tl.dot(dmatches, q_tail[c], input_precision="ieee")
                put_rows(dk_ptr, dk_offsets, valid, tile, TAIL + c * BLOCK_T, BLOCK_T, END, places_ptr is not None)

    if dq_ptr is not None:
        store_chunks(dq_ptr, row_heads * HEAD_DIM, head_mask, dq_tiles, FIRST, BLOCK_D, NUM_D, END)
        store_chunks(dq_ptr, row_heads * HEAD_DIM, head_mask, dq_tail, TAIL, BLOCK_T, NUM_T, END)
    if dw_ptr is not None:
        tl.store(dw_ptr + row_heads, tl.sum(dw, 0).to(dw_ptr.dtype.element_ty), mask=head_mask)

"""Backward kernel: one pass over the slots of a row yields dq, its share of dkv, and dsink.

With P the softmax over the valid slots (no sink) and keep = exp(lse) / (exp(lse) + exp(sink)):

    delta = rowsum(dout * out)                   dS  = P * (keep * (dout V^T - delta) + dlse)
    dq    = scale * dS K                         dkv = scale * dS^T q, plus (keep * P)^T dout in the value channels
    dsink = -sum_rows (1 - keep) * delta

Rows of dkv are shared by many queries. They are summed with fp32 atomics, or, when the result must be reproducible,
every slot stores its own row at its place and `mla_ops/kernels/row_sums.py` sums the rows of one key in a fixed order.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import (
    add_row_products,
    add_transposed_rows,
    add_weighted_rows,
    check_positions,
    known_multiple,
    load_chunks,
    locate_program,
    row_dot_sums,
    sink_keep,
    store_chunks,
    transpose_chunks,
    zero_chunks,
)
from mla_ops.kernels.row_sums import put_rows
from mla_ops.kernels.scaled_rows import load_scales, widened_chunks

LOG2_E = tl.constexpr(1.4426950408889634)


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_q_b", "stride_kv_b", "stride_i_b", "stride_do_b", "first_row", "seq_q", "seq_kv", "topk"
    ]
)  # fmt: skip
def _sparse_attn_bwd_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    out_ptr, lse_ptr,  # contiguous, as the forward made them
    dout_ptr, stride_do_b, stride_do_s, stride_do_h, dlse_ptr,  # a pointer is None for a gradient that did not arrive
    dq_ptr, dkv_ptr, dsink_ptr,  # contiguous; None for what is not needed; dkv fp32, dsink fp32 [rows, heads]
    places_ptr,  # None, or int32 [rows, groups, topk]: where dkv, then [places, head blocks, d_total], has the slots
    softmax_scale, first_row, seq_q, seq_kv, topk,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, D_TOTAL: tl.constexpr, D_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DT: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, USE_INT64_OFFSETS: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    IS_KEY_MAJOR: tl.constexpr, IS_AHEAD: tl.constexpr,
    # NOTE [Scales are folded]: fp32, contiguous, and None where q, or kv, is plain; else q, or kv, is bytes of e4m3.
    q_scale_ptr=None, kv_scale_ptr=None,
    IS_Q_SCALED_BY_ROW: tl.constexpr = False, IS_KV_SCALED_BY_ROW: tl.constexpr = False,
    ELEMENT: tl.constexpr = None, IS_NATIVE_E4M3: tl.constexpr = False,
):  # fmt: skip
    softmax_scale = tl.cast(softmax_scale, tl.float32)
    NUM_DV: tl.constexpr = (D_V + BLOCK_DV - 1) // BLOCK_DV
    TAIL: tl.constexpr = NUM_DV * BLOCK_DV
    NUM_DT: tl.constexpr = (D_TOTAL - TAIL + BLOCK_DT - 1) // BLOCK_DT if D_TOTAL > TAIL else 0
    # Key-major products have the keys as rows: 64 keys fill a wgmma tile where 16 heads would not.
    HEAD_AXIS: tl.constexpr = 1 if IS_KEY_MAJOR else 0
    element: tl.constexpr = kv_ptr.dtype.element_ty if ELEMENT is None else ELEMENT

    row, batch, query, group, offs_h, head_mask = locate_program(first_row, seq_q, HEADS, KV_GROUP, BLOCK_H)
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    stride_kv_s = known_multiple(stride_kv_s, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + query * known_multiple(stride_q_s, STRIDE_ALIGN)
    kv_ptr += batch * known_multiple(stride_kv_b, STRIDE_ALIGN)
    kv_ptr += group.to(tl.int64) * known_multiple(stride_kv_g, STRIDE_ALIGN)
    indices_ptr += batch * stride_i_b + query * stride_i_s + group.to(tl.int64) * stride_i_g
    q_offsets = offs_h.to(tl.int64) * stride_q_h
    q_tiles = load_chunks(q_ptr, q_offsets, head_mask, 0, BLOCK_DV, NUM_DV, D_TOTAL)
    q_tail = load_chunks(q_ptr, q_offsets, head_mask, TAIL, BLOCK_DT, NUM_DT, D_TOTAL)
    if q_scale_ptr is not None:
        q_scale = load_scales(q_scale_ptr, row * HEADS + offs_h, head_mask, IS_Q_SCALED_BY_ROW)
        q_scale = tl.expand_dims(q_scale, 1 - HEAD_AXIS)
        q_tiles = widened_chunks(q_tiles, NUM_DV, element, IS_NATIVE_E4M3)
        q_tail = widened_chunks(q_tail, NUM_DT, element, IS_NATIVE_E4M3)
    if IS_KV_SCALED_BY_ROW:
        kv_scale_ptr += batch * seq_kv * KV_GROUP + group

    row_heads = row * HEADS + offs_h
    lse = tl.load(lse_ptr + row_heads, mask=head_mask, other=0.0)
    # `shift` is what is subtracted from keep * dP, so it carries the gradient of lse too.
    shift = tl.zeros([BLOCK_H], tl.float32)
    if dout_ptr is not None:
        # As aligned as `out`, whatever the inputs are: the order of the sum below follows the width of these loads.
        OUT_ALIGN: tl.constexpr = 16 if D_V % 16 == 0 else 8 if D_V % 8 == 0 else 4 if D_V % 4 == 0 else 1
        dout_ptr += batch * known_multiple(stride_do_b, OUT_ALIGN) + query * known_multiple(stride_do_s, OUT_ALIGN)
        do_offsets = offs_h.to(tl.int64) * known_multiple(stride_do_h, OUT_ALIGN)
        do_tiles = load_chunks(dout_ptr, do_offsets, head_mask, 0, BLOCK_DV, NUM_DV, D_V)
        out_tiles = load_chunks(out_ptr, row_heads * D_V, head_mask, 0, BLOCK_DV, NUM_DV, D_V)
        shift = row_dot_sums(do_tiles, out_tiles, NUM_DV)
    keep = tl.full([BLOCK_H], 1.0, tl.float32)
    if attn_sink_ptr is not None:
        keep = sink_keep(lse, tl.load(attn_sink_ptr + offs_h, mask=head_mask, other=0.0))
        if dsink_ptr is not None:
            # An empty row adds nothing, also when dout is NaN there.
            dsink = tl.where(lse == -float("inf"), 0.0, (keep - 1.0) * shift)
            tl.store(dsink_ptr + row_heads, dsink, mask=head_mask)
        shift *= keep
    if dlse_ptr is not None:
        shift -= tl.load(dlse_ptr + row_heads, mask=head_mask, other=0.0)

    logit_scale = softmax_scale * LOG2_E
    lse_log2 = tl.expand_dims(lse * LOG2_E, 1 - HEAD_AXIS)
    shift = tl.expand_dims(shift, 1 - HEAD_AXIS)
    keep = tl.expand_dims(keep, 1 - HEAD_AXIS)
    if dq_ptr is not None:
        if IS_KEY_MAJOR:
            dq_tiles = zero_chunks(BLOCK_DV, BLOCK_H, NUM_DV)
            dq_tail = zero_chunks(BLOCK_DT, BLOCK_H, NUM_DT)
        else:
            dq_tiles = zero_chunks(BLOCK_H, BLOCK_DV, NUM_DV)
            dq_tail = zero_chunks(BLOCK_H, BLOCK_DT, NUM_DT)

    if dkv_ptr is not None:
        if places_ptr is not None:
            HEAD_BLOCKS: tl.constexpr = (HEADS // KV_GROUP + BLOCK_H - 1) // BLOCK_H
            places_ptr += (row * KV_GROUP + group) * topk
            dkv_ptr += tl.program_id(0) % HEAD_BLOCKS * D_TOTAL
        else:
            dkv_ptr += (batch * seq_kv * KV_GROUP + group) * D_TOTAL

    offs_k = tl.arange(0, BLOCK_K)
    if IS_AHEAD:
        ahead = tl.load(indices_ptr + offs_k, mask=offs_k < end_slot, other=0)
    for start in tl.range(0, end_slot, BLOCK_K):
        slots = start + offs_k
        if IS_AHEAD:
            position, valid = check_positions(ahead, slots, end_slot, seq_kv, USE_INT64_OFFSETS)
            ahead = tl.load(indices_ptr + slots + BLOCK_K, mask=slots + BLOCK_K < end_slot, other=0)
        else:
            position = tl.load(indices_ptr + slots, mask=slots < end_slot, other=0)
            position, valid = check_positions(position, slots, end_slot, seq_kv, USE_INT64_OFFSETS)
        if places_ptr is not None:
            place = tl.load(places_ptr + slots, mask=valid, other=0)  # early: needed last, and as late as a row
        kv_offsets = position * stride_kv_s
        kv_tiles = load_chunks(kv_ptr, kv_offsets, valid, 0, BLOCK_DV, NUM_DV, D_TOTAL)
        kv_tail = load_chunks(kv_ptr, kv_offsets, valid, TAIL, BLOCK_DT, NUM_DT, D_TOTAL)
        if kv_scale_ptr is not None:
            kv_scale = load_scales(kv_scale_ptr, position * KV_GROUP, valid, IS_KV_SCALED_BY_ROW)
            kv_scale = tl.expand_dims(kv_scale, HEAD_AXIS)
            kv_tiles = widened_chunks(kv_tiles, NUM_DV, element, IS_NATIVE_E4M3)
            kv_tail = widened_chunks(kv_tail, NUM_DT, element, IS_NATIVE_E4M3)

        if IS_KEY_MAJOR:
            logits = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
            logits = add_row_products(logits, kv_tail, q_tail, NUM_DT, INPUT_PRECISION)
            logits = add_row_products(logits, kv_tiles, q_tiles, NUM_DV, INPUT_PRECISION)
        else:
            logits = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
            logits = add_row_products(logits, q_tail, kv_tail, NUM_DT, INPUT_PRECISION)
            logits = add_row_products(logits, q_tiles, kv_tiles, NUM_DV, INPUT_PRECISION)
        if q_scale_ptr is not None:
            logits *= q_scale
        if kv_scale_ptr is not None:
            logits *= kv_scale
        # Both selections are needed: an empty row has lse = -inf and may have NaN gradients.
        is_valid = tl.expand_dims(valid, HEAD_AXIS)
        weights = tl.where(is_valid, tl.exp2(logits * logit_scale - lse_log2), 0.0)
        dlogits = -shift
        if dout_ptr is not None:
            if IS_KEY_MAJOR:
                dweights = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
                dweights = add_row_products(dweights, kv_tiles, do_tiles, NUM_DV, INPUT_PRECISION)
            else:
                dweights = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
                dweights = add_row_products(dweights, do_tiles, kv_tiles, NUM_DV, INPUT_PRECISION)
            if kv_scale_ptr is not None:
                dweights *= kv_scale
            dlogits = keep * dweights - shift
        dlogits = tl.where(is_valid, weights * dlogits * softmax_scale, 0.0)
        # A gradient of q is a sum of real keys, a gradient of kv one of real queries: each has the scales of the other.
        dlogits_q = (dlogits if kv_scale_ptr is None else dlogits * kv_scale).to(element)
        dlogits_kv = (dlogits if q_scale_ptr is None else dlogits * q_scale).to(element)

        # dq before dkv: its operands are dead by then, and their shared memory becomes the staging of the atomics.
        if dq_ptr is not None:
            if IS_KEY_MAJOR:
                dq_tiles = add_transposed_rows(dq_tiles, kv_tiles, dlogits_q, NUM_DV, INPUT_PRECISION)
                dq_tail = add_transposed_rows(dq_tail, kv_tail, dlogits_q, NUM_DT, INPUT_PRECISION)
            else:
                dq_tiles = add_weighted_rows(dq_tiles, dlogits_q, kv_tiles, NUM_DV, INPUT_PRECISION)
                dq_tail = add_weighted_rows(dq_tail, dlogits_q, kv_tail, NUM_DT, INPUT_PRECISION)
        if dkv_ptr is not None:
            if places_ptr is not None:
                dkv_offsets = place.to(position.dtype) * (HEAD_BLOCKS * D_TOTAL)
            else:
                dkv_offsets = position * (KV_GROUP * D_TOTAL)
            kept_weights = (weights * keep).to(element)
            dlogits_k = dlogits_kv if IS_KEY_MAJOR else tl.trans(dlogits_kv)
            kept_weights_k = kept_weights if IS_KEY_MAJOR else tl.trans(kept_weights)
            for c in tl.static_range(NUM_DV):
                tile = tl.dot(dlogits_k, q_tiles[c], input_precision=INPUT_PRECISION)
                if dout_ptr is not None:
                    tile = tl.dot(kept_weights_k, do_tiles[c], tile, input_precision=INPUT_PRECISION)
                put_rows(dkv_ptr, dkv_offsets, valid, tile, c * BLOCK_DV, BLOCK_DV, D_TOTAL, places_ptr is not None)
            for c in tl.static_range(NUM_DT):
                tile = tl.dot(dlogits_k, q_tail[c], input_precision=INPUT_PRECISION)
                put_rows(
                    dkv_ptr, dkv_offsets, valid, tile, TAIL + c * BLOCK_DT, BLOCK_DT, D_TOTAL, places_ptr is not None
                )

    if dq_ptr is not None:
        if IS_KEY_MAJOR:
            dq_tiles = transpose_chunks(dq_tiles, NUM_DV)
            dq_tail = transpose_chunks(dq_tail, NUM_DT)
        store_chunks(dq_ptr, row_heads * D_TOTAL, head_mask, dq_tiles, 0, BLOCK_DV, NUM_DV, D_TOTAL)
        store_chunks(dq_ptr, row_heads * D_TOTAL, head_mask, dq_tail, TAIL, BLOCK_DT, NUM_DT, D_TOTAL)

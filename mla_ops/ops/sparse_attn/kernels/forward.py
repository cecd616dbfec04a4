"""Forward kernel: the query heads of one row are the rows of the products, the selected KV rows their columns.

One program holds BLOCK_H heads of one (batch, query) pair and walks its slots BLOCK_K at a time with an online softmax.
For a short grid (decode) the slots of a row are shared out over grid.y; then each program stores fp32 partial results
that `forward_split.py` merges.

Without `out_ptr` the kernel stops at the logits: it makes no weights and no value product, and stores each head's
largest logit where lse would be.
"""

import triton
import triton.language as tl

from mla_ops.kernels.primitives import (
    LN_2,
    add_row_products,
    add_weighted_rows,
    check_positions,
    finished_softmax,
    known_multiple,
    load_chunks,
    locate_program,
    positive_logit_scale,
    scale_rows,
    sink_keep,
    softmax_step,
    store_chunks,
    zero_chunks,
)
from mla_ops.kernels.scaled_rows import load_scales, widened_chunks


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all. The other
# strides follow from widths and topk; STRIDE_ALIGN says of all strides what vector loads need to know.
@triton.jit(do_not_specialize=["stride_q_b", "stride_kv_b", "stride_i_b", "seq_q", "seq_kv", "topk", "slots_per_split"])
def _sparse_attn_fwd_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    kv_ptr, stride_kv_b, stride_kv_s, stride_kv_g,
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    topk_length_ptr, attn_sink_ptr,  # None when the call has none
    # [rows, heads, d_v] or None, and [rows, heads]; split: fp32, [rows, splits, heads, ...]
    out_ptr, lse_ptr,
    softmax_scale, seq_q, seq_kv, topk, slots_per_split,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, D_TOTAL: tl.constexpr, D_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DT: tl.constexpr,
    STRIDE_ALIGN: tl.constexpr, USE_INT64_OFFSETS: tl.constexpr, INPUT_PRECISION: tl.constexpr, IS_SPLIT: tl.constexpr,
    IS_NEGATIVE_SCALE: tl.constexpr,
    # NOTE [Scales are folded]: fp32, contiguous, and None where q, or kv, is plain; else q, or kv, is bytes of e4m3.
    q_scale_ptr=None, kv_scale_ptr=None,
    IS_Q_SCALED_BY_ROW: tl.constexpr = False, IS_KV_SCALED_BY_ROW: tl.constexpr = False,
    ELEMENT: tl.constexpr = None, IS_NATIVE_E4M3: tl.constexpr = False,
):  # fmt: skip
    softmax_scale = tl.cast(softmax_scale, tl.float32)
    element: tl.constexpr = kv_ptr.dtype.element_ty if ELEMENT is None else ELEMENT
    NUM_DV: tl.constexpr = (D_V + BLOCK_DV - 1) // BLOCK_DV
    TAIL: tl.constexpr = NUM_DV * BLOCK_DV
    NUM_DT: tl.constexpr = (D_TOTAL - TAIL + BLOCK_DT - 1) // BLOCK_DT if D_TOTAL > TAIL else 0

    row, batch, query, group, offs_h, head_mask = locate_program(0, seq_q, HEADS, KV_GROUP, BLOCK_H)
    end_slot = topk  # see NOTE [Loads that become addresses]
    if topk_length_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end_slot = tl.maximum(tl.minimum(tl.load(topk_length_ptr + row), topk), 0).to(tl.int32)
    first_slot = 0
    out_row = row
    if IS_SPLIT:
        first_slot = tl.program_id(1) * slots_per_split
        end_slot = tl.minimum(first_slot + slots_per_split, end_slot)
        out_row = row * tl.num_programs(1) + tl.program_id(1)

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
        q_tiles = widened_chunks(q_tiles, NUM_DV, element, IS_NATIVE_E4M3)
        q_tail = widened_chunks(q_tail, NUM_DT, element, IS_NATIVE_E4M3)
    if IS_KV_SCALED_BY_ROW:
        kv_scale_ptr += batch * seq_kv * KV_GROUP + group

    logit_scale = positive_logit_scale(softmax_scale)
    row_max = tl.full([BLOCK_H], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = zero_chunks(BLOCK_H, BLOCK_DV, NUM_DV)
    offs_k = tl.arange(0, BLOCK_K)
    slots = first_slot + offs_k
    ahead = tl.load(indices_ptr + slots, mask=slots < end_slot, other=0)
    for start in tl.range(first_slot, end_slot, BLOCK_K):
        slots = start + offs_k
        position, valid = check_positions(ahead, slots, end_slot, seq_kv, USE_INT64_OFFSETS)
        ahead = tl.load(indices_ptr + slots + BLOCK_K, mask=slots + BLOCK_K < end_slot, other=0)
        kv_offsets = position * stride_kv_s
        kv_tiles = load_chunks(kv_ptr, kv_offsets, valid, 0, BLOCK_DV, NUM_DV, D_TOTAL)
        kv_tail = load_chunks(kv_ptr, kv_offsets, valid, TAIL, BLOCK_DT, NUM_DT, D_TOTAL)
        if kv_scale_ptr is not None:
            kv_scale = load_scales(kv_scale_ptr, position * KV_GROUP, valid, IS_KV_SCALED_BY_ROW)
            kv_tiles = widened_chunks(kv_tiles, NUM_DV, element, IS_NATIVE_E4M3)
            kv_tail = widened_chunks(kv_tail, NUM_DT, element, IS_NATIVE_E4M3)

        logits = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
        logits = add_row_products(logits, q_tail, kv_tail, NUM_DT, INPUT_PRECISION)
        logits = add_row_products(logits, q_tiles, kv_tiles, NUM_DV, INPUT_PRECISION)
        if q_scale_ptr is not None:
            logits *= q_scale[:, None]
        if kv_scale_ptr is not None:
            logits *= kv_scale[None, :]
        if IS_NEGATIVE_SCALE:
            logits = -logits
        logits = tl.where(valid[None, :], logits, -float("inf"))

        new_max = tl.maximum(row_max, tl.max(logits, 1) * logit_scale)
        if out_ptr is None:
            # tl.max passes over NaN, and a NaN in a selected row must reach the result: this sum counts them.
            row_sum += tl.sum(tl.where(logits != logits, 1.0, 0.0), 1)
        else:
            row_sum, weights, rescale = softmax_step(logits, row_max, row_sum, new_max, logit_scale)
            acc = scale_rows(acc, rescale, NUM_DV)
            if kv_scale_ptr is not None:
                weights *= kv_scale[None, :]
            acc = add_weighted_rows(acc, weights.to(element), kv_tiles, NUM_DV, INPUT_PRECISION)
        row_max = new_max

    if out_ptr is None:
        # Rounded as lse is, so that it never exceeds lse; a scale of 0 is exact, and leaves an empty row at -inf.
        unit = tl.where(softmax_scale == 0, 0.0, LN_2)
        lse = tl.where(row_max == -float("inf"), row_max, row_max * unit)
        lse = tl.where(row_sum == 0.0, lse, float("nan"))
    else:
        factor, lse = finished_softmax(row_max, row_sum)
        if attn_sink_ptr is not None and not IS_SPLIT:
            factor *= sink_keep(lse, tl.load(attn_sink_ptr + offs_h, mask=head_mask, other=0.0))
        out_offsets = (out_row * HEADS + offs_h) * D_V
        store_chunks(out_ptr, out_offsets, head_mask, scale_rows(acc, factor, NUM_DV), 0, BLOCK_DV, NUM_DV, D_V)
    tl.store(lse_ptr + out_row * HEADS + offs_h, lse, mask=head_mask)

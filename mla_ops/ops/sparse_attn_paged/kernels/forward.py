"""Forward kernel of paged rows: the dense forward with rows that stand in a pool of pages, quantised or not.

NOTE [Scales stay out of rows]
FOLDS multiplies neither keys nor values by their scales: the logits of channels that share a scale are multiplied by
it, and so are the weights before they are rounded. That is BLOCK_H products a row and scale instead of one a channel,
and what enters the tensor cores is exact in bf16 and fp16, whatever the scales are. With 64 heads a block the parts of
the logits spill; there rows are multiplied in fp32 and rounded.

NOTE [A row in two segments]
A row is NUM_DV pieces of BLOCK_DV channels, then NUM_DT of BLOCK_DT. The first are e4m3 or, of dense rows, in 16 bits;
the second are stored alike, or in 16 bits behind the scales (IS_TAIL_16). A piece has one scale. Where the value is
wider than the first segment, both are value.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

import triton
import triton.language as tl

from mla_ops.kernels.primitives import (
    add_row_products,
    add_weighted_rows,
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
from mla_ops.kernels.row_codec import e4m3_to_half, opaque, split_row, ue8m0_to_fp32


@triton.jit
def load_scales(ptr, row_bytes, row_mask, COUNT: tl.constexpr, TYPE: tl.constexpr, IS_TOGETHER: tl.constexpr):
    """Return COUNT fp32 vectors, the scales of each row that begin `row_bytes`, a multiple of 4, behind `ptr`.

    IS_TOGETHER: fp32 scales are copied 16 bytes at a time. Not where rows are multiplied by them: the compiler would
    give the rows the layout of the scales, and copy them 4 bytes at a time.
    """
    scales = ()
    if TYPE == "fp32" and IS_TOGETHER:
        # Rows of up to 1024 channels have up to 8; the bytes of the scales are a multiple of 16.
        WIDTH: tl.constexpr = 4 if COUNT <= 4 else 8
        ptr = ptr.to(tl.pointer_type(tl.float32), bitcast=True)
        cols = tl.arange(0, WIDTH)
        tile = tl.load(ptr + (row_bytes // 4)[:, None] + cols[None, :], mask=row_mask[:, None], other=0.0)
        for s in tl.static_range(COUNT):
            scales = scales + (tl.sum(tl.where((cols == s)[None, :], tile, 0.0), 1),)
    if TYPE == "fp32" and not IS_TOGETHER:
        ptr = ptr.to(tl.pointer_type(tl.float32), bitcast=True)
        for s in tl.static_range(COUNT):
            scales = scales + (tl.load(ptr + row_bytes // 4 + s, mask=row_mask, other=0.0),)
    if TYPE == "ue8m0":
        # Four at a time: asynchronous copies have 4 bytes or more.
        ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        for s in tl.static_range(COUNT):
            if s % 4 == 0:
                word = tl.load(ptr + row_bytes // 4 + s // 4, mask=row_mask, other=0)
            scales = scales + (ue8m0_to_fp32((word >> (s % 4 * 8)) & 0xFF),)
    return scales


@triton.jit
def decode_chunks(
    tiles, scales,
    START: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, FOLDS: tl.constexpr,
    DTYPE: tl.constexpr, IS_NATIVE: tl.constexpr,
):  # fmt: skip
    """Return tiles of bytes in DTYPE: as they are stored, or unless FOLDS times their scales."""
    decoded = ()
    for c in tl.static_range(COUNT):
        if TILE == 0 or FOLDS:
            tile = e4m3_to_half(tiles[c], DTYPE, IS_NATIVE)
        else:
            tile = e4m3_to_half(tiles[c], tl.float32, IS_NATIVE) * scales[(START + c * WIDTH) // TILE][:, None]
            tile = tile.to(DTYPE)
        decoded = decoded + (opaque(tile),)
    return decoded


@triton.jit
def add_scaled_products(
    acc, a_tiles, b_tiles, scales,
    START: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return `acc + sum_s (a_s @ b_s^T) * scale_s`; see NOTE [Scales stay out of rows]."""
    for c in tl.static_range(COUNT):
        if c == 0 or (START + c * WIDTH) % TILE == 0:
            part = tl.zeros(acc.shape, tl.float32)
        part = tl.dot(a_tiles[c], tl.trans(b_tiles[c]), part)
        if c == COUNT - 1 or (START + (c + 1) * WIDTH) % TILE == 0:
            acc += part * scales[(START + c * WIDTH) // TILE][None, :]
    return acc


@triton.jit
def add_scaled_weighted_rows(
    acc_tiles, weights, tiles, scales,
    WIDTH: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return `acc_c + (weights * scale_c) @ tile_c` for every chunk; see NOTE [Scales stay out of rows]."""
    sums = ()
    for c in tl.static_range(COUNT):
        if c * WIDTH % TILE == 0:
            scaled = (weights * scales[c * WIDTH // TILE][None, :]).to(DTYPE)
        sums = sums + (tl.dot(scaled, tiles[c], acc_tiles[c]),)
    return sums


# Lengths, sizes of the pool, and strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_q_b", "stride_p_page", "page_scales", "stride_i_b",
        "seq_q", "num_rows", "page_size", "topk", "slots_per_split",
    ]
)  # fmt: skip
def _sparse_attn_paged_fwd_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    pages_ptr, stride_p_page, stride_p_row, stride_p_g, page_scales,  # distances in units of UNIT bytes
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,  # row numbers
    topk_length_ptr, attn_sink_ptr, cache_scale_ptr, stride_c_g,  # None when the call has none
    out_ptr, lse_ptr,  # [rows, heads, d_v] and [rows, heads]; split: fp32, [rows, splits, heads, ...]
    softmax_scale, seq_q, num_rows, page_size, topk, slots_per_split,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, D_TOTAL: tl.constexpr, D_V: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_DT: tl.constexpr,
    FIRST_END: tl.constexpr, SECOND_START: tl.constexpr,  # channels; see NOTE [A row in two segments]
    STRIDE_ALIGN: tl.constexpr, UNIT: tl.constexpr,  # elements of q, bytes of the pool
    IS_QUANTISED: tl.constexpr, IS_TAIL_16: tl.constexpr, TAIL_OFFSET: tl.constexpr,  # bytes from the start of a row
    SCALE_TYPE: tl.constexpr, SCALE_TILE: tl.constexpr, SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr,
    HAS_ONE_STRIDE: tl.constexpr, FOLDS: tl.constexpr, IS_NATIVE: tl.constexpr, USE_INT64_OFFSETS: tl.constexpr,
    IS_SPLIT: tl.constexpr, IS_NEGATIVE_SCALE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    OFFSET: tl.constexpr = tl.int64 if USE_INT64_OFFSETS else tl.int32
    NUM_DV: tl.constexpr = (FIRST_END + BLOCK_DV - 1) // BLOCK_DV
    NUM_DT: tl.constexpr = (D_TOTAL - SECOND_START + BLOCK_DT - 1) // BLOCK_DT if D_TOTAL > SECOND_START else 0
    LOAD_END: tl.constexpr = FIRST_END if IS_TAIL_16 else D_TOTAL
    IS_TAIL_VALUE: tl.constexpr = NUM_DT > 0 and D_V > SECOND_START
    PAYLOAD: tl.constexpr = FIRST_END if IS_TAIL_16 else D_TOTAL
    NUM_SCALES: tl.constexpr = (PAYLOAD + SCALE_TILE - 1) // SCALE_TILE if SCALE_TILE > 0 else 0
    IS_FOLDED: tl.constexpr = FOLDS and SCALE_TILE > 0

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
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + query * known_multiple(stride_q_s, STRIDE_ALIGN)
    indices_ptr += batch * stride_i_b + query * stride_i_s + group.to(tl.int64) * stride_i_g
    ITEM: tl.constexpr = 1 if IS_QUANTISED else DTYPE.primitive_bitwidth // 8
    pages_ptr += group.to(tl.int64) * stride_p_g * (UNIT // ITEM)
    half_ptr = pages_ptr.to(tl.pointer_type(DTYPE), bitcast=True)
    q_offsets = offs_h.to(tl.int64) * stride_q_h
    q_tiles = load_chunks(q_ptr, q_offsets, head_mask, 0, BLOCK_DV, NUM_DV, LOAD_END)
    q_tail = load_chunks(q_ptr, q_offsets, head_mask, SECOND_START, BLOCK_DT, NUM_DT, D_TOTAL)
    cache_scale = 1.0
    if cache_scale_ptr is not None:
        cache_scale = tl.load(cache_scale_ptr + group * stride_c_g)

    logit_scale = positive_logit_scale(tl.cast(softmax_scale, tl.float32))
    row_max = tl.full([BLOCK_H], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = zero_chunks(BLOCK_H, BLOCK_DV, NUM_DV)
    acc_tail = zero_chunks(BLOCK_H, BLOCK_DT, NUM_DT if IS_TAIL_VALUE else 0)
    offs_k = tl.arange(0, BLOCK_K)
    slots = first_slot + offs_k
    ahead = tl.load(indices_ptr + slots, mask=slots < end_slot, other=-1)
    for start in tl.range(first_slot, end_slot, BLOCK_K):
        slots = start + offs_k
        # Compared before it is narrowed: 2**40 is not row 0.
        valid = (ahead >= 0) & (ahead < num_rows)
        if HAS_ONE_STRIDE:
            units = ahead.to(OFFSET) * stride_p_row
        else:
            page, place = split_row(ahead, page_size)
            page_units = page.to(OFFSET) * stride_p_page
            units = page_units + place.to(OFFSET) * stride_p_row
        ahead = tl.load(indices_ptr + slots + BLOCK_K, mask=slots + BLOCK_K < end_slot, other=-1)

        kv_tiles = load_chunks(pages_ptr, units * (UNIT // ITEM), valid, 0, BLOCK_DV, NUM_DV, LOAD_END)
        if IS_TAIL_16:
            tail_ptr = half_ptr + (TAIL_OFFSET // 2 - SECOND_START)
            kv_tail = load_chunks(tail_ptr, units * (UNIT // 2), valid, SECOND_START, BLOCK_DT, NUM_DT, D_TOTAL)
        else:
            kv_tail = load_chunks(pages_ptr, units * (UNIT // ITEM), valid, SECOND_START, BLOCK_DT, NUM_DT, D_TOTAL)
        scales = ()
        if SCALE_BYTES > 0:
            scale_bytes = (page_units + page_scales) * UNIT + place.to(OFFSET) * SCALE_BYTES
            scales = load_scales(pages_ptr, scale_bytes, valid, NUM_SCALES, SCALE_TYPE, FOLDS)
        elif SCALE_TILE > 0:
            scales = load_scales(pages_ptr + SCALE_OFFSET, units * UNIT, valid, NUM_SCALES, SCALE_TYPE, FOLDS)
        if IS_QUANTISED:
            kv_tiles = decode_chunks(kv_tiles, scales, 0, BLOCK_DV, NUM_DV, SCALE_TILE, FOLDS, DTYPE, IS_NATIVE)
            if not IS_TAIL_16:
                kv_tail = decode_chunks(
                    kv_tail, scales, SECOND_START, BLOCK_DT, NUM_DT, SCALE_TILE, FOLDS, DTYPE, IS_NATIVE
                )

        logits = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
        if IS_FOLDED and not IS_TAIL_16:
            logits = add_scaled_products(logits, q_tail, kv_tail, scales, SECOND_START, BLOCK_DT, NUM_DT, SCALE_TILE)
        else:
            logits = add_row_products(logits, q_tail, kv_tail, NUM_DT, "ieee")
        if IS_FOLDED:
            logits = add_scaled_products(logits, q_tiles, kv_tiles, scales, 0, BLOCK_DV, NUM_DV, SCALE_TILE)
        else:
            logits = add_row_products(logits, q_tiles, kv_tiles, NUM_DV, "ieee")
        if cache_scale_ptr is not None:
            logits *= cache_scale
        if IS_NEGATIVE_SCALE:
            logits = -logits
        logits = tl.where(valid[None, :], logits, -float("inf"))

        new_max = tl.maximum(row_max, tl.max(logits, 1) * logit_scale)
        row_sum, weights, rescale = softmax_step(logits, row_max, row_sum, new_max, logit_scale)
        acc = scale_rows(acc, rescale, NUM_DV)
        if IS_FOLDED:
            acc = add_scaled_weighted_rows(acc, weights, kv_tiles, scales, BLOCK_DV, NUM_DV, SCALE_TILE, DTYPE)
        else:
            acc = add_weighted_rows(acc, weights.to(DTYPE), kv_tiles, NUM_DV, "ieee")
        if IS_TAIL_VALUE:
            acc_tail = scale_rows(acc_tail, rescale, NUM_DT)
            acc_tail = add_weighted_rows(acc_tail, weights.to(DTYPE), kv_tail, NUM_DT, "ieee")
        row_max = new_max

    factor, lse = finished_softmax(row_max, row_sum)
    if cache_scale_ptr is not None:
        # An empty row stays 0 whatever the scale is.
        factor = tl.where(row_sum == 0.0, 0.0, factor * cache_scale)
    if attn_sink_ptr is not None and not IS_SPLIT:
        factor *= sink_keep(lse, tl.load(attn_sink_ptr + offs_h, mask=head_mask, other=0.0))
    out_offsets = (out_row * HEADS + offs_h) * D_V
    VALUE_END: tl.constexpr = SECOND_START if IS_TAIL_VALUE else D_V
    store_chunks(out_ptr, out_offsets, head_mask, scale_rows(acc, factor, NUM_DV), 0, BLOCK_DV, NUM_DV, VALUE_END)
    if IS_TAIL_VALUE:
        acc_tail = scale_rows(acc_tail, factor, NUM_DT)
        store_chunks(out_ptr, out_offsets, head_mask, acc_tail, SECOND_START, BLOCK_DT, NUM_DT, D_V)
    tl.store(lse_ptr + out_row * HEADS + offs_h, lse, mask=head_mask)

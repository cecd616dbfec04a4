"""The reader: a program turns some rows of one KV group into plain numbers."""

import triton
import triton.language as tl

from mla_ops.kernels.row_codec import e4m3_to_half, split_row, ue8m0_to_fp32


@triton.jit
def _read_tiles(
    pages_ptr, data_offsets, scale_offsets, is_row, cache_scale, out_ptr, out_offsets, in_call,
    FIRST: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, D_PAYLOAD: tl.constexpr,
    SCALE_TYPE: tl.constexpr, IS_NATIVE: tl.constexpr,
):  # fmt: skip
    """Read COUNT tiles of each row, the FIRST and those after it; rows of no page are zeros."""
    cols = ((FIRST + tl.arange(0, COUNT)[:, None]) * TILE + tl.arange(0, TILE)[None, :])[None, :, :]
    load_mask, store_mask = is_row[:, None, None], in_call[:, None, None]
    if (FIRST + COUNT) * TILE > D_PAYLOAD:
        load_mask, store_mask = load_mask & (cols < D_PAYLOAD), store_mask & (cols < D_PAYLOAD)
    codes = tl.load(pages_ptr + data_offsets[:, None, None] + cols, mask=load_mask, other=0)  # [rows, COUNT, TILE]
    tile = FIRST + tl.arange(0, COUNT)[None, :]
    scale_mask = is_row[:, None] & (tile * TILE < D_PAYLOAD)
    if SCALE_TYPE == "fp32":
        fp32_ptr = pages_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
        scales = tl.load(fp32_ptr + scale_offsets[:, None] // 4 + tile, mask=scale_mask, other=0.0)
    elif SCALE_TYPE == "ue8m0":
        exponents = tl.load(pages_ptr + scale_offsets[:, None] + tile, mask=scale_mask, other=0)
        scales = ue8m0_to_fp32(exponents.to(tl.int32))
    else:
        # 0 where no row is: the scale of the cache may be NaN.
        scales = tl.where(scale_mask, cache_scale, 0.0)
    numbers = e4m3_to_half(codes, tl.float32, IS_NATIVE) * scales[:, :, None]
    tl.store(out_ptr + out_offsets[:, None, None] + cols, numbers.to(out_ptr.dtype.element_ty), mask=store_mask)


@triton.jit
def _read_copied(
    pages_ptr, offsets, is_row, out_ptr, out_offsets, in_call, START: tl.constexpr, WIDTH: tl.constexpr,
    END: tl.constexpr,
):  # fmt: skip
    """Copy WIDTH channels from START on; both kinds of offsets are those of channel 0, that of a pool in bytes."""
    ELEMENT: tl.constexpr = out_ptr.dtype.element_ty
    ptr = pages_ptr.to(tl.pointer_type(ELEMENT), bitcast=True)
    cols = START + tl.arange(0, WIDTH)[None, :]
    load_mask, store_mask = is_row[:, None], in_call[:, None]
    if START + WIDTH > END:
        load_mask, store_mask = load_mask & (cols < END), store_mask & (cols < END)
    channels = tl.load(ptr + offsets[:, None] // (ELEMENT.primitive_bitwidth // 8) + cols, mask=load_mask, other=0.0)
    tl.store(out_ptr + out_offsets[:, None] + cols, channels, mask=store_mask)


# Sizes and strides of a call and of a pool: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_p_page", "stride_p_row", "stride_p_g", "page_scales", "stride_r", "stride_c_g",
        "n", "num_rows", "page_size",
    ]
)  # fmt: skip
def _read_rows_kernel(
    pages_ptr, stride_p_page, stride_p_row, stride_p_g, page_scales,  # distances in units of UNIT bytes
    rows_ptr, stride_r,
    cache_scale_ptr, stride_c_g,  # None where scales belong to rows
    out_ptr,  # [n, groups, D_TOTAL]
    n, num_rows, page_size,
    KV_GROUP: tl.constexpr, D_PAYLOAD: tl.constexpr, D_TOTAL: tl.constexpr, UNIT: tl.constexpr,
    SCALE_TYPE: tl.constexpr,  # "fp32", "ue8m0" or "none": of the whole cache
    SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr, TAIL_OFFSET: tl.constexpr,
    TILE: tl.constexpr, FIRST_TILES: tl.constexpr, SECOND_TILES: tl.constexpr,
    FIRST_COPIED: tl.constexpr, SECOND_COPIED: tl.constexpr,
    BLOCK_N: tl.constexpr, IS_NATIVE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program % KV_GROUP
    entries = program // KV_GROUP * BLOCK_N + tl.arange(0, BLOCK_N)
    in_call = entries < n
    rows = tl.load(rows_ptr + entries.to(tl.int64) * stride_r, mask=in_call, other=-1)
    # Compared before it is narrowed: 2**40 is not row 0.
    is_row = (rows >= 0) & (rows < num_rows)
    page, place = split_row(rows, page_size)
    page_offsets = page.to(tl.int64) * stride_p_page
    data_offsets = (page_offsets + place.to(tl.int64) * stride_p_row + group * stride_p_g) * UNIT
    scale_offsets = data_offsets + SCALE_OFFSET
    if SCALE_BYTES > 0:
        scale_offsets = (page_offsets + page_scales) * UNIT + place.to(tl.int64) * SCALE_BYTES
    cache_scale = 0.0
    if cache_scale_ptr is not None:
        cache_scale = tl.load(cache_scale_ptr + group * stride_c_g)
    out_offsets = (entries.to(tl.int64) * KV_GROUP + group) * D_TOTAL
    if FIRST_TILES > 0:
        _read_tiles(
            pages_ptr, data_offsets, scale_offsets, is_row, cache_scale, out_ptr, out_offsets, in_call,
            0, FIRST_TILES, TILE, D_PAYLOAD, SCALE_TYPE, IS_NATIVE,
        )  # fmt: skip
    if SECOND_TILES > 0:
        _read_tiles(
            pages_ptr, data_offsets, scale_offsets, is_row, cache_scale, out_ptr, out_offsets, in_call,
            FIRST_TILES, SECOND_TILES, TILE, D_PAYLOAD, SCALE_TYPE, IS_NATIVE,
        )  # fmt: skip
    copied_offsets, out_offsets = data_offsets + TAIL_OFFSET, out_offsets + D_PAYLOAD
    if FIRST_COPIED > 0:
        _read_copied(
            pages_ptr, copied_offsets, is_row, out_ptr, out_offsets, in_call, 0, FIRST_COPIED, D_TOTAL - D_PAYLOAD
        )
    if SECOND_COPIED > 0:
        _read_copied(
            pages_ptr, copied_offsets, is_row, out_ptr, out_offsets, in_call,
            FIRST_COPIED, SECOND_COPIED, D_TOTAL - D_PAYLOAD,
        )  # fmt: skip

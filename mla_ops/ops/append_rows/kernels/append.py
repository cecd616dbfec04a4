"""The writer: a program quantises some rows of one KV group and stores each whole.

NOTE [One of equal rows]
Two programs that write one row at the same time could leave the payload of one with the scales of the other. So a row
is written for one entry only, the last that names it: a program compares its row numbers with all later ones. For many
entries that would take longer than the write. There `_claim_rows_kernel` runs first: every entry stores its place in
the call as the owner of its row, one of them last, and only the owner of a row writes it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mla_ops.kernels.primitives import known_multiple
from mla_ops.kernels.row_codec import fp32_to_ue8m0, scales_of, split_row, to_e4m3


@triton.jit
def _load_piece(
    latent_ptr, latent_offsets, tail_ptr, tail_offsets, in_call,
    START: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, D_LATENT: tl.constexpr,
):  # fmt: skip
    """Return channels `[rows, COUNT, WIDTH]` of the rows of a call from START on, 0 from END on."""
    cols = (START + tl.arange(0, COUNT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])[None, :, :]
    mask = in_call[:, None, None]
    if START + COUNT * WIDTH > END:
        mask = mask & (cols < END)
    if tail_ptr is None or (START + COUNT * WIDTH <= D_LATENT or END <= D_LATENT):
        piece = tl.load(latent_ptr + latent_offsets[:, None, None] + cols, mask=mask, other=0.0)
    else:
        tail_cols = tail_ptr + tail_offsets[:, None, None] + (cols - D_LATENT)
        if START >= D_LATENT:
            piece = tl.load(tail_cols, mask=mask, other=0.0)
        else:
            is_latent = cols < D_LATENT
            piece = tl.load(latent_ptr + latent_offsets[:, None, None] + cols, mask=mask & is_latent, other=0.0)
            piece = tl.where(is_latent, piece, tl.load(tail_cols, mask=mask & (cols >= D_LATENT), other=0.0))
    return piece


@triton.jit
def _store_tiles(
    pages_ptr, data_offsets, scale_offsets, is_written, tiles, cache_scale,
    FIRST: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, D_PAYLOAD: tl.constexpr,
    RULE: tl.constexpr, IS_NATIVE: tl.constexpr,
):  # fmt: skip
    """Quantise tiles `[rows, COUNT, TILE]`, the FIRST of a row and those after it, and store codes and scales."""
    numbers = tiles.to(tl.float32)
    if RULE == "cache":
        quotients = tl.div_rn(numbers, tl.broadcast_to(cache_scale, numbers.shape))
        # An infinity would become 448.
        is_finite = (numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        quotients = tl.where(is_finite, quotients, float("nan"))
    else:
        scales, reciprocals = scales_of(numbers, RULE)
        if RULE == "amax":
            quotients = tl.div_rn(numbers, tl.broadcast_to(scales[:, :, None], numbers.shape))
        else:
            quotients = numbers * reciprocals[:, :, None]
        tile = FIRST + tl.arange(0, COUNT)[None, :]
        mask = is_written[:, None] & (tile * TILE < D_PAYLOAD)
        if RULE == "ue8m0":
            tl.store(pages_ptr + scale_offsets[:, None] + tile, fp32_to_ue8m0(scales), mask=mask)
        else:
            fp32_ptr = pages_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
            tl.store(fp32_ptr + scale_offsets[:, None] // 4 + tile, scales, mask=mask)
    cols = ((FIRST + tl.arange(0, COUNT)[:, None]) * TILE + tl.arange(0, TILE)[None, :])[None, :, :]
    mask = is_written[:, None, None]
    if (FIRST + COUNT) * TILE > D_PAYLOAD:
        mask = mask & (cols < D_PAYLOAD)
    tl.store(pages_ptr + data_offsets[:, None, None] + cols, to_e4m3(quotients, IS_NATIVE), mask=mask)


@triton.jit
def _store_copied(
    pages_ptr, offsets, is_written, piece, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr
):  # fmt: skip
    """Store channels `[rows, 1, WIDTH]` as they are, from START on; `offsets` are those of channel 0, in bytes."""
    ITEMSIZE: tl.constexpr = piece.dtype.primitive_bitwidth // 8
    ptr = pages_ptr.to(tl.pointer_type(piece.dtype), bitcast=True)
    cols = START + tl.arange(0, WIDTH)[None, None, :]
    mask = is_written[:, None, None]
    if START + WIDTH > END:
        mask = mask & (cols < END)
    tl.store(ptr + offsets[:, None, None] // ITEMSIZE + cols, piece, mask=mask)


# Sizes and strides of a call and of a pool: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_l_n", "stride_l_g", "stride_t_n", "stride_t_g", "stride_r",
        "stride_p_page", "stride_p_row", "stride_p_g", "page_scales", "stride_c_g", "n", "num_rows", "page_size",
    ]
)  # fmt: skip
def _append_rows_kernel(
    latent_ptr, stride_l_n, stride_l_g,
    tail_ptr, stride_t_n, stride_t_g,  # None: latent has all channels
    rows_ptr, stride_r,
    owners_ptr,  # int32 [rows of the pool], of `_claim_rows_kernel`; None: see NOTE [One of equal rows]
    pages_ptr, stride_p_page, stride_p_row, stride_p_g, page_scales,  # distances in units of UNIT bytes
    cache_scale_ptr, stride_c_g,  # None where scales belong to rows
    n, num_rows, page_size,
    KV_GROUP: tl.constexpr, D_LATENT: tl.constexpr, D_PAYLOAD: tl.constexpr, D_TOTAL: tl.constexpr,
    INPUT_ALIGN: tl.constexpr, UNIT: tl.constexpr,  # elements of latent and tail, bytes of the pool
    RULE: tl.constexpr,  # as `scales_of` has them; "cache": of the whole cache
    SCALE_OFFSET: tl.constexpr, SCALE_BYTES: tl.constexpr, TAIL_OFFSET: tl.constexpr,
    TILE: tl.constexpr, FIRST_TILES: tl.constexpr, SECOND_TILES: tl.constexpr,
    FIRST_COPIED: tl.constexpr, SECOND_COPIED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_COMPARED: tl.constexpr, IS_NATIVE: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group = program % KV_GROUP
    entries = program // KV_GROUP * BLOCK_N + tl.arange(0, BLOCK_N)
    in_call = entries < n
    rows = tl.load(rows_ptr + entries.to(tl.int64) * stride_r, mask=in_call, other=-1)

    # What is written is loaded before it is known where to.
    latent_offsets = known_multiple(stride_l_n, INPUT_ALIGN) * entries.to(tl.int64)
    latent_ptr += known_multiple(stride_l_g, INPUT_ALIGN) * tl.cast(group, tl.int64)
    tail_offsets = latent_offsets
    if tail_ptr is not None:
        tail_offsets = known_multiple(stride_t_n, INPUT_ALIGN) * entries.to(tl.int64)
        tail_ptr += known_multiple(stride_t_g, INPUT_ALIGN) * tl.cast(group, tl.int64)
    cache_scale = 1.0
    if cache_scale_ptr is not None:
        cache_scale = tl.load(cache_scale_ptr + group * stride_c_g)
    if FIRST_TILES > 0:
        first_tiles = _load_piece(
            latent_ptr, latent_offsets, tail_ptr, tail_offsets, in_call, 0, FIRST_TILES, TILE, D_PAYLOAD, D_LATENT
        )
    if SECOND_TILES > 0:
        second_tiles = _load_piece(
            latent_ptr, latent_offsets, tail_ptr, tail_offsets, in_call,
            FIRST_TILES * TILE, SECOND_TILES, TILE, D_PAYLOAD, D_LATENT,
        )  # fmt: skip
    if FIRST_COPIED > 0:
        first_copied = _load_piece(
            latent_ptr, latent_offsets, tail_ptr, tail_offsets, in_call, D_PAYLOAD, 1, FIRST_COPIED, D_TOTAL, D_LATENT
        )
    if SECOND_COPIED > 0:
        second_copied = _load_piece(
            latent_ptr, latent_offsets, tail_ptr, tail_offsets, in_call,
            D_PAYLOAD + FIRST_COPIED, 1, SECOND_COPIED, D_TOTAL, D_LATENT,
        )  # fmt: skip

    # Compared before it is narrowed: 2**40 is not row 0.
    is_written = (rows >= 0) & (rows < num_rows)
    if owners_ptr is None:
        has_twin = tl.zeros([BLOCK_N], tl.int32)
        for start in tl.range(program // KV_GROUP * BLOCK_N + 1, n, BLOCK_COMPARED):
            later = start + tl.arange(0, BLOCK_COMPARED)
            others = tl.load(rows_ptr + later.to(tl.int64) * stride_r, mask=later < n, other=-1)
            is_twin = (others[None, :] == rows[:, None]) & (later[None, :] > entries[:, None])
            has_twin = tl.maximum(has_twin, tl.max(is_twin.to(tl.int32), 1))
        is_written = is_written & (has_twin == 0)
    else:
        if IS_EARLY:
            gdc_wait()
        is_written = is_written & (tl.load(owners_ptr + rows, mask=is_written, other=-1) == entries)

    page, place = split_row(rows, page_size)
    page_offsets = page.to(tl.int64) * stride_p_page
    data_offsets = (page_offsets + place.to(tl.int64) * stride_p_row + group * stride_p_g) * UNIT
    scale_offsets = data_offsets + SCALE_OFFSET
    if SCALE_BYTES > 0:
        scale_offsets = (page_offsets + page_scales) * UNIT + place.to(tl.int64) * SCALE_BYTES
    if FIRST_TILES > 0:
        _store_tiles(
            pages_ptr, data_offsets, scale_offsets, is_written, first_tiles, cache_scale,
            0, FIRST_TILES, TILE, D_PAYLOAD, RULE, IS_NATIVE,
        )  # fmt: skip
    if SECOND_TILES > 0:
        _store_tiles(
            pages_ptr, data_offsets, scale_offsets, is_written, second_tiles, cache_scale,
            FIRST_TILES, SECOND_TILES, TILE, D_PAYLOAD, RULE, IS_NATIVE,
        )  # fmt: skip
    if FIRST_COPIED > 0:
        copied_offsets = data_offsets + TAIL_OFFSET
        _store_copied(pages_ptr, copied_offsets, is_written, first_copied, 0, FIRST_COPIED, D_TOTAL - D_PAYLOAD)
        if SECOND_COPIED > 0:
            _store_copied(
                pages_ptr, copied_offsets, is_written, second_copied, FIRST_COPIED, SECOND_COPIED, D_TOTAL - D_PAYLOAD
            )


@triton.jit(do_not_specialize=["stride_r", "n", "num_rows"])
def _claim_rows_kernel(
    rows_ptr, stride_r, owners_ptr, n, num_rows, BLOCK_N: tl.constexpr, IS_EARLY: tl.constexpr
):  # fmt: skip
    """Write into the owner of every row that is named the place of an entry that names it.

    IS_EARLY: the writer may start, and load what it writes, while this kernel runs.
    """
    if IS_EARLY:
        gdc_launch_dependents()
    entries = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(rows_ptr + entries.to(tl.int64) * stride_r, mask=entries < n, other=-1)
    tl.store(owners_ptr + rows, entries, mask=(rows >= 0) & (rows < num_rows))

"""Where the row of a slot is, and what an FP8 row holds: device functions of the Gluon kernels that gather rows.

A slot names a row in two steps, so that a kernel can load what the second one needs a tile before it. First `pages_of`
turns a position into a page, by a division or by an entry of a page table; then `locate_rows` turns both into an
offset. Nothing is compared with what has just been loaded, which would wait for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Four e4m3 channels, the low byte first, as two pairs of 16-bit channels. Both are exact, and a NaN stays one.
_E4M3_TO_F16 = gl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
_E4M3_TO_BF16 = gl.constexpr("""{
    .reg .b16 low, high, h0, h1;
    .reg .b32 pair;
    .reg .f32 f0, f1;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 pair, low;
    mov.b32 {h0, h1}, pair;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.rn.bf16x2.f32 $0, f1, f0;
    cvt.rn.f16x2.e4m3x2 pair, high;
    mov.b32 {h0, h1}, pair;
    cvt.f32.f16 f0, h0;
    cvt.f32.f16 f1, h1;
    cvt.rn.bf16x2.f32 $1, f1, f0;
}""")


@gluon.jit
def load_positions(slots_ptr, first, end_slot, COUNT: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the positions that COUNT slots hold, -1 from `end_slot` on."""
    slots = first + gl.arange(0, COUNT, layout=LAYOUT)
    return gl.load(slots_ptr + slots, mask=slots < end_slot, other=-1)


@gluon.jit
def end_position(seq_lens_ptr, batch, num_positions):
    """Return from which position on there are no keys: `num_positions`, or the length of the request before it."""
    end = num_positions
    if seq_lens_ptr is not None:
        # Clamped before it is narrowed: -(2**40) + 1 is not 1.
        end = gl.maximum(gl.minimum(gl.load(seq_lens_ptr + batch), num_positions), 0).to(gl.int32)
    return end


@gluon.jit
def pages_of(positions, end, page_size, table_ptr, stride_table, batch, IS_PAGED: gl.constexpr):
    """Return the page of each position of a request; one outside [0, num_pages) says that the position is no key.

    `end` is the first position that is no key. `table_ptr` is None where positions are row numbers. Rows that are not
    paged are one page.
    """
    # Compared before it is narrowed: 2**40 is not position 0.
    is_inside = (positions >= 0) & (positions < end)
    if IS_PAGED:
        page = (gl.where(is_inside, positions, 0).to(gl.uint32) // page_size.to(gl.uint32)).to(gl.int32)
        if table_ptr is None:
            page = gl.where(is_inside, page, -1)
        else:
            page = gl.load(table_ptr + batch * stride_table + page, mask=is_inside, other=-1)
    else:
        page = gl.where(is_inside, 0, -1)
    return page


@gluon.jit
def locate_rows(positions, pages, num_pages, page_size, stride_page, stride_row, IS_PAGED: gl.constexpr):
    """Return `(offsets, is_valid)`: of 64 bits, from the first row of page 0. An invalid offset may be anything."""
    if IS_PAGED:
        place = (positions.to(gl.uint32) % page_size.to(gl.uint32)).to(gl.int64)
        offsets = pages.to(gl.int64) * stride_page + place * stride_row
        is_valid = (pages >= 0) & (pages < num_pages)
    else:
        offsets = positions.to(gl.int64) * stride_row
        is_valid = pages == 0
    return offsets, is_valid


@gluon.jit
def convert_e4m3(words, TO: gl.constexpr):
    """Return [rows, 2 * n] words of two 16-bit channels of type TO for [rows, n] words of four e4m3 channels."""
    TO_BF16: gl.constexpr = gl.bfloat16 == TO
    low, high = gl.inline_asm_elementwise(
        _E4M3_TO_BF16 if TO_BF16 else _E4M3_TO_F16, "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])

"""Device functions for rows that are stored as e4m3 payloads with fp32 scales: `real = payload * scale`.

NOTE [Scales are folded]
A payload is widened to the element of the products, which is exact, and multiplied as it is. Its scale joins where
numbers are fp32 anyway: a logit is `(q . k) * q_scale * kv_scale`, a weight is multiplied by the scale of its value
before it is rounded. So no row is rounded a second time, and a scale is any number: 0, negative, far out of fp16.
Invalid slots have scale 0, and their scales are not read, as their rows are not.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

import triton
import triton.language as tl

from mla_ops.kernels.row_codec import e4m3_to_half, opaque


@triton.jit
def load_scales(ptr, rows, mask, IS_BY_ROW: tl.constexpr):
    """Return the fp32 scales of some rows, 0 where masked; the tensor has one for each row, or one."""
    if IS_BY_ROW:
        return tl.load(ptr + rows, mask=mask, other=0.0)
    return tl.where(mask, tl.load(ptr), 0.0)


@triton.jit
def widened_chunks(tiles, COUNT: tl.constexpr, ELEMENT: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Return tiles of e4m3 bytes as tiles of ELEMENT, without their scales.

    Behind `opaque` both products read one converted tile; without, the compiler converts every byte for each of them.
    """
    widened = ()
    for c in tl.static_range(COUNT):
        widened = widened + (opaque(e4m3_to_half(tiles[c], ELEMENT, IS_NATIVE)),)
    return widened

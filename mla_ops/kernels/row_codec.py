"""Numbers of quantised rows: e4m3 codes and their scales, decoded and encoded, for the kernels of every operator.

`IS_NATIVE` says that the device converts e4m3 itself, from compute capability 8.9 on. Before it the compiler refuses
the type, loads included, so codes are bytes everywhere and integers do what the device can't. Both ways give the same
bits.

NOTE [The compiler must be stopped]
Left alone, Triton moves the operand layout of a product above the conversion that feeds it: rows are read from shared
memory byte by byte, and every value is converted once for each product it takes part in. Compiled for sm_90 at 576/512
with 16 heads and 32 rows that is 128 loads of single bytes and 255 registers with spills. Behind `opaque` rows are
loaded 16 bytes at a time and converted once, without spills at 168 registers: 128 us instead of 197 us for 128 queries
on an H100.
"""

import triton
import triton.language as tl

# The interpreter has no inline assembly.
IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

MAX_E4M3 = tl.constexpr(448.0)
NAN_CODE = tl.constexpr(0x7F)
# Floors of a scale that is any number, of one that is a power of two, and of the maximum of a tile with a ue8m0 scale.
# The first is 2^-126: written so that it is no subnormal, which would make the compiler count in fp64.
MIN_SCALE = tl.constexpr(1.1754943508222875e-38)
MIN_POW2_SCALE = tl.constexpr(1e-4)
MIN_UE8M0_MAXIMUM = tl.constexpr(1e-4)
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)

# Four codes to bf16: exponent and mantissa move to their places in half a word, and the product with 2^120 puts the
# exponent right, of subnormals too. Adding 120 to the exponent instead would be wrong for zero and subnormals. A code
# of NaN carries into bit 7 when 1 is added to its magnitude; prmt spreads that bit over the half.
# In one line: Inductor of torch 2.11 writes a global into a string of its own, which a line break would cut.
_E4M3_TO_BF16 = tl.constexpr(
    "{ .reg .b32 w0, w1, s0, s1, n, n0, n1; "
    "prmt.b32 w0, $2, 0, 0x1404; "
    "prmt.b32 w1, $2, 0, 0x3424; "
    "shr.u32 s0, w0, 4; "
    "shr.u32 s1, w1, 4; "
    "and.b32 s0, s0, 0x07f007f0; "
    "and.b32 s1, s1, 0x07f007f0; "
    "and.b32 w0, w0, 0x80008000; "
    "and.b32 w1, w1, 0x80008000; "
    "or.b32 w0, w0, s0; "
    "or.b32 w1, w1, s1; "
    "and.b32 n, $2, 0x7f7f7f7f; "
    "add.u32 n, n, 0x01010101; "
    "prmt.b32 n0, n, 0, 0x9988; "
    "prmt.b32 n1, n, 0, 0xbbaa; "
    "or.b32 w0, w0, n0; "
    "or.b32 w1, w1, n1; "
    "mov.b32 s0, 0x7b807b80; "
    "mov.b32 s1, 0x80008000; "
    "fma.rn.bf16x2 $0, w0, s0, s1; "
    "fma.rn.bf16x2 $1, w1, s0, s1; "
    "}"
)


@triton.jit
def opaque(x):
    """Return `x`, two-byte elements, through an operation that layouts are not moved across.

    See NOTE [The compiler must be stopped].
    """
    if not IS_INTERPRETED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def e4m3_to_half(codes, DTYPE: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Return the numbers, exact in bf16, fp16 and fp32, that uint8 `codes` stand for; both codes of NaN are NaN."""
    if IS_NATIVE:
        # In steps: from e4m3 to bf16 at once, triton 3.7 converts one value at a time, 16 of them a cycle.
        numbers = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        if tl.float16 != DTYPE:
            numbers = numbers.to(tl.float32).to(DTYPE)
    elif tl.bfloat16 == DTYPE and not IS_INTERPRETED:
        numbers = tl.inline_asm_elementwise(_E4M3_TO_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        code = codes.to(tl.int32)
        magnitude = code & 0x7F
        # As above: 20 bits further up, where fp32 has its exponent, times 2^120.
        numbers = (magnitude << 20 | (code & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
        numbers = tl.where(magnitude == NAN_CODE, float("nan"), numbers).to(DTYPE)
    return numbers


@triton.jit
def to_e4m3(numbers, IS_NATIVE: tl.constexpr):
    """Return the uint8 codes nearest to fp32 `numbers`, ties to even, at most 448 in magnitude; NaN has one code."""
    if IS_NATIVE:
        codes = numbers.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = numbers.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Three bits of the mantissa stay; the exponent loses the difference of the biases, 127 - 7.
        normal = (magnitude + 0x7FFFF + (magnitude >> 20 & 1) >> 20) - (120 << 3)
        # Below 2^-6 codes count 2^-9, which is the last bit of fp32 numbers from 2^14 on.
        subnormal = (tl.abs(numbers) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        codes = tl.where(magnitude > INFINITY_BITS, NAN_CODE, code | (bits >> 24 & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def scales_of(tiles, RULE: tl.constexpr):
    """Return `(scales, reciprocals)`, fp32, of fp32 tiles `[..., channels]`; NaN where a tile has NaN or infinity.

    RULE "amax" has no reciprocals: they round. Those of powers of two are exact.

    Args:
        tiles: what shares a scale; channels that a tile lacks are 0.
        RULE: "amax", maximum / 448 as vLLM writes it; "pow2", that rounded up to a power of two as FlashMLA writes it;
            "ue8m0", a power of two that one byte has room for, as vLLM writes it for its page-end formats.
    """
    # As integers magnitudes have the order of the numbers, with NaN above infinity above all others.
    maxima = tl.max(tiles.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(tiles.shape) - 1)
    is_finite = maxima < INFINITY_BITS
    maxima = maxima.to(tl.float32, bitcast=True)
    if RULE == "ue8m0":
        maxima = tl.maximum(maxima, MIN_UE8M0_MAXIMUM)
    # IEEE division: `/` is none, and its last bit decides ties.
    scales = tl.div_rn(maxima, tl.full(maxima.shape, MAX_E4M3, tl.float32))
    if RULE == "amax":
        scales = tl.where(is_finite, tl.maximum(scales, MIN_SCALE), float("nan"))
        reciprocals = scales
    else:
        if RULE == "pow2":
            scales = tl.maximum(scales, MIN_POW2_SCALE)
        bits = scales.to(tl.int32, bitcast=True) + 0x7FFFFF & 0x7F800000
        scales = tl.where(is_finite, bits, NAN_BITS).to(tl.float32, bitcast=True)
        reciprocals = tl.where(is_finite, 0x7F000000 - bits, NAN_BITS).to(tl.float32, bitcast=True)
    return scales, reciprocals


@triton.jit
def fp32_to_ue8m0(scales):
    """Return the byte of powers of two from 2^-126 on, their exponent + 127; 255 for NaN."""
    return (scales.to(tl.int32, bitcast=True) >> 23 & 0xFF).to(tl.uint8)


@triton.jit
def ue8m0_to_fp32(exponents):
    """Return the powers of two that bytes, as int32, stand for: 2^(byte - 127), NaN for 255."""
    # 2^-127 is subnormal.
    bits = tl.where(exponents == 0, 0x00400000, exponents << 23)
    return tl.where(exponents == 255, NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def split_row(row, page_size):
    """Return the page of a row number and its place in the page; of a number outside the pool anything."""
    row = row.to(tl.uint32)
    page = row // tl.cast(page_size, tl.uint32)
    return page, row - page * tl.cast(page_size, tl.uint32)

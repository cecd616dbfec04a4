"""Device functions that decode quantised rows.

NOTE [What the compiler is kept from]
A conversion in front of two products is one too many times cheap for the compiler: it moves the operand layouts of both
products above the conversion, converts every value twice and reads rows byte by byte. `opaque` hides the conversion
behind an identity that nothing moves across; with it rows are read 16 bytes at a time and converted once.
"""

import triton
import triton.language as tl

# The interpreter has no assembly, and its own conversion gives +-480 for the two NaN codes.
_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def opaque(x):
    """Return `x`, 16-bit values, through an operation that layouts are not moved across."""
    if _IS_INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def e4m3_to_half(x, DTYPE: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Return bytes `x` as e4m3fn values in DTYPE, fp16, bf16 or fp32: exact, and NaN for the codes 0x7F and 0xFF.

    IS_NATIVE: the device converts by an instruction. Else integers do, two values at a time.
    """
    if _IS_INTERPRETED:
        bits = x.to(tl.int32)
        magnitude = ((bits & 0x7F) << 7).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
        value = tl.where((bits & 0x80) != 0, -magnitude, magnitude)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(DTYPE)
    if IS_NATIVE:
        # Straight to bf16 is one instruction a value from triton 3.7 on, and a slow one.
        half = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return half if tl.float16 == DTYPE else half.to(tl.float32).to(DTYPE)
    if tl.float16 == DTYPE:
        # The byte to the top of a half-word, its exponent and mantissa to their places, times 2**8.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 w0, w1, n0, n1, s;
            prmt.b32 w0, $2, 0, 0x1404;
            prmt.b32 w1, $2, 0, 0x3424;
            and.b32 n0, w0, 0x7f007f00;
            and.b32 n1, w1, 0x7f007f00;
            add.u32 n0, n0, 0x01000100;
            add.u32 n1, n1, 0x01000100;
            and.b32 n0, n0, 0x80008000;
            and.b32 n1, n1, 0x80008000;
            shr.u32 s, n0, 6;
            sub.u32 n0, n0, s;
            shr.u32 s, n1, 6;
            sub.u32 n1, n1, s;
            shr.u32 s, w0, 1;
            and.b32 s, s, 0x3f803f80;
            and.b32 w0, w0, 0x80008000;
            or.b32 w0, w0, s;
            shr.u32 s, w1, 1;
            and.b32 s, s, 0x3f803f80;
            and.b32 w1, w1, 0x80008000;
            or.b32 w1, w1, s;
            mov.b32 s, 0x5c005c00;
            mul.rn.f16x2 w0, w0, s;
            mul.rn.f16x2 w1, w1, s;
            or.b32 $0, w0, n0;
            or.b32 $1, w1, n1;
            }""",
            "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    # The same with the places of bf16, times 2**120.
    value = tl.inline_asm_elementwise(
        """{
        .reg .b32 w0, w1, n0, n1, s, z;
        prmt.b32 w0, $2, 0, 0x1404;
        prmt.b32 w1, $2, 0, 0x3424;
        and.b32 n0, w0, 0x7f007f00;
        and.b32 n1, w1, 0x7f007f00;
        add.u32 n0, n0, 0x01000100;
        add.u32 n1, n1, 0x01000100;
        and.b32 n0, n0, 0x80008000;
        and.b32 n1, n1, 0x80008000;
        shr.u32 s, n0, 9;
        sub.u32 n0, n0, s;
        shr.u32 s, n1, 9;
        sub.u32 n1, n1, s;
        shr.u32 s, w0, 4;
        and.b32 s, s, 0x07f007f0;
        and.b32 w0, w0, 0x80008000;
        or.b32 w0, w0, s;
        shr.u32 s, w1, 4;
        and.b32 s, s, 0x07f007f0;
        and.b32 w1, w1, 0x80008000;
        or.b32 w1, w1, s;
        mov.b32 s, 0x7b807b80;
        mov.b32 z, 0x80008000;
        fma.rn.bf16x2 w0, w0, s, z;
        fma.rn.bf16x2 w1, w1, s, z;
        or.b32 $0, w0, n0;
        or.b32 $1, w1, n1;
        }""",
        "=r,=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip
    return value.to(DTYPE)


@triton.jit
def ue8m0_to_fp32(exponent):
    """Return `2 ** (exponent - 127)` of int32 exponents 0 to 254, and NaN of 255."""
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)

"""What the writers of rows store, one number at a time and without torch's conversions: what ours is compared with."""

from __future__ import annotations

import math

import torch

# Every non-negative e4m3 number, by its code: the exponent is biased by 7, code 0x7F is NaN.
E4M3 = [(m if e == 0 else 8 + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)][:127]
NAN_CODE = 0x7F


def value_of(code: int) -> float:
    """Return the number that an e4m3 code stands for."""
    magnitude = code & 0x7F
    return math.nan if magnitude == NAN_CODE else math.copysign(E4M3[magnitude], -1.0 if code & 0x80 else 1.0)


def code_of(number: float) -> int:
    """Return the code of the nearest e4m3 number, the even code of two that are as near; at most 448."""
    if math.isnan(number):
        return NAN_CODE
    magnitude = min(abs(number), 448.0)
    code = min(range(127), key=lambda c: (abs(E4M3[c] - magnitude), c % 2))
    return code | (0x80 if math.copysign(1.0, number) < 0 else 0)


def fp32(number: float) -> float:
    """Round to fp32."""
    return float(torch.tensor(number, dtype=torch.float32))


def scale_of(tile: list[float], rule: str) -> float:
    """Return the scale of a tile: rule "pow2" is FlashMLA's, "amax" vLLM's, "ue8m0" that of vLLM's one-byte scales."""
    if not all(map(math.isfinite, tile)):
        return math.nan
    largest = max(map(abs, tile))
    if rule == "amax":
        return max(fp32(largest / 448), 2.0**-126)
    least = fp32(1e-4)
    scale = max(fp32(largest / 448), least) if rule == "pow2" else fp32(max(largest, least) / 448)
    return 2.0 ** math.ceil(math.log2(scale))


def tile_bytes(tile: list[float], rule: str) -> tuple[list[int], float]:
    """Return the codes of a tile and its scale. The quotient is rounded to fp32 before it is rounded to e4m3."""
    scale = scale_of(tile, rule)
    return [code_of(fp32(number / scale)) for number in tile], scale

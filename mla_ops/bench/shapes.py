"""The sizes that `mla-ops bench` measures, what they cost, and how fast the hardware could be at them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.call import SparseAttnCall, SparseAttnProblem

SOFTMAX_SCALE = 0.08
DIRECTIONS = ("fwd", "bwd", "fwd_bwd")

# Micro-benchmarks on an H100, not measured again here: fp32 vector atomics to gathered rows; rows gathered through L2.
ATOMIC_BYTES_PER_S = 3.26e12
GATHER_BYTES_PER_S = {512: 8.0e12, 256: 7.2e12, 0: 6.5e12}  # from that d_total on


@dataclass(frozen=True)
class Shape:
    """A problem with its lengths, named by the letters of the tables; G = 1."""

    B: int
    Sq: int
    Skv: int
    H: int
    d_total: int
    d_v: int
    topk: int

    @property
    def slots(self) -> int:
        """Selected rows of all queries."""
        return self.B * self.Sq * self.topk

    def flops(self, direction: str) -> float:
        """Multiply-adds of the mathematics, times two: nothing recomputed is counted."""
        widths = {"fwd": self.d_total + self.d_v, "bwd": 3 * self.d_total + 2 * self.d_v}
        widths["fwd_bwd"] = widths["fwd"] + widths["bwd"]
        return 2.0 * self.slots * self.H * widths[direction]

    def floor_seconds(self, direction: str, matmul: float) -> float:
        """Return the larger of two estimates, for a device that multiplies at `matmul` FLOP/s.

        The FLOPs at that rate; and the bytes at the rates above: forward, the selected rows once per 64 heads;
        backward, the same plus fp32 rows added atomically once per 64 heads, not overlapped. A kernel that overlaps
        them, or gathers faster than the micro-benchmark did, beats it.
        """
        if direction == "fwd_bwd":
            return sum(self.floor_seconds(d, matmul) for d in ("fwd", "bwd"))
        gather = next(rate for width, rate in GATHER_BYTES_PER_S.items() if self.d_total >= width)
        passes = -(-self.H // 64)
        seconds = passes * self.slots * self.d_total * 2 / gather
        if direction == "bwd":
            seconds += passes * self.slots * self.d_total * 4 / ATOMIC_BYTES_PER_S
        return max(self.flops(direction) / matmul, seconds)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, kv, indices and dout on the GPU in bf16; indices distinct and random, the worst case for caches."""

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device="cuda", dtype=torch.bfloat16)

        indices = torch.empty(self.B, self.Sq, 1, self.topk, device="cuda", dtype=torch.int32)
        rows = max(1, 2**26 // self.Skv)
        for b in range(self.B):
            for start in range(0, self.Sq, rows):
                part = indices[b, start : start + rows, 0]
                part.copy_(torch.rand(len(part), self.Skv, device="cuda").argsort(-1)[:, : self.topk])
        q = normal(self.B, self.Sq, self.H, self.d_total)
        kv = normal(self.B, self.Skv, 1, self.d_total)
        return q, kv, indices, normal(self.B, self.Sq, self.H, self.d_v)

    def draw_call(self) -> tuple[SparseAttnCall, Tensor]:
        """Return what `draw` returns as a call, and dout."""
        q, kv, indices, dout = self.draw()
        return SparseAttnCall(q, kv, indices, self.d_v, SOFTMAX_SCALE), dout

    def problem(self, *, needs_grad: bool = False) -> SparseAttnProblem:
        """Return the problem that calls of this shape are, in bf16."""
        return SparseAttnProblem(self.d_total, self.d_v, self.topk, self.H, 1, torch.bfloat16, needs_grad)


SHAPES = {
    "NAM8": Shape(4, 4096, 4096, 8, 128, 64, 256),
    "NAM28": Shape(4, 4096, 4096, 28, 128, 64, 256),
    "NAM32": Shape(4, 4096, 4096, 32, 128, 64, 256),
    "NAM2": Shape(4, 4096, 4096, 28, 192, 64, 256),
    "MID": Shape(4, 4096, 4096, 32, 320, 256, 512),
    "DS16": Shape(1, 4096, 8192, 16, 576, 512, 2048),
    "DS64": Shape(1, 4096, 8192, 64, 576, 512, 2048),
    "DS": Shape(1, 4096, 8192, 128, 576, 512, 2048),
}

# One size varies, the others stay: {sweep: (axis label, {value: shape})}.
SWEEPS: dict[str, tuple[str, dict[int, Shape]]] = {
    "d_total": (
        "d_total (d_v = d_total - 64, 32 heads, topk 512)",
        {d: Shape(1, 4096, 8192, 32, d, d - 64, 512) for d in (128, 192, 256, 320, 448, 576, 1024)},
    ),
    "heads": (
        "query heads (128/64, topk 256)",
        {h: Shape(4, 4096, 4096, h, 128, 64, 256) for h in (4, 8, 16, 28, 32, 64, 128)},
    ),
    "topk": (
        "topk (128/64, 28 heads)",
        {k: Shape(1, 4096, 8192, 28, 128, 64, k) for k in (32, 64, 128, 256, 512, 1024, 2048)},
    ),
    "seq_q": (
        "queries (128/64, 28 heads, topk 1024)",
        {s: Shape(1, s, 8192, 28, 128, 64, 1024) for s in (1, 4, 16, 64, 256, 1024, 4096)},
    ),
}


def check_sizes(arguments: argparse.Namespace) -> None:
    """Refuse sizes that no call could have."""
    if arguments.d_v > arguments.d_total:
        raise InvalidInputError(f"--d-v must be at most --d-total ({arguments.d_total}), got {arguments.d_v}")

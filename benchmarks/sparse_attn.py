"""Forward and backward on a GPU at the named shapes: against gather + torch.compile, SDPA, and the hardware's floor.

    python benchmarks/sparse_attn.py [SHAPE ...]      writes results/<date>-<device>-sparse-attn.json, prints a table

bf16, random distinct indices (the worst case for cache reuse), medians of `triton.testing.do_bench`. FLOPs: forward
2*B*Sq*H*topk*(d_total+d_v), backward 2*B*Sq*H*topk*(3*d_total+2*d_v). A shape is timed only after its results match an
fp32 gather on its first queries. The floor is the larger of two bounds: the FLOPs at the rate of a bf16 matmul 8192^3
measured in the same run, and the bytes at the rates below (forward: the selected rows once per 64 heads; backward: the
same, plus fp32 rows added atomically once per 64 heads, nothing overlapped).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config
import triton
import triton.testing
from provenance import write
from torch import Tensor

SCALE = 0.08
DETERMINISTIC = "mla_ops, deterministic"
# Micro-benchmarks on an H100, not measured again here: fp32 vector atomics to gathered rows, and rows through L2.
ATOMIC_BYTES_PER_S = 3.26e12


def gather_bytes_per_s(d_total: int) -> float:
    return 8.0e12 if d_total >= 512 else 7.2e12 if d_total >= 256 else 6.5e12


@dataclass(frozen=True)
class Shape:
    """Sizes by the letters of the tables."""

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
        """Useful multiply-adds, times two."""
        widths = {"fwd": self.d_total + self.d_v, "bwd": 3 * self.d_total + 2 * self.d_v}
        widths["fwd_bwd"] = widths["fwd"] + widths["bwd"]
        return 2.0 * self.slots * self.H * widths[direction]

    def floor_seconds(self, direction: str, matmul: float) -> float:
        """No implementation of this shape of kernel is faster; see the module docstring."""
        if direction == "fwd_bwd":
            return sum(self.floor_seconds(d, matmul) for d in ("fwd", "bwd"))
        passes = -(-self.H // 64)
        moved = passes * self.slots * self.d_total * 2 / gather_bytes_per_s(self.d_total)
        if direction == "bwd":
            moved += passes * self.slots * self.d_total * 4 / ATOMIC_BYTES_PER_S
        return max(self.flops(direction) / matmul, moved)


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


def draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    indices = torch.empty(shape.B, shape.Sq, 1, shape.topk, device="cuda", dtype=torch.int32)
    for b in range(shape.B):
        indices[b, :, 0] = torch.rand(shape.Sq, shape.Skv, device="cuda").argsort(-1)[:, : shape.topk].int()
    q = normal(shape.B, shape.Sq, shape.H, shape.d_total)
    kv = normal(shape.B, shape.Skv, 1, shape.d_total)
    return q, kv, indices, normal(shape.B, shape.Sq, shape.H, shape.d_v)


def gather_formula(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    rows = kv[batch, indices.squeeze(2).long(), 0]
    logits = torch.einsum("bshd,bskd->bshk", q, rows) * SCALE
    return torch.einsum("bshk,bskd->bshd", logits.float().softmax(-1).to(q.dtype), rows[..., :d_v])


def masked_sdpa(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    mask = torch.zeros(q.shape[0], 1, q.shape[1], kv.shape[1], dtype=torch.bool, device=q.device)
    mask.scatter_(3, indices.transpose(1, 2).long(), True)
    k = kv.transpose(1, 2).expand(-1, q.shape[2], -1, -1)
    out = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, k[..., :d_v], mask, scale=SCALE)
    return out.transpose(1, 2)


def product(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    return torch.ops.mla.sparse_attn(q, kv, indices, d_v, SCALE)[0]


def check(shape: Shape, data: tuple[Tensor, ...]) -> dict[str, float]:
    """Compare with an fp32 gather on the first queries; relative norms of the errors, at most 1 % (bf16 has 0.4 %)."""
    q, kv, indices, dout = data
    few = max(1, 2**21 // (shape.topk * shape.d_total * shape.B))
    q, indices, dout = q[:, :few].clone(), indices[:, :few], dout[:, :few]
    results = []
    for function, cast in ((product, torch.bfloat16), (gather_formula, torch.float32)):
        leaves = [q.to(cast).requires_grad_(), kv.to(cast).requires_grad_()]
        out = function(*leaves, indices, shape.d_v)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(cast))])
    errors = {}
    for name, actual, want in zip(("out", "dq", "dkv"), *results, strict=True):
        errors[name] = float(((actual.float() - want).norm() / want.norm()).detach())
        assert errors[name] < 1e-2, f"{name} is off by {errors[name]:.2e}"
    return errors


# The compiled baseline's backward is timed on one graph again and again, which donated buffers forbid.
functorch_config.donated_buffer = False


def median_ms(run: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(run, warmup=20, rep=150, return_mode="median"))


def time_all(name: str, shape: Shape, matmul: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    data = draw(shape)
    errors = check(shape, data)
    q, kv, indices, dout = data
    leaves = [q.clone().requires_grad_(), kv.clone().requires_grad_()]
    torch._dynamo.reset()  # the compiled baseline is compiled anew, for this shape alone
    implementations: dict[str, Callable[..., Tensor]] = {"mla_ops": product, DETERMINISTIC: product}
    gathered_gb = shape.slots * shape.d_total * 2 / 2**30
    if gathered_gb < 12:  # what the plain formulations hold at once must fit beside its gradients
        implementations["gather + torch.compile"] = torch.compile(gather_formula)
        implementations["SDPA with mask"] = masked_sdpa
    records = []
    for impl, function in implementations.items():

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            with torch.no_grad():
                return function(q, kv, indices, shape.d_v)

        def forward_backward(function: Callable[..., Tensor] = function) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves, indices, shape.d_v), leaves, dout)

        torch.use_deterministic_algorithms(impl == DETERMINISTIC)
        record = {"shape": name, **asdict(shape), "impl": impl, "dtype": "bfloat16"}
        try:
            milliseconds = {"fwd": median_ms(forward)}
            out = function(*leaves, indices, shape.d_v)

            def backward(out: Tensor = out) -> tuple[Tensor, ...]:
                return torch.autograd.grad(out, leaves, dout, retain_graph=True)

            milliseconds["bwd"] = median_ms(backward)
            del out, backward
            milliseconds["fwd_bwd"] = median_ms(forward_backward)
        except torch.OutOfMemoryError:
            records.append({**record, "direction": "fwd_bwd", "error": "out of memory"})
            continue
        finally:
            torch.use_deterministic_algorithms(False)
            torch.cuda.empty_cache()
        for direction, ms in milliseconds.items():
            floor = 1e3 * shape.floor_seconds(direction, matmul)
            records.append(
                {
                    **record,
                    "direction": direction,
                    "ms": round(ms, 4),
                    "tflops": round(shape.flops(direction) / ms / 1e9, 1),
                    "floor_ratio": round(floor / ms, 3),
                    "error": errors if function is product else None,
                }
            )
    return records


def matmul_flops_per_s() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3


def peak_memory(shape: Shape) -> dict[str, float]:
    """Peak of forward + backward over out + lse + delta + fp32 dkv + the gradients."""
    q, kv, indices, dout = draw(shape)
    leaves = [q.requires_grad_(), kv.requires_grad_()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = torch.ops.mla.sparse_attn(*leaves, indices, shape.d_v, SCALE)
    grads = torch.autograd.grad(out, leaves, dout)
    peak = torch.cuda.max_memory_allocated() - before
    needed = sum(t.numel() * t.element_size() for t in (out, lse, lse, *grads)) + kv.numel() * 4
    return {"peak_bytes": peak, "needed_bytes": needed, "ratio": round(peak / needed, 3)}


def main() -> None:
    names = sys.argv[1:] or list(SHAPES)
    device = torch.device("cuda")
    matmul = matmul_flops_per_s()
    print(f"matmul {matmul / 1e12:.0f} TFLOP/s")
    records, memory = [], {}
    print(f"{'shape':7}{'impl':24}{'direction':10}{'ms':>9}{'TFLOP/s':>9}{'floor/ms':>9}")
    for name in names:
        for r in time_all(name, SHAPES[name], matmul):
            records.append(r)
            if "ms" in r:
                print(
                    f"{name:7}{r['impl']:24}{r['direction']:10}{r['ms']:9.3f}{r['tflops']:9.1f}{r['floor_ratio']:9.2f}",
                    flush=True,
                )
            else:
                print(f"{name:7}{r['impl']:24}{r['error']}", flush=True)
        torch.cuda.empty_cache()
        memory[name] = peak_memory(SHAPES[name])
        torch.cuda.empty_cache()
    print("peak memory over need:", {name: m["ratio"] for name, m in memory.items()})
    extra = {"matmul_flops_per_s": matmul, "memory": memory, "triton": triton.__version__}
    print(f"wrote {write('sparse-attn', device, records, **extra)}")


if __name__ == "__main__":
    main()

"""`quantized="fused"` beside plain tensors and beside a dequantised copy, forward and backward, in CUDA graphs.

    python benchmarks/quantized.py

writes results/<date>-<device>-quantized.json and prints it. Payloads and scales (one a row) are random; the plain
tensors are what they stand for. Graphs of a case take turns, ROUNDS times, and the median over the rounds is recorded,
after results and gradients have been held against each other. A copy is what users make without the fused path:
`(payload.float() * scale).bfloat16()`, kv alone or q too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mla_ops  # noqa: F401  # registers the operators
from mla_ops.bench.graphs import microseconds
from mla_ops.bench.provenance import write

ROUNDS = 7
DEVICE = torch.device("cuda")
# The plain tensors are rounded once more than the payloads that are read with their scales apart.
MAX_RELATIVE_ERROR = 2.0**-7


class Case(NamedTuple):
    """Sizes of a call."""

    batch: int
    seq_q: int
    seq_kv: int
    heads: int
    d_total: int
    d_v: int
    topk: int


CASES = {"NAM28": Case(4, 4096, 4096, 28, 128, 64, 256), "DS16": Case(1, 4096, 8192, 16, 576, 512, 2048)}


def quantised(*shape: int) -> tuple[Tensor, Tensor]:
    """Return a payload and a scale for each of its rows."""
    numbers = torch.randn(shape, device=DEVICE)
    scale = numbers.abs().amax(-1, keepdim=True) / 448
    return (numbers / scale).to(torch.float8_e4m3fn), scale


def copied(payload: Tensor, scale: Tensor) -> Tensor:
    return (payload.float() * scale).bfloat16()


def functions_of(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return what is timed, by name: the forward and the backward of every way."""
    batch, seq_q, seq_kv, heads, d_total, d_v, topk = case
    q, q_scale = quantised(batch, seq_q, heads, d_total)
    kv, kv_scale = quantised(batch, seq_kv, 1, d_total)
    indices = torch.rand(batch, seq_q, 1, seq_kv, device=DEVICE).topk(topk, -1).indices.int()
    dout = torch.randn(batch, seq_q, heads, d_v, device=DEVICE, dtype=torch.bfloat16)
    plain_q, plain_kv, scale = copied(q, q_scale), copied(kv, kv_scale), d_total**-0.5
    op = torch.ops.mla
    ways: dict[str, tuple[Any, Any]] = {
        "plain": (plain_q, plain_kv), "kv fused": (plain_q, (kv, kv_scale)),
        "q and kv fused": ((q, q_scale), (kv, kv_scale)),
    }  # fmt: skip

    def forward(q: Any, kv: Any) -> tuple[Tensor, Tensor]:
        if isinstance(kv, Tensor):
            return op.sparse_attn(q, kv, indices, d_v, scale)  # type: ignore[no-any-return]
        parts = *(q if isinstance(q, tuple) else (q, None)), *kv
        return op.sparse_attn_scaled(*parts, indices, d_v, scale, torch.bfloat16)  # type: ignore[no-any-return]

    def backward(q: Any, kv: Any) -> Callable[[], tuple[Tensor, ...]]:
        out, lse = forward(q, kv)
        if isinstance(kv, Tensor):
            return lambda: op.sparse_attn_bwd(dout, None, q, kv, indices, out, lse, d_v, scale)[:2]
        parts = *(q if isinstance(q, tuple) else (q, None)), *kv
        return lambda: op.sparse_attn_scaled_bwd(
            dout, None, *parts, indices, out, lse, d_v, scale, torch.bfloat16
        )[:2]  # fmt: skip

    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    for name, (each_q, each_kv) in ways.items():
        found[f"{name}, forward"] = lambda each_q=each_q, each_kv=each_kv: forward(each_q, each_kv)  # type: ignore[misc]
        found[f"{name}, backward"] = backward(each_q, each_kv)
    found["kv copied, forward"] = lambda: forward(plain_q, copied(kv, kv_scale))
    found["q and kv copied, forward"] = lambda: forward(copied(q, q_scale), copied(kv, kv_scale))
    return found


def check(found: dict[str, Callable[[], tuple[Tensor, ...]]]) -> float:
    """Return the largest relative error of a result or a gradient of the fused ways against those of plain tensors."""
    worst = 0.0
    for side in ("forward", "backward"):
        want = found[f"plain, {side}"]()
        for way in ("kv fused", "q and kv fused"):
            for got, expected in zip(found[f"{way}, {side}"](), want, strict=True):
                worst = max(worst, float((got.float() - expected.float()).norm() / expected.float().norm()))
    assert worst < MAX_RELATIVE_ERROR, worst
    return worst


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    records = []
    for name, case in CASES.items():
        torch.manual_seed(0)
        functions = functions_of(case)
        error = check(functions)
        times = microseconds(functions, rounds=ROUNDS, turn_us=3e3)
        for what, us in times.items():
            side = what.rpartition(", ")[2]
            ratio = us / times[f"plain, {side}"]
            records.append({
                "case": name, **case._asdict(), "impl": what, "us": round(us, 1), "error": error,
                "time_over_plain": round(ratio, 2),
            })  # fmt: skip
            print(f"{name:8}{what:28}{us:9.1f} us {ratio:6.2f} of plain", flush=True)
        write(arguments.out, "quantized", DEVICE, records, arguments.commit)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

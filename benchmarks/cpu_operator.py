"""The CPU operator against the plain formulation in time, and against its own bound in memory.

    python benchmarks/cpu_operator.py            writes results/<date>-cpu-operator.json and prints the same

Time: B=2, Sq=512, Skv=1024, H=8, 128/64, topk=64, random distinct indices, medians over interleaved rounds. The plain
formulation gathers `[B, Sq, topk, d_total]`, then matmul, softmax, matmul; it is written with both gathers torch
offers, and the ratio is to the faster one. In bf16 the plain formulation multiplies in bf16, so its logits are rounded
to 8 bits, which the contract does not allow; the same formulation with the gathered rows widened to fp32, which the
contract would allow, is listed too and is the baseline of the ratio's second column. Correctness comes first: all must
agree before anything is timed.
Memory: Sq=4096, Skv=8192, H=16, 576/512, topk=2048, in a process of its own, peak resident set over what the inputs
occupy, results included.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import mla_ops
from mla_ops.bench.provenance import write

SHAPE = {"B": 2, "Sq": 512, "Skv": 1024, "H": 8, "G": 1, "d_total": 128, "d_v": 64, "topk": 64}
MEMORY_SHAPE = {"B": 1, "Sq": 4096, "Skv": 8192, "H": 16, "G": 1, "d_total": 576, "d_v": 512, "topk": 2048}
SCALE = 0.1
ROUNDS = 15
RESULTS = Path(__file__).parent / "results"


def draw(shape: dict[str, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, seq_q, seq_kv = shape["B"], shape["Sq"], shape["Skv"]
    q = torch.randn(batch, seq_q, shape["H"], shape["d_total"], dtype=dtype)
    kv = torch.randn(batch, seq_kv, 1, shape["d_total"], dtype=dtype)
    distinct = [torch.randperm(seq_kv, dtype=torch.int32)[: shape["topk"]] for _ in range(batch * seq_q)]
    return q, kv, torch.stack(distinct).view(batch, seq_q, 1, shape["topk"])


def product(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    return mla_ops.sparse_attn(q, kv, indices, d_v=d_v, softmax_scale=SCALE).out


def attend(q: Tensor, rows: Tensor, valid: Tensor, d_v: int) -> Tensor:
    logits = torch.matmul(q, rows.transpose(-1, -2)) * SCALE
    weights = logits.masked_fill(~valid, -torch.inf).softmax(dim=-1)
    return torch.matmul(weights, rows[..., :d_v])


def plain_index_select(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    batch, seq_kv, _, d_total = kv.shape
    valid = (indices >= 0) & (indices < seq_kv)
    offsets = torch.arange(batch).view(-1, 1, 1, 1) * seq_kv
    flat = (indices.clamp(0, seq_kv - 1).long() + offsets).flatten()
    rows = kv.view(-1, d_total).index_select(0, flat).view(*indices.shape[:2], -1, d_total)
    return attend(q, rows, valid, d_v)


def plain_advanced_index(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    batch, seq_kv, _, _ = kv.shape
    valid = (indices >= 0) & (indices < seq_kv)
    rows = kv[torch.arange(batch).view(-1, 1, 1), indices.clamp(0, seq_kv - 1).long().squeeze(2), 0]
    return attend(q, rows, valid, d_v)


def plain_widened(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    return plain_index_select(q.float(), kv.float(), indices, d_v).to(q.dtype)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "mla_ops": product,
    "plain index_select": plain_index_select,
    "plain advanced indexing": plain_advanced_index,
    "plain, fp32 inside": plain_widened,
}


def time_operator(dtype: torch.dtype) -> list[dict]:
    torch.manual_seed(0)
    q, kv, indices = draw(SHAPE, dtype)
    dout = torch.randn(*q.shape[:-1], SHAPE["d_v"], dtype=dtype)
    leaves = [q.clone().requires_grad_(), kv.clone().requires_grad_()]

    def forward(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(q, kv, indices, SHAPE["d_v"])

    def forward_backward(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*leaves, indices, SHAPE["d_v"])
        return [out, *torch.autograd.grad(out, leaves, dout)]

    tolerance = {torch.float32: 1e-4, torch.bfloat16: 6e-2}[dtype]
    expected = forward_backward(plain_index_select)
    for name, function in IMPLEMENTATIONS.items():
        for actual, want in zip(forward_backward(function), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")

    records = []
    for direction, run in (("fwd", forward), ("fwd_bwd", forward_backward)):
        timers = {
            name: Timer(
                "run(function)", globals={"run": run, "function": function}, num_threads=torch.get_num_threads()
            )
            for name, function in IMPLEMENTATIONS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        for timer in timers.values():
            timer.timeit(3)
        for _ in range(ROUNDS):
            for name, timer in timers.items():
                seconds[name].append(timer.timeit(3).mean)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        best_plain = min(value for name, value in medians.items() if name != "mla_ops")
        best_fp32 = medians["plain, fp32 inside"] if dtype != torch.float32 else best_plain
        records += [
            {
                "shape": SHAPE,
                "direction": direction,
                "impl": name,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": round(1e3 * value, 3),
                "ratio_to_best_plain": round(value / best_plain, 3),
                "ratio_to_plain_with_fp32_inside": round(value / best_fp32, 3),
            }
            for name, value in medians.items()
        ]
    return records


def measure_memory(dtype_name: str) -> None:
    """Print one JSON record; runs in a process of its own."""
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    warm_up = draw({**SHAPE, "Sq": 4}, dtype)
    torch.autograd.grad(
        product(*[warm_up[0].requires_grad_(), warm_up[1].requires_grad_(), warm_up[2]], 64).sum(), warm_up[:2]
    )
    q, kv, indices = draw(MEMORY_SHAPE, dtype)
    leaves = [q.requires_grad_(), kv.requires_grad_()]
    dout = torch.randn(*q.shape[:-1], MEMORY_SHAPE["d_v"], dtype=dtype)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed must not hide what this call allocates
    before = resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    out = product(*leaves, indices, MEMORY_SHAPE["d_v"])
    forward_peak = resident_mb("VmHWM") - before
    Path("/proc/self/clear_refs").write_text("5")
    grads = torch.autograd.grad(out, leaves, dout)
    results = sum(t.numel() * t.itemsize for t in (out, *grads)) / 2**20 + q.shape[:-1].numel() * 4 / 2**20
    print(
        json.dumps(
            {
                "shape": MEMORY_SHAPE,
                "dtype": dtype_name,
                "impl": "mla_ops",
                "peak_mb_forward": round(forward_peak),
                "peak_mb_forward_backward": round(resident_mb("VmHWM") - before),
                "of_which_results_mb": round(results),
            }
        )
    )


def resident_mb(field: str = "VmRSS") -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--memory", metavar="DTYPE", help="print the peak memory of one dtype, in this process")
    arguments = parser.parse_args()
    if arguments.memory is not None:
        measure_memory(arguments.memory)
        return
    records = [record for dtype in (torch.float32, torch.bfloat16) for record in time_operator(dtype)]
    memory = []
    for dtype_name in ("float32", "bfloat16"):
        command = [sys.executable, __file__, "--memory", dtype_name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        memory.append(json.loads(result.stdout.splitlines()[-1]))
    print(f"{'dtype':10}{'direction':10}{'implementation':26}{'ms':>9}{'ratio':>8}{'fp32':>8}")
    for r in records:
        ratios = f"{r['ratio_to_best_plain']:8.2f}{r['ratio_to_plain_with_fp32_inside']:8.2f}"
        print(f"{r['dtype']:10}{r['direction']:10}{r['impl']:26}{r['ms']:9.2f}{ratios}")
    for m in memory:
        print(
            f"memory, {m['dtype']}: forward {m['peak_mb_forward']} MB, forward + backward "
            f"{m['peak_mb_forward_backward']} MB, of which results {m['of_which_results_mb']} MB"
        )
    print(f"wrote {write(arguments.out, 'operator', torch.device('cpu'), records, memory=memory)}")


if __name__ == "__main__":
    main()

"""Host time of one small call: this checkout beside another, in processes that take turns on one machine.

python benchmarks/host_time.py --before FOLDER     FOLDER holds another checkout, of what a change started from

A call of two queries keeps the GPU idle, so what is timed is what Python and the driver do. A process takes the median
of its calls, and a figure is the least of the processes': on a virtual machine a process runs at one of two speeds, 1.6
apart, and changes between them. `bare_launch` is Triton's own launch of the kernel that a forward ends in.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
ROUNDS, CALLS = 4, 2000


def microseconds(run: Callable[[], object]) -> float:
    for _ in range(100):
        run()
    torch.cuda.synchronize()
    times = []
    for call in range(CALLS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if call % 100 == 99:  # the queue of launches must not fill up
            torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def bare_launch(run: Callable[[], object]) -> Callable[[], object]:
    """Return the launch that `run` ends in, as Triton was asked for it."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, Any, Any]] = []
    launch = JITFunction.run

    def record(self: Any, *args: Any, **options: Any) -> Any:
        launches.append((self, args, options))
        return launch(self, *args, **options)

    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = launch
    kernel, args, options = launches[-1]
    return lambda: kernel.run(*args, **options)


def measure() -> dict[str, float]:
    """Time the package that this process imports."""
    import mla_ops

    if not Path(mla_ops.__file__).is_relative_to(Path.cwd()):
        raise AssertionError(f"the package of {Path.cwd()} is to be timed, got {mla_ops.__file__}")
    operator, backward = torch.ops.mla.sparse_attn.default, torch.ops.mla.sparse_attn_bwd.default
    # One block of slots: with four, so few queries would be split over programs, and a second kernel merges.
    q = torch.randn(1, 2, 28, 128, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(1, 256, 1, 128, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(256, (1, 2, 1, 32), device="cuda").int()
    q_leaf, kv_leaf = q.clone().requires_grad_(), kv.clone().requires_grad_()
    out, lse = operator(q, kv, indices, 64, 0.08)
    dout = torch.randn_like(out)

    def forward_and_backward() -> None:
        result, _ = operator(q_leaf, kv_leaf, indices, 64, 0.08)
        torch.autograd.grad(result, (q_leaf, kv_leaf), dout)

    with torch.no_grad():
        times = {
            "bare_launch": microseconds(bare_launch(lambda: operator(q, kv, indices, 64, 0.08))),
            "operator": microseconds(lambda: operator(q, kv, indices, 64, 0.08)),
            "front_door": microseconds(lambda: mla_ops.sparse_attn(q, kv, indices, d_v=64, softmax_scale=0.08)),
            "backward_operator": microseconds(lambda: backward(dout, None, q, kv, indices, out, lse, 64, 0.08)),
        }
    times["operator_with_grad"] = microseconds(lambda: operator(q_leaf, kv_leaf, indices, 64, 0.08))
    times["forward_and_backward"] = microseconds(forward_and_backward)
    return times


def measured_in(folder: Path) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    env = os.environ | {"PYTHONPATH": str(folder.resolve())}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a folder with another checkout")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return
    from mla_ops.bench.provenance import write

    folders = {"now": ROOT} | ({"before": arguments.before} if arguments.before else {})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for _ in range(ROUNDS):
        for name, folder in folders.items():
            rounds[name].append(measured_in(folder))
    least = {name: {stage: round(min(r[stage] for r in runs), 1) for stage in runs[0]} for name, runs in rounds.items()}
    for name, times in least.items():
        print(f"{name:8}", times, "us")
    ratios = {}
    if arguments.before:
        ratios = {stage: round(us / least["before"][stage], 3) for stage, us in least["now"].items()}
        print("now over before:", ratios)
    records = [
        {
            "checkout": name,
            "stage": stage,
            "dtype": "bfloat16",
            "us": us,
            "rounds_us": [round(r[stage], 1) for r in runs],
        }
        for name, runs in rounds.items()
        for stage, us in least[name].items()
    ]
    path = write(
        arguments.out,
        "host-time",
        torch.device("cuda"),
        records,
        arguments.commit,
        ratios=ratios,
        before=arguments.before and arguments.before.name,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

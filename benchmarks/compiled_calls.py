"""What a compiled call costs around its kernels: host time, each further call, idle gaps in CUDA graphs, compile time.

    python benchmarks/compiled_calls.py [PART ...]      writes results/<date>-<device>-compiled-calls.json, prints it

Parts, small ones first; one that fails is recorded with its error and the others still run:

    host      host time of one compiled inference call, lowering on and off, and in eager
    slope     host time over the number of operator calls in one graph, lowering off and on, and on with the option of
              Inductor to launch users' kernels as its own: microseconds per call
    gaps      a compiled decode layer as one CUDA graph: device time of a replay over the sum of its kernels
    compile   first step of the demo's model in a process of its own, caches cold and warm, against the same model with
              SDPA in the operator's place

Host times are medians over calls issued without waiting for the device, whose work is smaller. Targets: host at most
0.5x of the extern call, slope at most 15 us, gaps under 3 %, cold compile at most 1.15x of SDPA's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from mla_ops import lowering
from mla_ops.bench.provenance import write

SCALE = 0.1
CALLS = (1, 2, 4, 8)
Record = dict[str, Any]


def draw(batch: int, seq_q: int, seq_kv: int, heads: int, d_total: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    indices = torch.randint(0, seq_kv, (batch, seq_q, 1, topk), device="cuda", dtype=torch.int32)
    return normal(batch, seq_q, heads, d_total), normal(batch, seq_kv, 1, d_total), indices


def host_us(functions: Sequence[Callable[[], Any]], rounds: int = 40, calls: int = 15) -> list[float]:
    """Median over rounds of the time to issue one call; functions take turns, the device catches up between rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for round_number in range(rounds + 2):
        for function, of_function in zip(functions, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if round_number >= 2:  # the first rounds warm up
                of_function.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return [round(1e6 * statistics.median(of_function), 2) for of_function in times]


def compiled(function: FunctionType, *, is_lowered: bool, **options: Any) -> Callable[..., Any]:
    """Compile `function` anew and call it once inside the switch, so that the graph is what the switch says."""
    # Dynamo keeps graphs by code object and does not know the switch: a copy has graphs of its own.
    own_code = function.__code__.replace()
    copy = FunctionType(own_code, function.__globals__, None, function.__defaults__, function.__closure__)
    result = torch.compile(copy, fullgraph=True, **options)

    def first_call(*args: Any) -> Callable[..., Any]:
        with lowering.enable() if is_lowered else lowering.disable(), torch.no_grad():
            result(*args)
        return result

    return first_call


def part_host() -> list[Record]:
    args = draw(1, 2, 256, 28, 128, 128)  # split, so two kernels

    def function(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        return torch.ops.mla.sparse_attn(q, kv, indices, 64, SCALE)[0]

    with torch.no_grad():
        calls = {"eager": function}
        for name, is_lowered in (("extern", False), ("inlined", True)):
            calls[name] = compiled(function, is_lowered=is_lowered)(*args)
        medians = host_us([lambda call=call: call(*args) for call in calls.values()])
    times = dict(zip(calls, medians, strict=True))
    return [{"part": "host", "us": times, "inlined_over_extern": round(times["inlined"] / times["extern"], 3)}]


def part_slope() -> list[Record]:
    """With one block of slots a call is one kernel; with four the few queries are split, and a kernel merges."""
    # One compile thread: the workers of more have options of their own.
    static_launch = {"static_launch_user_defined_triton_kernels": True, "compile_threads": 1}
    return [
        slope_record(name, options, is_lowered=name != "extern", kernels=kernels)
        for kernels in (1, 2)
        for name, options in (("extern", {}), ("inlined", {}), ("inlined, launched statically", static_launch))
    ]


def slope_record(name: str, options: dict[str, Any], *, is_lowered: bool, kernels: int) -> Record:
    args = draw(1, 2, 256, 28, 128, {1: 32, 2: 128}[kernels])
    calls = []
    with torch.no_grad(), torch._inductor.config.patch(options):
        for count in CALLS:

            def function(q: Tensor, kv: Tensor, indices: Tensor, count: int = count) -> list[Tensor]:
                # Different scales, so that the calls are not one call.
                return [torch.ops.mla.sparse_attn(q, kv, indices, 64, SCALE * (i + 1))[0] for i in range(count)]

            calls.append(compiled(function, is_lowered=is_lowered)(*args))
        times = host_us([lambda call=call: call(*args) for call in calls])
    slope = round(statistics.linear_regression(CALLS, times).slope, 2)
    return {"part": "slope", "lowering": name, "kernels": kernels, "calls": CALLS, "us": times, "us_per_call": slope}


def part_gaps() -> list[Record]:
    """Replays on a device with nothing else to do: wall time by events, kernels by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    heads, d_total, d_v = 128, 576, 512
    _, kv, indices = draw(8, 16, 8192, heads, d_total, 2048)
    hidden = 2048
    to_q, to_out = (
        torch.randn(a, b, device="cuda", dtype=torch.bfloat16) * 0.02
        for a, b in ((hidden, heads * d_total), (heads * d_v, hidden))
    )
    x = torch.randn(8, 16, hidden, device="cuda", dtype=torch.bfloat16)

    def layer(x: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        q = (x @ to_q).unflatten(-1, (heads, d_total))
        out = torch.ops.mla.sparse_attn(q, kv, indices, d_v, SCALE)[0]
        return x + torch.nn.functional.silu(out.flatten(2) @ to_out)

    with torch.no_grad():
        call = compiled(layer, is_lowered=True)(x, kv, indices)
        for _ in range(3):
            call(x, kv, indices)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call(x, kv, indices)
    replays = 20
    for _ in range(5):
        graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    wall = start.elapsed_time(end) * 1e3 / replays
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    device_events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    kernels = sum(event.time_range.elapsed_us() for event in device_events) / replays
    names = sorted({event.name.split("(")[0][:60] for event in device_events})
    return [
        {
            "part": "gaps",
            "replay_us": round(wall, 2),
            "kernels_us": round(kernels, 2),
            "idle_share": round(1 - kernels / wall, 4),
            "kernels": names,
        }
    ]


# A whole process, because nothing else starts with cold caches: Dynamo, Inductor and Triton included.
TRAIN = """
import sys, time
import torch, torch._inductor.compile_fx
from mla_ops.adapters import torch_layer
from mla_ops.cli.model import LanguageModel, ModelConfig
def masked_sdpa(q, kv, indices, *, d_v, softmax_scale, backend):
    slots = indices.transpose(1, 2).long()
    mask = torch.zeros(q.shape[0], 1, q.shape[1], kv.shape[1] + 1, dtype=torch.bool, device=q.device)
    mask = mask.scatter(3, torch.where(slots < 0, kv.shape[1], slots), True)[..., :-1]
    k = kv.transpose(1, 2).expand(-1, q.shape[2], -1, -1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    out = sdpa(q.transpose(1, 2), k, k[..., :d_v], mask, scale=softmax_scale)
    return out.transpose(1, 2), q.new_zeros(q.shape[:-1])
if sys.argv[1] == "sdpa":
    torch_layer.sparse_attn = masked_sdpa
torch.manual_seed(0)
net = LanguageModel(ModelConfig()).cuda()
text = torch.randint(0, 256, (8, 129), device="cuda")
sum(net.losses(text)).backward()
torch.cuda.synchronize()
losses = torch.compile(net.losses, fullgraph=True)
start = time.perf_counter()
sum(losses(text)).backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_step_seconds(variant: str, cache: str) -> float:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    command = [sys.executable, "-c", TRAIN, variant]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return round(float(result.stdout.split()[-1]), 2)


def part_compile() -> list[Record]:
    """Both models at the same time, so that what else the host does slows both."""
    variants = ("sdpa", "mla_ops")
    with ExitStack() as stack:
        caches = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in variants]
        pool = stack.enter_context(ThreadPoolExecutor(len(variants)))
        cold, warm = ([*pool.map(first_step_seconds, variants, caches)] for _ in range(2))
    times = [
        {"part": "compile", "attention": variant, "cold_s": before, "warm_s": after}
        for variant, before, after in zip(variants, cold, warm, strict=True)
    ]
    ratios = {"cold_ratio": round(cold[1] / cold[0], 3), "warm_ratio": round(warm[1] / warm[0], 3)}
    return [*times, {"part": "compile", **ratios}]


PARTS = {"host": part_host, "slope": part_slope, "gaps": part_gaps, "compile": part_compile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--commit", help="what to record as the commit, where history is not at hand")
    arguments = parser.parse_args()
    records: list[Record] = []
    for name in arguments.parts or PARTS:
        try:
            found = PARTS[name]()
        except Exception as error:  # one part must not lose the others; the record says what happened
            traceback.print_exc()
            found = [{"part": name, "error": f"{type(error).__name__}: {error}"[-500:]}]
        for record in found:
            print(record, flush=True)
        records += found
        # After every part: a run that is cut short leaves what it had.
        path = write(arguments.out, "compiled-calls", torch.device("cuda"), records, arguments.commit)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""`mla-ops bench`: forward and backward on a GPU, beside other formulations and the hardware's floor.

bf16, random distinct indices, medians of the time on the GPU. A shape is timed only after its results match an fp32
gather on its first queries. Results go to one JSON file (`shape, direction, impl, dtype, ms, tflops, floor_ratio,
error`), from which the plots are drawn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mla_ops.bench.peers import Attention, flash_libraries, flash_peers, gather, ours, plain_peers
from mla_ops.bench.plots import plot_sweeps
from mla_ops.bench.provenance import write
from mla_ops.bench.requirements import require_writable
from mla_ops.bench.shapes import SHAPES, SOFTMAX_SCALE, SWEEPS, Shape
from mla_ops.device import pick_device
from mla_ops.errors import UnsupportedProblemError

OURS = "mla_ops"
DETERMINISTIC = "mla_ops, deterministic"
Record = dict[str, Any]
_MAX_CYCLES_PER_S = 2e9


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write the results after every shape and the plots; returns the exit status."""
    device = pick_device("auto")
    if device.type != "cuda":
        raise UnsupportedProblemError("mla-ops bench needs a CUDA device, none was found; the CPU has nothing to time")
    require_writable(arguments.out / "results.json")
    wanted, folder = arguments.peers, arguments.flash_libraries
    libraries = flash_libraries(folder) if folder and "flash" in wanted else []
    matmul = _matmul_flops_per_s()
    print(f"bf16 matmul of this run: {matmul / 1e12:.0f} TFLOP/s")
    print(f"{'shape':14}{'impl':26}{'direction':10}{'ms':>9}{'TFLOP/s':>9}{'floor/ms':>9}")
    host = _host_microseconds()
    print("host time of one call, us:", host)
    records: list[Record] = []
    memory: dict[str, dict[str, float]] = {}

    def save() -> Path:
        extra = {"matmul_flops_per_s": matmul, "memory": memory, "host_us": host}
        return write(arguments.out, arguments.name, device, records, arguments.commit, **extra)

    for name in arguments.shapes:
        shape = SHAPES[name]
        peers = {**plain_peers(shape, wanted), **flash_peers(shape, libraries)}
        with _undonated_buffers():
            records += _time_shape(name, shape, {OURS: ours, DETERMINISTIC: ours, **peers}, matmul)
        memory[name] = _peak_memory(shape)
        print(f"{name:14}peak memory over what the results need: {memory[name]['ratio']}", flush=True)
        save()
    for sweep in arguments.sweeps:
        for value, shape in SWEEPS[sweep][1].items():
            records += _time_shape(f"{sweep}={value}", shape, {OURS: ours}, matmul)
    path = save()
    print(f"wrote {path}")
    if arguments.sweeps:
        print(f"wrote {plot_sweeps(path)}")
    return 0


def _time_shape(name: str, shape: Shape, implementations: dict[str, Attention], matmul: float) -> list[Record]:
    torch.manual_seed(0)
    q, kv, indices, dout = shape.draw()
    leaves = [q.clone().requires_grad_(), kv.clone().requires_grad_()]
    records = []
    for impl, function in implementations.items():
        record = {"shape": name, **asdict(shape), "impl": impl, "dtype": "bfloat16"}
        torch.use_deterministic_algorithms(impl == DETERMINISTIC)
        try:
            errors = _check(shape, q, kv, indices, dout) if function is ours else None
            for direction, ms in _milliseconds(function, q, kv, indices, dout, leaves):
                timed = {
                    **record,
                    "direction": direction,
                    "ms": round(ms, 4),
                    "tflops": round(shape.flops(direction) / ms / 1e9, 1),
                    "floor_ratio": float(f"{1e3 * shape.floor_seconds(direction, matmul) / ms:.3g}"),
                    "error": errors,
                }
                records.append(timed)
                print(f"{name:14}{impl:26}{direction:10}{ms:9.3f}{timed['tflops']:9.1f}{timed['floor_ratio']:9.2f}")
        except torch.OutOfMemoryError:
            records.append({**record, "direction": "fwd_bwd", "error": "out of memory"})
        except Exception as error:  # a peer's failure is a result of its own, whatever it raises
            if function is ours:
                raise
            records.append({**record, "direction": "fwd", "error": f"{type(error).__name__}: {error}"[:200]})
        finally:
            torch.use_deterministic_algorithms(False)
            torch.cuda.empty_cache()
        if "ms" not in records[-1]:
            print(f"{name:14}{impl:26}{records[-1]['error'][:60]}")
    return records


def _milliseconds(
    function: Attention,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    dout: torch.Tensor,
    leaves: list[torch.Tensor],
) -> Iterator[tuple[str, float]]:
    """Yield the median time of every direction; a kernel without a backward ends after the forward."""
    d_v = dout.shape[-1]
    with torch.no_grad():
        yield "fwd", _median_ms(lambda: function(q, kv, indices, d_v))
    out = function(leaves[0], leaves[1], indices, d_v)
    if not out.requires_grad:
        return
    yield "bwd", _median_ms(partial(torch.autograd.grad, out, leaves, dout, retain_graph=True))
    del out
    yield "fwd_bwd", _median_ms(lambda: torch.autograd.grad(function(leaves[0], leaves[1], indices, d_v), leaves, dout))


def _check(
    shape: Shape, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, dout: torch.Tensor
) -> dict[str, float]:
    """Compare with an fp32 gather on the first queries; relative norms of the errors, at most 1 % (bf16 has 0.4 %).

    All queries run, because fewer may be another kernel's; a `dout` of zeros keeps those that are not compared out of
    `dkv`.
    """
    few = max(1, 2**21 // (shape.topk * shape.d_total * shape.B))
    first = slice(None), slice(None, few)
    dout = dout.clone()
    dout[:, few:] = 0
    leaves = [q.clone().requires_grad_(), kv.clone().requires_grad_()]
    out = ours(leaves[0], leaves[1], indices, shape.d_v)
    dq, dkv = torch.autograd.grad(out, leaves, dout)
    leaves = [q[first].float().requires_grad_(), kv.float().requires_grad_()]
    expected = gather(leaves[0], leaves[1], indices[first], shape.d_v)
    expected_grads = torch.autograd.grad(expected, leaves, dout[first].float())
    errors = {}
    results = (out[first], dq[first], dkv), (expected, *expected_grads)
    for name, actual, want in zip(("out", "dq", "dkv"), *results, strict=True):
        errors[name] = float(((actual.float() - want).norm() / want.norm()).detach())
        if not errors[name] < 1e-2:  # also when it is NaN
            raise AssertionError(f"{name} is off by {errors[name]:.2e} at {shape}; nothing is timed that is wrong")
    return errors


def _peak_memory(shape: Shape) -> dict[str, float]:
    """Return the peak of forward + backward over out + lse + delta + fp32 dkv + the gradients."""
    q, kv, indices, dout = shape.draw()
    leaves = [q.requires_grad_(), kv.requires_grad_()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = torch.ops.mla.sparse_attn(*leaves, indices, shape.d_v, SOFTMAX_SCALE)
    grads = torch.autograd.grad(out, leaves, dout)
    peak = torch.cuda.max_memory_allocated() - before
    needed = sum(t.numel() * t.element_size() for t in (out, lse, lse, *grads)) + kv.numel() * 4
    return {"peak_bytes": peak, "needed_bytes": needed, "ratio": round(peak / needed, 3)}


def _host_microseconds() -> dict[str, float]:
    """Return the median host time of one small call: the operator, and a bare launch of the kernel it ends in."""
    from mla_ops.ops.sparse_attn.triton.direct import run_forward

    # One block of slots: with four, so few queries would be split over programs, and a second kernel merges.
    call, _ = Shape(1, 2, 256, 28, 128, 64, 32).draw_call()
    q, kv, indices, *_ = call
    leaves = [q.clone().requires_grad_(), kv.clone().requires_grad_()]
    launches: list[Callable[[], Any]] = []

    class _Recorder:
        """Stands where the kernel is launched, and keeps the launch to repeat it bare."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                launches.append(lambda: self.kernel[grid](*args, **options))

            return launch

    run_forward(call, num_splits=1, wrap=_Recorder)
    with torch.no_grad():
        operator = _host_median(lambda: ours(q, kv, indices, 64))
    bare = _host_median(launches[0])
    return {
        "bare_launch": bare,
        "operator": operator,
        "operator_over_bare_launch": round(operator - bare, 1),
        "operator_with_grad": _host_median(lambda: ours(leaves[0], leaves[1], indices, 64)),
    }


def _host_median(run: Callable[[], Any], calls: int = 2000) -> float:
    for _ in range(50):
        run()
    torch.cuda.synchronize()
    seconds = []
    for call in range(calls):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
        if call % 100 == 99:  # the queue of launches must not fill up
            torch.cuda.synchronize()
    return round(sorted(seconds)[calls // 2] * 1e6, 1)


def _matmul_flops_per_s() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _median_ms(lambda: a @ b) * 1e3


def _median_ms(run: Callable[[], Any]) -> float:
    """Return the median time on the GPU, from a flushed L2 cache; what the host needs for a call is measured by itself.

    The GPU spins until the host has issued the whole call, or short calls would be as fast as the host: for twice as
    long as the host took before, and no longer, because a GPU that has rested runs at higher clocks than in training.
    """
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    host_seconds = 0.0
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        host_seconds = time.perf_counter() - begin
    times: list[float] = []
    while len(times) < 5 or (len(times) < 100 and sum(times) < 100):
        cache.zero_()
        torch.cuda._sleep(int(2 * host_seconds * _MAX_CYCLES_PER_S))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@contextmanager
def _undonated_buffers() -> Iterator[None]:
    """Let a compiled peer's backward be timed on one graph again and again, which donated buffers forbid."""
    from torch._functorch import config

    with config.patch(donated_buffer=False):
        yield

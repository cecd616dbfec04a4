"""The backward where kv and dkv exceed the L2 cache: through the keys in order against the order of the slots.

    python benchmarks/key_order.py [SHAPE ...]

writes results/<date>-<device>-key-order.json and prints it. The two take turns, ROUNDS times. Every record carries the
median over the rounds of the time in slot order over that in key order, sorting included, where key order is what the
operator does by itself. Indices are random or overlapping as in `wide_forward.py`. A shape is timed after both orders
have given the same gradients.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor
from wide_forward import overlapping

from mla_ops.bench.provenance import write
from mla_ops.bench.shapes import Shape
from mla_ops.ops.sparse_attn.call import Gradients
from mla_ops.ops.sparse_attn.triton.direct import run_backward, run_forward

ROUNDS = 5
LONG = {
    "16k keys": Shape(1, 4096, 2**14, 64, 576, 512, 2048),
    "32k keys": Shape(1, 4096, 2**15, 64, 576, 512, 2048),
    "64k keys": Shape(1, 4096, 2**16, 64, 576, 512, 2048),
    "128k keys": Shape(1, 4096, 2**17, 64, 576, 512, 2048),
    "128 heads": Shape(1, 4096, 2**16, 128, 576, 512, 2048),
    "16 heads": Shape(1, 4096, 2**16, 16, 576, 512, 2048),
    "320/256": Shape(1, 4096, 2**16, 64, 320, 256, 2048),
}


def check(orders: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, float]:
    """Return the relative distances of dq and dkv between the orders; both are sums in fp32, rounded once to bf16."""
    first, second = (run() for run in orders.values())
    errors = {}
    for name, a, b in zip(("dq", "dkv"), first, second, strict=False):
        errors[name] = float((a.float() - b.float()).norm() / b.float().norm())
        if not errors[name] < 2e-3:  # also when it is NaN
            raise AssertionError(f"{name} differs by {errors[name]:.2e} between the orders; nothing is timed")
    return errors


def measure(name: str, shape: Shape, is_overlapping: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    call, dout = shape.draw_call()
    if is_overlapping:
        call = call._replace(indices=overlapping(call.indices, shape.Skv))
    backward = partial(run_backward, call, run_forward(call), Gradients(dout, None))
    orders = {"key order": backward, "slot order": partial(backward, in_key_order=False)}
    errors = check(orders)
    times: dict[str, list[float]] = {order: [] for order in orders}
    for _ in range(ROUNDS):
        for order, run in orders.items():
            times[order].append(float(triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")))
    speedup = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    indices_are = "overlapping" if is_overlapping else "random"
    print(f"{name:10}{indices_are:12} key order {speedup:.2f} times as fast", flush=True)
    return [
        {
            "shape": name,
            **asdict(shape),
            "indices": indices_are,
            "direction": "bwd",
            "impl": f"mla_ops, {order}",
            "dtype": "bfloat16",
            "ms": round(statistics.median(milliseconds), 4),
            "tflops": round(shape.flops("bwd") / statistics.median(milliseconds) / 1e9, 1),
            "key_order_over_slot_order": round(speedup, 3),
            "distance": errors,
        }
        for order, milliseconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(LONG)}; all of them by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    records = []
    for name in arguments.shapes or LONG:
        for is_overlapping in (False, True):
            records += measure(name, LONG[name], is_overlapping)
            write(arguments.out, "key-order", torch.device("cuda"), records, arguments.commit)


if __name__ == "__main__":
    main()

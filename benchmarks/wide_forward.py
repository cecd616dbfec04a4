"""The forward of wide rows on sm90, interleaved with hand-written kernels in one process.

    python benchmarks/wide_forward.py [SHAPE ...] [--flash-libraries DIR]

writes results/<date>-<device>-wide-forward.json and prints it.

The device's clock and temperature drift by several percent within a minute, so all kernels take turns, ROUNDS times,
and every record carries the median over the rounds of its time over that of each other kernel in the same round.
Indices are distinct and random (the worst case for caches), or `overlapping`: of the keys of one query the next one
keeps 80 %, as learned indexers do. A shape is timed after its results match an fp32 gather on its first queries.

With few queries `mla_ops` takes the plain kernel by itself, and splits the slots.
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

from mla_ops.bench.peers import flash_libraries, flash_peers, gather
from mla_ops.bench.provenance import write
from mla_ops.bench.shapes import SHAPES, SOFTMAX_SCALE, Shape
from mla_ops.device import traits_of
from mla_ops.ops.sparse_attn.call import SparseAttnCall
from mla_ops.ops.sparse_attn.configs.lookup import forward_config, key_of
from mla_ops.ops.sparse_attn.triton.direct import run_forward

ROUNDS = 7
KEPT = 0.8
WIDE = {
    "DS": SHAPES["DS"],
    "DS64": SHAPES["DS64"],
    "512/512": Shape(1, 4096, 8192, 64, 512, 512, 512),
    "320/256": Shape(1, 4096, 8192, 64, 320, 256, 512),
    "Sq=1": Shape(1, 1, 8192, 128, 576, 512, 2048),
    "Sq=16": Shape(1, 16, 8192, 128, 576, 512, 2048),
    "Sq=64": Shape(1, 64, 8192, 128, 576, 512, 2048),
    "DEC128": Shape(1, 128, 65536, 128, 576, 512, 2048),
}
Forward = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def overlapping(indices: Tensor, seq_kv: int) -> Tensor:
    """Return indices of the same shape in which a query keeps 80 % of the keys of the one before it, in their slots."""
    seq_q, topk = indices.shape[1], indices.shape[3]
    result = indices[0, :, 0].clone()
    fresh = topk - round(KEPT * topk)
    for query in range(1, seq_q):
        row = result[query - 1].clone()
        is_selected = torch.zeros(seq_kv, device=row.device)
        is_selected[row.long()] = 2.0
        # The smallest of random numbers, those of the selected keys pushed behind all others.
        others = (torch.rand(seq_kv, device=row.device) + is_selected).topk(fresh, largest=False).indices
        row[torch.randperm(topk, device=row.device)[:fresh]] = others.to(row.dtype)
        result[query] = row
    return result[None, :, None]


def implementations(shape: Shape, libraries: list[str]) -> dict[str, Forward]:
    traits = traits_of(torch.device("cuda"))
    plain = forward_config(key_of(shape.problem(), traits))

    def ours(config: Any) -> Forward:
        return lambda q, kv, indices, d_v: (
            run_forward(SparseAttnCall(q, kv, indices, d_v, SOFTMAX_SCALE), config=config).out
        )

    return {"mla_ops": ours(None), "mla_ops, plain Triton": ours(plain), **flash_peers(shape, libraries)}


def check(shape: Shape, function: Forward, q: Tensor, kv: Tensor, indices: Tensor) -> float:
    few = max(1, 2**21 // (shape.topk * shape.d_total))
    expected = gather(q[:, :few].float(), kv.float(), indices[:, :few], shape.d_v)
    error = float((function(q, kv, indices, shape.d_v)[:, :few].float() - expected).norm() / expected.norm())
    if not error < 1e-2:  # also when it is NaN
        raise AssertionError(f"out is off by {error:.2e} at {shape}; nothing is timed that is wrong")
    return error


def measure(name: str, shape: Shape, is_overlapping: bool, libraries: list[str]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    q, kv, indices, _ = shape.draw()
    if is_overlapping:
        indices = overlapping(indices, shape.Skv)
    functions = implementations(shape, libraries)
    errors = {impl: check(shape, function, q, kv, indices) for impl, function in functions.items()}
    times: dict[str, list[float]] = {impl: [] for impl in functions}
    for _ in range(ROUNDS):
        for impl, function in functions.items():
            run = partial(function, q, kv, indices, shape.d_v)
            times[impl].append(float(triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")))
    records = []
    for impl, milliseconds in times.items():
        ms = statistics.median(milliseconds)
        speed_over = {
            other: round(statistics.median(b / a for a, b in zip(milliseconds, others, strict=True)), 3)
            for other, others in times.items()
            if other != impl
        }
        record = {
            "shape": name, **asdict(shape), "indices": "overlapping" if is_overlapping else "random",
            "direction": "fwd", "impl": impl, "dtype": "bfloat16", "ms": round(ms, 4),
            "tflops": round(shape.flops("fwd") / ms / 1e9, 1), "speed_over": speed_over, "error": errors[impl],
        }  # fmt: skip
        records.append(record)
        print(
            f"{name:9}{record['indices']:12}{impl:24}{ms:9.3f} ms{record['tflops']:8.1f}  speed over {speed_over}",
            flush=True,
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(WIDE)}; all of them by default")
    parser.add_argument("--flash-libraries", type=Path, help="folder of FlashMLA's and FlashAttention-3's libraries")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    libraries = flash_libraries(arguments.flash_libraries) if arguments.flash_libraries else []
    records = []
    for name in arguments.shapes or WIDE:
        for is_overlapping in (False, True):
            records += measure(name, WIDE[name], is_overlapping, libraries)
            write(arguments.out, "wide-forward", torch.device("cuda"), records, arguments.commit)


if __name__ == "__main__":
    main()

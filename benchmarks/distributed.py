"""Tensor parallelism over heads and key-sharded context parallelism against one rank, in one run.

    python benchmarks/distributed.py [SHAPE ...] [--compile]     one process per GPU; writes results/<date>-<device>-...

bf16, Sq 8192, Skv 65536, random distinct indices. Correctness comes first: a shape is timed only after the sharded
results agree with those of one rank on the whole problem. Times are those of one of CALLS calls that are issued one
after the other, as layers are: medians over repetitions that all ranks start together, then the slowest rank's.
Efficiency is the time of one rank on the whole problem (all ranks at it at once) over `ranks` times the sharded time.
The backward of tensor parallelism ends with the all-reduce of `dkv`.

`--compile` compiles every call: in eager a DTensor takes longer on the host than a narrow forward on the GPU, and the
packing and merging of key sharding are many small operators. Without GPUs everything runs at toy sizes over gloo, to
test this file, and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import mla_ops
from mla_ops.bench.provenance import write
from mla_ops.distributed import key_load, sparse_attn_cp

SCALE = 0.08
REPETITIONS = 7
CALLS = 10
DRAWN_ROWS = 1024  # queries whose indices are drawn at once


@dataclass(frozen=True)
class Shape:
    """Sizes by the letters of the tables; B and G are 1."""

    Sq: int
    Skv: int
    H: int
    d_total: int
    d_v: int
    topk: int

    def toy(self) -> Shape:
        """The same widths at sizes for a CPU."""
        return replace(self, Sq=16, Skv=64, H=min(self.H, 4), topk=8)


SHAPES = {
    "DS": Shape(8192, 65536, 128, 576, 512, 2048),
    "NAM28": Shape(8192, 65536, 28, 128, 64, 256),
    "NAM128": Shape(8192, 65536, 128, 128, 64, 256),
}


@dataclass(frozen=True)
class Bench:
    """One rank's view of the run."""

    mesh: DeviceMesh
    device: torch.device
    is_compiled: bool

    def compiled(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return `call`, compiled if the run is asked to."""
        return torch.compile(call, fullgraph=True, dynamic=False) if self.is_compiled else call

    @property
    def rank(self) -> int:
        """This process."""
        return self.mesh.get_local_rank()

    @property
    def ranks(self) -> int:
        """How many processes share the problem."""
        return self.mesh.size()

    def draw(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, kv, indices and dout of the whole problem, the same on every rank."""

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=self.device, dtype=torch.bfloat16)

        q, kv = normal(1, shape.Sq, shape.H, shape.d_total), normal(1, shape.Skv, 1, shape.d_total)
        dout = normal(1, shape.Sq, shape.H, shape.d_v)
        indices = torch.empty(1, shape.Sq, 1, shape.topk, device=self.device, dtype=torch.int32)
        for rows in indices[0, :, 0].split(DRAWN_ROWS):
            rows.copy_(torch.rand(len(rows), shape.Skv, device=self.device).argsort(-1)[:, : shape.topk])
        for tensor in (q, kv, indices, dout):
            dist.broadcast(tensor, src=0)
        return q, kv, indices, dout

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, function: Callable[[], Any]) -> float:
        """Median over a fixed number of repetitions (ranks that choose their own would wait for one another)."""
        for _ in range(2):
            function()
        times = []
        for _ in range(REPETITIONS):
            dist.barrier()
            self.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            self.synchronize()
            times.append((time.perf_counter() - start) / CALLS)
        slowest = torch.tensor(statistics.median(times), device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return 1e3 * float(slowest)

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """Most memory that a call holds beyond what was there, its results included."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


@dataclass
class Way:
    """A way to run the problem: leaves, the forward, the gradients of a step, and what to do with them."""

    name: str
    leaves: list[Tensor]
    forward: Callable[[], Tensor]
    dout: Tensor
    finish: Callable[[list[Tensor]], list[Tensor]] = list

    def step(self) -> list[Tensor]:
        """Forward and backward; dq and dkv of this rank's part."""
        return self.finish(list(torch.autograd.grad(self.forward(), self.leaves, self.dout)))

    def inference(self) -> Tensor:
        """Forward without gradients."""
        with torch.no_grad():
            return self.forward()


def attention(shape: Shape) -> Callable[..., Tensor]:
    def call(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        return mla_ops.sparse_attn(q, kv, indices, d_v=shape.d_v, softmax_scale=SCALE).out

    return call


def one_rank(bench: Bench, shape: Shape, q: Tensor, kv: Tensor, indices: Tensor, dout: Tensor) -> Way:
    leaves = [q.detach().requires_grad_(), kv.detach().requires_grad_()]
    run = bench.compiled(attention(shape))
    return Way("one rank", leaves, lambda: run(*leaves, indices), dout)


def tensor_parallel(bench: Bench, shape: Shape, q: Tensor, kv: Tensor, indices: Tensor, dout: Tensor) -> Way:
    assert shape.H % bench.ranks == 0, f"{shape.H} heads are not cut evenly over {bench.ranks} ranks"
    heads, whole = [Shard(2)], [Replicate()]

    def place(tensor: Tensor, placements: list[Any]) -> DTensor:
        local = tensor if placements == whole else tensor.chunk(bench.ranks, 2)[bench.rank].contiguous()
        return DTensor.from_local(local, bench.mesh, placements, shape=tensor.shape, stride=tensor.stride())

    leaves = [place(q, heads).requires_grad_(), place(kv, whole).requires_grad_()]
    where = place(indices, whole)

    run = bench.compiled(attention(shape))

    def finish(grads: list[Tensor]) -> list[Tensor]:
        dq, dkv = grads
        return [dq.to_local(), dkv.redistribute(placements=whole).to_local()]

    return Way("TP over heads", leaves, lambda: run(*leaves, where), place(dout, heads), finish)


def context_parallel(bench: Bench, shape: Shape, q: Tensor, kv: Tensor, indices: Tensor, dout: Tensor) -> Way:
    def own(tensor: Tensor) -> Tensor:
        return tensor.chunk(bench.ranks, 1)[bench.rank].contiguous()

    leaves = [own(q).requires_grad_(), own(kv).requires_grad_()]
    where, seq_kv = own(indices), kv.shape[1]

    def call(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        return sparse_attn_cp(q, kv, indices, bench.mesh, d_v=shape.d_v, softmax_scale=SCALE, seq_kv=seq_kv).out

    run = bench.compiled(call)
    return Way("key-sharded CP", leaves, lambda: run(*leaves, where), own(dout))


def check(bench: Bench, way: Way, alone: Way) -> dict[str, float]:
    """Compare a sharded step with this rank's part of the step of one rank; bf16 results, so by relative norms."""
    out, (dq, dkv) = alone.inference(), alone.step()
    is_tp = way.name == "TP over heads"
    got = [way.inference(), *way.step()]
    if is_tp:
        got[0] = got[0].to_local()
    cut = 2 if is_tp else 1
    want = [t.chunk(bench.ranks, cut)[bench.rank] for t in (out, dq)]
    want.append(dkv if is_tp else dkv.chunk(bench.ranks, 1)[bench.rank])
    errors = {}
    for name, a, b in zip(("out", "dq", "dkv"), got, want, strict=True):
        error = torch.linalg.vector_norm(a.float() - b.float()) / torch.linalg.vector_norm(b.float())
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        errors[name] = float(f"{float(error):.1e}")
    # Two bf16 roundings where one rank has one: 2^-8 each at worst, about 2e-3 in the norm.
    assert all(error < 8e-3 for error in errors.values()), (way.name, errors)
    return errors


def time_collectives(bench: Bench, shape: Shape) -> dict[str, dict[str, float]]:
    """The two collectives of a context-parallel forward alone, and the bytes that each rank receives."""
    rows = shape.Sq // bench.ranks
    results = {}
    for name, width in (("all_gather of q", shape.d_total), ("all_to_all of out", shape.d_v)):
        local = torch.empty(rows, shape.H, width, device=bench.device, dtype=torch.bfloat16)
        whole = torch.empty(shape.Sq, shape.H, width, device=bench.device, dtype=torch.bfloat16)
        if name.startswith("all_gather"):
            ms = bench.milliseconds(lambda local=local, whole=whole: dist.all_gather_into_tensor(whole, local))
        else:
            received = torch.empty_like(whole)
            ms = bench.milliseconds(lambda whole=whole, to=received: dist.all_to_all_single(to, whole))
        moved = (bench.ranks - 1) * local.numel() * local.element_size()
        results[name] = {"ms": round(ms, 3), "bytes_received": moved, "gb_per_s": round(moved / ms / 1e6, 1)}
    return results


def measure(bench: Bench, name: str, shape: Shape) -> list[dict[str, Any]]:
    tensors = bench.draw(shape)
    alone = one_rank(bench, shape, *tensors)
    where = tensors[2].chunk(bench.ranks, 1)[bench.rank]
    ways = [alone, tensor_parallel(bench, shape, *tensors), context_parallel(bench, shape, *tensors)]
    base: dict[str, float] = {}
    records = []
    for way in ways:
        is_cp = way.name == "key-sharded CP"
        common: dict[str, Any] = {"shape": name, **asdict(shape), "impl": way.name, "ranks": bench.ranks}
        common["compiled"] = bench.is_compiled
        if way is not alone:
            common["error"] = check(bench, way, alone)
        if is_cp:
            common["imbalance"] = round(key_load(where, bench.mesh, seq_kv=shape.Skv).imbalance, 3)
            common["collectives"] = time_collectives(bench, shape)
        for direction, function in (("fwd", way.inference), ("fwd_bwd", way.step)):
            ms = bench.milliseconds(function)
            base.setdefault(direction, ms)
            ranks = 1 if way is alone else bench.ranks
            record = {**common, "direction": direction, "ms": round(ms, 3), "peak_bytes": bench.peak_bytes(function)}
            record["efficiency"] = round(base[direction] / (ranks * ms), 3)
            records.append(record)
            if bench.rank == 0:
                print(f"{name:8}{way.name:16}{direction:9}{ms:10.3f} ms  efficiency {record['efficiency']:.2f}")
    return records


def run_rank(rank: int, ranks: int, folder: str, arguments: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        device_id=device if on_gpu else None,
    )
    bench = Bench(init_device_mesh(device.type, (ranks,), mesh_dim_names=("ranks",)), device, arguments.compile)
    records = []
    for name in arguments.shapes or SHAPES:
        records += measure(bench, name, SHAPES[name] if on_gpu else SHAPES[name].toy())
        if on_gpu:
            torch.cuda.empty_cache()
    if rank == 0 and on_gpu:
        what = f"distributed-x{ranks}" + ("-compiled" if arguments.compile else "")
        print(f"wrote {write(arguments.out, what, device, records, arguments.commit, ranks=ranks)}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--commit", help="what to record as the commit, where history is not at hand")
    arguments = parser.parse_args()
    # Multicast over NVLink needs a privilege that containers often lack; without it NCCL hangs at start-up.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    ranks = max(torch.cuda.device_count(), 2)
    with TemporaryDirectory() as folder:
        # A rank that ends as `spawn` ends it may abort: DTensor's caches keep gloo's threads alive through Python's
        # finalization, and a thread that then frees a tensor waits for a lock it cannot have. A fork just exits.
        torch.multiprocessing.start_processes(
            run_rank, (ranks, folder, arguments), nprocs=ranks, start_method="forkserver"
        )


if __name__ == "__main__":
    main()

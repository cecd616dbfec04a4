"""Sharded attention against one rank, on any number of ranks: heads, keys, and a data x tensor mesh under FSDP2.

    python benchmarks/distributed.py [--ranks N] [--cases PATTERN ...] [--keys N ...] [--seconds N]

One process per GPU; writes results/<date>-<device>-distributed-x<ranks>.json anew after every case, so that a run that
is cut off leaves what it has; where a case fails, that is recorded and new processes go on. A case is
WAY/SHAPE/KEYS/MODE, as in `tp/DS/65536/compiled`; `--list` prints them in the order they run, the most important first.

    tp      tensor parallelism over heads; the backward ends with the all-reduce of `dkv`
    cp      key-sharded context parallelism; cp-causal: causal indices; cp-spread: those, and every n-th key to a rank
    mesh    a layer with its projections on 2 sequences: FSDP2 over 2 halves of the ranks, heads over those of each

bf16, 8192 queries, random distinct indices. Correctness comes first: a case is timed only after its results agree with
those of one rank on the whole problem. Times are those of one of several calls that are issued one after the other, as
layers are: medians over repetitions that all ranks start together, then the slowest rank's. Of every case is recorded

    efficiency       the time of one rank on the whole problem (all ranks at it at once) over `ranks` times its own
    bytes_received   by each rank in a call: by the formulas of docs/distributed.md, and counted
    imbalance        the most selected keys times heads that a rank attends to, over the mean
    host_share       the time until all calls are issued, over the time until they are done

In eager a DTensor takes longer on the host than a narrow forward on the GPU, and the packing and merging of key
sharding are many small operators; hence both modes. Without GPUs everything runs at toy sizes over gloo (keys / 1024,
no Inductor), to test this file, and nothing is written unless `--out` says where.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from distributed_plan import Case, planned
from distributed_traffic import CountedTraffic
from distributed_ways import Attention, LayerProblem, Shape, Way, World
from torch import Tensor
from torch.distributed.tensor import DTensor

from mla_ops.bench.provenance import write

REPETITIONS = 5
MAX_CALLS = 10
# A repetition takes about this long, or two calls.
REPETITION_MS = 100.0
# Of the layer's inputs and outputs: the low-rank queries of a model with 128 heads of 576/512.
WIDTH, TOY_WIDTH = 1536, 32
# Two bf16 roundings where one rank has one: 2^-8 each at worst, about 2e-3 in the norm.
MAX_ERROR = 8e-3
# Of a rank: an exception, or a death without one.
FAILURES = (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException)
# What a record holds instead of times.
WHY_NOT = ("left_out", "wrong", "failed")


def compiled(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `call` as one graph; a CPU, which tests this file, need not wait for Inductor."""
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(call, fullgraph=True, dynamic=False, backend=backend)


def as_it_is(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `call`: eager."""
    return call


MODES = {"compiled": compiled, "eager": as_it_is}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call, of the slowest rank."""

    ms: float
    host_ms: float


def synchronize(world: World) -> None:
    """Wait for the device."""
    if world.on_gpu:
        torch.cuda.synchronize()


def greatest(world: World, *values: float) -> list[float]:
    """Each value's maximum over the ranks."""
    tensor = torch.tensor(values, device=world.device, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def timed(world: World, function: Callable[[], Any]) -> Timing:
    """Medians over a fixed number of repetitions (ranks that choose their own would wait for one another)."""

    def repetition(calls: int) -> tuple[float, float]:
        dist.barrier()
        synchronize(world)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        issued = time.perf_counter()
        synchronize(world)
        return (time.perf_counter() - start) / calls, (issued - start) / calls

    repetition(1)
    (estimate,) = greatest(world, 1e3 * repetition(1)[0])
    calls = int(min(max(REPETITION_MS / estimate, 2), MAX_CALLS))
    # Toy times say nothing.
    times = [repetition(calls) for _ in range(REPETITIONS)] if world.on_gpu else [repetition(1)]
    return Timing(*greatest(world, *(1e3 * statistics.median(column) for column in zip(*times, strict=True))))


def peak_bytes(world: World, function: Callable[[], Any]) -> int:
    """Most memory that a call holds beyond what was there, its results included."""
    if not world.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    synchronize(world)
    return torch.cuda.max_memory_allocated() - before


def bytes_counted(function: Callable[[], Any]) -> dict[str, Any]:
    """Bytes that this rank receives in a call, in all and by kind; why not, where they cannot be counted."""
    try:
        with CountedTraffic() as counted:
            function()
    except Exception as error:
        # Versions of torch differ in what a compiled call does under a dispatch mode. Times stand without the count.
        return {"counted": None, "not_counted": f"{type(error).__name__}: {error}"}
    return {"counted": counted.received, **counted.bytes_by_kind}


def collectives_alone(world: World, shape: Shape, way: str) -> dict[str, dict[str, float]]:
    """The large collectives of a way by themselves, and the bytes that each rank receives in them."""
    n, rows = world.ranks, shape.Sq // world.ranks

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device=world.device, dtype=torch.bfloat16)

    if way == "tp":
        dkv = torch.zeros(shape.Skv, shape.d_total, device=world.device, dtype=torch.bfloat16)
        collectives = {"all_reduce of dkv": (lambda: dist.all_reduce(dkv), 2 * (n - 1) / n * dkv.nbytes)}
    else:
        q, all_q = empty(rows, shape.H, shape.d_total), empty(shape.Sq, shape.H, shape.d_total)
        out, received = empty(shape.Sq, shape.H, shape.d_v), empty(shape.Sq, shape.H, shape.d_v)
        collectives = {
            "all_gather of q": (lambda: dist.all_gather_into_tensor(all_q, q), (n - 1) * q.nbytes),
            "all_to_all of out": (lambda: dist.all_to_all_single(received, out), (n - 1) / n * out.nbytes),
        }
    results = {}
    for name, (function, moved) in collectives.items():
        ms = timed(world, function).ms
        results[name] = {"ms": round(ms, 3), "bytes_received": round(moved), "gb_per_s": round(moved / ms / 1e6, 1)}
    return results


@dataclass
class Baseline:
    """A problem, what one rank makes of it, and how long it takes in each mode."""

    key: tuple[str, str, int]
    problem: Attention | LayerProblem
    results: dict[str, Tensor]
    timings: dict[tuple[str, str], Timing] = field(default_factory=dict)

    @classmethod
    def draw(cls, world: World, case: Case, shape: Shape) -> Baseline:
        """Draw the problem of a case and run it on this rank alone."""
        kind = case.problem[0]
        if kind == "layer":
            width = WIDTH if world.on_gpu else TOY_WIDTH
            problem: Attention | LayerProblem = LayerProblem.draw(world, shape, width)
        else:
            problem = Attention.draw(world, shape, kind == "causal")
        return cls(case.problem, problem, problem.one_rank(as_it_is).results())

    def timing(self, world: World, mode: str) -> dict[str, Timing]:
        """Of one rank's forward and step."""
        if (mode, "fwd") not in self.timings:
            alone = self.problem.one_rank(MODES[mode])
            for direction, function in directions(alone).items():
                self.timings[mode, direction] = timed(world, function)
            torch._dynamo.reset()
        return {direction: self.timings[mode, direction] for direction in ("fwd", "fwd_bwd")}


def directions(way: Way) -> dict[str, Callable[[], Any]]:
    return {"fwd": way.inference, "fwd_bwd": way.backward}


def sharded(baseline: Baseline, case: Case) -> Way:
    problem, compile_ = baseline.problem, MODES[case.mode]
    if isinstance(problem, LayerProblem):
        return problem.mesh(compile_)
    if case.way == "tp":
        return problem.tensor_parallel(compile_)
    return problem.key_sharded(compile_, "interleaved" if case.way == "cp-spread" else "contiguous")


def check(world: World, way: Way, whole: dict[str, Tensor]) -> dict[str, float]:
    """Compare with this rank's part of one rank's results, by relative norms; the same outcome on all ranks."""
    got, errors = way.results(), {}
    assert got.keys() == whole.keys(), (list(got), list(whole))
    for name, result in got.items():
        mine = result.full_tensor() if isinstance(result, DTensor) else result
        want = way.part(name, whole[name]).float()
        error = torch.linalg.vector_norm(mine.float() - want) / torch.linalg.vector_norm(want)
        # A maximum drops NaN, so NaN counts as infinite.
        errors[name] = float(f"{greatest(world, float(error.nan_to_num(torch.inf)))[0]:.1e}")
    return errors


def measure(world: World, case: Case, shape: Shape, baseline: Baseline) -> list[dict[str, Any]]:
    """Check and time one case; the records of its directions, or one that says how wrong it is."""
    way = sharded(baseline, case)
    common: dict[str, Any] = {"case": str(case), "shape": case.shape, **asdict(shape), "impl": case.way}
    common |= {"ranks": world.ranks, "compiled": case.mode == "compiled", "error": check(world, way, baseline.results)}
    if max(common["error"].values()) > MAX_ERROR:
        return [{**common, "wrong": f"an error exceeds {MAX_ERROR}; not timed"}]
    slots = torch.tensor(float(way.local_slots), device=world.device)
    dist.all_reduce(slots)
    common["imbalance"] = round(greatest(world, way.local_slots)[0] * world.ranks / float(slots), 3)
    if case.way in ("tp", "cp"):
        common["collectives"] = collectives_alone(world, shape, case.way)
    alone, records = baseline.timing(world, case.mode), []
    for direction, function in directions(way).items():
        timing = timed(world, function)
        records.append(
            {
                **common,
                "direction": direction,
                "ms": round(timing.ms, 3),
                "one_rank_ms": round(alone[direction].ms, 3),
                "efficiency": round(alone[direction].ms / (world.ranks * timing.ms), 3),
                "host_ms": round(timing.host_ms, 3),
                "host_share": round(timing.host_ms / timing.ms, 3),
                "one_rank_host_share": round(alone[direction].host_ms / alone[direction].ms, 3),
                "bytes_received": {"predicted": way.traffic.of(direction), **bytes_counted(function)},
                "peak_bytes": peak_bytes(world, function),
            }
        )
    return records


def line(record: dict[str, Any]) -> str:
    if "direction" not in record:
        return f"{record['case']:28}" + "; ".join(f"{why}: {record[why]}" for why in WHY_NOT if why in record)
    received = record["bytes_received"]
    counted = "?" if received["counted"] is None else f"{received['counted'] / 1e6:.2f}"
    return (
        f"{record['case']:28}{record['direction']:8}{record['ms']:9.3f} ms  efficiency {record['efficiency']:.2f}  "
        f"received {counted} MB of {received['predicted'] / 1e6:.2f}  "
        f"imbalance {record['imbalance']:.2f}  host {record['host_share']:.2f}"
    )


class Progress:
    """What a run has done so far, in a folder that its ranks share: a case that fails ends them, and others go on."""

    def __init__(self, folder: str) -> None:
        self._records, self._running = Path(folder, "records.json"), Path(folder, "running")

    @property
    def records(self) -> list[dict[str, Any]]:
        """Of every case that is over."""
        return json.loads(self._records.read_text()) if self._records.exists() else []

    @property
    def running(self) -> str | None:
        """The case that has begun and is not over."""
        return self._running.read_text() if self._running.exists() else None

    def begin(self, case: Case) -> None:
        """Note what runs."""
        self._running.write_text(str(case))

    def end(self, new: list[dict[str, Any]]) -> None:
        """Add the records of a case; none runs now."""
        self._records.write_text(json.dumps(self.records + new))
        self._running.unlink(missing_ok=True)


def outcomes(
    world: World, cases: list[Case], deadline: float, begin: Callable[[Case], None]
) -> Iterator[list[dict[str, Any]]]:
    """Records of each case, until a case would start after the deadline."""
    baseline: Baseline | None = None
    for case in cases:
        (is_late,) = greatest(world, time.time() > deadline)
        if is_late:
            return
        begin(case)
        shape = case.sizes(world.on_gpu)
        refusal = case.refusal(shape, world.ranks)
        if refusal:
            yield [{"case": str(case), "left_out": refusal}]
            continue
        if baseline is None or baseline.key != case.problem:
            # The old problem goes before the new one comes.
            baseline = None
            if world.on_gpu:
                torch.cuda.empty_cache()
            baseline = Baseline.draw(world, case, shape)
        yield measure(world, case, shape, baseline)
        torch._dynamo.reset()


def run_rank(rank: int, ranks: int, folder: str, rendezvous: str, start: float, arguments: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    # Read before the ranks meet, so that all of them read the same.
    progress = Progress(folder)
    over = {record["case"] for record in progress.records}
    cases = [case for case in planned(arguments.cases, arguments.keys) if str(case) not in over]
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder}/{rendezvous}",
        rank=rank,
        world_size=ranks,
        device_id=device if on_gpu else None,
    )

    def publish(rest: list[Case]) -> None:
        if arguments.out:
            state = {"ranks": ranks, "seconds": round(time.time() - start, 1), "not_started": list(map(str, rest))}
            write(arguments.out, f"distributed-x{ranks}", device, progress.records, arguments.commit, **state)

    is_first = rank == 0
    if is_first:
        publish(cases)
    begin = progress.begin if is_first else lambda case: None
    for done, new in enumerate(outcomes(World.of(device, ranks), cases, start + arguments.seconds, begin), 1):
        if is_first:
            print(*map(line, new), sep="\n", flush=True)
            progress.end(new)
            publish(cases[done:])
    dist.destroy_process_group()


def run(ranks: int, start: float, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cases; where one fails, go on with new processes and the rest. Returns all records."""
    with TemporaryDirectory() as folder:
        progress = Progress(folder)
        for world in itertools.count():
            given = (ranks, folder, f"rendezvous-{world}", start, arguments)
            try:
                # A rank that ends as `spawn` ends it may abort: DTensor's caches keep gloo's threads alive through
                # Python's finalization, and a thread that then frees a tensor waits for a lock it cannot have. A fork
                # just exits.
                torch.multiprocessing.start_processes(run_rank, given, nprocs=ranks, start_method="forkserver")
                break
            except FAILURES as error:
                failed = progress.running
                if failed is None:
                    raise
                print(error, file=sys.stderr, flush=True)
                record = {"case": failed, "failed": str(error).strip().splitlines()[-1]}
                print(line(record), flush=True)
                progress.end([record])
        return progress.records


def main() -> None:
    start = time.time()
    on_gpu = torch.cuda.is_available()
    default_out = Path(__file__).parent / "results" if on_gpu else None
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=gpus if on_gpu else 2, help="all GPUs; 2 on a CPU")
    parser.add_argument("--cases", nargs="+", default=["*"], metavar="PATTERN", help="a way, or cases with * and ?")
    parser.add_argument("--keys", nargs="+", type=int, metavar="N", help="for every way, instead of the plan's")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case starts later than that")
    parser.add_argument("--out", type=Path, default=default_out, help="folder for the results")
    parser.add_argument("--commit", help="what to record as the commit, where history is not at hand")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    arguments = parser.parse_args()
    cases = planned(arguments.cases, arguments.keys)
    if arguments.ranks < 2 or (on_gpu and arguments.ranks > gpus):
        parser.error(f"--ranks must be 2 or more, and one to a GPU ({gpus} found), got {arguments.ranks}")
    if not cases:
        parser.error(f"no case is called {' or '.join(arguments.cases)}; see --list")
    if arguments.list:
        print(*cases, sep="\n")
        return
    # Multicast over NVLink (NVLS) needs a privilege that containers often lack; without it NCCL hangs at start-up. It
    # would also sum in the switch, where a rank receives fewer bytes than the formulas say.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    if not on_gpu:
        # Ranks are forks of a process that has imported these once; few cores would be busy for long with every rank's.
        imports = ["torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo", "mla_ops.distributed"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(imports)
    records = run(arguments.ranks, start, arguments)
    bad = [record["case"] for record in records if "wrong" in record or "failed" in record]
    if bad:
        sys.exit(f"wrong or failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()

"""`mla::index_topk` and its two stages, in CUDA graphs, interleaved with torch's formulation and with DeepGEMM.

    python benchmarks/index_topk.py [CASE ...] [--sweep]

writes results/<date>-<device>-index-topk.json and prints it. `--sweep` times other configurations of every stage too.

A graph holds one call for each of a few sets of random inputs; graphs of a case take turns, ROUNDS times. The median
over the rounds is recorded. A case is timed after its scores match fp32 products and its choice is that of a stable
sort. Both selections read fp32 scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mla_ops.bench.graphs import microseconds
from mla_ops.bench.provenance import write
from mla_ops.device import traits_of
from mla_ops.launching import as_it_is
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.launch import ScoresConfig, SelectConfig
from mla_ops.ops.index_topk.triton.launch import TopkPlan, launch_topk, plan_topk
from mla_ops.ops.index_topk.triton.scores import run_scores, transposed_weights
from mla_ops.ops.index_topk.triton.selection import run_selection

ROUNDS = 7
DEVICE = torch.device("cuda")
FP8 = torch.float8_e4m3fn
CHECKED_ROWS = 64


class Case(NamedTuple):
    """Sizes of a call, and what of it is timed."""

    batch: int
    seq_q: int
    seq_kv: int
    heads: int
    head_dim: int
    topk: int
    causal: bool
    stages: tuple[str, ...] = ("call", "scores", "selection")
    dtype: torch.dtype = torch.bfloat16
    sets: int = 4  # of inputs
    has_torch: bool = False  # torch's formulation fits the memory

    @property
    def flops(self) -> int:
        """Multiplications and additions of the scores that a query may choose."""
        pairs = self.batch * self.seq_q * self.seq_kv
        return 2 * (pairs // 2 if self.causal else pairs) * self.heads * self.head_dim

    def draw(self) -> IndexTopkCall:
        """Return a call with random inputs."""
        q = torch.randn(self.batch, self.seq_q, self.heads, self.head_dim, device=DEVICE)
        k = torch.randn(self.batch, self.seq_kv, 1, self.head_dim, device=DEVICE)
        weights = torch.randn(self.batch, self.seq_q, self.heads, device=DEVICE) * (self.heads * self.head_dim) ** -0.5
        k_scale = torch.rand(self.batch, self.seq_kv, 1, device=DEVICE) + 0.5 if self.dtype == FP8 else None
        q, k = q.to(self.dtype), k.to(self.dtype)
        return IndexTopkCall(q, k, weights, self.topk, k_scale=k_scale, causal=self.causal)


CASES = {
    "project": Case(1, 4096, 4096, 4, 64, 256, True, has_torch=True),
    "square": Case(1, 4096, 4096, 64, 128, 2048, True, sets=2, has_torch=True),
    "long": Case(1, 4096, 32768, 64, 128, 2048, False, sets=1),
    "long e4m3": Case(1, 4096, 32768, 64, 128, 2048, False, stages=("scores",), dtype=FP8, sets=1),
    "decode": Case(8, 1, 131072, 64, 128, 2048, False, sets=2),
}


def scores_of(call: IndexTopkCall, rows: slice) -> Tensor:
    """Return fp32 scores `[batch, rows, seq_kv]` by torch, in chunks of one head."""
    q, k = call.q_idx[:, rows].float(), call.k_idx[:, :, 0].float()
    total = torch.zeros(q.shape[0], q.shape[1], k.shape[1], device=DEVICE)
    for head in range(q.shape[2]):
        products = q[:, :, head] @ k.mT
        products = products if call.k_scale is None else products * call.k_scale[:, None, :, 0]
        total += call.weights[:, rows, head, None] * products.relu()
    return total


def torch_topk(call: IndexTopkCall) -> Tensor:
    """Return torch's choice: products in the dtype of the inputs, causally masked, unsorted ties."""
    q, k, weights, topk, *_ = call
    products = torch.einsum("bshd,btd->bsht", q, k[:, :, 0]).relu()
    scores = torch.einsum("bsht,bsh->bst", products, weights.to(q.dtype))
    positions = torch.arange(k.shape[1], device=q.device)
    is_future = positions > positions[-q.shape[1] :, None]
    values, indices = scores.masked_fill(is_future, -torch.inf).topk(topk, dim=-1)
    return indices.masked_fill(values == -torch.inf, -1).int()


def stage(name: str, call: IndexTopkCall, plan: TopkPlan, scratch: Tensor, indices: Tensor) -> None:
    """Run one stage of a call, strip by strip; a selection chooses among whatever the scratch holds."""
    if name == "call":
        launch_topk(call, plan)
        return
    if name == "scores" and plan.scores.copies_weights:
        call = call._replace(weights=transposed_weights(call))
    for strip in plan.strips:
        if name == "scores":
            run_scores(call, strip, scratch, plan.row_stride, plan.scores, as_it_is)
        else:
            run_selection(call, strip, scratch, plan.row_stride, indices, plan.selection, as_it_is)


class Run:
    """Everything of a case in one configuration: inputs, memory, what is checked and what is timed."""

    def __init__(self, case: Case, calls: list[IndexTopkCall], **chosen: Any) -> None:
        self.case, self.calls = case, calls
        problem = IndexTopkProblem.of(calls[0])
        self.plan = plan_topk(calls[0], problem, traits_of(DEVICE), **chosen)
        self.scratch = torch.empty(self.plan.scratch_words, dtype=torch.int32, device=DEVICE)
        self.indices = torch.empty(self.plan.out_shape, dtype=torch.int32, device=DEVICE)

    def check(self) -> float:
        """Return the error of the scores; raise where they are off or the choice is not that of a stable sort."""
        call, case, plan = self.calls[0], self.case, self.plan
        strip = plan.strips[-1]
        run_call = call._replace(weights=transposed_weights(call)) if plan.scores.copies_weights else call
        run_scores(run_call, strip, self.scratch, plan.row_stride, plan.scores, as_it_is)
        run_selection(run_call, strip, self.scratch, plan.row_stride, self.indices, plan.selection, as_it_is)
        queries = min(CHECKED_ROWS, strip.num_queries)
        first = strip.first_query + strip.num_queries - queries
        scores = scores_of(call, slice(first, first + queries))
        strips = self.scratch[: strip.rows * plan.row_stride].view(torch.float32)
        ours = strips.view(strip.num_planes, strip.num_queries, -1)[:, -queries:, : case.seq_kv]
        ranked = ours
        if case.causal:
            positions = torch.arange(case.seq_kv, device=DEVICE)
            is_future = positions > positions[first + case.seq_kv - case.seq_q :][:queries, None]
            ranked = ours.masked_fill(is_future, -torch.inf)
            ours, scores = ours.masked_fill(is_future, 0.0), scores.masked_fill(is_future, 0.0)
        error = float((ours - scores).norm() / scores.norm())
        if not error < 1e-3:  # also when it is NaN
            raise AssertionError(f"scores are off by {error:.2e} at {case} with {plan.scores.config}")
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : case.topk].sort(dim=-1).values
        chosen = self.indices[strip.first_plane :][: strip.num_planes, first : first + queries, 0]
        if not torch.equal(chosen, best.int()):
            raise AssertionError(f"the choice is not that of a stable sort at {case} with {plan.selection}")
        return error

    def stages(self) -> dict[str, Callable[[], None]]:
        """Return what is timed, each for all sets of inputs."""

        def run(name: str) -> None:
            for call in self.calls:
                stage(name, call, self.plan, self.scratch, self.indices)

        return {name: partial(run, name) for name in self.case.stages}


def peers(case: Case, calls: list[IndexTopkCall]) -> dict[str, Callable[[], Any]]:
    """Return what else computes a stage of a case, for all sets of inputs, by its name."""
    functions: dict[str, Callable[[], Any]] = {}

    def for_all(function: Callable[[IndexTopkCall], Any]) -> Callable[[], None]:
        return lambda: [function(call) for call in calls] and None

    if case.has_torch:
        functions["call, torch eager"] = for_all(torch_topk)
        functions["call, torch compiled"] = for_all(torch.compile(torch_topk, dynamic=False))
    if "selection" in case.stages:
        scores = torch.randn(case.batch * case.seq_q, case.seq_kv, device=DEVICE)
        functions["selection, torch.topk fp32"] = for_all(lambda _: scores.topk(case.topk, dim=-1))
    if case.dtype == FP8:
        functions |= deep_gemm(calls)
    return functions


def deep_gemm(calls: list[IndexTopkCall]) -> dict[str, Callable[[], Any]]:
    """Return DeepGEMM's scores, where it imports."""
    try:
        from deep_gemm import fp8_mqa_logits
    except ImportError as reason:
        print(f"without DeepGEMM: {reason}")
        return {}
    call = calls[0]
    seq_q, seq_kv = call.q_idx.shape[1], call.k_idx.shape[1]
    starts = torch.zeros(seq_q, dtype=torch.int32, device=DEVICE)
    keys = call.k_idx[0, :, 0].contiguous(), call.k_scale[0, :, 0].contiguous()
    ends = starts + seq_kv
    return {
        "scores, DeepGEMM": lambda: [
            fp8_mqa_logits(each.q_idx[0], keys, each.weights[0], starts, ends, clean_logits=False) for each in calls
        ]
    }


def alternatives(case: Case, plan: TopkPlan) -> list[dict[str, Any]]:
    """Return other configurations of a case's stages: what `plan_topk` takes."""
    base, selection = plan.scores.config, plan.selection.config
    tiles: list[ScoresConfig] = []
    if base.way == "passing keys":
        tiles += [replace(base, num_stages=3), replace(base, key_tiles=4), replace(base, key_tiles=16)]
    elif base.way == "passing heads":
        tiles += [replace(base, num_stages=2), replace(base, block_k=64), replace(base, block_k=256, num_warps=8)]
        tiles.append(replace(base, max_registers=168))
    else:
        tiles += [replace(base, block_k=keys, num_warps=warps) for keys, warps in ((64, 4), (128, 8), (256, 8))]
        tiles += [replace(base, num_stages=stages) for stages in (1, 3)]
    found: list[dict[str, Any]] = [{"scores": tile} for tile in tiles if tile != base]
    if "selection" not in case.stages:
        return found
    if isinstance(selection, SelectConfig):
        found += [{"selection": replace(selection, max_registers=cap)} for cap in (64, 72, 80, 96, 128)]
        found += [{"selection": replace(selection, num_warps=warps, max_registers=None)} for warps in (2, 8)]
    else:
        changes: list[dict[str, Any]] = [{"sample": 1024}, {"sample": 4096}, {"chunk": 1024}, {"max_registers": 80}]
        changes += [{"num_warps": warps, "max_registers": None} for warps in (4, 8, 16)]
        found += [{"selection": replace(selection, **change)} for change in changes]
    return found


def sweep(name: str, case: Case, calls: list[IndexTopkCall], run: Run) -> list[dict[str, Any]]:
    """Time the stages with other configurations, best first."""
    records = []
    for chosen in alternatives(case, run.plan):
        (what, config), *_ = chosen.items()
        timed = "scores" if what == "scores" else "selection"
        try:
            other = Run(case, calls, way=run.plan.selection.way, **chosen)
            other.check()
            time = microseconds({timed: other.stages()[timed]}, rounds=ROUNDS, turn_us=5e3)[timed] / len(calls)
        except Exception as error:
            records.append({"case": name, "stage": timed, "config": str(config), "error": str(error)[:200]})
            print(f"  {timed:10}  {config}: {type(error).__name__} {str(error)[:150]}", flush=True)
            continue
        records.append({"case": name, "stage": timed, "config": str(config), "us": round(time, 2)})
    for record in sorted((r for r in records if "us" in r), key=lambda r: (r["stage"], r["us"])):
        print(f"  {record['stage']:10}{record['us']:10.1f} us  {record['config']}", flush=True)
    return records


def measure(name: str, case: Case, is_swept: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    calls = [case.draw() for _ in range(case.sets)]
    run = Run(case, calls)
    error = run.check()
    times = microseconds({**run.stages(), **peers(case, calls)}, rounds=ROUNDS, turn_us=5e3)
    records = []
    for what, time in times.items():
        us = time / len(calls)
        kind, *peer = what.split(", ")
        record = {
            "case": name, **{field: str(value) for field, value in case._asdict().items()}, "stage": kind,
            "impl": peer[0] if peer else "mla_ops", "us": round(us, 2), "error": error,
        }  # fmt: skip
        if kind == "scores":
            record["tflops"] = round(case.flops / us / 1e6, 1)
        if peer and kind in times:
            record["speed_of_mla_ops_over"] = round(time / times[kind], 2)
        records.append(record)
        ratio = record.get("speed_of_mla_ops_over")
        tail = f"  mla_ops is {ratio} times as fast" if ratio else f"  {record.get('tflops', '')}"
        print(f"{name:12}{what:30}{us:10.1f} us{tail}", flush=True)
    print(f"  {run.plan.scores.config}\n  {run.plan.selection.way}: {run.plan.selection.config}", flush=True)
    return records + (sweep(name, case, calls, run) if is_swept else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all of them by default")
    parser.add_argument("--sweep", action="store_true", help="time other configurations of every stage too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    records = []
    for name in arguments.cases or CASES:
        records += measure(name, CASES[name], arguments.sweep)
        torch.cuda.empty_cache()
        write(arguments.out, "index-topk" + "-sweep" * arguments.sweep, DEVICE, records, arguments.commit)


if __name__ == "__main__":
    main()

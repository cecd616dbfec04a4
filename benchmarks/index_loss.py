"""The indexer's loss on a GPU, stage by stage, and beside plain torch.

    python benchmarks/index_loss.py [--sweep] [--no-torch]     writes results/<date>-<device>-index-loss.json

Stages are what the operators launch: attention mass, index scores, the backward of the scores, the same in
deterministic mode. Then the loss, forward and backward, as users write it: `mla_ops.index_loss` in `torch.compile`, on
a given list and, at the first shape, with `mla_ops.index_topk` before it. Times are medians of replays of one CUDA
graph over random inputs, with a cold L2 cache. A shape is timed only after the results of its first queries match an
fp32 gather, and the compiled loss after its gradients match those of the eager one.

Plain torch is measured at the first shape, as eager and as compiled code, in CUDA graphs too, with the memory that it
holds at most beside its inputs: once on a given list, and once with the selection, whose dense scores it then reuses.
The last shape is a long sequence, run for the memory that it takes, without a peer. `--sweep` times other launch
configurations of every stage instead; a result unlike the table's is an error.
"""

from __future__ import annotations

import argparse
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton.testing
from torch import Tensor

import mla_ops
from mla_ops.bench.provenance import write
from mla_ops.bench.shapes import ATOMIC_BYTES_PER_S
from mla_ops.device import traits_of
from mla_ops.ops.attn_mass.call import AttnMassCall
from mla_ops.ops.attn_mass.triton.launch import launch_mass, plan_mass
from mla_ops.ops.index_scores.call import IndexScoresCall, Wanted
from mla_ops.ops.index_scores.triton.backward import launch_backward, plan_backward
from mla_ops.ops.index_scores.triton.forward import launch_forward, plan_forward
from mla_ops.tiling import TileConfig

Record = dict[str, Any]
Results = tuple[Tensor, ...]
# Seen on an H100 in micro-benchmarks: rows gathered through L2, from that many bytes a row on.
GATHER_BYTES_PER_S = {1152: 8.0e12, 0: 6.5e12}
WARM_UP_MS, TIMED_MS = 15, 60


@dataclass(frozen=True)
class Shape:
    """One layer, one sequence, G = 1."""

    seq_q: int
    seq_kv: int
    topk: int
    heads: int
    d_total: int
    index_heads: int
    index_head_dim: int
    causal: bool

    def draw_inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, kv, q_idx, k_idx and weights."""

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device="cuda").bfloat16()

        weights = torch.randn(self.seq_q, self.index_heads, device="cuda")
        return (
            normal(self.seq_q, self.heads, self.d_total),
            normal(self.seq_kv, 1, self.d_total),
            normal(self.seq_q, self.index_heads, self.index_head_dim),
            normal(self.seq_kv, 1, self.index_head_dim),
            weights * (self.index_heads * self.index_head_dim) ** -0.5,
        )

    def draw(self) -> tuple[AttnMassCall, IndexScoresCall, Tensor]:
        """Return calls with random keys, ascending as a selection gives them, and a gradient of the scores."""
        q, kv, q_idx, k_idx, weights = self.draw_inputs()
        order = torch.rand(self.seq_q, self.seq_kv, device="cuda")
        if self.causal:
            order = order.tril() - torch.ones_like(order).triu(1)
        best = order.topk(self.topk, dim=-1)
        indices = best.indices.masked_fill(best.values < 0, self.seq_kv).sort(-1).values
        indices = indices.masked_fill(indices == self.seq_kv, -1).int()[:, None]
        del order, best
        scale = self.d_total**-0.5
        lse = torch.cat(
            [
                gathered_logits(q[rows], kv, indices[rows], scale).logsumexp(-1)
                for rows in torch.arange(self.seq_q, device="cuda").split(max(1, 2**18 // self.topk))
            ]
        )
        dscores = torch.randn(indices.shape, device="cuda") / self.topk
        return (
            AttnMassCall(q, kv, indices, lse, scale),
            IndexScoresCall(q_idx, k_idx, weights, indices),
            dscores,
        )

    def costs(self, stage: str) -> tuple[float, float]:
        """Return the FLOPs of a stage and its floor in us: the gathered rows, and the fp32 rows that are added."""
        slots = self.seq_q * self.topk
        width, heads, products = {
            "mass": (self.d_total, self.heads, 1), "scores": (self.index_head_dim, self.index_heads, 1),
        }.get(stage, (self.index_head_dim, self.index_heads, 3))  # fmt: skip
        gather = next(rate for row_bytes, rate in GATHER_BYTES_PER_S.items() if 2 * width >= row_bytes)
        seconds = slots * 2 * width / gather
        if products == 3:
            seconds += slots * 4 * width / ATOMIC_BYTES_PER_S
        return 2.0 * slots * width * heads * products, 1e6 * seconds


SHAPES = {
    "project": Shape(4096, 4096, 256, 28, 128, 4, 64, causal=True),
    "wide": Shape(4096, 8192, 2048, 64, 576, 64, 128, causal=False),
    "long": Shape(65536, 65536, 256, 28, 128, 4, 64, causal=True),
}


def tiles(*rows: tuple[Any, ...]) -> list[TileConfig]:
    return [TileConfig(*row) for row in rows]


# (block_h, block_k, max_chunk, num_warps, num_stages[, max_registers[, columns]])
SWEEPS: dict[tuple[str, str], list[TileConfig]] = {
    ("project", "mass"): tiles(
        (32, 64, 64, 2, 2), (32, 64, 64, 4, 2), (32, 128, 128, 4, 2), (32, 128, 64, 4, 2), (32, 64, 64, 2, 2, 128),
    ),
    ("project", "scores"): tiles(
        (16, 64, 64, 1, 2), (16, 32, 64, 1, 2), (8, 32, 64, 1, 2), (8, 64, 64, 1, 2), (8, 128, 64, 2, 2),
    ),
    ("project", "scores_bwd"): tiles(
        (16, 64, 32, 4, 2), (16, 64, 64, 4, 2, 128), (16, 64, 32, 4, 2, 128), (16, 64, 64, 2, 2), (16, 128, 64, 4, 2),
        (16, 64, 32, 2, 2), (16, 64, 32, 4, 2, 96),
    ),
    ("wide", "mass"): tiles(
        (64, 64, 128, 4, 2), (64, 256, 64, 8, 2, None, 64), (64, 256, 64, 8, 3, None, 64),
        (64, 128, 64, 4, 3, None, 64), (64, 128, 64, 8, 3, None, 64),
        (64, 128, 64, 4, 2, None, 64), (64, 64, 64, 4, 3, None, 64), (64, 512, 64, 16, 3, 128, 64),
        (64, 512, 64, 8, 3, None, 64),
    ),
    ("wide", "scores"): tiles(
        (64, 64, 128, 4, 2), (64, 64, 64, 4, 2), (64, 128, 64, 4, 2), (64, 128, 64, 4, 3, None, 64),
        (64, 256, 64, 8, 2, None, 64),
    ),
    ("wide", "scores_bwd"): tiles(
        (64, 64, 32, 4, 2), (64, 64, 32, 4, 3), (64, 128, 32, 8, 2), (64, 64, 16, 4, 2), (64, 128, 32, 4, 2),
    ),
}  # fmt: skip


@contextmanager
def deterministic_algorithms(is_on: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(is_on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def stage_of(
    stage: str, mass: AttnMassCall, scores: IndexScoresCall, dscores: Tensor, config: TileConfig | None = None
) -> Callable[[], Results]:
    """Return what launches a stage, planned once."""
    traits = traits_of(torch.device("cuda"))
    if stage == "mass":
        mass_plan = plan_mass(mass, traits, config=config)
        return lambda: (launch_mass(mass, mass_plan),)
    if stage == "scores":
        scores_plan = plan_forward(scores, traits, config=config)
        return lambda: (launch_forward(scores, scores_plan),)
    with deterministic_algorithms(stage == "scores_bwd, deterministic"):
        plan = plan_backward(scores, traits, Wanted(), config=config)

    def backward() -> Results:
        with deterministic_algorithms(plan.is_deterministic):
            return launch_backward(scores, dscores, Wanted(), plan)

    return backward


STAGES = ("mass", "scores", "scores_bwd", "scores_bwd, deterministic")


def gathered_logits(q: Tensor, keys: Tensor, indices: Tensor, scale: float = 1.0) -> Tensor:
    """Return fp32 `[seq_q, heads, topk]`, -inf where a slot is invalid."""
    rows = keys[indices[:, 0].clamp_min(0).long(), 0].float()
    return (torch.einsum("shd,skd->shk", q.float(), rows) * scale).masked_fill(indices < 0, -torch.inf)


def check(mass: AttnMassCall, scores: IndexScoresCall, dscores: Tensor) -> dict[str, float]:
    """Compare every stage with fp32 on some queries of all lengths; return relative distances."""
    some = torch.arange(len(mass.q), device="cuda")[:: len(mass.q) // 32]
    mass = mass._replace(q=mass.q[some], indices=mass.indices[some], lse=mass.lse[some])
    scores = scores._replace(q_idx=scores.q_idx[some], weights=scores.weights[some], indices=mass.indices)
    dscores = dscores[some]
    valid = mass.indices >= 0
    logits = gathered_logits(mass.q, mass.kv, mass.indices, mass.softmax_scale)
    leaves = [tensor.float().requires_grad_() for tensor in scores[:3]]
    matches = gathered_logits(*leaves[:2], scores.indices)
    shares = matches.relu() * leaves[2].unsqueeze(-1)
    of_slots = shares.sum(1, keepdim=True).masked_fill(~valid, 0)
    of_slots.backward(dscores.masked_fill(~valid, 0))
    gradients = {name: leaf.grad for name, leaf in zip(("dq", "dk", "dw"), leaves, strict=True)}
    expected = {
        "mass": {"mass": torch.exp(logits - mass.lse.unsqueeze(-1)).sum(1, keepdim=True)},
        "scores": {"scores": of_slots.detach()},
        "scores_bwd": gradients,
        "scores_bwd, deterministic": gradients,
    }
    errors = {}
    for stage, results in expected.items():
        actual = stage_of(stage, mass, scores, dscores)()
        for (name, want), got in zip(results.items(), actual, strict=True):
            if name == "scores":
                assert torch.equal(got == -torch.inf, ~valid)
                got = got.masked_fill(~valid, 0)
            errors[f"{stage}: {name}"] = error = float((got.float() - want).norm() / want.norm())
            if not error < 1e-2:  # also when it is NaN
                raise AssertionError(f"{name} of {stage} is off by {error:.2e}; nothing is timed that is wrong")
    return errors


def graph_us(function: Callable[[], Any]) -> float:
    """Return the median time of a replay of the function's CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    ms = triton.testing.do_bench(graph.replay, warmup=WARM_UP_MS, rep=TIMED_MS, return_mode="median")
    return round(1e3 * float(ms), 1)


def peak_mb(function: Callable[[], Any]) -> float:
    """Return the MB that a call holds at most beside what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def loss_on_list(
    q: Tensor, kv: Tensor, lse: Tensor, scale: float, indices: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor
) -> Tensor:
    """The loss on a given list, by the operators."""
    return mla_ops.index_loss(q, kv, indices, lse, q_idx, k_idx, weights, softmax_scale=scale).mean()


def whole_loss(
    q: Tensor, kv: Tensor, lse: Tensor, scale: float, topk: int, q_idx: Tensor, k_idx: Tensor, weights: Tensor
) -> Tensor:
    """The selection too, by the operators."""
    indices = mla_ops.index_topk(q_idx, k_idx, weights, topk)
    return loss_on_list(q, kv, lse, scale, indices, q_idx, k_idx, weights)


def torch_on_list(
    q: Tensor, kv: Tensor, lse: Tensor, scale: float, indices: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor
) -> Tensor:
    """The loss on a given list `[S, topk]`, as one writes it: rows gathered, products in bf16."""
    rows = indices.clamp_min(0).long()
    logits = scale * torch.einsum("shd,skd->shk", q, kv[rows, 0]).float()
    matches = torch.einsum("shd,skd->shk", q_idx, k_idx[rows, 0]).relu()
    scores = torch.einsum("shk,sh->sk", matches, weights.to(matches.dtype)).float()
    return torch_kl(logits, lse, indices, scores)


def torch_whole(
    q: Tensor, kv: Tensor, lse: Tensor, scale: float, topk: int, q_idx: Tensor, k_idx: Tensor, weights: Tensor
) -> Tensor:
    """The selection too, from dense causal scores that the loss reuses; in batches, as models have them."""
    q, kv, lse, q_idx, k_idx, weights = (tensor.unsqueeze(0) for tensor in (q, kv, lse, q_idx, k_idx, weights))
    matches = torch.einsum("bshd,btd->bsht", q_idx, k_idx.squeeze(2)).relu()
    dense = torch.einsum("bsht,bsh->bst", matches, weights.to(matches.dtype))
    position = torch.arange(q.shape[1], device=q.device)
    best, indices = dense.masked_fill(position[None, :] > position[:, None], -torch.inf).topk(topk, dim=-1)
    indices = indices.masked_fill(best == -torch.inf, -1)
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    rows = kv.squeeze(2)[batch, indices.clamp_min(0)]
    logits = scale * torch.einsum("bshd,bskd->bshk", q, rows).float()
    return torch_kl(logits, lse, indices, best.float())


def torch_kl(logits: Tensor, lse: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
    unused = indices < 0
    target = torch.exp(logits - lse.unsqueeze(-1)).masked_fill(unused.unsqueeze(-2), 0.0).mean(-2)
    log_share = scores.masked_fill(unused, -torch.inf).log_softmax(-1).masked_fill(unused, 0.0)
    return (target * (target.clamp_min(1e-9).log() - log_share)).sum(-1).mean()


def show(record: Record) -> None:
    rate = f"{record['tflops']:8.1f} TFLOP/s, floor {record['floor_us']:7.1f} us" if "tflops" in record else ""
    if "us_ratio" in record:
        rate = f"   {record['us_ratio']:.2f} x the time, {record['peak_ratio']:.1f} x the memory of mla_ops"
    what = f"{record['shape']:9}{record['stage']:28}{record['impl']:30}"
    print(f"{what}{record['us']:10.1f} us   peak {record['peak_mb']:8.1f} MB{rate}", flush=True)


def with_gradients(loss: Callable[..., Tensor], *arguments: Any) -> Callable[[], Results]:
    """Return what runs a loss forward and backward; its last arguments are q_idx, k_idx and weights."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments[-3:]]

    def run() -> Results:
        value = loss(*arguments[:-3], *leaves)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def time_loss(name: str, mass: AttnMassCall, scores: IndexScoresCall, has_torch: bool) -> list[Record]:
    """Time the loss by the operators, and beside plain torch the selection as well."""
    ours: dict[str, Callable[..., Tensor]] = {"given list": loss_on_list}
    plain: dict[str, Callable[..., Tensor]] = {}
    which: dict[str, Any] = {"given list": mass.indices, "selecting": mass.indices.shape[-1]}
    if has_torch:
        ours["selecting"] = whole_loss
        plain = {"given list": torch_on_list, "selecting": torch_whole}
    records = []
    for way, function in ours.items():
        common = (mass.q, mass.kv, mass.lse, mass.softmax_scale)
        run = with_gradients(torch.compile(function, dynamic=False), *common, which[way], *scores[:3])
        for got, want in zip(run(), with_gradients(function, *common, which[way], *scores[:3])(), strict=True):
            error = float((got.float() - want.float()).norm() / want.float().norm())
            if not error < 1e-2:  # also when it is NaN
                raise AssertionError(f"the compiled loss, {way}, is off by {error:.2e}; nothing is timed that is wrong")
        record: Record = {"shape": name, "stage": "loss", "impl": f"mla_ops, {way}, compiled"}
        record |= {"peak_mb": peak_mb(run), "us": graph_us(run)}
        show(record)
        records.append(record)
        if way not in plain:
            continue
        indices = mass.indices[:, 0] if way == "given list" else which[way]
        for kind, peer in (("eager", plain[way]), ("compiled", torch.compile(plain[way], dynamic=False))):
            run = with_gradients(peer, *common, indices, *scores[:3])
            run()
            other: Record = {"shape": name, "stage": "loss", "impl": f"torch, {way}, {kind}"}
            other |= {"peak_mb": peak_mb(run), "us": graph_us(run)}
            other["us_ratio"] = round(other["us"] / record["us"], 2)
            other["peak_ratio"] = round(other["peak_mb"] / record["peak_mb"], 2)
            show(other)
            records.append(other)
    return records


def run_long(name: str, shape: Shape) -> list[Record]:
    """Run selection and loss, forward and backward, once: for the memory beside inputs, lists and results."""
    q, kv, *index = shape.draw_inputs()
    lse = torch.full(q.shape[:2], math.log(shape.topk), device="cuda")
    compiled = torch.compile(whole_loss, dynamic=False)
    run = with_gradients(compiled, q, kv, lse, shape.d_total**-0.5, shape.topk, *index)
    results = run()
    assert all(result.isfinite().all() for result in results)
    # Indices, mass and scores are kept for the backward.
    kept = 3 * 4 * shape.seq_q * shape.topk + sum(result.nbytes for result in results)
    del results
    record: Record = {"shape": name, "stage": "loss", "impl": "mla_ops, selecting, compiled", "peak_mb": peak_mb(run)}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    record |= {"us": round(1e3 * start.elapsed_time(end), 1), "kept_mb": round(kept / 1e6, 1)}
    record["workspace_mb"] = round(record["peak_mb"] - record["kept_mb"], 1)
    show(record)
    print(f"{'':9}kept {record['kept_mb']} MB, workspace {record['workspace_mb']} MB", flush=True)
    return [record]


def time_stages(name: str, shape: Shape, calls: tuple[AttnMassCall, IndexScoresCall, Tensor]) -> list[Record]:
    errors = check(*calls)
    records = []
    for stage in STAGES:
        function = stage_of(stage, *calls)
        function()
        record: Record = {"shape": name, "stage": stage, "impl": "mla_ops"}
        record |= {"peak_mb": peak_mb(function), "us": graph_us(function)}
        flops, floor_us = shape.costs(stage)
        record |= {"tflops": round(flops / record["us"] / 1e6, 1), "floor_us": round(floor_us, 1)}
        record["errors"] = {key: error for key, error in errors.items() if key.startswith(f"{stage}:")}
        show(record)
        records.append(record)
    return records


def sweep(name: str, calls: tuple[AttnMassCall, IndexScoresCall, Tensor]) -> list[Record]:
    records = []
    for stage in ("mass", "scores", "scores_bwd"):
        expected = stage_of(stage, *calls)()
        for config in SWEEPS[name, stage]:
            record: Record = {"shape": name, "stage": stage, "impl": "mla_ops", "config": asdict(config)}
            try:
                function = stage_of(stage, *calls, config)
                for got, want in zip(function(), expected, strict=True):
                    torch.testing.assert_close(
                        got, want, rtol=2e-2, atol=2e-3 * float(want[want.isfinite()].abs().max())
                    )
                record["us"] = graph_us(function)
            except Exception as error:  # a configuration that does not launch is a result of its own
                torch.cuda.synchronize()
                record["error"] = f"{type(error).__name__}: {error}"[:200]
                if isinstance(error, AssertionError):
                    traceback.print_exc()
            shown = f"{record['us']:10.1f} us" if "us" in record else record["error"][:60]
            print(f"{name:9}{stage:12}{tuple(asdict(config).values())!s:34}{shown}", flush=True)
            records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all of them by default")
    parser.add_argument("--sweep", action="store_true", help="time other launch configurations")
    parser.add_argument("--no-torch", action="store_true", help="leave plain torch out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    what = "index-loss-sweep" if arguments.sweep else "index-loss"
    records: list[Record] = []
    for name in arguments.shapes or SHAPES:
        torch.manual_seed(0)
        if name == "long":
            records += [] if arguments.sweep else run_long(name, SHAPES[name])
        else:
            calls = SHAPES[name].draw()
            if arguments.sweep:
                check(*calls)
                records += sweep(name, calls)
            else:
                records += time_stages(name, SHAPES[name], calls)
                records += time_loss(name, *calls[:2], has_torch=name == "project" and not arguments.no_torch)
            del calls
        # After every shape: a run that is cut short leaves what it had.
        path = write(arguments.out, what, torch.device("cuda"), records, arguments.commit)
        torch.cuda.empty_cache()
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

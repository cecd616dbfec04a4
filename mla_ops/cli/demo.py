"""`mla-ops demo`: train the model of `model.py` on real text, once compiled and once eager, and report.

The text is the source of the running interpreter's standard library, as bytes. Both runs start from the same weights
and see the same batches, so their loss curves lie on each other; the second half of the steps uses twice the sequence
length, which a graph with a symbolic length takes without recompiling.
"""

from __future__ import annotations

import json
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_ops.bench.peers import Attention, masked_sdpa, ours
from mla_ops.bench.provenance import header
from mla_ops.bench.requirements import require, require_writable
from mla_ops.bench.shapes import SHAPES
from mla_ops.cli.model import LanguageModel, ModelConfig
from mla_ops.device import pick_device, traits_of
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import SparseAttnProblem
from mla_ops.settings import cxx_compiler

REPORT, PLOT = "report.json", "loss.png"
SEQUENCE_LENGTHS = (128, 256)
BATCH = 8
LEARNING_RATE = 3e-3
# Losses of single batches are noisy; the figure reported as a run's result is the mean of this many last steps.
TAIL = 20


@dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    losses: list[float] = field(default_factory=list)
    index_losses: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0  # compilation included
    tokens_per_second: float | None = None  # of the steps after the first

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps, nats per byte."""
        tail = self.losses[-TAIL:]
        return sum(tail) / len(tail)


def run_demo(*, out: Path, steps: int, device: str, seed: int) -> int:
    """Train, print, and write `report.json` and `loss.png` to `out`; returns the exit status."""
    for module in ("tqdm", "matplotlib"):
        require(module, "mla-ops demo")
    target = pick_device(device)
    for path in (out / REPORT, out / PLOT):
        require_writable(path)
    compiler = _compile_backend(target)
    config = ModelConfig()
    op_backend = _operator_backend(config, target)
    text = _standard_library()
    training, validation = text[: -len(text) // 10], text[-len(text) // 10 :]
    print(f"device: {traits_of(target)}; torch {torch.__version__}; torch.compile backend: {compiler}")
    print(f"operator backend: {op_backend}")
    print(f"text: {len(text):,} bytes of the standard library's source; model: {_count(config):,} parameters")

    compiled, model = _train("compiled", training, config, target, steps, seed, _compile_options(target, compiler))
    graphs, graph_breaks = _count_graphs()
    eager, _ = _train("eager", training, config, target, steps, seed, None)

    report = {
        "header": header(target),
        "operator_backend": op_backend,
        "compile_backend": compiler,
        "fullgraph": True,
        "graphs": graphs,
        "graph_breaks": graph_breaks,
        "recompiles": graphs - 1,
        "sequence_lengths": sorted({_length(step, steps) for step in range(steps)}),
        "steps": steps,
        "config": asdict(config),
        "validation_loss": _validate(model, validation, target),
        "largest_loss_difference": max(abs(a - b) for a, b in zip(compiled.losses, eager.losses, strict=True)),
        "runs": {run.name: {**asdict(run), "final_loss": run.final_loss} for run in (compiled, eager)},
        "over_dense_attention": _speed_over_dense_attention() if target.type == "cuda" else None,
        "sample": _sample(model, b"import os\n\nclass ", 200, target, seed),
    }
    _print_report(report)
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    _plot(compiled, eager, out / PLOT)
    print(f"wrote {out / REPORT} and {out / PLOT}")
    return 0


# Training


def _train(
    name: str,
    text: Tensor,
    config: ModelConfig,
    device: torch.device,
    steps: int,
    seed: int,
    compile_options: dict[str, str] | None,
) -> tuple[Run, LanguageModel]:
    from tqdm import tqdm

    torch.manual_seed(seed)
    model = LanguageModel(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    losses = model.losses
    if compile_options is not None:
        losses = torch.compile(model.losses, fullgraph=True, **compile_options)  # type: ignore[call-overload]
    run = Run(name)
    tokens, started, rate_from = 0, time.perf_counter(), 0.0
    label = f"{name:8}" if compile_options is None else f"{name:8} (the first step compiles)"
    with tqdm(_batches(text, steps, seed), total=steps, desc=label, unit="step", dynamic_ncols=True) as progress:
        for batch in progress:
            batch = batch.to(device)
            if compile_options is not None:
                torch._dynamo.maybe_mark_dynamic(batch, 1)
            loss, index_loss = losses(batch)
            (loss + index_loss).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            run.index_losses.append(index_loss.item())
            if len(run.losses) == 1:  # compilation is no part of the rate
                rate_from = time.perf_counter()
                run.first_step_seconds = rate_from - started
                progress.set_description(f"{name:8}")
                continue
            tokens += batch.shape[0] * (batch.shape[1] - 1)
            run.tokens_per_second = tokens / (time.perf_counter() - rate_from)
            progress.set_postfix_str(f"loss {run.losses[-1]:.3f}, {run.tokens_per_second:,.0f} tokens/s", refresh=False)
    return run, model


def _length(step: int, steps: int) -> int:
    """Return the sequence length of a step: the shorter one in the first half."""
    return SEQUENCE_LENGTHS[0] if step < (steps + 1) // 2 else SEQUENCE_LENGTHS[1]


def _batches(text: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `[BATCH, length + 1]` windows."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        length = _length(step, steps)
        starts = torch.randint(0, len(text) - length - 1, (BATCH,), generator=generator).tolist()
        yield torch.stack([text[start : start + length + 1] for start in starts]).long()


def _validate(model: LanguageModel, text: Tensor, device: torch.device) -> float:
    length = SEQUENCE_LENGTHS[1]
    stride = (len(text) - length - 1) // 32
    windows = torch.stack([text[i * stride : i * stride + length + 1] for i in range(32)]).long()
    with torch.no_grad():
        losses = [model.losses(batch.to(device))[0].item() for batch in windows.split(BATCH)]
    return sum(losses) / len(losses)


def _sample(model: LanguageModel, prompt: bytes, count: int, device: torch.device, seed: int) -> str:
    """Continue `prompt` by `count` bytes at temperature 0.8, over a sliding window padded in front to full length."""
    generator = torch.Generator().manual_seed(seed)
    length = SEQUENCE_LENGTHS[0]
    tokens = list(b"\n" * (length - len(prompt)) + prompt)
    with torch.no_grad():
        for _ in range(count):
            logits, _ = model(torch.tensor([tokens[-length:]], device=device))
            weights = (logits[0, -1].float().cpu() / 0.8).softmax(dim=-1)
            tokens.append(int(torch.multinomial(weights, 1, generator=generator)))
    return bytes(tokens[length - len(prompt) :]).decode("utf-8", errors="replace")


def _speed_over_dense_attention() -> dict[str, Any]:
    """Time attention alone at training size: the operator against all keys under a mask, forward + backward."""
    import triton.testing

    shape = SHAPES["NAM28"]
    q, kv, indices, dout = shape.draw()
    leaves = [q.requires_grad_(), kv.requires_grad_()]

    def step(attention: Attention) -> None:
        torch.autograd.grad(attention(q, kv, indices, shape.d_v), leaves, dout)

    ms = [triton.testing.do_bench(partial(step, attention), return_mode="median") for attention in (ours, masked_sdpa)]
    return {"shape": asdict(shape), "dtype": "bfloat16", "speed_up": ms[1] / ms[0]}


# What the machine offers


def _compile_options(device: torch.device, compiler: str) -> dict[str, str]:
    """On CUDA the compiled step is recorded as CUDA graphs, once for each sequence length."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": compiler}


def _count_graphs() -> tuple[int, int]:
    """Return how many graphs were compiled so far, and how many graph breaks there were."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _operator_backend(config: ModelConfig, device: torch.device) -> str:
    problem = SparseAttnProblem(
        d_total=config.kv_lora_rank + config.qk_rope_head_dim,
        d_v=config.kv_lora_rank,
        topk=config.topk,
        heads=config.heads,
        kv_group=1,
        dtype=torch.float32,
        needs_grad=True,
    )
    return select(problem, traits_of(device)).require_backend().name


def _compile_backend(device: torch.device) -> str:
    if device.type == "cpu" and cxx_compiler() is None:
        print("no C++ compiler found (CXX, or g++): Inductor cannot run, using backend='aot_eager' instead")
        return "aot_eager"
    return "inductor"


def _standard_library() -> Tensor:
    """Return the top-level modules of the running interpreter's standard library, in name order, as bytes."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)


def _count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(config).parameters())


# Reporting


def _plot(compiled: Run, eager: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(compiled.losses, label=f"torch.compile, fullgraph ({compiled.final_loss:.2f})", color="tab:blue", lw=3)
    axes.plot(eager.losses, label=f"eager ({eager.final_loss:.2f})", color="tab:orange", lw=1)
    axes.axvline((len(eager.losses) + 1) // 2, color="grey", ls=":", lw=1)
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="Sparse MLA (d_total 128, d_v 64) on Python source")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _print_report(report: dict[str, Any]) -> None:
    compiled, eager = report["runs"]["compiled"], report["runs"]["eager"]
    lengths = " and ".join(map(str, report["sequence_lengths"]))
    plural = "s" if len(report["sequence_lengths"]) > 1 else ""
    print(f"\n{'':10}{'first loss':>12}{'final loss':>12}{'tokens/s':>12}{'first step':>12}")
    for name, run in (("compiled", compiled), ("eager", eager)):
        rate = "-" if run["tokens_per_second"] is None else f"{run['tokens_per_second']:,.0f}"
        print(
            f"{name:10}{run['losses'][0]:12.3f}{run['final_loss']:12.3f}{rate:>12}{run['first_step_seconds']:10.1f} s"
        )
    print(f"largest difference between the two loss curves: {report['largest_loss_difference']:.1e}")
    print(f"validation loss of the compiled run: {report['validation_loss']:.3f} nats per byte")
    print(
        f"graphs: {report['graphs']}, graph breaks: {report['graph_breaks']}, recompiles over sequence length{plural} "
        f"{lengths}: {report['recompiles']}"
    )
    if report["over_dense_attention"] is not None:
        dense = report["over_dense_attention"]
        sizes = ", ".join(f"{name}={size}" for name, size in dense["shape"].items())
        print(f"attention alone, forward + backward: {dense['speed_up']:.1f}x dense attention under a mask ({sizes})")
    print(f"sampled text:\n{'-' * 72}\n{_visible(report['sample'])}\n{'-' * 72}")


def _visible(text: str) -> str:
    """Return `text` with all that a terminal would obey, other than a new line, written as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)

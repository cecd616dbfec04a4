"""A training step of the demo's model at NAM28 widths: this package against plain torch and other sparse attention.

    python benchmarks/training_step.py        writes results/<date>-<device>-training-step.json
    python benchmarks/training_step.py --long writes results/<date>-<device>-training-step-long.json

Forward, backward and AdamW of 8 layers (28 heads, d_total 128, d_v 64, 4096 tokens, topk 256, bf16 autocast), every
layer compiled, the whole step one CUDA graph; `--long` has 4 layers and 16,384 or 32,768 tokens. All variants start
from the same weights and see the same text; they differ in what stands in the place of the operators:

    mla_ops          the operators
    torch_selection  scores, selection and the indexer's loss in plain torch, attention by the operator
    rest             next to no attention: what a step takes besides it, the selection of the keys above all
    flex             flex_attention with a block mask made from the indices
    dense            all logits, those of keys that are not selected masked

Correctness comes first: no variant is timed whose losses leave those of the operators. A variant that does not fit the
device is recorded as that. Without a GPU everything but flex, which has no backward there, runs at toy sizes and
uncompiled, to test this file, and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_ops.adapters.torch_layer import attention
from mla_ops.bench.provenance import write
from mla_ops.cli import model
from mla_ops.cli.model import IndexedMLA, LanguageModel, ModelConfig, Selection

CONFIG = ModelConfig(
    hidden_size=1792,
    num_layers=8,
    heads=28,
    qk_nope_head_dim=64,
    v_head_dim=64,
    topk=256,
    index_heads=4,
    index_head_dim=64,
    index_rope_head_dim=32,
)
TOY_CONFIG = ModelConfig(topk=16)
LEARNING_RATE = 1e-4
WARM_UP = 3  # steps before the graph


@dataclass(frozen=True)
class Size:
    """What one step trains on, and how often it runs."""

    batch: int
    sequence: int
    num_layers: int
    steps: int = 8  # whose losses are compared; the first ones come before the graph
    repetitions: int = 20


SIZES = [Size(batch, 4096, 8) for batch in (1, 4)]
LONG_SIZES = [Size(1, sequence, 4, steps=4, repetitions=5) for sequence in (16384, 32768)]
TOY_SIZE = Size(2, 128, TOY_CONFIG.num_layers)
# Two bf16 formulations of one model drift apart: where scores are near a tie, the indexers select other keys. The plain
# one rounds its scores to bf16 as well.
LOSS_TOLERANCE = 0.01

Formulation = Callable[..., tuple[Tensor, Tensor]]


def selected(indices: Tensor, seq_kv: int) -> Tensor:
    """Return the indices `[B, Sq, 1, topk]` as a mask `[B, Sq, Skv]`; -1 goes to a column that is cut off."""
    slots = indices.squeeze(2).long()
    mask = torch.zeros(*slots.shape[:2], seq_kv + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter(2, torch.where(slots < 0, seq_kv, slots), True)[..., :-1]


def flex(q: Tensor, kv: Tensor, indices: Tensor, *, d_v: int, softmax_scale: float, backend: str) -> Any:
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    mask = selected(indices, kv.shape[1])
    block_mask = create_block_mask(
        lambda b, h, i, j: mask[b, i, j], q.shape[0], None, q.shape[1], kv.shape[1], device=q.device
    )
    q, kv = cast_as_autocast(q), cast_as_autocast(kv)
    k = kv.transpose(1, 2)
    out, aux = flex_attention(
        q.transpose(1, 2),
        k,
        k[..., :d_v],
        block_mask=block_mask,
        scale=softmax_scale,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


def dense(q: Tensor, kv: Tensor, indices: Tensor, *, d_v: int, softmax_scale: float, backend: str) -> Any:
    q, k = cast_as_autocast(q), cast_as_autocast(kv).squeeze(2)
    logits = torch.einsum("bshd,btd->bhst", q, k).float() * softmax_scale
    logits = logits.masked_fill(~selected(indices, kv.shape[1]).unsqueeze(1), -torch.inf)
    out = torch.einsum("bhst,btd->bshd", logits.softmax(-1).to(q.dtype), k[..., :d_v])
    return out, logits.logsumexp(-1).transpose(1, 2)


def rest(q: Tensor, kv: Tensor, indices: Tensor, *, d_v: int, softmax_scale: float, backend: str) -> Any:
    # As if every logit were that of the query's own row, so that the indexer's target stays finite.
    own = softmax_scale * (q * kv).float().sum(-1)
    return q[..., :d_v] + kv[..., :d_v], own + math.log(indices.shape[-1])


def cast_as_autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


class TorchSelection(IndexedMLA):
    """The model's attention with scores, selection and loss in plain torch, as it was before there were operators."""

    def forward(self, x: Tensor, shared: Selection | None = None) -> tuple[Tensor, None, Tensor]:
        """Return what the model's own layer does; it shares nothing."""
        q, kv = self.mla.project(x)
        q_idx, k_idx, weights = self.indexer.project(x)
        match = torch.einsum("bshd,btd->bsht", q_idx, k_idx.squeeze(2)).relu()
        score = torch.einsum("bsht,bsh->bst", match, weights)  # [B, S, S]
        position = torch.arange(x.shape[1], device=x.device)
        score = score.masked_fill(position[None, :] > position[:, None], -torch.inf)
        best, indices = score.topk(self.indexer.topk, dim=-1)
        indices = indices.masked_fill(best == -torch.inf, -1).to(torch.int32)
        out, lse = self.mla.attend(q, kv, indices)
        return out, None, self.index_loss(q, kv, indices.long(), lse, best.log_softmax(dim=-1))

    def index_loss(self, q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, index_logprob: Tensor) -> Tensor:
        """Return the KL divergence on the selected keys, clamped as it was."""
        q, kv, lse = q.detach(), kv.detach().squeeze(2), lse.detach()
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        rows = kv[batch, indices.clamp_min(0)]  # [B, S, K, 128]
        logits = self.mla.meta.softmax_scale * torch.einsum("bshd,bskd->bshk", q, rows)
        unused = (indices < 0).unsqueeze(2)
        target = torch.exp(logits - lse.unsqueeze(-1)).masked_fill(unused, 0.0).mean(dim=2)
        divergence = target * (target.clamp_min(1e-9).log() - index_logprob.masked_fill(indices < 0, 0.0))
        return divergence.sum(dim=-1).mean()


@dataclass(frozen=True)
class Variant:
    """What stands in the place of the operator, and of the model's layer around it."""

    attention: Formulation = attention.sparse_attn
    layer: type[IndexedMLA] = IndexedMLA


VARIANTS = {
    "mla_ops": Variant(),
    "torch_selection": Variant(layer=TorchSelection),
    "rest": Variant(attention=rest),
    "flex": Variant(attention=flex),
    "dense": Variant(attention=dense),
}
LONG_VARIANTS = ["mla_ops", "torch_selection"]


@contextmanager
def formulation(name: str) -> Iterator[None]:
    """Let the model be made of the layers of that variant, and those call what it has for the operator."""
    torch.compiler.reset()
    attention.sparse_attn, model.IndexedMLA = VARIANTS[name].attention, VARIANTS[name].layer
    try:
        yield
    finally:
        attention.sparse_attn, model.IndexedMLA = VARIANTS["mla_ops"].attention, VARIANTS["mla_ops"].layer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Training:
    """A model, its optimizer, and one step over the batch in `tokens` `[B, S + 1]`."""

    def __init__(self, size: Size, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        config = replace(CONFIG if on_gpu else TOY_CONFIG, num_layers=size.num_layers)
        torch.manual_seed(0)
        self.device = device
        self.model = LanguageModel(config).to(device)
        for layer in self.model.layers if on_gpu else ():
            layer.compile(fullgraph=True, dynamic=False)  # one graph for all of them: they are the same code
        options = {"fused": True, "capturable": True} if on_gpu else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, **options)
        self.tokens = torch.empty(size.batch, size.sequence + 1, dtype=torch.long, device=device)
        self.text = standard_library()
        self.generator = torch.Generator().manual_seed(0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss, self.index_loss = torch.empty(()), torch.empty(())

    def next_batch(self) -> None:
        """Draw other windows of the text."""
        batch, width = self.tokens.shape
        starts = torch.randint(0, len(self.text) - width, (batch,), generator=self.generator).tolist()
        self.tokens.copy_(torch.stack([self.text[start : start + width] for start in starts]))

    def step(self) -> None:
        """Forward, backward and update: the calls, or the graph of them once there is one."""
        if self.graph is not None:
            self.graph.replay()
            return
        self.optimizer.zero_grad(set_to_none=True)
        # A cast kept from one step to the next would be frozen into the graph.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss, index_loss = self.model.losses(self.tokens)
        (loss + index_loss).backward()
        self.optimizer.step()
        self.loss, self.index_loss = loss.detach(), index_loss.detach()

    def record(self) -> None:
        """Record the step as a CUDA graph; it doesn't run here."""
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.graph = graph

    def losses(self, steps: int) -> tuple[list[float], list[float]]:
        """Run so many steps, recorded after the first WARM_UP on a GPU, and return their losses and the indexers'."""
        losses, index_losses = [], []
        for step in range(steps):
            if step == WARM_UP and self.device.type == "cuda":
                self.record()
            self.next_batch()
            self.step()
            losses.append(round(float(self.loss), 5))
            index_losses.append(round(float(self.index_loss), 5))
        return losses, index_losses


def standard_library() -> Tensor:
    """Return the top-level modules of the running interpreter's standard library, as bytes."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)


def measure(name: str, size: Size, device: torch.device, expected: list[float] | None) -> dict[str, Any]:
    """Train with one variant, compare its losses with `expected`, then time its steps."""
    record: dict[str, Any] = {"variant": name, **asdict(size)}
    started = time.perf_counter()
    with formulation(name):
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            training = Training(size, device)
            record["losses"], record["index_losses"] = training.losses(size.steps)
            if name != "rest":
                pairs = zip(record["losses"], expected or record["losses"], strict=True)
                record["loss_difference"] = round(max(abs(a - b) / b for a, b in pairs), 5)
                if not record["loss_difference"] < LOSS_TOLERANCE:  # also when it is NaN
                    raise AssertionError(f"{name}: losses {record['losses']}, expected {expected}")
            if device.type == "cuda":
                record["peak_bytes"] = torch.cuda.max_memory_allocated()
                record["ms"] = round(step_milliseconds(training, size.repetitions), 3)
                record["tokens_per_s"] = round(1e3 * training.tokens[:, 1:].numel() / record["ms"])
        except torch.OutOfMemoryError as error:
            record["error"] = f"out of memory: {str(error).partition('. ')[0]}"
    record["seconds"] = round(time.perf_counter() - started, 1)  # of all this, compilation included
    return record


def step_milliseconds(training: Training, repetitions: int) -> float:
    """Return the median time of a step on the device."""
    times = []
    for _ in range(repetitions):
        training.next_batch()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        training.step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", action="store_true", help="long sequences, mla_ops and torch_selection")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all of them")
    parser.add_argument("--batches", nargs="+", type=int, help="only the sizes of these batches")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--commit", help="what to record as the commit, where history is not at hand")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    variants = arguments.variants or (LONG_VARIANTS if arguments.long else list(VARIANTS))
    sizes = LONG_SIZES if arguments.long else SIZES
    if not on_gpu:
        variants, sizes = [name for name in variants if name != "flex"], [TOY_SIZE]
    records: list[dict[str, Any]] = []
    for size in sizes:
        if arguments.batches and size.batch not in arguments.batches:
            continue
        expected, base_ms = None, None
        for name in variants:
            record = measure(name, size, device, expected)
            if name == "mla_ops":
                expected, base_ms = record.get("losses"), record.get("ms")
            elif "ms" in record and base_ms is not None and name != "rest":
                record["mla_ops_speed_up"] = round(record["ms"] / base_ms, 2)
            print(record, flush=True)
            records.append(record)
            if on_gpu:  # after each, so that a run that is cut off leaves what it measured
                name = "training-step-long" if arguments.long else "training-step"
                path = write(arguments.out, name, device, records, arguments.commit, config=asdict(CONFIG))
                print(f"wrote {path}")


if __name__ == "__main__":
    main()

"""A training step of the demo's model at NAM28 widths: this package against other ways to attend to selected keys.

    python benchmarks/training_step.py        writes results/<date>-<device>-training-step.json

Forward, backward and AdamW of 8 layers (28 heads, d_total 128, d_v 64, 4096 tokens, topk 256, bf16 autocast), every
layer compiled, the whole step one CUDA graph. All variants start from the same weights, see the same text and run the
same indexers; they differ in what stands in the place of the operator:

    mla_ops   the operator, inlined by the lowering
    flex      flex_attention with a block mask made from the indices
    dense     all logits, those of keys that are not selected masked
    rest      next to nothing: what a step takes besides attention, the selection of the keys above all

Correctness comes first: no attention is timed whose losses leave those of the operator. A variant that does not fit the
device is recorded as that. Without a GPU everything but flex, which has no backward there, runs at toy sizes and
uncompiled, to test this file, and nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_ops.adapters import torch_layer
from mla_ops.bench.provenance import write
from mla_ops.cli.model import LanguageModel, ModelConfig

BATCHES = (1, 4)
SEQUENCE = 4096
CONFIG = ModelConfig(
    hidden_size=1792,
    num_layers=8,
    heads=28,
    qk_nope_head_dim=64,
    v_head_dim=64,
    topk=256,
    index_heads=4,
    index_head_dim=64,
)
TOY_SEQUENCE, TOY_CONFIG = 128, ModelConfig(topk=16)
LEARNING_RATE = 1e-4
STEPS = 8  # whose losses are compared; the first ones come before the graph
WARM_UP = 3
REPETITIONS = 20
# Two bf16 formulations of one model drift apart: where scores are near a tie, the indexers select other keys.
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
    return q[..., :d_v] + kv[..., :d_v], (q * kv).float().sum(-1)


def cast_as_autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor


VARIANTS: dict[str, Formulation] = {"mla_ops": torch_layer.sparse_attn, "flex": flex, "dense": dense, "rest": rest}


@contextmanager
def formulation(name: str) -> Iterator[None]:
    """Let the model's layers call the formulation of that name where they call the operator."""
    torch.compiler.reset()
    torch_layer.sparse_attn = VARIANTS[name]
    try:
        yield
    finally:
        torch_layer.sparse_attn = VARIANTS["mla_ops"]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Training:
    """A model, its optimizer, and one step over the batch in `tokens` `[B, S + 1]`."""

    def __init__(self, batch: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        config, length = (CONFIG, SEQUENCE) if on_gpu else (TOY_CONFIG, TOY_SEQUENCE)
        torch.manual_seed(0)
        self.device = device
        self.model = LanguageModel(config).to(device)
        for layer in self.model.layers if on_gpu else ():
            layer.compile(fullgraph=True, dynamic=False)  # one graph for all of them: they are the same code
        options = {"fused": True, "capturable": True} if on_gpu else {}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, **options)
        self.tokens = torch.empty(batch, length + 1, dtype=torch.long, device=device)
        self.text = standard_library()
        self.generator = torch.Generator().manual_seed(0)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.loss = torch.empty(())

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
        self.loss = loss.detach()

    def record(self) -> None:
        """Record the step as a CUDA graph; it doesn't run here."""
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.graph = graph

    def losses(self) -> list[float]:
        """Run STEPS steps, recorded after the first WARM_UP on a GPU, and return their losses."""
        losses = []
        for step in range(STEPS):
            if step == WARM_UP and self.device.type == "cuda":
                self.record()
            self.next_batch()
            self.step()
            losses.append(round(float(self.loss), 5))
        return losses


def standard_library() -> Tensor:
    """Return the top-level modules of the running interpreter's standard library, as bytes."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)


def measure(name: str, batch: int, device: torch.device, expected: list[float] | None) -> dict[str, Any]:
    """Train with one formulation, compare its losses with `expected`, then time its steps."""
    record: dict[str, Any] = {"attention": name, "batch": batch}
    with formulation(name):
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            training = Training(batch, device)
            record["losses"] = training.losses()
            if name != "rest":
                pairs = zip(record["losses"], expected or record["losses"], strict=True)
                record["loss_difference"] = round(max(abs(a - b) / b for a, b in pairs), 5)
                if not record["loss_difference"] < LOSS_TOLERANCE:  # also when it is NaN
                    raise AssertionError(f"{name}: losses {record['losses']}, expected {expected}")
            if device.type == "cuda":
                record["peak_bytes"] = torch.cuda.max_memory_allocated()
                record["ms"] = round(step_milliseconds(training), 3)
                record["tokens_per_s"] = round(1e3 * training.tokens[:, 1:].numel() / record["ms"])
        except torch.OutOfMemoryError as error:
            record["error"] = f"out of memory: {str(error).partition('. ')[0]}"
    return record


def step_milliseconds(training: Training) -> float:
    """Return the median time of a step on the device."""
    times = []
    for _ in range(REPETITIONS):
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--commit", help="what to record as the commit, where history is not at hand")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    records: list[dict[str, Any]] = []
    sizes = {"config": asdict(CONFIG), "sequence": SEQUENCE}
    for batch in BATCHES if on_gpu else (2,):
        expected, base_ms = None, None
        for name in VARIANTS if on_gpu else ("mla_ops", "dense", "rest"):
            record = measure(name, batch, device, expected)
            if name == "mla_ops":
                expected, base_ms = record.get("losses"), record.get("ms")
            elif "ms" in record and base_ms is not None and name != "rest":
                record["mla_ops_speed_up"] = round(record["ms"] / base_ms, 2)
            print(record, flush=True)
            records.append(record)
            if on_gpu:  # after each, so that a run that is cut off leaves what it measured
                path = write(arguments.out, "training-step", device, records, arguments.commit, **sizes)
                print(f"wrote {path}")


if __name__ == "__main__":
    main()

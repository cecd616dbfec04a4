"""Turn dense attention sparse: train a small model, warm its indexers up, then let it attend to what they select.

    python examples/train_indexer.py [--steps 100] [--device cuda]     45 seconds of one CPU core

The recipe of DeepSeek-V3.2 in small, on the source of Python's standard library:

1. a byte-level language model learns with dense attention; its indexers stand by,
2. warm-up: everything but the indexers is frozen, and they learn where dense attention goes (`Indexer.dense_loss`),
3. sparse: attention reads the 16 selected bytes of up to 128; the model learns from the next byte alone, the indexers
   from the attention on what they selected (`Indexer.loss`).

One switch, `is_dense`, is all that differs in the model. After each stage a line shows the losses on unseen text, and
the share of dense attention that falls on the selected bytes beside what the best and a random choice would get.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ops import attn_mass
from mla_ops.adapters.seam import resolve_layer_meta
from mla_ops.adapters.torch_layer import Indexer, MLASparseAttention

SEQUENCE, BATCH, TOPK, HIDDEN, LAYERS = 128, 8, 16, 96, 2
META = resolve_layer_meta(
    {"heads": 4, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}, form="absorbed"
)


class Attention(nn.Module):
    """Attention over all past bytes or over those that an indexer selects."""

    def __init__(self) -> None:
        super().__init__()
        self.mla = MLASparseAttention(HIDDEN, META)
        self.indexer = Indexer(HIDDEN, topk=TOPK, index_heads=4, index_head_dim=32, qk_rope_head_dim=16)

    def forward(self, x: Tensor, is_dense: bool) -> tuple[Tensor, Tensor]:
        """Map `[batch, rows, hidden]` to the same, and return the indexer's loss: its mean over all queries."""
        q, kv = self.mla.project(x)
        index = self.indexer.project(x)  # queries, keys and head weights
        if is_dense:
            out, lse = self.mla.attend(q, kv, all_past(x))
            mean = torch.full(x.shape[:2], 1 / x[..., 0].numel(), device=x.device)
            return out, self.indexer.dense_loss(q, kv, lse, *index, mean, softmax_scale=META.softmax_scale)
        indices = self.indexer.select(*index)
        out, lse = self.mla.attend(q, kv, indices)
        return out, self.indexer.loss(q, kv, indices, lse, *index, softmax_scale=META.softmax_scale).mean()

    def recall(self, x: Tensor) -> Tensor:
        """Return the share of dense attention on the selected, the best and random keys, `[3]`.

        Queries with no more keys than slots are left out: they select everything.
        """
        q, kv = self.mla.project(x)
        everything = all_past(x)
        _, lse = self.mla.attend(q, kv, everything)

        def share(indices: Tensor) -> Tensor:
            mass = attn_mass(q, kv, indices, lse, softmax_scale=META.softmax_scale)
            return mass[:, TOPK:] / META.heads  # [batch, rows, 1, slots]

        best = share(everything.unsqueeze(2)).topk(TOPK, dim=-1).values
        at_random = 1 / torch.arange(TOPK + 1, x.shape[1] + 1, device=x.device) * TOPK
        selected = share(self.indexer(x))
        return torch.stack([selected.sum(-1).mean(), best.sum(-1).mean(), at_random.mean()])


class Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norms = Attention(), nn.ModuleList(nn.RMSNorm(HIDDEN) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor, is_dense: bool) -> tuple[Tensor, Tensor]:
        """Return the new residual stream and the indexer's loss."""
        attended, index_loss = self.attention(self.norms[0](x), is_dense)
        x = x + attended
        return x + self.mlp(self.norms[1](x)), index_loss


class Model(nn.Module):
    """Bytes in, next-byte logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layers = nn.Embedding(256, HIDDEN), nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def losses(self, tokens: Tensor, is_dense: bool) -> tuple[Tensor, Tensor]:
        """Return the mean next-byte loss and the sum of the indexers' losses on `tokens` `[batch, rows + 1]`."""
        x, index_loss = self.embedding(tokens[:, :-1]), torch.zeros((), device=tokens.device)
        for layer in self.layers:
            x, loss = layer(x, is_dense)
            index_loss = index_loss + loss
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten()), index_loss

    def recall(self, tokens: Tensor) -> Tensor:
        """Return the layers' mean share of dense attention on the selected, the best and random keys, `[3]`."""
        x, shares = self.embedding(tokens[:, :-1]), []
        for layer in self.layers:
            shares.append(layer.attention.recall(layer.norms[0](x)))
            x, _ = layer(x, is_dense=True)
        return torch.stack(shares).mean(0)


def all_past(x: Tensor) -> Tensor:
    """Return the list of all past rows and a row itself, `[batch, rows, rows]`: dense attention, in small."""
    rows = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    return rows.where(rows <= rows[:, None], -1).expand(x.shape[0], -1, -1)


def windows(text: Tensor, seed: int, device: torch.device) -> Callable[[], Tensor]:
    """Return what draws a batch of windows `[batch, rows + 1]`."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        starts = torch.randint(0, len(text) - SEQUENCE - 1, (BATCH,), generator=generator).tolist()
        return torch.stack([text[start : start + SEQUENCE + 1] for start in starts]).long().to(device)

    return draw


def main() -> None:
    """Run the three stages and print a line after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each stage")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    draw, draw_unseen = windows(text[: -len(text) // 10], 0, device), windows(text[-len(text) // 10 :], 1, device)
    unseen = [draw_unseen() for _ in range(4)]
    model = Model().to(device)
    indexers = [parameter for name, parameter in model.named_parameters() if "indexer" in name]
    others = [parameter for name, parameter in model.named_parameters() if "indexer" not in name]

    print(f"{'stage':10}{'next byte, dense':>18}{'sparse':>8}{'indexer':>9}{'recall':>9}  (best choice, random choice)")
    for stage, is_dense, learners in (
        ("dense", True, others),
        ("warm-up", True, indexers),
        ("sparse", False, others + indexers),
    ):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in learners:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(learners, lr=3e-3)
        for _ in range(options.steps):
            # Either loss reaches its own parameters only: the indexer's input is detached, and so is its target.
            sum(model.losses(draw(), is_dense)).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            dense, sparse = (
                torch.stack([torch.stack(model.losses(tokens, is_dense)) for tokens in unseen]).mean(0).tolist()
                for is_dense in (True, False)
            )
            recall, best, at_random = torch.stack([model.recall(tokens) for tokens in unseen]).mean(0).tolist()
        print(
            f"{stage:10}{dense[0]:18.3f}{sparse[0]:8.3f}{(dense if is_dense else sparse)[1]:9.3f}{recall:9.1%}"
            f"  ({best:.1%}, {at_random:.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()

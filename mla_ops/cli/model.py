"""A small decoder-only language model around the operators: absorbed MLA over keys that a learned indexer selects.

Read it top to bottom: in `IndexedMLA` an indexer picks `topk` past tokens per query, attention reads them, and the
indexer learns from where the attention went; `LanguageModel` stacks layers, of which some may share a selection. Sizes
in comments: B batch, S sequence, H heads, K topk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mla_ops.adapters.seam import resolve_layer_meta
from mla_ops.adapters.torch_layer import Indexer, IndexSharing, MLASparseAttention
from mla_ops.api import attn_mass, index_kl


@dataclass(frozen=True)
class ModelConfig:
    """Widths of the NAM56R family in small: latent rank 64 + rope 64, so d_total 128 and d_v 64."""

    vocab_size: int = 256  # bytes
    hidden_size: int = 128
    num_layers: int = 2
    heads: int = 4
    kv_lora_rank: int = 64  # d_v
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    topk: int = 32
    index_heads: int = 2
    index_head_dim: int = 32
    index_rope_head_dim: int = 16
    index_every: int = 1  # of so many layers the first one selects, and the others attend to its selection


class Selection(NamedTuple):
    """What an indexer selected, on its way through the layers that attend to it."""

    indices: Tensor  # [B, S, 1, K], int32, -1 where no past token is left
    scores: Tensor  # [B, S, 1, K], the indexer's, through which it learns
    mass: Tensor | float = 0.0  # [B, S, 1, K], attention on these tokens, summed over heads and the layers so far


class IndexedMLA(nn.Module):
    """Multi-head latent attention over the tokens that a learned indexer selects."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.mla = MLASparseAttention(config.hidden_size, resolve_layer_meta(config, form="absorbed"))
        sharing = IndexSharing.periodic(config.num_layers, every=config.index_every)
        self.indexer = None
        if sharing.is_owner(layer):
            self.indexer = Indexer(
                config.hidden_size,
                topk=config.topk,
                index_heads=config.index_heads,
                index_head_dim=config.index_head_dim,
                qk_rope_head_dim=config.index_rope_head_dim,
            )
        self.is_last = layer == sharing.served_by(sharing.owner_of(layer))[-1]

    def forward(self, x: Tensor, shared: Selection | None = None) -> tuple[Tensor, Selection | None, Tensor]:
        """Return the attention output `[B, S, hidden]`, what the next layer shares, and the indexer's loss."""
        q, kv = self.mla.project(x)  # [B, S, H, 128], [B, S, 1, 128]
        selection = shared if self.indexer is None else self.select(self.indexer, x)
        assert selection is not None, "a layer without an indexer attends to what an earlier one selected"
        indices, scores, mass = selection
        out, lse = self.mla.attend(q, kv, indices)
        mass = mass + attn_mass(q, kv, indices, lse, softmax_scale=self.mla.meta.softmax_scale)
        if self.is_last:
            # KL divergence from the scores to the mean attention of all layers that attended to this selection.
            return out, None, index_kl(mass, scores).mean()
        return out, Selection(indices, scores, mass), x.new_zeros(())

    def select(self, indexer: Indexer, x: Tensor) -> Selection:
        """Select tokens, and score the selected ones once more: that has a gradient."""
        rows = indexer.project(x)
        indices = indexer.select(*rows)
        return Selection(indices, indexer.scores(*rows, indices))


class Layer(nn.Module):
    """Pre-norm transformer layer: sparse attention, then a gated feed-forward block."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        h = config.hidden_size
        self.attn_norm, self.ffn_norm = nn.RMSNorm(h), nn.RMSNorm(h)
        self.attn = IndexedMLA(config, layer)
        self.gate, self.up, self.down = (nn.Linear(h, 3 * h), nn.Linear(h, 3 * h), nn.Linear(3 * h, h))

    def forward(self, x: Tensor, shared: Selection | None = None) -> tuple[Tensor, Selection | None, Tensor]:
        """Return the new residual stream, what the next layer shares, and the indexer's loss."""
        attended, shared, index_loss = self.attn(self.attn_norm(x), shared)
        return self.feed_forward(x + attended), shared, index_loss

    def feed_forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the feed-forward block."""
        y = self.ffn_norm(x)
        stream: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return stream


class LanguageModel(nn.Module):
    """Bytes in, next-byte logits out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, S, vocab]` of the next byte and the sum of the indexers' losses."""
        x = self.embedding(tokens)
        index_loss, shared = x.new_zeros(()), None
        for layer in self.layers:
            x, shared, layer_index_loss = layer(x, shared)
            index_loss = index_loss + layer_index_loss
        return self.head(self.norm(x)), index_loss

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean next-byte loss in nats, sum of the indexers' losses) on `tokens` `[B, S + 1]`."""
        logits, index_loss = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), index_loss

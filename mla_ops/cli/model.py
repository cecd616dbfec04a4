"""A small decoder-only language model around the operator: absorbed MLA over keys that a learned indexer selects.

Read it top to bottom: `Indexer` picks `topk` past tokens per query, `IndexedMLA` attends to them through the package's
plain PyTorch layer, `LanguageModel` stacks layers. Sizes in comments: B batch, S sequence, H heads, K topk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla_ops.adapters.seam import resolve_layer_meta
from mla_ops.adapters.torch_layer import MLASparseAttention


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


class Indexer(nn.Module):
    """Scores every past token for every query and keeps the best `topk`, as DeepSeek-V3.2's lightning indexer does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.index_heads * config.index_head_dim, bias=False)
        self.key = nn.Linear(config.hidden_size, config.index_head_dim, bias=False)
        self.head_weight = nn.Linear(config.hidden_size, config.index_heads, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `indices` `[B, S, 1, K]` int32 (-1 where no past token is left) and their log-probabilities."""
        x = x.detach()  # the indexer learns from its own loss only
        query = self.query(x).unflatten(-1, (self.config.index_heads, self.config.index_head_dim))
        match = torch.einsum("bshd,btd->bsht", query, self.key(x)).relu()
        score = torch.einsum("bsht,bsh->bst", match, self.head_weight(x))  # [B, S, S]
        position = torch.arange(x.shape[1], device=x.device)
        score = score.masked_fill(position[None, :] > position[:, None], -torch.inf)  # causal
        # A branch, which costs a compiled graph a guard; min() would make topk a symbol there.
        topk = self.config.topk if x.shape[1] >= self.config.topk else x.shape[1]
        best, indices = score.topk(topk, dim=-1)
        indices = indices.masked_fill(best == -torch.inf, -1)
        return indices.to(torch.int32).unsqueeze(2), best.log_softmax(dim=-1)


class IndexedMLA(nn.Module):
    """Multi-head latent attention over the tokens that a learned indexer selects."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mla = MLASparseAttention(config.hidden_size, resolve_layer_meta(config, form="absorbed"))
        self.indexer = Indexer(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention output `[B, S, hidden]` and the indexer's loss."""
        q, kv = self.mla.project(x)  # [B, S, H, 128], [B, S, 1, 128]
        indices, index_logprob = self.indexer(x)
        out, lse = self.mla.attend(q, kv, indices)
        return out, self.index_loss(q, kv, indices, lse, index_logprob)

    def index_loss(self, q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, index_logprob: Tensor) -> Tensor:
        """KL divergence from the indexer's distribution to the attention weights on the selected keys, detached."""
        q, kv, lse = q.detach(), kv.detach().squeeze(2), lse.detach()
        indices = indices.squeeze(2).long()
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        rows = kv[batch, indices.clamp_min(0)]  # [B, S, K, 128]
        logits = self.mla.meta.softmax_scale * torch.einsum("bshd,bskd->bshk", q, rows)
        unused = (indices < 0).unsqueeze(2)
        weights = torch.exp(logits - lse.unsqueeze(-1)).masked_fill(unused, 0.0).mean(dim=2)  # heads agree on one list
        log_weights = weights.clamp_min(1e-9).log()
        divergence = weights * (log_weights - index_logprob.masked_fill(indices < 0, 0.0))
        return divergence.sum(dim=-1).mean()


class Layer(nn.Module):
    """Pre-norm transformer layer: sparse attention, then a gated feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.attn_norm, self.ffn_norm = nn.RMSNorm(h), nn.RMSNorm(h)
        self.attn = IndexedMLA(config)
        self.gate, self.up, self.down = (nn.Linear(h, 3 * h), nn.Linear(h, 3 * h), nn.Linear(3 * h, h))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new residual stream and the indexer's loss."""
        attended, index_loss = self.attn(self.attn_norm(x))
        x = x + attended
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y)), index_loss


class LanguageModel(nn.Module):
    """Bytes in, next-byte logits out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, S, vocab]` of the next byte and the sum of the indexers' losses."""
        x = self.embedding(tokens)
        index_loss = x.new_zeros(())
        for layer in self.layers:
            x, layer_index_loss = layer(x)
            index_loss = index_loss + layer_index_loss
        return self.head(self.norm(x)), index_loss

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean next-byte loss in nats, sum of the indexers' losses) on `tokens` `[B, S + 1]`."""
        logits, index_loss = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), index_loss

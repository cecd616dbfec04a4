"""A small decoder-only language model around the operator: absorbed MLA over keys that a learned indexer selects.

Read it top to bottom: `Indexer` picks `topk` past tokens per query, `SparseMLA` attends to them through
`torch.ops.mla.sparse_attn`, `LanguageModel` stacks layers. Sizes in comments: B batch, S sequence, H heads, K topk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mla_ops  # noqa: F401  (registers torch.ops.mla)


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

    @property
    def softmax_scale(self) -> float:
        """The trained head's scale. `d_total ** -0.5` would be wrong: absorption widens the row, not the head."""
        return float((self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5)


def rotate(x: Tensor) -> Tensor:
    """Apply rotary position embedding to `[B, S, heads, rope]`."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None, None] * frequency  # [S, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
        best, indices = score.topk(self.config.topk, dim=-1)
        indices = indices.masked_fill(best == -torch.inf, -1)
        return indices.to(torch.int32).unsqueeze(2), best.log_softmax(dim=-1)


class SparseMLA(nn.Module):
    """Multi-head latent attention in absorbed form: queries move into the latent space, keys and values stay there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(c.hidden_size, c.heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), bias=False)
        self.kv_proj = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_norm = nn.RMSNorm(c.kv_lora_rank)
        self.k_up = nn.Parameter(torch.randn(c.heads, c.qk_nope_head_dim, c.kv_lora_rank) * c.kv_lora_rank**-0.5)
        self.v_up = nn.Parameter(torch.randn(c.heads, c.kv_lora_rank, c.v_head_dim) * c.kv_lora_rank**-0.5)
        self.out_proj = nn.Linear(c.heads * c.v_head_dim, c.hidden_size, bias=False)
        self.indexer = Indexer(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention output `[B, S, hidden]` and the indexer's loss."""
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_proj(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)

        # Absorption: <q_nope, k_up^T latent> = <k_up q_nope, latent>, so the key never leaves its latent row.
        q = torch.cat([torch.einsum("bshn,hnl->bshl", q_nope, self.k_up), rotate(q_rope)], dim=-1)  # [B, S, H, 128]
        kv = torch.cat([self.kv_norm(latent).unsqueeze(2), rotate(k_rope.unsqueeze(2))], dim=-1)  # [B, S, 1, 128]

        indices, index_logprob = self.indexer(x)
        out, lse = torch.ops.mla.sparse_attn(q, kv, indices, c.kv_lora_rank, c.softmax_scale)
        index_loss = self.index_loss(q, kv, indices, lse, index_logprob)
        out = torch.einsum("bshl,hlv->bshv", out, self.v_up).flatten(2)
        return self.out_proj(out), index_loss

    def index_loss(self, q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, index_logprob: Tensor) -> Tensor:
        """KL divergence from the indexer's distribution to the attention weights on the selected keys, detached."""
        q, kv, lse = q.detach(), kv.detach().squeeze(2), lse.detach()
        indices = indices.squeeze(2).long()
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
        rows = kv[batch, indices.clamp_min(0)]  # [B, S, K, 128]
        logits = self.config.softmax_scale * torch.einsum("bshd,bskd->bshk", q, rows)
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
        self.attn = SparseMLA(config)
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

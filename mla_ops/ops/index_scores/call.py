"""What is asked of `mla::index_scores` and its backward: a call as one value, and what of it decides who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

# What a call is planned for: the operator itself, or its backward.
Side = Literal["forward", "backward"]


class IndexScoresCall(NamedTuple):
    """The arguments of `mla::index_scores` in the order of its schema, up to `relu`; see `mla_ops.index_scores`."""

    q_idx: torch.Tensor  # [batch, seq_q, index_heads, index_head_dim], or without batch, like all tensors
    k_idx: torch.Tensor  # [batch, seq_kv, kv_group, index_head_dim]
    weights: torch.Tensor  # [batch, seq_q, index_heads]
    indices: torch.Tensor  # [batch, seq_q, kv_group, topk]
    topk_length: torch.Tensor | None = None  # [batch, seq_q]
    relu: bool = True


class Wanted(NamedTuple):
    """Which gradients a backward computes."""

    dq: bool = True
    dk: bool = True
    dw: bool = True


@dataclass(frozen=True)
class IndexScoresProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    index_head_dim: int
    index_heads: int  # of all KV groups
    kv_group: int  # KV heads; 1 in MLA
    topk: int  # slots per query and KV group
    dtype: torch.dtype  # of q_idx and k_idx
    needs_grad: bool = False

    @property
    def heads_per_group(self) -> int:
        """Index heads that score the keys of one KV group."""
        return self.index_heads // self.kv_group

    @classmethod
    def of(cls, call: IndexScoresCall, *, needs_grad: bool = False) -> IndexScoresProblem:
        """Read the problem off a checked call."""
        *_, index_heads, index_head_dim = call.q_idx.shape
        kv_group, topk = call.indices.shape[-2:]
        return cls(index_head_dim, index_heads, kv_group, topk, call.q_idx.dtype, needs_grad)

    def __str__(self) -> str:
        return (
            f"index_head_dim={self.index_head_dim} index_heads={self.index_heads} kv_group={self.kv_group} "
            f"topk={self.topk} {str(self.dtype).removeprefix('torch.')} needs_grad={self.needs_grad}"
        )

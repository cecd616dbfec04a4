"""What is asked of `mla::index_topk`: a call as one value, and what of it decides who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class IndexTopkCall(NamedTuple):
    """The arguments of `mla::index_topk` in the order of its schema, up to `relu`; see `mla_ops.index_topk`."""

    q_idx: torch.Tensor  # [batch, seq_q, index_heads, index_head_dim], or without batch, like all tensors
    k_idx: torch.Tensor  # [batch, seq_kv, kv_group, index_head_dim]
    weights: torch.Tensor  # [batch, seq_q, index_heads]
    topk: int
    starts: torch.Tensor | None = None  # [batch, seq_q] or [seq_q]
    ends: torch.Tensor | None = None  # [batch, seq_q] or [seq_q]
    k_scale: torch.Tensor | None = None  # [batch, seq_kv, kv_group], fp32: with e4m3 keys, and only then
    causal: bool = True
    relu: bool = True


@dataclass(frozen=True)
class IndexTopkProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    index_head_dim: int
    index_heads: int  # of all KV groups
    kv_group: int  # KV heads; 1 in MLA
    topk: int
    dtype: torch.dtype  # of q_idx and k_idx

    @property
    def heads_per_group(self) -> int:
        """Index heads that score the keys of one KV group."""
        return self.index_heads // self.kv_group

    @classmethod
    def of(cls, call: IndexTopkCall) -> IndexTopkProblem:
        """Read the problem off a checked call."""
        *_, index_heads, index_head_dim = call.q_idx.shape
        return cls(index_head_dim, index_heads, call.k_idx.shape[-2], call.topk, call.q_idx.dtype)

    def __str__(self) -> str:
        return (
            f"index_head_dim={self.index_head_dim} index_heads={self.index_heads} kv_group={self.kv_group} "
            f"topk={self.topk} {str(self.dtype).removeprefix('torch.')}"
        )

"""What is asked of `mla::attn_mass`: a call as one value, and what of it decides who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class AttnMassCall(NamedTuple):
    """The arguments of `mla::attn_mass` in the order of its schema, up to `topk_length`; see `mla_ops.attn_mass`."""

    q: torch.Tensor  # [batch, seq_q, heads, d_total], or without batch, like all tensors
    kv: torch.Tensor  # [batch, seq_kv, kv_group, d_total]
    indices: torch.Tensor  # [batch, seq_q, kv_group, topk]
    lse: torch.Tensor  # [batch, seq_q, heads], fp32
    softmax_scale: float
    topk_length: torch.Tensor | None = None  # [batch, seq_q]


@dataclass(frozen=True)
class AttnMassProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    d_total: int  # width of one absorbed query / latent KV row
    heads: int  # of all KV groups
    kv_group: int  # KV heads; 1 in MLA
    topk: int  # slots per query and KV group
    dtype: torch.dtype  # of q and kv

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV row."""
        return self.heads // self.kv_group

    @classmethod
    def of(cls, call: AttnMassCall) -> AttnMassProblem:
        """Read the problem off a checked call."""
        *_, heads, d_total = call.q.shape
        kv_group, topk = call.indices.shape[-2:]
        return cls(d_total, heads, kv_group, topk, call.q.dtype)

    def __str__(self) -> str:
        return (
            f"d_total={self.d_total} heads={self.heads} kv_group={self.kv_group} topk={self.topk} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

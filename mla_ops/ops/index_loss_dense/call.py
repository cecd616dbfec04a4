"""What is asked of `mla::index_loss_dense`: a call as one value, and what it returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class IndexLossDenseCall(NamedTuple):
    """The arguments of `mla::index_loss_dense` in the order of its schema, up to `relu`; see `mla_ops`' function."""

    q: torch.Tensor  # [batch, seq_q, heads, d_total], or without batch, like all tensors
    k: torch.Tensor  # [batch, seq_kv, kv_group, d_total]
    lse: torch.Tensor  # [batch, seq_q, heads], fp32
    q_idx: torch.Tensor  # [batch, seq_q, index_heads, index_head_dim]
    k_idx: torch.Tensor  # [batch, seq_kv, kv_group, index_head_dim]
    weights: torch.Tensor  # [batch, seq_q, index_heads]
    row_weight: torch.Tensor  # [batch, seq_q] or [batch, seq_q, kv_group], fp32
    softmax_scale: float
    starts: torch.Tensor | None = None  # [batch, seq_q] or [seq_q]
    ends: torch.Tensor | None = None  # [batch, seq_q] or [seq_q]
    causal: bool = True
    relu: bool = True


class LossAndGradients(NamedTuple):
    """What a call returns; gradients that are not needed are empty `[0]` tensors."""

    loss: torch.Tensor  # fp32 scalar
    dq: torch.Tensor  # as q_idx
    dk: torch.Tensor  # as k_idx
    dw: torch.Tensor  # as weights

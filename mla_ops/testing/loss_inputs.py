"""Seeded calls of the indexer's loss: attention and indexer over one list of keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mla_ops.ops.sparse_attn.reference import sparse_attn_reference
from mla_ops.testing.cases import Case
from mla_ops.testing.index_inputs import IndexCase, make_index_inputs
from mla_ops.testing.inputs import make_inputs

_FLOATS = ("q", "kv", "q_idx", "k_idx", "weights")


@dataclass(frozen=True)
class LossInputs:
    """The tensors of one call of `mla_ops.index_loss`, in its order."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    lse: torch.Tensor
    q_idx: torch.Tensor
    k_idx: torch.Tensor
    weights: torch.Tensor
    softmax_scale: float
    topk_length: torch.Tensor | None

    @property
    def scores_args(self) -> tuple[Any, ...]:
        """The positional arguments of `mla::index_scores`, up to `topk_length`."""
        return (self.q_idx, self.k_idx, self.weights, self.indices, self.topk_length)

    @property
    def mass_args(self) -> tuple[Any, ...]:
        """The positional arguments of `mla::attn_mass`, up to `topk_length`."""
        return (self.q, self.kv, self.indices, self.lse, self.softmax_scale, self.topk_length)

    @property
    def differentiable(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tensors a gradient is asked for."""
        return (self.q_idx, self.k_idx, self.weights)

    @property
    def valid(self) -> torch.Tensor:
        """Which slots name a key, in the shape of `indices`."""
        valid = (self.indices >= 0) & (self.indices < self.kv.shape[-3])
        if self.topk_length is not None:
            slot = torch.arange(self.indices.shape[-1], device=self.indices.device)
            valid = valid & (slot < self.topk_length[..., None, None])
        return valid

    def to(self, dtype: torch.dtype) -> LossInputs:
        """The same values in another dtype, detached: cast after drawing, so that an oracle sees identical numbers."""
        return replace(self, **{name: getattr(self, name).detach().to(dtype) for name in _FLOATS})

    def requires_grad(self) -> LossInputs:
        """The same values as fresh leaves that ask for gradients."""
        return replace(self, **{name: getattr(self, name).detach().clone().requires_grad_() for name in _FLOATS})


def make_loss_inputs(
    case: IndexCase,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    heads: int = 4,
    d_total: int = 24,
    seed: int = 0,
    index_dtype: torch.dtype = torch.int32,
    invalid: bool = True,
    topk_length: bool = False,
) -> LossInputs:
    """Draw a call of `case`, with as many attention heads as `heads` says for each KV group.

    Indices are those of `make_inputs`: with repeats, and with `invalid` hostile. `lse` is that of attention to them, in
    fp32; `weights` are fp32 unless `dtype` is fp64.
    """
    sizes = Case(
        d_total,
        d_total,
        case.topk,
        heads * case.kv_group,
        case.kv_group,
        case.batch,
        case.seq_q,
        case.seq_kv,
    )
    attention = make_inputs(
        sizes, dtype, device, seed=seed, index_dtype=index_dtype, invalid=invalid, topk_length=topk_length
    )
    indexer = make_index_inputs(case, dtype, device, seed=seed)
    double = attention.to(torch.float64)
    _, lse = sparse_attn_reference(*double.args)
    return LossInputs(
        q=attention.q,
        kv=attention.kv,
        indices=attention.indices,
        lse=lse.float(),
        q_idx=indexer.q_idx,
        k_idx=indexer.k_idx,
        weights=indexer.weights.to(dtype) if dtype == torch.float64 else indexer.weights,
        softmax_scale=attention.softmax_scale,
        topk_length=attention.topk_length,
    )

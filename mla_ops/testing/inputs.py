"""Seeded random calls, hostile where a case asks for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mla_ops.testing.cases import Case

# What serving and training stacks put into unused slots, and the extremes of both index types.
INVALID_INDICES_INT32 = (-1, -2, -(2**31), 2**31 - 1)
INVALID_INDICES_INT64 = (*INVALID_INDICES_INT32, 2**40, -(2**40), 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Inputs:
    """One call and the gradients of its results."""

    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    d_v: int
    softmax_scale: float
    topk_length: torch.Tensor | None
    attn_sink: torch.Tensor | None
    dout: torch.Tensor
    dlse: torch.Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        """The operator's positional arguments."""
        return (self.q, self.kv, self.indices, self.d_v, self.softmax_scale, self.topk_length, self.attn_sink)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `mla_ops.sparse_attn`, everything after `indices`."""
        return {
            "d_v": self.d_v,
            "softmax_scale": self.softmax_scale,
            "topk_length": self.topk_length,
            "attn_sink": self.attn_sink,
        }

    @property
    def differentiable(self) -> list[torch.Tensor]:
        """The tensors a gradient is asked for: q, kv and the sink if there is one."""
        return [self.q, self.kv] + ([] if self.attn_sink is None else [self.attn_sink])

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype, detached: cast after drawing, so that an oracle sees identical numbers."""
        floats = {name: getattr(self, name).detach().to(dtype) for name in ("q", "kv", "dout", "dlse")}
        sink = None if self.attn_sink is None else self.attn_sink.detach().to(dtype)
        return replace(self, **floats, attn_sink=sink)

    def requires_grad(self, *, q: bool = True, kv: bool = True, attn_sink: bool = True) -> Inputs:
        """The same values as fresh leaves that ask for gradients as told."""
        sink = None if self.attn_sink is None else self.attn_sink.detach().clone().requires_grad_(attn_sink)
        return replace(
            self,
            q=self.q.detach().clone().requires_grad_(q),
            kv=self.kv.detach().clone().requires_grad_(kv),
            attn_sink=sink,
        )


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    seed: int = 0,
    index_dtype: torch.dtype = torch.int32,
    invalid: bool = True,
    topk_length: bool = False,
    attn_sink: bool = False,
) -> Inputs:
    """Draw a call of `case`: q and kv N(0, 1) / 10 in `dtype`, indices uniform with repeats.

    With `invalid`, about a fifth of the slots hold values that name no key, and the first query of every batch element
    has no valid slot at all. `topk_length` draws lengths in [-1, topk + 1], `attn_sink` N(0, 1) logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    indices_shape = (*case.lead, case.seq_q, case.kv_group, case.topk)
    indices = torch.randint(0, max(case.seq_kv, 1), indices_shape, generator=generator, dtype=torch.int64)
    if invalid:
        values = INVALID_INDICES_INT64 if index_dtype == torch.int64 else INVALID_INDICES_INT32
        pool = torch.tensor([*values, case.seq_kv, case.seq_kv + 7], dtype=torch.int64)
        bad = pool[torch.randint(0, len(pool), indices_shape, generator=generator)]
        indices = torch.where(torch.rand(indices_shape, generator=generator) < 0.2, bad, indices)
        indices[..., :1, :, :] = bad[..., :1, :, :]
    lengths = None
    if topk_length:
        lengths = torch.randint(-1, case.topk + 2, (*case.lead, case.seq_q), generator=generator, dtype=torch.int32)
        lengths = lengths.to(device)
    heads_shape = (*case.lead, case.seq_q, case.heads)
    return Inputs(
        q=(normal(*heads_shape, case.d_total) / 10).to(dtype).to(device),
        kv=(normal(*case.lead, case.seq_kv, case.kv_group, case.d_total) / 10).to(dtype).to(device),
        indices=indices.to(index_dtype).to(device),
        d_v=case.d_v,
        softmax_scale=case.softmax_scale,
        topk_length=lengths,
        attn_sink=normal(case.heads).float().to(device) if attn_sink else None,
        dout=normal(*heads_shape, case.d_v).to(dtype).to(device),
        dlse=normal(*heads_shape).float().to(device),
    )

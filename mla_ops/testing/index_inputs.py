"""Seeded calls of index selection: random, or of small integers, on which every backend must agree to the last slot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class IndexCase:
    """Sizes of one call; `batch=None` means the form without a batch dimension."""

    topk: int = 6
    index_heads: int = 4
    index_head_dim: int = 16
    kv_group: int = 1
    batch: int | None = 2
    seq_q: int = 5
    seq_kv: int = 24

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading sizes of every tensor: `(batch,)`, or `()` without one."""
        return () if self.batch is None else (self.batch,)

    def __str__(self) -> str:
        batch = "3d" if self.batch is None else f"B{self.batch}"
        return (
            f"{batch}-Sq{self.seq_q}-Skv{self.seq_kv}-G{self.kv_group}-{self.index_heads}x{self.index_head_dim}"
            f"-topk{self.topk}"
        )


@dataclass(frozen=True)
class IndexInputs:
    """The tensors of one call."""

    q_idx: torch.Tensor
    k_idx: torch.Tensor
    weights: torch.Tensor
    topk: int
    starts: torch.Tensor | None
    ends: torch.Tensor | None
    k_scale: torch.Tensor | None

    @property
    def args(self) -> tuple[Any, ...]:
        """The operator's positional arguments, up to `k_scale`."""
        return (self.q_idx, self.k_idx, self.weights, self.topk, self.starts, self.ends, self.k_scale)

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `mla_ops.index_topk` that are tensors."""
        return {"starts": self.starts, "ends": self.ends, "k_scale": self.k_scale}

    def to(self, dtype: torch.dtype) -> IndexInputs:
        """The same values in another dtype: cast after drawing, so that an oracle sees identical numbers."""
        return replace(self, q_idx=self.q_idx.to(dtype), k_idx=self.k_idx.to(dtype), weights=self.weights.to(dtype))


def make_index_inputs(
    case: IndexCase,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    seed: int = 0,
    exact: bool = False,
    bounds: bool = False,
    bounds_dtype: torch.dtype = torch.int32,
) -> IndexInputs:
    """Draw a call of `case`: queries and keys N(0, 1), weights N(0, 1) in fp32, either sign.

    With `exact`, all numbers are integers of [-2, 2]: scores are integers that fp32 holds, and ties are many, at the
    threshold too. `bounds` draws `starts` and `ends` per batch element, some beyond both ends of the keys, some that
    leave no key. With `dtype` e4m3 there is a `k_scale` of powers of two.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        if exact:
            return torch.randint(-2, 3, shape, generator=generator).double()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def draw_bound(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (*case.lead, case.seq_q), generator=generator, dtype=bounds_dtype).to(device)

    keys_shape = (*case.lead, case.seq_kv, case.kv_group)
    q_idx = draw(*case.lead, case.seq_q, case.index_heads, case.index_head_dim)
    k_idx = draw(*keys_shape, case.index_head_dim)
    weights = draw(*case.lead, case.seq_q, case.index_heads)
    half = case.seq_kv // 2
    return IndexInputs(
        q_idx=q_idx.to(dtype).to(device),
        k_idx=k_idx.to(dtype).to(device),
        weights=weights.float().to(device),
        topk=case.topk,
        starts=draw_bound(-3, half + 1) if bounds else None,
        ends=draw_bound(half - 2, case.seq_kv + 4) if bounds else None,
        k_scale=torch.randint(-2, 3, keys_shape, generator=generator).exp2().to(device) if dtype == FP8 else None,
    )

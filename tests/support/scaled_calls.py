"""Calls on e4m3 payloads with scales, and the oracle they are held against: the reference on `payload * scale`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from mla_ops.ops.sparse_attn.call import Scales, SparseAttnCall
from mla_ops.testing import Inputs
from mla_ops.testing.closeness import assert_within_budget
from mla_ops.testing.oracle import run_reference

Kind = Literal["plain", "tensor", "row"]
# What arrives: a quantised kv beside a plain q, both quantised, and a quantised q alone.
KINDS: list[tuple[Kind, Kind]] = [
    ("plain", "row"),
    ("plain", "tensor"),
    ("row", "row"),
    ("tensor", "row"),
    ("row", "plain"),
]


def quantised(tensor: torch.Tensor, kind: Kind) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a payload and its scale, `[]` or `[..., 1]`."""
    if kind == "plain":
        return tensor, None
    real = tensor.float()
    amax = real.abs().amax(-1, keepdim=True) if kind == "row" else real.abs().amax()
    scale = (amax / 448).clamp_min(2.0**-30)
    return (real / scale).to(torch.float8_e4m3fn), scale


def real(payload: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Return what a payload stands for, in fp64."""
    return payload.double() if scale is None else payload.double() * scale.double()


@dataclass(frozen=True)
class ScaledInputs:
    """A call of payloads; `plain` has everything else of it."""

    plain: Inputs
    q: torch.Tensor
    kv: torch.Tensor
    scales: Scales

    @classmethod
    def of(cls, inputs: Inputs, q_kind: Kind, kv_kind: Kind) -> ScaledInputs:
        (q, q_scale), (kv, kv_scale) = quantised(inputs.q, q_kind), quantised(inputs.kv, kv_kind)
        return cls(inputs, q, kv, Scales(q_scale, kv_scale, inputs.q.dtype))

    @property
    def call(self) -> SparseAttnCall:
        return SparseAttnCall(self.q, self.kv, *self.plain.args[2:])

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What `mla::sparse_attn_scaled` takes first."""
        return self.q, self.scales.q, self.kv, self.scales.kv

    @property
    def args(self) -> tuple[object, ...]:
        """The arguments of `mla::sparse_attn_scaled`."""
        indices, d_v, softmax_scale, topk_length, attn_sink = self.plain.args[2:]
        return (*self.tensors, indices, d_v, softmax_scale, self.scales.dtype, topk_length, attn_sink)

    def bwd_args(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[object, ...]:
        """The arguments of `mla::sparse_attn_scaled_bwd`."""
        indices, d_v, softmax_scale, topk_length, attn_sink = self.plain.args[2:]
        dtype = self.scales.dtype
        gradients = (self.plain.dout, self.plain.dlse)
        return (*gradients, *self.tensors, indices, out, lse, d_v, softmax_scale, dtype, topk_length, attn_sink)


def run_scaled(inputs: ScaledInputs, backend: str = "auto") -> dict[str, torch.Tensor]:
    """Run forward and backward as raw calls."""
    out, lse = torch.ops.mla.sparse_attn_scaled(*inputs.args, backend)
    gradients = torch.ops.mla.sparse_attn_scaled_bwd(*inputs.bwd_args(out, lse), backend=backend)
    count = 2 if inputs.plain.attn_sink is None else 3
    return {"out": out, "lse": lse, **dict(zip(["dq", "dkv", "dsink"][:count], gradients[:count], strict=True))}


def assert_matches_scaled_oracle(actual: dict[str, torch.Tensor], inputs: ScaledInputs) -> None:
    """Assert that results are as close to the reference on `payload * scale` as on plain tensors they must be."""
    q, kv = real(inputs.q, inputs.scales.q), real(inputs.kv, inputs.scales.kv)
    oracle = run_reference(replace(inputs.plain, q=q, kv=kv), torch.float64)
    low = run_reference(replace(inputs.plain, q=q, kv=kv), inputs.scales.dtype)
    terms = inputs.plain.indices.shape[-1] + q.shape[-1]
    every_query = inputs.plain.indices.numel() * q.shape[-2]
    for name, result in actual.items():
        summed = terms + every_query if name in ("dkv", "dsink") else terms
        assert_within_budget(result, oracle[name], low[name], terms=summed, name=name)

"""The eager backend: plain torch operators over chunks of gathered KV rows. The CPU's implementation."""

from __future__ import annotations

import torch

from mla_ops import settings
from mla_ops.device import DeviceTraits
from mla_ops.gathering import NamedKeys
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class EagerBackend:
    """Runs anywhere torch runs; picked by `backend="auto"` on the CPU only."""

    name = "eager"

    def unsupported_reasons(self, problem: AttnMassProblem, traits: DeviceTraits) -> list[str]:
        """See `Declares.unsupported_reasons`."""
        if problem.dtype in _SUPPORTED_DTYPES:
            return []
        return [f"dtype is {problem.dtype}, needs bf16, fp16, fp32 or fp64; cast q and kv"]

    def auto_excluded_reason(self, problem: AttnMassProblem, traits: DeviceTraits) -> str | None:
        """See `Declares.auto_excluded_reason`."""
        if traits.type == "cpu":
            return None
        return f'excluded from backend="auto" on {traits.type}; pass backend="eager" to accept chunked gathers'

    def plan(self, call: AttnMassCall, problem: AttnMassProblem, traits: DeviceTraits) -> None:
        """See `Backend.plan`; chunks follow from the sizes at hand."""

    def describe(self, plan: None) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return (f"rows are gathered in chunks of {settings.current().eager_workspace_mb} MiB; nothing to warm",)

    def run(self, call: AttnMassCall, plan: None) -> torch.Tensor:
        """See `Backend.run`."""
        mass = call.q.new_empty(call.indices.shape, dtype=torch.float32)
        kv = NamedKeys.of(call.kv, call.indices, call.topk_length)
        if kv.is_empty:
            return mass.zero_()
        num_rows, heads, dtype = len(kv.indices), call.q.shape[-2] // kv.kv_group, kv.compute_dtype
        q = call.q.reshape(num_rows, heads, call.q.shape[-1])
        lse = call.lse.reshape(num_rows, heads, 1)
        mass_rows = mass.view(num_rows, 1, -1)
        for chunk in kv.chunks(numbers_per_slot=heads):
            # A copy even where the dtype fits: the same bits in the same layout, whatever the strides of q.
            queries = q[chunk.span].to(dtype, copy=True, memory_format=torch.contiguous_format)
            normaliser = lse[chunk.span].to(dtype)
            weights = torch.bmm(queries, chunk.keys.transpose(1, 2)).mul_(call.softmax_scale).sub_(normaliser).exp_()
            weights.masked_fill_(normaliser == -torch.inf, 0.0)
            mass_rows[chunk.span] = weights.sum(dim=1, keepdim=True).masked_fill_(chunk.invalid, 0.0)
        return mass

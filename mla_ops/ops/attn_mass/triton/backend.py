"""The Triton backend: what it supports, and the call it answers on the device of its tensors."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem
from mla_ops.ops.attn_mass.triton.launch import MassPlan, describe_mass, launch_mass, plan_mass

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on. Configurations come from a table; nothing is tuned at run time."""

    name = "triton"

    def unsupported_reasons(self, problem: AttnMassProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        reasons = triton_refusals(traits)
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16 or fp32; cast q and kv")
        return reasons

    def auto_excluded_reason(self, problem: AttnMassProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def plan(self, call: AttnMassCall, problem: AttnMassProblem, traits: DeviceTraits) -> MassPlan:
        """See `Backend.plan`."""
        return plan_mass(call, traits)

    def describe(self, plan: MassPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe_mass(plan)

    def run(self, call: AttnMassCall, plan: MassPlan) -> torch.Tensor:
        """See `Backend.run`."""
        return launch_on(call.q.device, launch_mass, call, plan)

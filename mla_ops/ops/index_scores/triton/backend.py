"""The Triton backend: what it supports, and the calls it answers on the device of their tensors."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Side, Wanted
from mla_ops.ops.index_scores.triton.backward import BackwardPlan, describe_backward, launch_backward, plan_backward
from mla_ops.ops.index_scores.triton.forward import describe_forward, launch_forward, plan_forward
from mla_ops.ops.index_scores.triton.launch import Launch

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on. Configurations come from tables; nothing is tuned at run time."""

    name = "triton"

    def unsupported_reasons(self, problem: IndexScoresProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        reasons = triton_refusals(traits)
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16 or fp32; cast q_idx and k_idx")
        return reasons

    def auto_excluded_reason(self, problem: IndexScoresProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def plan(
        self, side: Side, call: IndexScoresCall, problem: IndexScoresProblem, traits: DeviceTraits, wanted: Wanted
    ) -> Launch | BackwardPlan:
        """See `Backend.plan`."""
        return plan_backward(call, traits, wanted) if side == "backward" else plan_forward(call, traits)

    def describe(self, plan: Launch | BackwardPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe_forward(plan) if isinstance(plan, Launch) else describe_backward(plan)

    def forward(self, call: IndexScoresCall, plan: Launch) -> torch.Tensor:
        """See `Backend.forward`."""
        return launch_on(call.q_idx.device, launch_forward, call, plan)

    def backward(
        self, call: IndexScoresCall, dscores: torch.Tensor, wanted: Wanted, plan: BackwardPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Backend.backward`."""
        return launch_on(call.q_idx.device, launch_backward, call, dscores, wanted, plan)

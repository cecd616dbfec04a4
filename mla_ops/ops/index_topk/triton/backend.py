"""The Triton backend: what it supports, and the call it answers, on the device of its tensors."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.lookup import MAX_TOPK
from mla_ops.ops.index_topk.triton.launch import TopkPlan, describe_topk, launch_topk, plan_topk

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
_MIN_FP8_ARCH = 89


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on. Configurations come from tables; nothing is tuned at run time."""

    name = "triton"

    def unsupported_reasons(self, problem: IndexTopkProblem, traits: DeviceTraits) -> list[str]:
        """See `Declares.unsupported_reasons`."""
        reasons = triton_refusals(traits)
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16, fp32 or e4m3; cast q_idx and k_idx")
        elif problem.dtype == torch.float8_e4m3fn and 0 < traits.arch < _MIN_FP8_ARCH:
            have = f"{traits.arch // 10}.{traits.arch % 10}"
            reasons.append(f"compute capability is {have}, e4m3 needs 8.9 or later; cast q_idx and k_idx to bf16")
        if problem.topk > MAX_TOPK:
            reasons.append(f'topk is {problem.topk}, needs at most {MAX_TOPK}; pass backend="eager"')
        return reasons

    def auto_excluded_reason(self, problem: IndexTopkProblem, traits: DeviceTraits) -> str | None:
        """See `Declares.auto_excluded_reason`."""
        return None

    def plan(self, call: IndexTopkCall, problem: IndexTopkProblem, traits: DeviceTraits) -> TopkPlan:
        """See `Backend.plan`."""
        return plan_topk(call, problem, traits)

    def describe(self, plan: TopkPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe_topk(plan)

    def run(self, call: IndexTopkCall, plan: TopkPlan) -> torch.Tensor:
        """See `Backend.run`."""
        return launch_on(call.q_idx.device, launch_topk, call, plan)

"""The Triton backend: what it supports, and the three calls it answers, each on the device of its tensors."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.sparse_attn.call import (
    SCALED_FORMAT,
    Gradients,
    Results,
    Scales,
    Side,
    SparseAttnCall,
    SparseAttnProblem,
    Wanted,
)
from mla_ops.ops.sparse_attn.configs.lookup import MAX_D_TOTAL
from mla_ops.ops.sparse_attn.triton.backward import BackwardPlan, describe_backward, launch_backward, plan_backward
from mla_ops.ops.sparse_attn.triton.forward import (
    ForwardPlan,
    describe_forward,
    launch_forward,
    launch_max_logits,
    plan_forward,
)
from mla_ops.ops.sparse_attn.triton.kernel_sets import PORTABLE
from mla_ops.ops.sparse_attn.triton.scaled import (
    launch_scaled_backward,
    launch_scaled_forward,
    plan_scaled_backward,
    plan_scaled_forward,
)

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on. Configurations come from tables; nothing is tuned at run time."""

    name = "triton"

    def unsupported_reasons(self, problem: SparseAttnProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        reasons = triton_refusals(traits)
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16 or fp32; cast q and kv")
        if problem.is_scaled and problem.dtype != torch.bfloat16:
            reasons.append(
                f"dtype is {problem.dtype}, needs bf16 where rows are e4m3, whose products are made in bf16; quantise "
                'bf16 tensors, or pass quantized="dequantize"'
            )
        if problem.kv_format not in ("dense", SCALED_FORMAT):
            reasons.append(f"kv_format is {problem.kv_format!r}, needs 'dense'; dequantise kv first")
        if problem.d_total > MAX_D_TOTAL:
            reasons.append(f'd_total is {problem.d_total}, needs at most {MAX_D_TOTAL}; pass backend="eager"')
        if not reasons:
            # The portable kernels are the last resort of every problem, so what they refuse nobody runs.
            sides: tuple[Side, ...] = ("forward", "backward") if problem.needs_grad else ("forward",)
            refusals = (PORTABLE.refusal(side, problem, None, traits) for side in sides)
            reasons.extend(reason for reason in refusals if reason is not None)
        return reasons

    def auto_excluded_reason(self, problem: SparseAttnProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def plan(
        self, side: Side, call: SparseAttnCall, problem: SparseAttnProblem, traits: DeviceTraits, wanted: Wanted
    ) -> ForwardPlan | BackwardPlan:
        """See `Backend.plan`."""
        if problem.is_scaled:
            if side == "backward":
                return plan_scaled_backward(call, traits, wanted, problem)
            return plan_scaled_forward(call, traits, problem)
        if side == "backward":
            return plan_backward(call, traits, wanted, problem=problem)
        return plan_forward(call, traits, max_logits_only=side == "max_logits", problem=problem)

    def describe(self, plan: ForwardPlan | BackwardPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe_forward(plan) if isinstance(plan, ForwardPlan) else describe_backward(plan)

    def forward(self, call: SparseAttnCall, plan: ForwardPlan, scales: Scales | None = None) -> Results:
        """See `Backend.forward`."""
        if scales is not None:
            return launch_on(call.q.device, launch_scaled_forward, call, scales, plan)
        return launch_on(call.q.device, launch_forward, call, plan)

    def max_logits(self, call: SparseAttnCall, plan: ForwardPlan) -> torch.Tensor:
        """See `Backend.max_logits`."""
        return launch_on(call.q.device, launch_max_logits, call, plan)

    def backward(
        self,
        call: SparseAttnCall,
        results: Results,
        gradients: Gradients,
        wanted: Wanted,
        plan: BackwardPlan,
        scales: Scales | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Backend.backward`."""
        if scales is not None:
            return launch_on(call.q.device, launch_scaled_backward, call, scales, results, gradients, wanted, plan)
        return launch_on(call.q.device, launch_backward, call, results, gradients, wanted, plan)

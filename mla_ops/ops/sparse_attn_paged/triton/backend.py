"""The Triton backend: what it supports, and the call it answers on the device of its tensors."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.sparse_attn.configs.lookup import MAX_D_TOTAL
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.forward import PagedPlan, describe, launch_forward, plan_forward
from mla_ops.ops.sparse_attn_paged.triton.kernel_sets import PORTABLE

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on. Configurations come from tables; nothing is tuned at run time."""

    name = "triton"

    def unsupported_reasons(self, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        reasons = triton_refusals(traits)
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16 or fp32; cast q and pages")
        if problem.d_total > MAX_D_TOTAL:
            reasons.append(f'd_total is {problem.d_total}, needs at most {MAX_D_TOTAL}; pass backend="eager"')
        if not reasons:
            # The portable kernels are the last resort of every problem, so what they refuse nobody runs.
            refusal = PORTABLE.refusal(problem, None, traits)
            reasons.extend(() if refusal is None else (refusal,))
        return reasons

    def auto_excluded_reason(self, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def plan(self, call: SparseAttnPagedCall, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> PagedPlan:
        """See `Backend.plan`."""
        return plan_forward(call, traits, problem=problem)

    def describe(self, plan: PagedPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe(plan)

    def run(self, call: SparseAttnPagedCall, plan: PagedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run`."""
        return launch_on(call.q.device, launch_forward, call, plan)

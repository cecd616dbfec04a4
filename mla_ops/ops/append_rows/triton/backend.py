"""The Triton backend: what it supports, and the call it answers on the device of its tensors."""

from __future__ import annotations

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.ops.append_rows.triton.launch import AppendPlan, describe_append, launch_append, plan_append


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on, every format: before 8.9 integers make the codes."""

    name = "triton"

    def unsupported_reasons(self, problem: AppendRowsProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        return triton_refusals(traits)

    def auto_excluded_reason(self, problem: AppendRowsProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def plan(self, call: AppendRowsCall, problem: AppendRowsProblem, traits: DeviceTraits) -> AppendPlan:
        """See `Backend.plan`."""
        return plan_append(call, problem, traits)

    def describe(self, plan: AppendPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe_append(plan)

    def run(self, call: AppendRowsCall, plan: AppendPlan) -> None:
        """See `Backend.run`."""
        launch_on(call.pages.device, launch_append, call, plan)

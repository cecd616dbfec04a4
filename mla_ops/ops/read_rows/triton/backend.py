"""The Triton backend: what it supports, and the call it answers on the device of its tensors."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits, triton_refusals
from mla_ops.launching import launch_on
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem
from mla_ops.ops.read_rows.triton.launch import ReadPlan, describe_read, launch_read, plan_read


class TritonBackend:
    """NVIDIA devices from compute capability 8.0 on, every format: before 8.9 integers make the numbers."""

    name = "triton"

    def unsupported_reasons(self, problem: ReadRowsProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        return triton_refusals(traits)

    def auto_excluded_reason(self, problem: ReadRowsProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def plan(self, call: ReadRowsCall, problem: ReadRowsProblem, traits: DeviceTraits) -> ReadPlan:
        """See `Backend.plan`."""
        return plan_read(call, problem, traits)

    def describe(self, plan: ReadPlan) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return describe_read(plan)

    def run(self, call: ReadRowsCall, plan: ReadPlan) -> torch.Tensor:
        """See `Backend.run`."""
        return launch_on(call.pages.device, launch_read, call, plan)

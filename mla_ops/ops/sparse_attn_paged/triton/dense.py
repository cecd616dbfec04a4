"""The dense kernel set: rows as `mla::sparse_attn` has them, run by the kernels of that operator."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import LaunchRecord, as_it_is
from mla_ops.ops.sparse_attn.triton.forward import ForwardPlan, describe_forward, plan_forward, readable
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints, Pool, as_dense_call
from mla_ops.ops.sparse_attn_paged.triton.resolve import ResolvePlan, resolve
from mla_ops.row_formats import ROW_ALIGN


class DensePlan(NamedTuple):
    """What sizes and strides decide about a call."""

    resolve: ResolvePlan | None  # None: indices are row numbers as they come, and pages are not padded
    forward: ForwardPlan

    @property
    def record(self) -> LaunchRecord:
        """Whether the kernels were launched before."""
        return self.forward.record


class DenseKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "dense"

    def refusal(self, problem: SparseAttnPagedProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why rows are none of `mla::sparse_attn`, or would be copied by it to align them."""
        if problem.row_format != "dense":
            return f"rows are {problem.row_format!r}"
        if hints is not None and not hints.pool.page_rows:
            return "pages are not as far apart as a whole number of rows"
        if hints is not None and hints.pool.unit < ROW_ALIGN:
            return f"rows start at multiples of {hints.pool.unit} bytes, not of {ROW_ALIGN}"
        return None

    def plan(self, call: SparseAttnPagedCall, traits: DeviceTraits) -> DensePlan:
        """Plan the call of `mla::sparse_attn`."""
        pool, found = Pool.of(call), None
        if call.block_table is not None or not pool.has_one_stride:
            found = ResolvePlan.of(call, pool.page_rows)
            call = found.as_resolved(call)
        return DensePlan(found, plan_forward(as_dense_call(call), traits))

    def describe(self, plan: DensePlan) -> tuple[str, ...]:
        """Say what the plan of `mla::sparse_attn` launches."""
        return (f"as mla::sparse_attn by its {plan.forward.kernels.name} kernels", *describe_forward(plan.forward))

    def run(self, call: SparseAttnPagedCall, plan: DensePlan, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Run the kernels of `mla::sparse_attn`."""
        found, forward = plan
        dense = as_dense_call(call if found is None else resolve(call, found))
        forward.kernels.run_forward(
            dense if forward.is_readable else readable(dense), out, lse, forward.launch, as_it_is
        )

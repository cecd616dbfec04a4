"""The dense kernel set: rows as `mla::sparse_attn` has them, by row number, run by the kernels of that operator."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import as_it_is
from mla_ops.ops.sparse_attn.triton.forward import ForwardPlan, describe_forward, plan_forward, readable
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints, as_dense_call
from mla_ops.row_formats import ROW_ALIGN


class DenseKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "dense"

    def refusal(self, problem: SparseAttnPagedProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why a call is none of `mla::sparse_attn`, or one that would copy the pool to align its rows."""
        if problem.row_format != "dense":
            return f"rows are {problem.row_format!r}"
        if problem.has_block_table:
            return "rows are found by block_table"
        if hints is not None and not hints.pool.has_one_stride:
            return "pages are padded"
        if hints is not None and hints.pool.unit < ROW_ALIGN:
            return f"rows start at multiples of {hints.pool.unit} bytes, not of {ROW_ALIGN}"
        return None

    def plan(self, call: SparseAttnPagedCall, traits: DeviceTraits) -> ForwardPlan:
        """Plan the call of `mla::sparse_attn`."""
        return plan_forward(as_dense_call(call), traits)

    def describe(self, plan: ForwardPlan) -> tuple[str, ...]:
        """Say what the plan of `mla::sparse_attn` launches."""
        return (f"as mla::sparse_attn by its {plan.kernels.name} kernels", *describe_forward(plan))

    def run(self, call: SparseAttnPagedCall, plan: ForwardPlan, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Run the kernels of `mla::sparse_attn`."""
        dense = as_dense_call(call)
        plan.kernels.run_forward(dense if plan.is_readable else readable(dense), out, lse, plan.launch, as_it_is)

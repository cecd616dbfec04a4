"""Who may run `mla::sparse_attn_paged`, in order of preference, and the plan of all calls that look alike."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.dispatch import AUTO
from mla_ops.launching import facts
from mla_ops.ops.sparse_attn_paged.backend import Backend
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.eager import EagerBackend
from mla_ops.ops.sparse_attn_paged.rules import check_inputs
from mla_ops.ops.sparse_attn_paged.triton.backend import TritonBackend
from mla_ops.row_formats import ROW_ALIGN

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[SparseAttnPagedProblem, Backend]

Plan = dispatch.Plan[SparseAttnPagedProblem, Backend]

_plans: dispatch.Plans[SparseAttnPagedProblem, Backend] = dispatch.Plans()


def plan_of(call: SparseAttnPagedCall, backend: str) -> Plan:
    """Check a call and decide how it runs, or find what was decided for a call that looks alike.

    Of the tensors of `call` everything but the values and the addresses decides, and how the pool is aligned; `backend`
    as in `mla_ops.sparse_attn_paged`.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.sparse_attn_paged`.
    """
    q, pages, indices, d_v, softmax_scale, row_format, *optional = call
    key: tuple[object, ...] = (
        backend,
        d_v,
        softmax_scale,
        row_format,
        facts(q),
        facts(pages),
        pages.storage_offset() % ROW_ALIGN,
        facts(indices),
        *(None if tensor is None else facts(tensor) for tensor in optional),
    )
    plan = _plans.get(key)
    if plan is None:
        check_inputs(call)
        problem, traits = SparseAttnPagedProblem.of(call), traits_of(q.device)
        chosen = (decision := select(problem, traits, backend)).require_backend()
        plan = _plans.keep(key, Plan(decision, chosen, chosen.plan(call, problem, traits)))
    return plan


def check_backend_name(name: str) -> None:
    """Raise `UnknownBackendError`, listing the known names, unless `name` is one of them or "auto"."""
    dispatch.check_backend_name(name, BACKENDS)


@lru_cache(maxsize=4096)  # a decision is logged once per distinct problem
def select(problem: SparseAttnPagedProblem, traits: DeviceTraits, requested: str = AUTO) -> Decision:
    """Decide who runs `problem` on a device with `traits`; a refusal is a `Decision` without backend, not an error."""
    return dispatch.decide("mla::sparse_attn_paged", BACKENDS, problem, traits, requested)


def explain(call: SparseAttnPagedCall, requested: str) -> Decision:
    """Return the decision about a checked call, with what its plan would launch; a refusal is no error.

    Symbolic sizes have no plan.
    """
    decision = select(SparseAttnPagedProblem.of(call), traits_of(call.q.device), requested)
    sizes = (*call.q.shape, *call.pages.shape, *call.indices.shape)
    if decision.backend is None or any(isinstance(size, torch.SymInt) for size in sizes):
        return decision
    return replace(decision, launch=decision.backend.describe(plan_of(call, requested).launch))

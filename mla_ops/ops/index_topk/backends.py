"""Who may run `mla::index_topk`, in order of preference, and the plan of a call: made once for all that look alike."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.dispatch import AUTO
from mla_ops.launching import facts
from mla_ops.ops.index_topk.backend import Backend
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.eager import EagerBackend
from mla_ops.ops.index_topk.rules import check_inputs
from mla_ops.ops.index_topk.triton.backend import TritonBackend

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[IndexTopkProblem, Backend]
Plan = dispatch.Plan[IndexTopkProblem, Backend]

_plans: dispatch.Plans[IndexTopkProblem, Backend] = dispatch.Plans()


def plan_of(call: IndexTopkCall, backend: str) -> Plan:
    """Check a call and decide how it runs, or find what was decided for a call that looks alike.

    Args:
        call: the call. Of its tensors everything but the values and the addresses decides.
        backend: as in `mla_ops.index_topk`.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.index_topk`.
    """
    q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu = call
    key: tuple[object, ...] = (
        backend,
        topk,
        causal,
        relu,
        facts(q_idx),
        facts(k_idx),
        facts(weights),
        None if starts is None else facts(starts),
        None if ends is None else facts(ends),
        None if k_scale is None else facts(k_scale),
    )
    plan = _plans.get(key)
    if plan is None:
        check_inputs(call)
        problem = IndexTopkProblem.of(call)
        traits = traits_of(q_idx.device)
        decision = select(problem, traits, backend)
        chosen = decision.require_backend()
        plan = _plans.keep(key, Plan(decision, chosen, chosen.plan(call, problem, traits)))
    return plan


def backend_names() -> tuple[str, ...]:
    """Return the values that `backend=` takes besides "auto", in the order "auto" considers them."""
    return tuple(backend.name for backend in BACKENDS)


def check_backend_name(name: str) -> None:
    """Raise `UnknownBackendError`, listing the known names, unless `name` is one of them or "auto"."""
    dispatch.check_backend_name(name, BACKENDS)


@lru_cache(maxsize=4096)  # a decision is logged once per distinct problem
def select(problem: IndexTopkProblem, traits: DeviceTraits, requested: str = AUTO) -> Decision:
    """Decide who runs `problem` on a device with `traits`; a refusal is a `Decision` without backend, not an error."""
    return dispatch.decide("mla::index_topk", BACKENDS, problem, traits, requested)


def explain(call: IndexTopkCall, requested: str) -> Decision:
    """Return the decision about a checked call, with what its plan would launch; a refusal is no error.

    Symbolic sizes have no plan.
    """
    decision = select(IndexTopkProblem.of(call), traits_of(call.q_idx.device), requested)
    sizes = (*call.q_idx.shape, *call.k_idx.shape, call.topk)
    if decision.backend is None or any(isinstance(size, torch.SymInt) for size in sizes):
        return decision
    return replace(decision, launch=decision.backend.describe(plan_of(call, requested).launch))

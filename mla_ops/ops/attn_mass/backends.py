"""Who may run `mla::attn_mass`, in order of preference, and the plan of a call: made once for all that look alike."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.dispatch import AUTO
from mla_ops.launching import facts
from mla_ops.ops.attn_mass.backend import Backend
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem
from mla_ops.ops.attn_mass.eager import EagerBackend
from mla_ops.ops.attn_mass.rules import check_inputs
from mla_ops.ops.attn_mass.triton.backend import TritonBackend

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[AttnMassProblem, Backend]

Plan = dispatch.Plan[AttnMassProblem, Backend]

_plans: dispatch.Plans[AttnMassProblem, Backend] = dispatch.Plans()


def plan_of(call: AttnMassCall, backend: str) -> Plan:
    """Check a call and decide how it runs, or find what was decided for a call that looks alike.

    Of the tensors of `call` everything but the values and the addresses decides; `backend` as in `mla_ops.attn_mass`.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.attn_mass`.
    """
    q, kv, indices, lse, softmax_scale, topk_length = call
    key: tuple[object, ...] = (
        backend,
        softmax_scale,
        facts(q),
        facts(kv),
        facts(indices),
        facts(lse),
        None if topk_length is None else facts(topk_length),
    )
    plan = _plans.get(key)
    if plan is None:
        check_inputs(call)
        problem, traits = AttnMassProblem.of(call), traits_of(q.device)
        chosen = (decision := select(problem, traits, backend)).require_backend()
        plan = _plans.keep(key, Plan(decision, chosen, chosen.plan(call, problem, traits)))
    return plan


def check_backend_name(name: str) -> None:
    """Raise `UnknownBackendError`, listing the known names, unless `name` is one of them or "auto"."""
    dispatch.check_backend_name(name, BACKENDS)


@lru_cache(maxsize=4096)  # a decision is logged once per distinct problem
def select(problem: AttnMassProblem, traits: DeviceTraits, requested: str = AUTO) -> Decision:
    """Decide who runs `problem` on a device with `traits`; a refusal is a `Decision` without backend, not an error."""
    return dispatch.decide("mla::attn_mass", BACKENDS, problem, traits, requested)


def explain(call: AttnMassCall, requested: str) -> Decision:
    """Return the decision about a checked call, with what its plan would launch; a refusal is no error.

    Symbolic sizes have no plan.
    """
    decision = select(AttnMassProblem.of(call), traits_of(call.q.device), requested)
    sizes = (*call.q.shape, *call.kv.shape, *call.indices.shape)
    if decision.backend is None or any(isinstance(size, torch.SymInt) for size in sizes):
        return decision
    return replace(decision, launch=decision.backend.describe(plan_of(call, requested).launch))

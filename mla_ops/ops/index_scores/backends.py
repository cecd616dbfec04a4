"""Who may run `mla::index_scores`, in order of preference, and the plan of a call, made once for all alike."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.dispatch import AUTO
from mla_ops.launching import facts
from mla_ops.ops.index_scores.backend import Backend
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Side, Wanted
from mla_ops.ops.index_scores.eager import EagerBackend
from mla_ops.ops.index_scores.rules import check_bwd_inputs, check_inputs
from mla_ops.ops.index_scores.triton.backend import TritonBackend

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[IndexScoresProblem, Backend]

Plan = dispatch.Plan[IndexScoresProblem, Backend]

_plans: dispatch.Plans[IndexScoresProblem, Backend] = dispatch.Plans()


def plan_of(
    side: Side,
    call: IndexScoresCall,
    backend: str,
    *,
    needs_grad: bool = False,
    dscores: torch.Tensor | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008  # a named tuple of constants
) -> Plan:
    """Check a call and decide how it runs, or find what was decided for a call that looks alike.

    Args:
        side: what of the operator is asked.
        call: the call. Of its tensors everything but the values and the addresses decides.
        backend: as in `mla_ops.index_scores`.
        needs_grad: a backward will follow, so what cannot run it refuses the forward.
        dscores: of a backward, where it starts; None when the plan is only read.
        wanted: of a backward, what it computes.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.index_scores`.
    """
    q_idx, k_idx, weights, indices, topk_length, relu = call
    key: tuple[object, ...] = (
        side,
        backend,
        relu,
        needs_grad,
        facts(q_idx),
        facts(k_idx),
        facts(weights),
        facts(indices),
        None if topk_length is None else facts(topk_length),
    )
    if side == "backward":
        key += (
            wanted,
            torch.are_deterministic_algorithms_enabled(),
            None if dscores is None else facts(dscores),
        )
    plan = _plans.get(key)
    if plan is None:
        check_inputs(call)
        if dscores is not None:
            check_bwd_inputs(call, dscores)
        problem = IndexScoresProblem.of(call, needs_grad=needs_grad or side == "backward")
        traits = traits_of(q_idx.device)
        chosen = (decision := select(problem, traits, backend)).require_backend()
        plan = _plans.keep(key, Plan(decision, chosen, chosen.plan(side, call, problem, traits, wanted)))
    return plan


def check_backend_name(name: str) -> None:
    """Raise `UnknownBackendError`, listing the known names, unless `name` is one of them or "auto"."""
    dispatch.check_backend_name(name, BACKENDS)


@lru_cache(maxsize=4096)  # a decision is logged once per distinct problem
def select(problem: IndexScoresProblem, traits: DeviceTraits, requested: str = AUTO) -> Decision:
    """Decide who runs `problem` on a device with `traits`; a refusal is a `Decision` without backend, not an error."""
    return dispatch.decide("mla::index_scores", BACKENDS, problem, traits, requested)


def explain(call: IndexScoresCall, requested: str, wanted: Wanted | None) -> Decision:
    """Return the decision about a checked call, with what its plans would launch; a refusal is no error.

    `wanted` says what a backward would compute, None that there will be none. Symbolic sizes have no plan.
    """
    needs_grad = wanted is not None
    decision = select(IndexScoresProblem.of(call, needs_grad=needs_grad), traits_of(call.q_idx.device), requested)
    sizes = (*call.q_idx.shape, *call.k_idx.shape, *call.indices.shape)
    if decision.backend is None or any(isinstance(size, torch.SymInt) for size in sizes):
        return decision
    sides: tuple[Side, ...] = ("forward", "backward") if needs_grad else ("forward",)
    plans = [plan_of(side, call, requested, needs_grad=needs_grad, wanted=wanted or Wanted()).launch for side in sides]
    lines = [line for plan in plans for line in decision.backend.describe(plan)]
    return replace(decision, launch=tuple(dict.fromkeys(lines)))  # what holds for both sides is said once

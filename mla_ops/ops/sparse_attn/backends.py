"""Who may run `mla::sparse_attn`, in order of preference, and the plan of a call: made once for all that look alike."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.dispatch import AUTO
from mla_ops.launching import facts
from mla_ops.ops.sparse_attn.backend import Backend
from mla_ops.ops.sparse_attn.call import (
    Gradients,
    Hints,
    Results,
    Scales,
    Side,
    SparseAttnCall,
    SparseAttnProblem,
    Wanted,
    call_like,
)
from mla_ops.ops.sparse_attn.eager import EagerBackend
from mla_ops.ops.sparse_attn.rules import check_bwd_inputs, check_inputs
from mla_ops.ops.sparse_attn.triton.backend import TritonBackend
from mla_ops.settings import current

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[SparseAttnProblem, Backend]


Plan = dispatch.Plan[SparseAttnProblem, Backend]

_plans: dispatch.Plans[SparseAttnProblem, Backend] = dispatch.Plans()


def plan_of(
    side: Side,
    call: SparseAttnCall,
    backend: str,
    *,
    needs_grad: bool = False,
    results: Results | None = None,
    gradients: Gradients | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008  # a named tuple of constants
) -> Plan:
    """Check a call and decide how it runs, or find what was decided for a call that looks alike.

    Args:
        side: what of the operator is asked.
        call: the call. Of its tensors everything but the values and the addresses decides.
        backend: as in `mla_ops.sparse_attn`.
        needs_grad: a backward will follow, so what cannot run it refuses the forward.
        results: of a backward, what the forward returned.
        gradients: of a backward, where it starts.
        wanted: of a backward, what it computes.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.sparse_attn`.
    """
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
    key: tuple[object, ...] = (
        side,
        backend,
        d_v,
        softmax_scale,
        needs_grad,
        current().tuned_rows,
        facts(q),
        facts(kv),
        facts(indices),
        None if topk_length is None else facts(topk_length),
        None if attn_sink is None else facts(attn_sink),
    )
    if results is not None and gradients is not None:
        (out, lse), (dout, dlse) = results, gradients
        key += (
            wanted,
            torch.are_deterministic_algorithms_enabled(),
            facts(out),
            facts(lse),
            None if dout is None else facts(dout),
            None if dlse is None else facts(dlse),
        )
    elif side == "backward":
        key += (wanted, torch.are_deterministic_algorithms_enabled())
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan(side, call, None, backend, needs_grad, results, gradients, wanted))
    return plan


def scaled_plan_of(
    side: Side,
    call: SparseAttnCall,
    scales: Scales,
    backend: str,
    *,
    needs_grad: bool = False,
    results: Results | None = None,
    gradients: Gradients | None = None,
    wanted: Wanted = Wanted(),  # noqa: B008  # a named tuple of constants
) -> Plan:
    """`plan_of` for a call of payloads."""
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
    tensors = (q, kv, indices, topk_length, attn_sink, scales.q, scales.kv, *(results or ()), *(gradients or ()))
    key: tuple[object, ...] = (
        *("scaled", side, backend, d_v, softmax_scale, needs_grad, wanted, scales.dtype),
        *(current().tuned_rows, torch.are_deterministic_algorithms_enabled()),
        *(None if tensor is None else facts(tensor) for tensor in tensors),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = _plans.keep(key, _plan(side, call, scales, backend, needs_grad, results, gradients, wanted))
    return plan


def _plan(
    side: Side,
    call: SparseAttnCall,
    scales: Scales | None,
    backend: str,
    needs_grad: bool,
    results: Results | None,
    gradients: Gradients | None,
    wanted: Wanted,
) -> Plan:
    check_inputs(call, scales=scales)
    if results is not None and gradients is not None:
        check_bwd_inputs(call, results, gradients, scales=scales)
    problem = SparseAttnProblem.of(call, needs_grad=needs_grad or side == "backward", scales=scales)
    traits = traits_of(call.q.device)
    decision = select(problem, traits, backend)
    chosen = decision.require_backend()
    return Plan(decision, chosen, chosen.plan(side, call, problem, traits, wanted))


def backend_names() -> tuple[str, ...]:
    """Return the values that `backend=` takes besides "auto", in the order "auto" considers them."""
    return tuple(backend.name for backend in BACKENDS)


def check_backend_name(name: str) -> None:
    """Raise `UnknownBackendError`, listing the known names, unless `name` is one of them or "auto"."""
    dispatch.check_backend_name(name, BACKENDS)


def select(
    problem: SparseAttnProblem, traits: DeviceTraits, requested: str = AUTO, hints: Hints | None = None
) -> Decision:
    """Decide who runs `problem` on a device with `traits`; a refusal is a `Decision` without backend, not an error.

    With `hints` the decision also says how the kernels would be launched at those sizes; they never change who runs it.
    """
    decision = _select(problem, traits, requested)
    backend = decision.backend
    if hints is None or backend is None:
        return decision
    call = call_like(problem, hints)
    plans = [backend.plan(side, call, problem, traits, Wanted()) for side in _sides(problem)]
    return replace(decision, launch=_described(backend, plans))


def explain(call: SparseAttnCall, requested: str, wanted: Wanted | None) -> Decision:
    """Return the decision about a checked call, with what its plans would launch; a refusal is no error.

    `wanted` says what a backward would compute, None that there will be none. Symbolic sizes have no plan.
    """
    needs_grad = wanted is not None
    decision = _select(SparseAttnProblem.of(call, needs_grad=needs_grad), traits_of(call.q.device), requested)
    sizes = (*call.q.shape, *call.kv.shape, *call.indices.shape)
    if decision.backend is None or any(isinstance(size, torch.SymInt) for size in sizes):
        return decision
    plans = [
        plan_of(side, call, requested, needs_grad=needs_grad, wanted=wanted or Wanted()).launch
        for side in _sides(decision.problem)
    ]
    return replace(decision, launch=_described(decision.backend, plans))


def _sides(problem: SparseAttnProblem) -> tuple[Side, ...]:
    return ("forward", "backward") if problem.needs_grad else ("forward",)


def _described(backend: Backend, plans: list[Any]) -> tuple[str, ...]:
    lines = [line for plan in plans for line in backend.describe(plan)]
    return tuple(dict.fromkeys(lines))  # what holds for both sides is said once


@lru_cache(maxsize=4096)  # a decision is logged once per distinct problem
def _select(problem: SparseAttnProblem, traits: DeviceTraits, requested: str) -> Decision:
    return dispatch.decide("mla::sparse_attn", BACKENDS, problem, traits, requested)

"""Who may run `mla::append_rows`, in order of preference, and the plan of a call: made once for all that look alike."""

from __future__ import annotations

from functools import lru_cache

from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.dispatch import AUTO
from mla_ops.launching import facts
from mla_ops.ops.append_rows.backend import Backend
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.ops.append_rows.eager import EagerBackend
from mla_ops.ops.append_rows.rules import check_inputs
from mla_ops.ops.append_rows.triton.backend import TritonBackend
from mla_ops.row_formats import ROW_ALIGN

# In order of preference for every call.
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[AppendRowsProblem, Backend]

Plan = dispatch.Plan[AppendRowsProblem, Backend]

_plans: dispatch.Plans[AppendRowsProblem, Backend] = dispatch.Plans()


def plan_of(call: AppendRowsCall) -> Plan:
    """Check a call and decide how it runs, or find what was decided for a call that looks alike.

    Of the tensors of `call` everything but the values and the addresses decides, and how the pool is aligned.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.append_rows`.
    """
    latent, tail, rows, pages, d_v, row_format, scale_rule, cache_scale = call
    key: tuple[object, ...] = (
        d_v,
        row_format,
        scale_rule,
        facts(latent),
        None if tail is None else facts(tail),
        facts(rows),
        facts(pages),
        pages.storage_offset() % ROW_ALIGN,
        None if cache_scale is None else facts(cache_scale),
    )
    plan = _plans.get(key)
    if plan is None:
        check_inputs(call)
        problem, traits = AppendRowsProblem.of(call), traits_of(pages.device)
        chosen = (decision := select(problem, traits)).require_backend()
        plan = _plans.keep(key, Plan(decision, chosen, chosen.plan(call, problem, traits)))
    return plan


@lru_cache(maxsize=4096)  # a decision is logged once per distinct problem
def select(problem: AppendRowsProblem, traits: DeviceTraits, requested: str = AUTO) -> Decision:
    """Decide who runs `problem` on a device with `traits`; a refusal is a `Decision` without backend, not an error."""
    return dispatch.decide("mla::append_rows", BACKENDS, problem, traits, requested)

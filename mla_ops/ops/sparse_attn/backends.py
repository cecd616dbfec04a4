"""Who may run `mla::sparse_attn`, in order of preference, and the decision between them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from mla_ops import dispatch
from mla_ops.device import DeviceTraits
from mla_ops.dispatch import AUTO
from mla_ops.ops.sparse_attn.backend import Backend
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem
from mla_ops.ops.sparse_attn.eager import EagerBackend
from mla_ops.ops.sparse_attn.triton.backend import TritonBackend

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())

Decision = dispatch.Decision[SparseAttnProblem, Backend]


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
    if hints is None or decision.backend is None:
        return decision
    return replace(decision, launch=decision.backend.describe_launch(problem, traits, hints))


@lru_cache(maxsize=4096)  # so a decision is logged once per distinct problem
def _select(problem: SparseAttnProblem, traits: DeviceTraits, requested: str) -> Decision:
    return dispatch.decide("mla::sparse_attn", BACKENDS, problem, traits, requested)

"""Which backend runs a problem, and why: a pure function over declared support, with its whole trace kept.

`select` never tries a backend and never falls back. `backend="auto"` takes the first backend of `BACKENDS` that
declares support and does not exclude itself; a named backend runs or raises. Either way every backend's reasons are in
the `Decision`, which prints as the text that errors and `mla_ops.explain` show.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from mla_ops.backends.base import Backend
from mla_ops.backends.eager import EagerBackend
from mla_ops.backends.triton import TritonBackend
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.errors import UnknownBackendError, UnsupportedProblemError
from mla_ops.problem import Hints, SparseAttnProblem
from mla_ops.validation import check_argument_types, check_inputs

_log = logging.getLogger(__name__)

# In order of preference for backend="auto".
BACKENDS: tuple[Backend, ...] = (TritonBackend(), EagerBackend())
AUTO = "auto"


@dataclass(frozen=True)
class Verdict:
    """What one backend said about a problem: it runs it when `reasons` is empty."""

    backend: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.backend}: {'; '.join(self.reasons) if self.reasons else 'runs it'}"


@dataclass(frozen=True)
class Decision:
    """The outcome of `select`: the backend, or None, and the verdict of every backend that was asked."""

    problem: SparseAttnProblem
    traits: DeviceTraits
    requested: str
    backend: Backend | None
    verdicts: tuple[Verdict, ...]
    launch: tuple[str, ...] = ()  # how it would be launched, when the decision was asked for with sizes

    def __str__(self) -> str:
        chosen = "no backend" if self.backend is None else f"backend {self.backend.name!r}"
        lines = [f'{chosen} (backend="{self.requested}") for mla::sparse_attn on {self.traits}', f"  {self.problem}"]
        lines += [f"  {verdict}" for verdict in self.verdicts]
        return "\n".join(lines + [f"  {launch}" for launch in self.launch])

    def require_backend(self) -> Backend:
        """Return the backend, or raise `UnsupportedProblemError` with the whole trace."""
        if self.backend is None:
            raise UnsupportedProblemError(str(self))
        return self.backend


def backend_names() -> tuple[str, ...]:
    """Return the values that `backend=` takes besides "auto", in the order "auto" considers them."""
    return tuple(backend.name for backend in BACKENDS)


def check_backend_name(name: str) -> None:
    """Raise `UnknownBackendError`, listing the known names, unless `name` is one of them or "auto"."""
    if name != AUTO and name not in backend_names():
        known = ", ".join(repr(known) for known in (AUTO, *backend_names()))
        raise UnknownBackendError(f"backend must be one of {known}, got {name!r}")


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


@lru_cache(maxsize=4096)
def _select(problem: SparseAttnProblem, traits: DeviceTraits, requested: str) -> Decision:
    check_backend_name(requested)
    verdicts = []
    chosen = None
    for backend in BACKENDS:
        if requested not in (AUTO, backend.name):
            continue
        reasons = backend.unsupported_reasons(problem, traits)
        if requested == AUTO:
            excluded = backend.auto_excluded_reason(problem, traits)
            reasons = reasons + ([] if excluded is None else [excluded])
        verdicts.append(Verdict(backend.name, tuple(reasons)))
        if chosen is None and not reasons:
            chosen = backend
    decision = Decision(problem, traits, requested, chosen, tuple(verdicts))
    _log.info("%s", decision)  # once per distinct problem: this function is cached
    return decision


def explain(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float = 1.0,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = AUTO,
) -> Decision:
    """Say which backend would run `mla_ops.sparse_attn` on these tensors, and what every other one lacks.

    Takes the arguments of `sparse_attn` (their values do not matter, `softmax_scale` not at all) and runs nothing.
    Print the result, or read its `backend` and `verdicts`; a refusal is `backend=None`, not an error.

    Raises:
        InvalidInputError: the arguments break the operator's contract.
        UnknownBackendError: `backend` is not a known name.
    """
    check_argument_types(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, kv, attn_sink))
    problem = SparseAttnProblem.from_tensors(q, kv, indices, d_v, needs_grad=needs_grad)
    return select(problem, traits_of(q.device), backend, Hints.from_tensors(q, kv))

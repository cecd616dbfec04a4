"""Which backend runs a problem, and why: the first that declares support, with every backend's reasons kept.

Nothing here knows an operator or a tensor. `decide` never tries a backend and never falls back: `backend="auto"` takes
the first backend that declares support and does not exclude itself; a named backend runs or raises. Either way every
backend's reasons are in the `Decision`, which prints as the text that errors and `mla_ops.explain` show.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnknownBackendError, UnsupportedProblemError

_log = logging.getLogger(__name__)

AUTO = "auto"

ProblemT = TypeVar("ProblemT")
_ProblemIn = TypeVar("_ProblemIn", contravariant=True)


class Declares(Protocol[_ProblemIn]):
    """What dispatch asks of a backend of any operator."""

    name: str

    def unsupported_reasons(self, problem: _ProblemIn, traits: DeviceTraits) -> list[str]:
        """Every reason why this backend cannot run `problem` on `traits`; each says have, want and the fix."""
        ...

    def auto_excluded_reason(self, problem: _ProblemIn, traits: DeviceTraits) -> str | None:
        """Why `backend="auto"` must not pick this backend although it could run, or None."""
        ...


BackendT = TypeVar("BackendT", bound=Declares)  # type: ignore[type-arg]


@dataclass(frozen=True)
class Verdict:
    """What one backend said about a problem: it runs it when `reasons` is empty."""

    backend: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.backend}: {'; '.join(self.reasons) if self.reasons else 'runs it'}"


@dataclass(frozen=True)
class Decision(Generic[ProblemT, BackendT]):
    """The outcome of `decide`: the backend, or None, and the verdict of every backend that was asked."""

    operator: str
    problem: ProblemT
    traits: DeviceTraits
    requested: str
    backend: BackendT | None
    verdicts: tuple[Verdict, ...]
    launch: tuple[str, ...] = ()  # how it would be launched, when the decision was asked for with sizes

    def __str__(self) -> str:
        chosen = "no backend" if self.backend is None else f"backend {self.backend.name!r}"
        lines = [f'{chosen} (backend="{self.requested}") for {self.operator} on {self.traits}', f"  {self.problem}"]
        lines += [f"  {verdict}" for verdict in self.verdicts]
        return "\n".join(lines + [f"  {launch}" for launch in self.launch])

    def require_backend(self) -> BackendT:
        """Return the backend, or raise `UnsupportedProblemError` with the whole trace."""
        if self.backend is None:
            raise UnsupportedProblemError(str(self))
        return self.backend


class Plan(NamedTuple, Generic[ProblemT, BackendT]):
    """Everything that is decided about a call before it runs."""

    decision: Decision[ProblemT, BackendT]  # problem, device and every backend's reasons
    backend: BackendT
    launch: Any  # what the backend made of it: kernels, configuration, grid


MAX_PLANS = 4096  # lengths may be new in every call


class Plans(dict[tuple[object, ...], Plan[ProblemT, BackendT]]):
    """The plans of an operator by everything of a call that decides: one look-up between dispatcher and launch.

    Not a functools.lru_cache, whose keys would keep the tensors of a miss alive: what is checked and planned on a miss
    is the call itself, what is kept is its facts.
    """

    def keep(self, key: tuple[object, ...], plan: Plan[ProblemT, BackendT]) -> Plan[ProblemT, BackendT]:
        """Keep a plan and return it."""
        if len(self) >= MAX_PLANS:
            self.clear()
        self[key] = plan
        return plan


def decide(
    operator: str, backends: Sequence[BackendT], problem: ProblemT, traits: DeviceTraits, requested: str
) -> Decision[ProblemT, BackendT]:
    """Decide who of `backends`, in order of preference, runs `problem` on a device with `traits`.

    A refusal is a `Decision` without backend, not an error; an unknown `requested` raises `UnknownBackendError`.
    """
    check_backend_name(requested, backends)
    verdicts = []
    chosen = None
    for backend in backends:
        if requested not in (AUTO, backend.name):
            continue
        reasons = backend.unsupported_reasons(problem, traits)
        if requested == AUTO:
            excluded = backend.auto_excluded_reason(problem, traits)
            reasons = reasons + ([] if excluded is None else [excluded])
        verdicts.append(Verdict(backend.name, tuple(reasons)))
        if chosen is None and not reasons:
            chosen = backend
    decision = Decision(operator, problem, traits, requested, chosen, tuple(verdicts))
    _log.info("%s", decision)
    return decision


def check_backend_name(name: str, backends: Sequence[Declares]) -> None:  # type: ignore[type-arg]
    """Raise `UnknownBackendError`, listing the known names, unless `name` is that of a backend or "auto"."""
    names = (AUTO, *(backend.name for backend in backends))
    if name not in names:
        raise UnknownBackendError(f"backend must be one of {', '.join(map(repr, names))}, got {name!r}")

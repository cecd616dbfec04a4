"""The only reader of environment variables. Settings are frozen; none changes what the operator computes.

| variable | field | default | meaning |
| --- | --- | --- | --- |
| `MLA_OPS_EAGER_WORKSPACE_MB` | `eager_workspace_mb` | 8 | MiB of gathered rows and logits in a chunk (eager backend) |
| `MLA_OPS_TUNED_ROWS` | `tuned_rows` | none | file of launch configurations that `mla-ops tune` wrote |

The environment is read when a setting is first needed, not at import, so a wrong variable is told by what needs it and
by `mla-ops doctor`. `override()` replaces fields for one context (a thread or task), which is what tests and notebooks
want.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from mla_ops.errors import InvalidSettingError


@dataclass(frozen=True)
class Settings:
    """Values in force; read them through `current()`."""

    # A gather that stays in the last-level cache is what makes chunking faster than one big gather, not only smaller.
    eager_workspace_mb: int = 8
    tuned_rows: str = ""  # a path; read when a kernel is first launched

    def __post_init__(self) -> None:
        if type(self.eager_workspace_mb) is not int or self.eager_workspace_mb < 1:
            raise InvalidSettingError(f"eager_workspace_mb must be an integer >= 1, got {self.eager_workspace_mb!r}")
        if type(self.tuned_rows) is not str:
            raise InvalidSettingError(f"tuned_rows must be a path as a string, got {self.tuned_rows!r}")


@cache
def _from_environment() -> Settings:
    settings = Settings(tuned_rows=os.environ.get("MLA_OPS_TUNED_ROWS", ""))
    text = os.environ.get("MLA_OPS_EAGER_WORKSPACE_MB")
    if text is None:
        return settings
    try:
        value = int(text)
    except ValueError:
        raise InvalidSettingError(f"MLA_OPS_EAGER_WORKSPACE_MB must be an integer >= 1, got {text!r}") from None
    return replace(settings, eager_workspace_mb=value)


# None: the environment's settings are in force.
_current: ContextVar[Settings | None] = ContextVar("mla_ops_settings", default=None)


def current() -> Settings:
    """Return the settings of this context: those of the innermost `override`, else the environment's.

    Raises:
        InvalidSettingError: an environment variable has a value that its setting cannot take.
    """
    return _current.get() or _from_environment()


@contextmanager
def override(**fields: Any) -> Iterator[Settings]:
    """Replace fields of the settings inside a `with` block; an unknown field raises `InvalidSettingError`."""
    known = Settings.__dataclass_fields__
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise InvalidSettingError(f"unknown setting {', '.join(unknown)}; expected one of {', '.join(known)}")
    settings = replace(current(), **fields)
    token = _current.set(settings)
    try:
        yield settings
    finally:
        _current.reset(token)


class _InForce:
    __slots__ = ("_settings", "_token")

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> None:
        self._token = _current.set(self._settings)

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)


_NOTHING_TO_DO = nullcontext()


def use(settings: Settings) -> AbstractContextManager[None]:
    """Put settings in force that were current elsewhere, in the thread of a forward, say, inside a `with` block."""
    return _NOTHING_TO_DO if settings is current() else _InForce(settings)


def cxx_compiler() -> str | None:
    """Path of the C++ compiler that Inductor would call (`CXX`, else the platform's usual one), or None without one."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))

"""Optional frameworks: imported on request, refused with the pip line, questioned when their version is untested.

What an adapter changes in a framework's objects it hands back as an `Undo`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from types import ModuleType, TracebackType
from typing import Self

from mla_ops.errors import MissingExtraError


class Undo:
    """The way back from a change: call it, or leave its `with` block. A second time does nothing."""

    def __init__(self, steps: ExitStack) -> None:
        self._steps = steps

    def __call__(self) -> None:
        """Put everything back as it was found."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()


def import_extra(module: str, *, feature: str, package: str, extra: str) -> ModuleType:
    """Import `module` of the optional `package`, or raise `MissingExtraError` with the pip line for `extra`.

    A package that is there but cannot be loaded counts as missing and says why: builds without their compiled half
    raise RuntimeError (Transformer Engine's meta package) or OSError (a shared library) from their import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The framework itself, or something that it needs and its own installation left out.
        absent = error.name is not None and module.split(".")[0] == error.name.split(".")[0]
        problem = "is not installed" if absent else f"cannot be imported ({type(error).__name__}: {error})"
        raise MissingExtraError(feature, package, extra, problem=problem) from error
    except (ImportError, RuntimeError, OSError) as error:
        problem = f"cannot be imported ({type(error).__name__}: {error})"
        raise MissingExtraError(feature, package, extra, problem=problem) from error


def warn_if_untested(package: str, tested: Sequence[str]) -> str:
    """Return the installed version of `package`; warn, once a process, unless it starts with one of `tested`.

    Args:
        package: the distribution's name, which must be installed.
        tested: version prefixes at a dot, such as "0.16.1" or "5.23".
    """
    return _version_after_warning(package, tuple(tested))


@cache
def _version_after_warning(package: str, tested: tuple[str, ...]) -> str:
    version = importlib.metadata.version(package)
    if not any(f"{version}.".startswith(f"{prefix}.") for prefix in tested):
        warnings.warn(
            f"mla_ops is tested with {package} {', '.join(tested)}; {version} is installed. It may work; if it does "
            f"not, install a tested version before reporting a bug",
            RuntimeWarning,
            stacklevel=3,
        )
    return version

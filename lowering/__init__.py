"""The Inductor lowering's switch.

This version has no lowering: a compiled graph calls the operators as extern kernels, which needs nothing enabled and
is complete. `enable()` therefore refuses, rather than leave a caller believing that kernels are inlined.
"""

if __name__ != "mla_ops.lowering":
    raise ImportError(f"import mla_ops.lowering, not {__name__}: a second copy would have a switch of its own")

from mla_ops.errors import UnsupportedProblemError

__all__ = ["disable", "enable", "is_enabled"]


def enable() -> None:
    """Raise `UnsupportedProblemError`: there is no lowering to install in this version."""
    raise UnsupportedProblemError(
        "mla_ops.lowering.enable(): this version has no Inductor lowering; compiled graphs call mla::sparse_attn as an "
        "extern kernel, which needs nothing enabled"
    )


def disable() -> None:
    """Leave the operators as extern kernels in compiled graphs, as they are."""


def is_enabled() -> bool:
    """Return whether compiled graphs get kernels inlined; False in this version."""
    return False

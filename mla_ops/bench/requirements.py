"""Optional packages of the commands."""

from __future__ import annotations

import importlib

from mla_ops.errors import MissingExtraError


def require(module: str, command: str) -> None:
    """Raise `MissingExtraError` with the pip line unless `module`, of the extra "demo", can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(command, module, "demo") from None

"""What the commands need before hours of work: optional packages, a place for the results."""

from __future__ import annotations

import importlib
from pathlib import Path

from mla_ops.errors import InvalidInputError, MissingExtraError


def require(module: str, command: str) -> None:
    """Raise `MissingExtraError` with the pip line unless `module`, of the extra "demo", can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(command, module, "demo") from None


def require_writable(path: Path) -> None:
    """Raise `InvalidInputError` unless the file `path` can be written; makes its folder, leaves the file as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise InvalidInputError(
            f"--out must be where {path.name} can be written, got {path} ({error.strerror}: {error.filename})"
        ) from None

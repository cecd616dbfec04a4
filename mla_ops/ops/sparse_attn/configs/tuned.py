"""Configurations that a user measured with `mla-ops tune`: exact problems that go before the nearest row of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mla_ops.errors import InvalidSettingError
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig


@dataclass(frozen=True)
class TunedRow:
    """The fastest configurations found for one problem on one architecture; None where only the other was tuned."""

    arch: int
    d_total: int
    d_v: int
    heads: int  # per KV group
    element_size: int
    fwd: FwdConfig | None = None
    bwd: tuple[BwdConfig, ...] | None = None

    @property
    def key(self) -> tuple[int, ...]:
        """What a problem must equal to take this row."""
        return self.arch, self.heads, self.d_total, self.d_v, self.element_size


@cache
def tuned_row(path: str, arch: int, heads: int, d_total: int, d_v: int, element_size: int) -> TunedRow | None:
    """Return the row of the file `path` for a problem, the last one of equals; None without one or without a file."""
    rows = _rows_of(path) if path else ()
    found = [row for row in rows if row.key == (arch, heads, d_total, d_v, element_size)]
    return found[-1] if found else None


def read_rows(path: str | Path) -> tuple[TunedRow, ...]:
    """Read the rows of a file that `write_rows` wrote.

    Raises:
        InvalidSettingError: there is no such file, or it isn't one of rows.
    """
    try:
        return tuple(_row(fields) for fields in json.loads(Path(path).read_text())["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidSettingError(
            f"tuned_rows must name a file that mla-ops tune wrote, got {str(path)!r} ({type(error).__name__}: {error})"
        ) from None


def write_rows(path: Path, header: dict[str, Any], rows: Sequence[TunedRow]) -> None:
    """Write rows as JSON, with where and how they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


_rows_of = cache(read_rows)


def _row(fields: dict[str, Any]) -> TunedRow:
    fwd, bwd = fields.pop("fwd"), fields.pop("bwd")
    return TunedRow(
        **fields,
        fwd=None if fwd is None else FwdConfig(**fwd),
        bwd=None if bwd is None else tuple(BwdConfig(**config) for config in bwd),
    )

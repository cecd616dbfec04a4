"""Configurations that a user measured with `mla-ops tune`: exact problems that go before the nearest row of a table.

A file is read once a process, and what was read is what counts from then on, for launches as for the keys of compile
caches: a file that is rewritten under a running process changes neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from mla_ops.errors import InvalidSettingError
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, ConfigKey, FwdConfig


@dataclass(frozen=True)
class TunedRow:
    """The fastest configurations of the portable kernels for one problem; None where only the other side was tuned.

    `bwd` is one pass or two; see `launch.Row`.
    """

    arch: int
    d_total: int
    d_v: int
    heads: int  # per KV group
    element_size: int
    fwd: FwdConfig | None = None
    bwd: tuple[BwdConfig, ...] | None = None

    def is_for(self, key: ConfigKey) -> bool:
        """Whether the row was tuned for exactly the problem of `key`."""
        own = (self.arch, self.heads, self.d_total, self.d_v, self.element_size)
        return own == (key.arch, key.heads_per_group, key.d_total, key.d_v, key.element_size)


@dataclass(frozen=True)
class TunedRows:
    """A file as it was read."""

    rows: tuple[TunedRow, ...]
    digest: str  # of the bytes


def tuned_row(path: str, key: ConfigKey) -> TunedRow | None:
    """Return the row of the file `path` for a problem, the last one of equals; None without one or without a file."""
    rows = read_once(path).rows if path else ()
    return next((row for row in reversed(rows) if row.is_for(key)), None)


@cache
def read_once(path: str) -> TunedRows:
    """Return the file `path` as it was when this process first read it; errors as of `read_rows`."""
    return _read(path)


def read_rows(path: str | Path) -> tuple[TunedRow, ...]:
    """Read the rows of a file that `write_rows` wrote, as it is now.

    Raises:
        InvalidSettingError: there is no such file, it isn't one of rows, or a field of a row is missing, unknown or
            impossible; the message names file, row and field.
    """
    return _read(path).rows


def write_rows(path: Path, header: dict[str, Any], rows: Sequence[TunedRow]) -> None:
    """Write rows as JSON, with where and how they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def _read(path: str | Path) -> TunedRows:
    try:
        data = Path(path).read_bytes()
        content = json.loads(data)
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise ValueError('it has no list "rows"')
        rows = tuple(_row(index, row) for index, row in enumerate(content["rows"]))
    except (OSError, ValueError) as error:
        raise InvalidSettingError(
            f"tuned_rows must name a file that mla-ops tune wrote, got {str(path)!r} ({type(error).__name__}: "
            f"{error}); tune again, or unset MLA_OPS_TUNED_ROWS"
        ) from None
    return TunedRows(rows, hashlib.sha256(data).hexdigest())


def _row(index: int, row: object) -> TunedRow:
    where = f"row {index}"
    values = _checked(where, row, TunedRow, {**_SIZES, "fwd": _is_object_or_none, "bwd": _is_list_or_none})
    fwd, bwd = values.pop("fwd"), values.pop("bwd")
    if bwd is not None and len(bwd) not in (1, 2):
        raise ValueError(f"{where}: bwd must hold one pass or two, got {len(bwd)}")
    return TunedRow(
        **values,
        fwd=None if fwd is None else FwdConfig(**_checked(f"{where}: fwd", fwd, FwdConfig, _CONFIG)),
        bwd=None
        if bwd is None
        else tuple(
            BwdConfig(**_checked(f"{where}: bwd[{i}]", config, BwdConfig, _CONFIG)) for i, config in enumerate(bwd)
        ),
    )


def _checked(where: str, value: object, cls: type, rules: dict[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """Return `value` as arguments of `cls`, whose fields `rules` knows, or raise ValueError naming the field."""
    names = [field.name for field in fields(cls)]
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {value!r}")
    for name in (*names, *value):
        if name not in value or name not in names:
            raise ValueError(f"{where}: field {name} is {'missing' if name in names else 'unknown'}")
        if not rules[name](value[name]):
            raise ValueError(f"{where}: {name} can't be {value[name]!r}")
    return dict(value)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_block(value: object) -> bool:
    """Whether `value` is a power of two that tensor cores take as a side of a product."""
    return type(value) is int and value >= 16 and value & (value - 1) == 0


def _is_object_or_none(value: object) -> bool:
    return value is None or isinstance(value, dict)


def _is_list_or_none(value: object) -> bool:
    return value is None or isinstance(value, list)


_SIZES: dict[str, Callable[[Any], bool]] = dict.fromkeys(("arch", "d_total", "d_v", "heads", "element_size"), _is_size)
_CONFIG: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("block_h", "block_k", "max_chunk"), _is_block),
    "num_warps": lambda value: value in (1, 2, 4, 8, 16, 32) and type(value) is int,
    "num_stages": _is_size,
    **dict.fromkeys(("is_key_major", "is_ahead"), lambda value: type(value) is bool),
    "max_registers": lambda value: value is None or (_is_size(value) and value <= 255),
}

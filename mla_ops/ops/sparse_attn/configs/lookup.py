"""Launch configurations: a table of rows per architecture, and the one rule that finds the row for a problem.

NOTE [The nearest row]
A problem takes, among the rows of its element size, the one nearest in log2(d_total), log2(d_v) and log2(heads per
group), summed; the first of equals. The row's head block is cut to the heads that exist, and the configuration is
shrunk (one stage, then fewer keys, then fewer heads) until its shared memory fits the device. So a problem is refused
only where 16 rows of q, of dout and of keys do not fit, and a better row changes what is near it and nothing else.

A row that a user tuned (`tuned.py`) goes first where it is for exactly this problem.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import log2
from typing import Literal, TypeVar

from mla_ops.ops.sparse_attn.configs import sm80, sm90, sm100, sm120
from mla_ops.ops.sparse_attn.configs.head_dims import FAMILIES
from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    Config,
    FwdConfig,
    HopperBwdConfig,
    HopperConfig,
    Row,
    bwd_smem_bytes,
    fwd_smem_bytes,
    hopper_bwd_smem_bytes,
    hopper_smem_bytes,
    shrink_to_fit,
)
from mla_ops.ops.sparse_attn.configs.tuned import tuned_row

# The widest row the kernels are launched for: its query, its gradient and 16 keys still fit the registers of a block.
MAX_D_TOTAL = 1024

# In ascending order; an architecture takes the last table that is not newer than itself.
TABLES: tuple[tuple[int, tuple[Row, ...]], ...] = (
    (80, sm80.ROWS),
    (90, sm90.ROWS),
    (100, sm100.ROWS),
    (120, sm120.ROWS),
)


def table_of(arch: int) -> tuple[Row, ...]:
    """Return the rows for a compute capability, given as major * 10 + minor."""
    return [rows for first_arch, rows in TABLES if first_arch <= arch][-1]


def nearest_rows(arch: int, heads: int, d_total: int, d_v: int, element_size: int) -> list[Row]:
    """Return the rows of an element size, nearest first; see NOTE [The nearest row]."""

    def distance(row: Row) -> float:
        row_d_total, row_d_v = FAMILIES[row.family]
        return sum(abs(log2(a / b)) for a, b in ((row_d_total, d_total), (row_d_v, d_v), (row.heads, heads)))

    return sorted((row for row in table_of(arch) if row.element_size == element_size), key=distance)


@cache
def forward_config(
    arch: int, smem_bytes: int, heads: int, d_total: int, d_v: int, element_size: int, tuned: str = ""
) -> FwdConfig | None:
    """Return how to launch the forward of a problem with `heads` heads per group, or None when nothing fits.

    `tuned` is the path of a file of tuned rows, if there is one.
    """
    own = tuned_row(tuned, arch, heads, d_total, d_v, element_size)
    row = nearest_rows(arch, heads, d_total, d_v, element_size)[0]
    if own is not None and own.fwd is not None:
        row = replace(row, fwd=own.fwd)
    return _fitted_forward(row, arch, smem_bytes, heads, d_total, d_v)


_Hopper = TypeVar("_Hopper", HopperConfig, HopperBwdConfig)

# The narrowest value that the warp-specialised kernels take: below, their second value group would have nothing to do.
MIN_HOPPER_D_V = 256


@cache
def hopper_config(arch: int, smem_bytes: int, d_total: int, d_v: int, element_size: int) -> HopperConfig | None:
    """Return how to launch the warp-specialised forward of wide rows on sm90, or None where it can't run.

    Rows are copied 16 bytes at a time, so widths are multiples of 8 two-byte channels.
    """
    covering = _covering_hopper(sm90.HOPPER, arch, d_total, d_v, element_size)
    return next((config for config in covering if hopper_smem_bytes(config) <= smem_bytes), None)


@cache
def hopper_backward_config(
    arch: int, smem_bytes: int, d_total: int, d_v: int, element_size: int
) -> HopperBwdConfig | None:
    """Return how to launch the warp-specialised backward, or None where it can't run: see `hopper_config`."""
    covering = _covering_hopper(sm90.HOPPER_BWD, arch, d_total, d_v, element_size)
    return next((config for config in covering if hopper_bwd_smem_bytes(config) <= smem_bytes), None)


def _covering_hopper(
    table: tuple[tuple[int, int, _Hopper], ...], arch: int, d_total: int, d_v: int, element_size: int
) -> list[_Hopper]:
    """Return the configurations of a table that cover a row, the narrowest first."""
    if arch != 90 or element_size != 2 or d_v < MIN_HOPPER_D_V or d_v % 8 or d_total % 8:
        return []
    return [config for max_d_v, max_d_total, config in table if d_v <= max_d_v and d_total <= max_d_total]


@cache
def is_tuned(
    side: Literal["fwd", "bwd"], arch: int, heads: int, d_total: int, d_v: int, element_size: int, tuned: str
) -> bool:
    """Return whether a user's file holds a side of the plain kernels for exactly this problem."""
    own = tuned_row(tuned, arch, heads, d_total, d_v, element_size)
    return own is not None and getattr(own, side) is not None


@cache
def backward_configs(
    arch: int,
    smem_bytes: int,
    heads: int,
    d_total: int,
    d_v: int,
    element_size: int,
    tuned: str = "",
    is_deterministic: bool = False,
) -> tuple[BwdConfig, ...] | None:
    """Return how to launch the backward: one pass, or a dq pass and a dkv pass; None when one of them does not fit."""
    own = tuned_row(tuned, arch, heads, d_total, d_v, element_size)
    row = nearest_rows(arch, heads, d_total, d_v, element_size)[0]
    if own is not None and own.bwd is not None:
        row = replace(row, bwd=own.bwd, placed=None)
    return _fitted_backward(row, arch, smem_bytes, heads, d_total, d_v, is_deterministic)


def forward_candidates(
    arch: int, smem_bytes: int, heads: int, d_total: int, d_v: int, element_size: int, tuned: str = "", *, count: int
) -> list[FwdConfig]:
    """Return up to `count` different configurations: `forward_config` first, then those of the nearest rows."""
    first = forward_config(arch, smem_bytes, heads, d_total, d_v, element_size, tuned)
    rows = nearest_rows(arch, heads, d_total, d_v, element_size)
    configs = [first, *(_fitted_forward(row, arch, smem_bytes, heads, d_total, d_v) for row in rows)]
    return list(dict.fromkeys(config for config in configs if config is not None))[:count]


def backward_candidates(
    arch: int,
    smem_bytes: int,
    heads: int,
    d_total: int,
    d_v: int,
    element_size: int,
    tuned: str = "",
    is_deterministic: bool = False,
    *,
    count: int,
) -> list[tuple[BwdConfig, ...]]:
    """Return up to `count` different ways to launch the backward: `backward_configs` first, then the nearest rows'."""
    first = backward_configs(arch, smem_bytes, heads, d_total, d_v, element_size, tuned, is_deterministic)
    rows = nearest_rows(arch, heads, d_total, d_v, element_size)
    others = (_fitted_backward(row, arch, smem_bytes, heads, d_total, d_v, is_deterministic) for row in rows)
    configs = [first, *others]
    return list(dict.fromkeys(config for config in configs if config is not None))[:count]


def _fitted_forward(row: Row, arch: int, smem_bytes: int, heads: int, d_total: int, d_v: int) -> FwdConfig | None:
    return shrink_to_fit(
        _cut_heads(row.fwd, heads), smem_bytes, lambda c: fwd_smem_bytes(c, arch, d_total, d_v, row.element_size)
    )


def _fitted_backward(
    row: Row, arch: int, smem_bytes: int, heads: int, d_total: int, d_v: int, is_deterministic: bool
) -> tuple[BwdConfig, ...] | None:
    fitting = []
    for config in (row.placed,) if is_deterministic and row.placed else row.bwd:
        fitted = shrink_to_fit(
            _cut_heads(config, heads), smem_bytes, lambda c: bwd_smem_bytes(c, arch, d_total, d_v, row.element_size)
        )
        if fitted is None:
            return None
        fitting.append(fitted)
    return tuple(fitting)


def _cut_heads(config: Config, heads: int) -> Config:
    """Return `config` with no more heads in a block than there are, padded to the 16 that a product needs."""
    needed = max(16, 1 << (heads - 1).bit_length())
    return config if config.block_h <= needed else replace(config, block_h=needed)

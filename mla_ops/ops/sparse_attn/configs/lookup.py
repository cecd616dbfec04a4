"""The one rule that finds the launch configuration of a problem in the tables, of which there is one an architecture.

NOTE [The nearest row]
A problem takes, among the rows of its element size, the one nearest in log2(d_total), log2(d_v) and log2(heads per
group), summed; the first of equals. The row's head block is cut to the heads that exist, and the configuration is
shrunk (one stage, then fewer keys, then fewer heads) until its shared memory fits the device. So a problem is refused
only where 16 rows of q, of dout and of keys do not fit, and a better row changes what is near it and nothing else.

A row that a user tuned (`tuned.py`) goes before the nearest row of a table where it is for exactly this problem.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import log2
from typing import TypeVar

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.call import SparseAttnProblem
from mla_ops.ops.sparse_attn.configs import sm80, sm90, sm100, sm120
from mla_ops.ops.sparse_attn.configs.head_dims import FAMILIES
from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    Config,
    ConfigKey,
    FewHeadsConfig,
    FwdConfig,
    HopperBwdConfig,
    HopperConfig,
    Row,
    bwd_smem_bytes,
    few_heads_smem_bytes,
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


def key_of(problem: SparseAttnProblem, traits: DeviceTraits) -> ConfigKey:
    """Return what the tables are asked with for a problem on a device."""
    heads = max(1, problem.heads_per_group)  # a problem without heads launches nothing and is asked about all the same
    element_size = problem.dtype.itemsize
    has_payloads = problem.kv_format != "dense"
    return ConfigKey(traits.arch, traits.smem_bytes, heads, problem.d_total, problem.d_v, element_size, has_payloads)


def nearest_rows(key: ConfigKey) -> list[Row]:
    """Return the rows of the element size of `key`, nearest first; see NOTE [The nearest row]."""

    def distance(row: Row) -> float:
        d_total, d_v = FAMILIES[row.family]
        pairs = ((d_total, key.d_total), (d_v, key.d_v), (row.heads, key.heads_per_group))
        return sum(abs(log2(a / b)) for a, b in pairs)

    return sorted((row for row in table_of(key.arch) if row.element_size == key.element_size), key=distance)


@cache
def forward_config(key: ConfigKey, tuned: str = "") -> FwdConfig | None:
    """Return how to launch the portable forward, or None when nothing fits.

    `tuned` is the path of a file of tuned rows, if there is one.
    """
    own = tuned_row(tuned, key)
    row = nearest_rows(key)[0]
    if own is not None and own.fwd is not None:
        row = replace(row, fwd=own.fwd)
    return _fitted_forward(row, key)


@cache
def backward_configs(key: ConfigKey, tuned: str = "", is_deterministic: bool = False) -> tuple[BwdConfig, ...] | None:
    """Return how to launch the portable backward: one pass, or a dq pass and a dkv pass; None when one does not fit.

    A tuned row was measured with atomic sums: the deterministic pass, which stores rows, keeps that of the table.
    """
    row = nearest_rows(key)[0]
    if is_deterministic:
        return _fitted_backward((row.placed,) if row.placed else row.bwd, key)
    own = tuned_row(tuned, key)
    return _fitted_backward(row.bwd if own is None or own.bwd is None else own.bwd, key)


def forward_candidates(key: ConfigKey, tuned: str = "", *, count: int) -> list[FwdConfig]:
    """Return up to `count` different configurations: `forward_config` first, then what the nearest rows hold."""
    configs = [forward_config(key, tuned), *(_fitted_forward(row, key) for row in nearest_rows(key))]
    return list(dict.fromkeys(config for config in configs if config is not None))[:count]


def backward_candidates(
    key: ConfigKey, tuned: str = "", is_deterministic: bool = False, *, count: int
) -> list[tuple[BwdConfig, ...]]:
    """Return up to `count` different ways to launch the backward: `backward_configs` first, then the nearest rows'."""
    rows = nearest_rows(key)
    passes = [(row.placed,) if is_deterministic and row.placed else row.bwd for row in rows]
    configs = [backward_configs(key, tuned, is_deterministic), *(_fitted_backward(each, key) for each in passes)]
    return list(dict.fromkeys(config for config in configs if config is not None))[:count]


def _fitted_forward(row: Row, key: ConfigKey) -> FwdConfig | None:
    return shrink_to_fit(
        _cut_heads(row.fwd, key.heads_per_group), key.smem_bytes, lambda config: fwd_smem_bytes(config, key)
    )


def _fitted_backward(passes: tuple[BwdConfig, ...], key: ConfigKey) -> tuple[BwdConfig, ...] | None:
    fitting = []
    for config in passes:
        cut = _cut_heads(config, key.heads_per_group)
        fitted = shrink_to_fit(cut, key.smem_bytes, lambda config: bwd_smem_bytes(config, key))
        if fitted is None:
            return None
        fitting.append(fitted)
    return tuple(fitting)


def _cut_heads(config: Config, heads_per_group: int) -> Config:
    """Return `config` with no more heads in a block than there are, padded to the 16 that a product needs."""
    needed = max(16, 1 << (heads_per_group - 1).bit_length())
    return config if config.block_h <= needed else replace(config, block_h=needed)


_Hopper = TypeVar("_Hopper", HopperConfig, HopperBwdConfig, FewHeadsConfig)

# The narrowest value that the warp-specialised kernels take: below, their second value group would have nothing to do.
MIN_HOPPER_D_V = 256


@cache
def hopper_config(key: ConfigKey) -> HopperConfig | None:
    """Return how to launch the warp-specialised forward of wide rows on sm90, or None where it can't run.

    Rows are copied 16 bytes at a time, so widths are multiples of 8 two-byte channels.
    """
    covering = _covering(sm90.HOPPER, key)
    return next((config for config in covering if hopper_smem_bytes(config) <= key.smem_bytes), None)


@cache
def few_heads_config(key: ConfigKey, *, has_scales: bool = False) -> FewHeadsConfig | None:
    """Return how to launch the warp-specialised forward for few heads, or None where it can't run."""
    covering = [config for config in _covering(sm90.FEW_HEADS, key) if config.block_h >= key.heads_per_group]
    return next((c for c in covering if few_heads_smem_bytes(c, has_scales=has_scales) <= key.smem_bytes), None)


@cache
def hopper_backward_config(key: ConfigKey) -> HopperBwdConfig | None:
    """Return how to launch the warp-specialised backward, or None where it can't run: see `hopper_config`."""
    covering = _covering(sm90.HOPPER_BWD, key)
    return next((config for config in covering if hopper_bwd_smem_bytes(config) <= key.smem_bytes), None)


def _covering(table: tuple[tuple[int, int, _Hopper], ...], key: ConfigKey) -> list[_Hopper]:
    """Return the configurations of a table that cover a row, the narrowest first."""
    if key.arch != 90 or key.element_size != 2 or key.d_v < MIN_HOPPER_D_V or key.d_v % 8 or key.d_total % 8:
        return []
    return [config for max_d_v, max_d_total, config in table if key.d_v <= max_d_v and key.d_total <= max_d_total]

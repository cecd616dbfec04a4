"""Launch configurations as values, and the shared-memory arithmetic that decides whether one fits a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple


class ConfigKey(NamedTuple):
    """What launch configurations are chosen by. Lengths are no part of it: they change from call to call."""

    arch: int  # CUDA compute capability as major * 10 + minor
    smem_bytes: int  # shared memory one thread block may opt in to
    heads: int  # index heads per KV group
    head_dim: int
    element_size: int  # bytes of a channel: 1 for e4m3, 2 for bf16 and fp16, 4 for fp32


# What a program holds while something else passes by; see `kernels/scores.py`.
Way = Literal["passing heads", "passing keys", "head rows", "wide"]


@dataclass(frozen=True)
class ScoresConfig:
    """How to launch a kernel of `kernels/scores.py`."""

    way: Way
    block_rows: int  # queries of one program; heads of one step where heads are rows
    block_k: int  # keys of one tile
    width: int  # channels of a chunk of a row, a power of two
    chunks: int  # that cover a row
    num_warps: int
    num_stages: int
    key_tiles: int = 1  # of one program, where keys pass by
    max_registers: int | None = None  # per thread, where more of them would only keep other programs off the SM


@dataclass(frozen=True)
class SelectConfig:
    """How to launch the selection of rows in registers: one program a row."""

    block: int  # keys that a program holds
    num_warps: int
    max_registers: int | None = None


@dataclass(frozen=True)
class StreamConfig:
    """How to launch the selection of long rows, whole or split over programs."""

    chunk: int  # keys read at a time
    buffer: int  # keys that may be gathered, at least topk + chunk
    sample: int
    num_warps: int
    max_registers: int | None = None


def launch_options(config: ScoresConfig | SelectConfig | StreamConfig) -> dict[str, int]:
    """Return what Triton takes beside the kernel's own arguments."""
    options = {"num_warps": config.num_warps}
    return options if config.max_registers is None else {**options, "maxnreg": config.max_registers}


# Bytes for what warps exchange. Seen in offline compiles.
_SMALL_BYTES = 1024


def smem_bytes(config: ScoresConfig, key: ConfigKey) -> int:
    """Return an upper bound of the shared memory of a scores kernel."""
    width = config.width * config.chunks
    rows, keys = config.block_rows * width * key.element_size, config.block_k * width * key.element_size
    # The tile of results is staged to be stored 16 bytes at a time.
    staged = 4 * config.block_rows * config.block_k
    weights = 4 * config.block_rows * config.num_stages
    match config.way:
        case "passing heads":
            operands = keys + config.num_stages * rows + weights
        case "passing keys":
            operands = key.heads * rows + config.num_stages * keys + 4 * config.num_stages * config.block_k
        case "head rows":
            operands, staged = keys + config.num_stages * rows + weights, 4 * config.block_rows * 16
        case "wide":
            chunk = (config.block_rows + config.block_k) * config.width * key.element_size
            operands = config.num_stages * chunk
    return operands + staged + _SMALL_BYTES


def fitted(config: ScoresConfig, key: ConfigKey) -> ScoresConfig | None:
    """Return `config`, or the first that fits of: fewer stages, fewer keys, fewer rows; None when none does."""
    while smem_bytes(config, key) > key.smem_bytes:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > 32:
            config = replace(config, block_k=config.block_k // 2)
        elif config.block_rows > 16:
            config = replace(config, block_rows=config.block_rows // 2)
        else:
            return None
    return config

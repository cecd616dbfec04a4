"""How kernels that gather rows are tiled: a configuration as a value, the pieces of a row, and a table's nearest row.

NOTE [The nearest row of a table]
A problem takes, among the rows for its architecture and element size, the one nearest in log2(width) and log2(heads per
group), summed; the first of equals. Its block of heads is cut to the heads that exist. Where its shared memory does not
fit the device, blocks are halved to 32 keys; a kernel with one product then streams columns (NOTE [Streamed rows] in
`mla_ops/kernels/primitives.py`), and others shrink further (one stage, 16 keys, fewer heads): a copy that does not pass
through registers is worth more than a longer block of keys. A better row changes what is near it and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import log2
from typing import NamedTuple

from mla_ops.device import DeviceTraits

# Bytes of small buffers in shared memory: positions, and what warps exchange. Seen in offline compiles.
SMALL_BYTES = 2048

# An architecture without rows of its own takes those that fit all from compute capability 8.0 on.
DEFAULT_ARCH = 80


@dataclass(frozen=True)
class TileConfig:
    """How to launch a kernel that gathers rows and multiplies them with the queries of some heads."""

    block_h: int  # heads of one product
    block_k: int  # rows gathered per step; 64 and more make wgmma tiles, fewer run as mma.sync
    max_chunk: int  # widest piece a row is cut into
    num_warps: int
    num_stages: int  # 1: rows pass through registers; more: asynchronous copies into stages - 1 or stages buffers
    max_registers: int | None = None  # per thread, where more of them would only keep other programs off the SM
    columns: int | None = None  # of a row, held at a time; None: all, and the product streams nothing

    @property
    def options(self) -> dict[str, int]:
        """What Triton takes beside the kernel's own arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


class TileKey(NamedTuple):
    """What configurations are chosen by."""

    arch: int  # CUDA compute capability as major * 10 + minor
    smem_bytes: int  # shared memory one thread block may opt in to
    heads: int  # that share a KV row
    width: int  # channels of a row
    element_size: int  # bytes of a channel

    @classmethod
    def of(cls, traits: DeviceTraits, heads: int, width: int, element_size: int) -> TileKey:
        """Return the key of a problem on a device; a problem without heads, which launches nothing, has one too."""
        return cls(traits.arch, traits.smem_bytes, max(1, heads), width, element_size)


@dataclass(frozen=True)
class TileRow:
    """One line of a table: the configuration made for a width and a number of heads."""

    heads: int
    width: int
    config: TileConfig
    element_size: int = 2  # bytes of a channel: 2 for bf16 and fp16, 4 for fp32
    arch: int = DEFAULT_ARCH


@cache
def chunk_widths(width: int, max_chunk: int) -> tuple[int, int]:
    """Return (BLOCK_D, BLOCK_T): a row is cut into whole pieces of BLOCK_D, one at least, and its rest into BLOCK_T.

    Both are powers of two. The cheapest cut wins: a further piece costs about as much as 32 channels of padding, two
    tensor-core instructions' depth.
    """
    widths = [piece for piece in (16, 32, 64, 128, 256, 512) if piece <= max_chunk]

    def cost(block_d: int, block_t: int) -> tuple[int, int]:
        whole, rest = pieces(width, block_d, block_t)
        return whole * block_d + rest * block_t + 32 * (whole + rest), -block_d

    return min(((d, t) for d in widths for t in widths if t <= d), key=lambda pair: cost(*pair))


def pieces(width: int, block_d: int, block_t: int) -> tuple[int, int]:
    """Return how many pieces of each kind a row has; the kernels count them alike."""
    whole = max(1, width // block_d)
    return whole, -(-max(0, width - whole * block_d) // block_t)


def padded_width(width: int, max_chunk: int) -> int:
    """Return the channels held of a row, padding included."""
    block_d, block_t = chunk_widths(width, max_chunk)
    whole, rest = pieces(width, block_d, block_t)
    return whole * block_d + rest * block_t


def row_buffers(config: TileConfig, arch: int) -> int:
    """Return how many blocks of rows are in shared memory at a time.

    Asynchronous products read a block while the next ones arrive; the others have copied it to registers by then.
    """
    if config.num_stages == 1:
        return 1
    is_asynchronous = 90 <= arch < 120 and config.block_k >= 64 and config.num_warps >= 4
    return config.num_stages if is_asynchronous else config.num_stages - 1


def product_smem_bytes(config: TileConfig, key: TileKey) -> int:
    """Return an upper bound of the shared memory of a kernel with one product: queries and the buffers of rows."""
    buffers = row_buffers(config, key.arch)
    if config.columns is not None:
        return buffers * (config.block_h + config.block_k) * config.columns * key.element_size + SMALL_BYTES
    rows = config.block_h + config.block_k * buffers
    return rows * padded_width(key.width, config.max_chunk) * key.element_size + SMALL_BYTES


def product_pieces(config: TileConfig, width: int) -> tuple[int, int, bool]:
    """Return BLOCK_D, BLOCK_T and IS_STREAMED of a kernel with one product."""
    if config.columns is not None:
        return config.columns, 16, True
    return *chunk_widths(width, config.max_chunk), False


def nearest_config(rows: Sequence[TileRow], key: TileKey) -> TileConfig:
    """Return the configuration of the nearest row, whether it fits or not, with no more heads than there are."""

    def distance(row: TileRow) -> float:
        return abs(log2(row.width / key.width)) + abs(log2(row.heads / key.heads))

    arch = key.arch if any(row.arch == key.arch for row in rows) else DEFAULT_ARCH
    config = min((r for r in rows if (r.arch, r.element_size) == (arch, key.element_size)), key=distance).config
    return replace(config, block_h=min(config.block_h, max(16, 1 << (key.heads - 1).bit_length())))


def product_config(rows: Sequence[TileRow], key: TileKey) -> TileConfig:
    """Return how to launch a kernel with one product, at any width."""
    config = nearest_config(rows, key)
    while config.block_k > 32 and product_smem_bytes(config, key) > key.smem_bytes:
        config = replace(config, block_k=config.block_k // 2)
    if product_smem_bytes(config, key) > key.smem_bytes:
        # 3 * (64 + 64) pieces of 64 channels: 49 KB in bf16, 98 KB in fp32.
        config = replace(config, block_k=64, columns=64, num_stages=3)
    return config


def shrunk(config: TileConfig, key: TileKey, smem_bytes: Callable[[TileConfig, TileKey], int]) -> TileConfig | None:
    """Return `config`, shrunk until it fits the device, or None where 16 heads and 16 keys do not fit."""
    while smem_bytes(config, key) > key.smem_bytes:
        if config.num_stages > 1 and config.block_k <= 32:
            config = replace(config, num_stages=1)
        elif config.block_k > 16:
            config = replace(config, block_k=config.block_k // 2)
        elif config.block_h > 16:
            config = replace(config, block_h=config.block_h // 2)
        else:
            return None
    return config

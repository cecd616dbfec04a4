"""Launch configurations of both sides, and which runs a problem: see NOTE [The nearest row of a table]."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from mla_ops.tiling import (
    SMALL_BYTES,
    TileConfig,
    TileKey,
    TileRow,
    chunk_widths,
    nearest_config,
    padded_width,
    product_config,
    row_buffers,
    shrunk,
)

# Widest rows of a backward in one slab: 16 heads of dq take 72 registers of 128 threads.
MAX_COLUMNS = 576

# Times are those of one H100 (triton 3.6) for 4096 queries, a cold L2 cache and random ascending lists. Rows without a
# time are derived by the arithmetic of offline compiles.
FORWARD: tuple[TileRow, ...] = (
    # 256 slots: 23.1 us; 28.0 us with 4 warps. With blocks of 8 heads 22.9 us, but 16 heads would take two passes.
    TileRow(4, 64, TileConfig(block_h=16, block_k=64, max_chunk=64, num_warps=1, num_stages=2), arch=90),
    # 2048 slots: 361 us; in one piece of 128 channels 386 us, 427 us with 3 stages, 408 us with 128 keys.
    TileRow(64, 128, TileConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2), arch=90),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4, arch=90),
    TileRow(4, 64, TileConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(64, 128, TileConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4),
)

# As above; dk is added by atomics.
BACKWARD: tuple[TileRow, ...] = (
    # 256 slots: 115.2 us; in pieces of 64 channels 135.9 us, or 113.8 us with a limit of 128 registers, which spills.
    TileRow(4, 64, TileConfig(block_h=16, block_k=64, max_chunk=32, num_warps=4, num_stages=2), arch=90),
    # 2048 slots: 1785 us. A piece of dk is in registers beside dq until it is added: 2030 us in pieces of 64 channels,
    # 2892 us in one of 128; 2730 us and more with 8 warps.
    TileRow(64, 128, TileConfig(block_h=64, block_k=64, max_chunk=32, num_warps=4, num_stages=2), arch=90),
    TileRow(16, 576, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), arch=90),
    TileRow(16, 128, TileConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=1), 4, arch=90),
    TileRow(4, 64, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(64, 128, TileConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(16, 128, TileConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=1), 4),
)


@cache
def forward_config(key: TileKey) -> TileConfig:
    """Return how to launch the score kernel."""
    return product_config(FORWARD, key)


@cache
def backward_config(key: TileKey) -> TileConfig:
    """Return how to launch the backward: in one slab of columns, or in the widest ones that fit."""
    config = nearest_config(BACKWARD, key)
    slabs = [None, 512, 256, 128] if key.width <= MAX_COLUMNS else [512, 256, 128]
    fitting = (shrunk(replace(config, columns=columns), key, backward_smem_bytes) for columns in slabs)
    # 16 heads and 16 keys of 128 columns fit every device.
    return next(config for config in fitting if config is not None)


def column_slabs(config: TileConfig, width: int) -> list[tuple[int, int]]:
    """Return (first, end) of the columns of every launch of the backward."""
    columns = config.columns or width
    return [(first, min(first + columns, width)) for first in range(0, width, columns)]


def backward_smem_bytes(config: TileConfig, key: TileKey) -> int:
    """Return an upper bound of the shared memory of the backward: q, the buffers of rows, dS, and a tile of dk.

    Queries and rows are read in two layouts where some of the products are asynchronous and others are not. dS is held
    as the operand of either product. A tile of dk is staged to be added 16 bytes at a time. Beside a slab of columns
    the pieces of the product are held, in both layouts of every buffer.
    """
    columns = min(key.width, config.columns or key.width)
    piece = max(chunk_widths(columns, config.max_chunk))
    rows = 2 * config.block_h + config.block_k * (row_buffers(config, key.arch) + 1)
    operands = rows * padded_width(columns, config.max_chunk) + 2 * config.block_h * config.block_k
    if columns < key.width:
        operands += 2 * config.num_stages * (config.block_h + config.block_k) * piece
    return operands * key.element_size + 4 * config.block_k * piece + SMALL_BYTES

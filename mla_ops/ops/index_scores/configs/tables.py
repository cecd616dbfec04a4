"""Launch configurations of both sides, and which runs a problem: see NOTE [The nearest row of a table]."""

from __future__ import annotations

from functools import cache

from mla_ops.tiling import (
    SMALL_BYTES,
    TileConfig,
    TileKey,
    TileRow,
    chunk_widths,
    find_config,
    padded_width,
    product_smem_bytes,
    row_buffers,
)

# Derived by shared-memory and register arithmetic of offline compiles, not yet measured.
FORWARD: tuple[TileRow, ...] = (
    TileRow(4, 64, TileConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2), arch=90),
    TileRow(64, 128, TileConfig(block_h=64, block_k=64, max_chunk=128, num_warps=4, num_stages=3), arch=90),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4, arch=90),
    TileRow(4, 64, TileConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(64, 128, TileConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4),
)

# Derived by shared-memory and register arithmetic of offline compiles, not yet measured.
BACKWARD: tuple[TileRow, ...] = (
    TileRow(4, 64, TileConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2), arch=90),
    # With four warps, or with keys in one piece, the gradients of the queries spill.
    TileRow(64, 128, TileConfig(block_h=64, block_k=64, max_chunk=64, num_warps=8, num_stages=2), arch=90),
    TileRow(16, 576, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), arch=90),
    TileRow(16, 128, TileConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=1), 4, arch=90),
    TileRow(4, 64, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(64, 128, TileConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(16, 128, TileConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=1), 4),
)


@cache
def forward_config(key: TileKey) -> TileConfig | None:
    """Return how to launch the score kernel, or None when nothing fits."""
    return find_config(FORWARD, key, product_smem_bytes)


@cache
def backward_config(key: TileKey) -> TileConfig | None:
    """Return how to launch the backward, or None when nothing fits."""
    return find_config(BACKWARD, key, backward_smem_bytes)


def backward_smem_bytes(config: TileConfig, key: TileKey) -> int:
    """Return an upper bound of the shared memory of the backward: q, the buffers of rows, dS, and a tile of dk.

    Queries and rows are read in two layouts where some of the products are asynchronous and others are not. dS is held
    as the operand of either product. A tile of dk is staged to be added 16 bytes at a time.
    """
    rows = 2 * config.block_h + config.block_k * (row_buffers(config, key.arch) + 1)
    operands = rows * padded_width(key.width, config.max_chunk) + 2 * config.block_h * config.block_k
    staging = 4 * config.block_k * max(chunk_widths(key.width, config.max_chunk))
    return operands * key.element_size + staging + SMALL_BYTES

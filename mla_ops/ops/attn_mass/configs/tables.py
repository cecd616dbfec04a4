"""Launch configurations of the mass kernel, and which runs a problem: see NOTE [The nearest row of a table]."""

from __future__ import annotations

from functools import cache

from mla_ops.tiling import TileConfig, TileKey, TileRow, find_config, product_smem_bytes

# Derived by shared-memory and register arithmetic of offline compiles, not yet measured.
ROWS: tuple[TileRow, ...] = (
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2), arch=90),
    TileRow(32, 128, TileConfig(block_h=32, block_k=64, max_chunk=128, num_warps=4, num_stages=2), arch=90),
    TileRow(16, 576, TileConfig(block_h=16, block_k=64, max_chunk=512, num_warps=4, num_stages=2), arch=90),
    # q^T of 64 heads and two blocks of 64 rows fill the shared memory of an SM.
    TileRow(64, 576, TileConfig(block_h=64, block_k=64, max_chunk=512, num_warps=4, num_stages=2), arch=90),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4, arch=90),
    TileRow(32, 128, TileConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(64, 576, TileConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4),
)


@cache
def mass_config(key: TileKey) -> TileConfig | None:
    """Return how to launch the mass kernel, or None when nothing fits."""
    return find_config(ROWS, key, product_smem_bytes)

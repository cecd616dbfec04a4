"""Launch configurations of the mass kernel, and which runs a problem: see NOTE [The nearest row of a table]."""

from __future__ import annotations

from functools import cache

from mla_ops.tiling import TileConfig, TileKey, TileRow, product_config

# Times are those of one H100 (triton 3.6) for 4096 queries, a cold L2 cache and random ascending lists. Rows without a
# time are derived by the arithmetic of offline compiles.
ROWS: tuple[TileRow, ...] = (
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2), arch=90),
    # 28 heads, 256 slots: 53.0 us, as with 4 warps; 57.0 us with 32 keys and 1 warp, 58.8 us with 3 stages.
    TileRow(32, 128, TileConfig(block_h=32, block_k=64, max_chunk=64, num_warps=2, num_stages=2), arch=90),
    TileRow(16, 576, TileConfig(block_h=16, block_k=64, max_chunk=512, num_warps=4, num_stages=2), arch=90),
    # 2048 slots: 1521 us, columns streamed. With 16 warps 1512 us, with 256 keys 1669 us, with 128 keys and 4 warps
    # 1698 us. With q^T of 64 heads and two blocks of 64 whole rows, which fill the shared memory of an SM, 2221 us.
    TileRow(64, 576, TileConfig(64, block_k=512, max_chunk=64, num_warps=8, num_stages=3, columns=64), arch=90),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4, arch=90),
    TileRow(32, 128, TileConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(64, 576, TileConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2)),
    TileRow(16, 128, TileConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2), 4),
)


@cache
def mass_config(key: TileKey) -> TileConfig:
    """Return how to launch the mass kernel."""
    return product_config(ROWS, key)

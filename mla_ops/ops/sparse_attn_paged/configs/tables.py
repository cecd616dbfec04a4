"""How the portable kernel is launched: a table for quantised rows, and for dense ones that of the dense kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import log2
from typing import NamedTuple

from mla_ops.ops.sparse_attn.configs.launch import ConfigKey, FwdConfig, shrink_to_fit
from mla_ops.ops.sparse_attn.configs.launch import chunk_widths as dense_chunk_widths
from mla_ops.ops.sparse_attn.configs.lookup import forward_config
from mla_ops.row_formats import row_format

# A value is multiplied by its scale, rounded to the dtype of q, in blocks of more heads than this. In blocks of up to
# so many heads scales join logits and weights instead: with 64 heads the accumulators of the parts spill.
MAX_FOLDING_HEADS = 32
# Bytes of small buffers: positions, table entries, and what warps exchange. Seen in offline compiles.
_SMALL_BYTES = 1024


# In blocks of 64 heads products are asynchronous on sm100, which the compiler can't pipeline behind a conversion, and
# synchronous before sm90: there are none. Rows for sm90 are measured, see the comments; the others are derived by
# shared-memory arithmetic and offline compiles.
_PLAIN_ROWS = (
    (16, 128, FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=2, num_stages=2)),
    (32, 128, FwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=2, num_stages=2)),
    (16, 576, FwdConfig(block_h=16, block_k=32, max_chunk=128, num_warps=4, num_stages=2)),
    (32, 576, FwdConfig(block_h=32, block_k=32, max_chunk=128, num_warps=8, num_stages=2)),
)
# Measured on an H100 with cold rows, as the best of nine configurations or more.
_HOPPER_ROWS = (
    # 64 requests, topk 256: 7.9 us with 8 heads, blocks of 64 rows 8.6; 8.7 us with 28 heads, blocks of 64 rows 9.4.
    (16, 128, FwdConfig(block_h=16, block_k=128, max_chunk=64, num_warps=4, num_stages=2)),
    (32, 128, FwdConfig(block_h=32, block_k=128, max_chunk=64, num_warps=4, num_stages=2)),
    # 16 and 128 requests, topk 2048: 24 and 120 us; capped at 168 registers 25 and 125, with two stages 26 and 129.
    (16, 576, FwdConfig(block_h=16, block_k=32, max_chunk=128, num_warps=4, num_stages=3)),
    # The same: 32 and 160 us; with two stages 34 and 171, blocks of 64 rows 34 and 185.
    (32, 576, FwdConfig(block_h=32, block_k=32, max_chunk=128, num_warps=4, num_stages=3)),
    # The same, 64 heads: 39 and 199 us; with two stages 41 and 205; two blocks of 32 heads, which fold, 56 and 345.
    (64, 576, FwdConfig(block_h=64, block_k=64, max_chunk=128, num_warps=8, num_stages=3)),
)
# By the first compute capability that they are for: query heads per KV group, width of a row, configuration.
ROWS: tuple[tuple[int, tuple[tuple[int, int, FwdConfig], ...]], ...] = (
    (80, _PLAIN_ROWS),
    (90, _HOPPER_ROWS),
    (100, _PLAIN_ROWS),
)


class Cut(NamedTuple):
    """How a row is cut: pieces of BLOCK_DV channels from its start on, then pieces of BLOCK_DT."""

    block_dv: int
    block_dt: int
    first_end: int  # channels that the pieces of BLOCK_DV cover, without padding
    second_start: int  # first channel of the pieces of BLOCK_DT


@cache
def cut_row(name: str, d_total: int, d_v: int, max_chunk: int) -> Cut:
    """Return how rows of the format `name` are cut.

    A piece has one scale, so its width divides the tile that shares one. Behind the payload stands a scale and not the
    next channel, so only a row of one kind of channel is cut as dense rows are, where a value piece may reach past d_v.
    """
    form = row_format(name)
    layout = form.layout(d_total, d_v)
    widest = min(max_chunk, form.tile) if form.tile else max_chunk
    first_end = layout.d_payload if layout.d_tail16 else d_v
    block_dv, block_dt = dense_chunk_widths(d_total, first_end, widest)
    padded = -(-first_end // block_dv) * block_dv
    if form.tile:
        # A piece of the tail starts at a multiple of its width, or it would have two scales.
        block_dt = min(block_dt, padded & -padded)
    return Cut(block_dv, block_dt, first_end, first_end if layout.d_tail16 else padded)


def quantised_smem_bytes(config: FwdConfig, name: str, key: ConfigKey) -> int:
    """Return an upper bound of the shared memory on quantised rows: q, rows as they come, rows converted, weights."""
    layout = row_format(name).layout(key.d_total, key.d_v)
    cut = cut_row(name, key.d_total, key.d_v, config.max_chunk)
    first = -(-cut.first_end // cut.block_dv) * cut.block_dv
    second = -(-max(key.d_total - cut.second_start, 0) // cut.block_dt) * cut.block_dt
    # Scales that are copied together are a power of two, 4 or more.
    scales = 4 * max(4, 1 << max(0, layout.num_scales - 1).bit_length()) if layout.num_scales else 0
    stored = first + second * (2 if layout.d_tail16 else 1) + scales
    buffers = max(1, config.num_stages - 1)
    converted = 2 * (first + (0 if layout.d_tail16 else second))
    q, weights = 2 * config.block_h * (first + second), 2 * config.block_h * config.block_k
    return q + config.block_k * (buffers * stored + converted) + weights + _SMALL_BYTES


@cache
def paged_config(name: str, key: ConfigKey) -> FwdConfig | None:
    """Return how to launch the portable kernel on rows of the format `name`, or None when nothing fits the device."""
    if name == "dense":
        return forward_config(key)

    def distance(row: tuple[int, int, FwdConfig]) -> float:
        return abs(log2(row[0] / key.heads_per_group)) + abs(log2(row[1] / key.d_total))

    rows = [rows for first_arch, rows in ROWS if first_arch <= key.arch][-1]
    *_, config = min(rows, key=distance)
    config = replace(config, block_h=min(config.block_h, max(16, 1 << (key.heads_per_group - 1).bit_length())))
    if config.num_stages > 2 and quantised_smem_bytes(config, name, key) > key.smem_bytes:
        config = replace(config, num_stages=2)
    return shrink_to_fit(config, key.smem_bytes, lambda config: quantised_smem_bytes(config, name, key))

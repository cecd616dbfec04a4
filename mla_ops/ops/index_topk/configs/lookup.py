"""The one rule that finds a launch configuration.

Scores: a measured row for exactly these heads, width and element size on this architecture, else the default of the
way that the problem takes. Either is cut until its shared memory fits the device (`launch.fitted`); where even the
smallest does not, rows are read a chunk at a time ("wide"), which fits everywhere.

Selection follows from topk and from the length of a row.
"""

from __future__ import annotations

from functools import cache

from mla_ops.ops.index_topk.configs.launch import ConfigKey, ScoresConfig, SelectConfig, StreamConfig, fitted

# Up to here the buffer of the streamed selection, twice as long, fits the registers of a program of 16 warps.
MAX_TOPK = 8192

# The longest row that is chosen from in registers. Longer ones are gathered first.
MAX_IN_REGISTERS = 8192

# Up to so many queries of a batch element heads are the rows of the products.
MAX_FEW_QUERIES = 8

# (arch, heads per group, head_dim, element size): what was fastest on that device. H100, triton 3.6, torch 2.11.
MEASURED: dict[tuple[int, int, int, int], ScoresConfig] = {
    # 4096 x 32,768: 682 TFLOP/s of bf16.
    (90, 64, 128, 2): ScoresConfig("passing heads", 64, 128, 128, 1, num_warps=4, num_stages=3),
    # The same in e4m3: 1127 TFLOP/s, with three programs an SM; 991 with two, of 222 registers a thread; 850 to 960
    # with 2 stages, 64 keys or 256.
    (90, 64, 128, 1): ScoresConfig("passing heads", 64, 128, 128, 1, num_warps=4, num_stages=3, max_registers=168),
}

# The queries of all heads stay in shared memory up to so many bytes, and up to so many products a tile.
_MAX_QUERY_BYTES = 48 * 1024
_MAX_UNROLLED = 16


@cache
def scores_config(key: ConfigKey, has_few_queries: bool) -> ScoresConfig:
    """Return how to launch the scores."""
    width, chunks = chunk_widths(key.head_dim, key.element_size)
    if key.element_size == 4:
        return _wide(key)
    if has_few_queries:
        # Sums of e4m3 products are rounded coarsely, and otherwise by wgmma, which takes 64 rows, than by mma.sync. So
        # heads are padded to 64, that few queries choose as many do. Padding is free: decoding is bound by memory.
        is_wgmma = key.arch == 90 and key.element_size == 1
        block_h = 64 if is_wgmma else min(64, max(16, _power_of_two(key.heads)))
        default = ScoresConfig("head rows", block_h, 128, width, chunks, num_warps=4, num_stages=2)
    elif 64 * key.heads * width * chunks * key.element_size <= _MAX_QUERY_BYTES and key.heads * chunks <= _MAX_UNROLLED:
        # 4 x 64, 4096 x 4096 causal, on the H100: 21.1 us, with 2 stages 22.3 us, with 128 keys a tile 30 to 50 us.
        default = ScoresConfig("passing keys", 64, 64, width, chunks, num_warps=4, num_stages=3, key_tiles=8)
    else:
        default = ScoresConfig("passing heads", 64, 128, width, chunks, num_warps=4, num_stages=3)
    if not has_few_queries:
        default = MEASURED.get((key.arch, key.heads, key.head_dim, key.element_size), default)
    config = fitted(default, key) if chunks <= _MAX_UNROLLED else None
    return _wide(key) if config is None else config


def _wide(key: ConfigKey) -> ScoresConfig:
    """Return the configuration for rows that don't fit, and for fp32, which tensor cores don't multiply."""
    width = 32 if key.element_size == 4 else 64
    chunks = max(1, -(-key.head_dim // width))
    return ScoresConfig("wide", 64, 64, width, chunks, num_warps=4, num_stages=1 if key.element_size == 4 else 2)


@cache
def chunk_widths(head_dim: int, element_size: int) -> tuple[int, int]:
    """Return the power of two that a row is cut into, and how many of them cover it.

    A power of two is one chunk up to 256 channels. Others are cut so that the fewest channels are padding, into chunks
    of 64 at most: 192 is 3 x 64, 72 is 5 x 16. A product is at least 16 channels deep, of e4m3 32.
    """
    least = 32 if element_size == 1 else 16
    padded = max(least, _power_of_two(head_dim))
    if padded <= 256 and padded - head_dim < padded // 8:
        return padded, 1
    widths = [width for width in (64, 32, 16) if width >= least]
    return min(((width, -(-head_dim // width)) for width in widths), key=lambda cut: cut[0] * cut[1])


@cache
def select_config(seq_kv: int) -> SelectConfig:
    """Return how to choose from rows of up to `seq_kv <= MAX_IN_REGISTERS` keys in registers.

    A thread holds 32 scores, and 96 registers let five programs of 4 warps share an SM.
    """
    block = max(64, _power_of_two(seq_kv))
    return SelectConfig(block, num_warps=max(1, block // 1024), max_registers=96)


@cache
def stream_config(topk: int, is_split: bool) -> StreamConfig:
    """Return how to choose from rows of any length, whole or split; a split row is alone on its SM: it has more warps.

    The cap lets two programs of 8 warps share an SM. What it spills belongs to a full buffer, which few rows see.
    """
    buffer = max(4096, 2 * _power_of_two(topk))
    num_warps = min(16, buffer // (256 if is_split else 512))
    return StreamConfig(chunk=2048, buffer=buffer, sample=2048, num_warps=num_warps, max_registers=128)


def split_count(rows: int, num_sms: int) -> int:
    """Return over how many programs each row is split: two for every SM, 32 a row at most."""
    return min(32, max(1, _power_of_two(2 * num_sms // max(1, rows) + 1) // 2))


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()

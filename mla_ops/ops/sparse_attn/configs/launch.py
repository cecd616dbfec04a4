"""Launch configurations as values, and the shared-memory arithmetic that decides whether one fits a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, NamedTuple, TypeVar


class ConfigKey(NamedTuple):
    """What launch configurations are chosen by."""

    arch: int  # CUDA compute capability as major * 10 + minor
    smem_bytes: int  # shared memory one thread block may opt in to
    heads_per_group: int  # query heads that share a KV row
    d_total: int
    d_v: int
    element_size: int  # bytes of a channel
    has_payloads: bool = False  # rows arrive as bytes of e4m3, and are widened to channels


@dataclass(frozen=True)
class FwdConfig:
    """How to launch the forward kernel."""

    block_h: int  # query heads of one program; 64 and more make wgmma tiles, fewer run as mma.sync
    block_k: int  # selected rows gathered per step
    max_chunk: int  # widest piece a row is cut into
    num_warps: int
    num_stages: int  # 1: rows pass through registers; more: asynchronous copies into stages - 1 or stages buffers
    max_registers: int | None = None  # per thread, where more of them would only keep other programs off the SM


@dataclass(frozen=True)
class BwdConfig:
    """How to launch the backward kernel."""

    block_h: int
    block_k: int
    max_chunk: int
    num_warps: int
    num_stages: int
    is_key_major: bool = True  # keys as rows of the products: 64 keys fill a wgmma tile where 16 heads would not
    is_ahead: bool = True  # positions of a block are loaded during the block before it
    max_registers: int | None = None  # as in the forward


# Query heads of a work item of the Hopper kernels, and keys of a tile: what one wgmma tile holds.
HOPPER_BLOCK_H = 64


@dataclass(frozen=True)
class HopperConfig:
    """How to launch the warp-specialised forward of `kernels/hopper_forward.py`: 64 heads a block, 64 keys a tile."""

    left: int  # value channels of the first value group, a power of two
    right: int  # of the second; left + right cover d_v
    tail: int  # remaining channels of a row, 0, 64 or 128
    value_registers: int  # per thread; what they and the gather leave of 512 goes to the scores
    gather_registers: int
    pairs: int  # pairs of tiles in shared memory at a time: 1, or 2 where they fit


@dataclass(frozen=True)
class FewHeadsConfig:
    """How to launch the warp-specialised forward of `kernels/hopper_few_heads.py`: 64 keys a tile."""

    value: int  # channels held for the value, a multiple of 64
    tail: int  # remaining channels of a row, 0, 64 or 128
    block_h: int  # query heads of a work item, 16 or 32
    stages: int  # tiles in shared memory at a time
    q_buffers: int  # queries of work items in shared memory at a time


@dataclass(frozen=True)
class HopperBwdConfig:
    """How to launch the warp-specialised backward of `kernels/hopper_backward.py`: 64 heads a block, 64 keys a tile."""

    half_value: int  # value channels of each of the two gradient groups, a power of two; two of them cover d_v
    half_tail: int  # of each group among the remaining channels of a row, 0, 32 or 64
    block_h: ClassVar[int] = HOPPER_BLOCK_H


def program_count(rows: int, heads: int, kv_group: int, block_h: int) -> int:
    """Return how many programs a kernel needs: one per row, KV group and block of its heads."""
    return rows * kv_group * -(-(heads // kv_group) // block_h)


def wave_programs(config: BwdConfig | HopperBwdConfig, num_sms: int) -> int:
    """Return how many programs of the backward kernel the registers of a device hold at a time."""
    return num_sms if isinstance(config, HopperBwdConfig) else num_sms * programs_by_registers(config, 256)


def programs_by_registers(config: FwdConfig | BwdConfig, unlimited: int) -> int:
    """Return how many programs the registers of an SM hold; a kernel without a limit takes `unlimited` a thread."""
    return max(1, 65536 // ((config.max_registers or unlimited) * 32 * config.num_warps))


def launch_options(config: FwdConfig | BwdConfig) -> dict[str, int]:
    """Return what Triton takes beside the kernel's own arguments."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return options if config.max_registers is None else {**options, "maxnreg": config.max_registers}


@dataclass(frozen=True)
class Row:
    """One line of an architecture's table: the configurations made for a head-dim family and a number of heads.

    `bwd` holds one configuration that computes dq and dkv in one pass, or two: one for a dq pass and one for a dkv
    pass, which repeat two of the five products and in exchange keep no gradient in registers besides their own. Where a
    backward must be deterministic, `placed` goes before `bwd`: rows are stored then, not added.
    """

    family: str  # a name in `head_dims.FAMILIES`
    heads: int  # query heads per KV group
    fwd: FwdConfig
    bwd: tuple[BwdConfig, ...]
    placed: BwdConfig | None = None
    element_size: int = 2  # bytes of a channel: 2 for bf16 and fp16, 4 for fp32


# Bytes of the portable kernels' small buffers: indices, and what warps exchange. Seen in offline compiles.
_SMALL_BYTES = 1024
# Bytes of the Hopper kernels' small buffers: which slots are valid, factors that rescale the accumulators, barriers,
# and the arguments of the roles. The forward has as many for each pair of tiles, and places of the rows of two pairs.
_HOPPER_SMALL_BYTES = 2048
_HOPPER_PLACES_BYTES = 2 * 128 * 8


@cache
def chunk_widths(d_total: int, d_v: int, max_chunk: int) -> tuple[int, int]:
    """Return (BLOCK_DV, BLOCK_DT), the powers of two a row is cut into; see NOTE [A row is a tuple of chunks].

    The cheapest cut wins. A padded channel costs work in the logits; a padded channel of a value chunk costs work in
    the value product too. A further chunk costs about as much as 32 channels, two tensor-core instructions' depth.
    """
    widths = [width for width in (16, 32, 64, 128, 256, 512) if width <= max_chunk]

    def cost(block_dv: int, block_dt: int) -> tuple[int, int]:
        value = _round_up(d_v, block_dv)
        tail = _round_up(max(d_total - value, 0), block_dt)
        return value + tail + value + 32 * (value // block_dv + tail // block_dt), -block_dv

    return min(((dv, dt) for dv in widths for dt in widths), key=lambda pair: cost(*pair))


def padded_widths(d_total: int, d_v: int, max_chunk: int) -> tuple[int, int]:
    """Return the channels held for a value and for a whole row, padding included."""
    block_dv, block_dt = chunk_widths(d_total, d_v, max_chunk)
    value = _round_up(d_v, block_dv)
    return value, value + _round_up(max(d_total - value, 0), block_dt)


def fwd_smem_bytes(config: FwdConfig, key: ConfigKey) -> int:
    """Return an upper bound of the shared memory of the forward kernel: q, the buffers of rows, and the weights."""
    _, width = padded_widths(key.d_total, key.d_v, config.max_chunk)
    buffers = _row_buffers(config.num_stages, _is_asynchronous(key.arch, config.block_h, config.num_warps))
    operands = config.block_h * width + config.block_k * width * buffers
    weights = config.block_h * config.block_k
    payloads = config.block_k * width if key.has_payloads else 0
    # Rows that pass through registers are stored once more, chunk by chunk, as operands of the second product.
    again = config.block_k * max(chunk_widths(key.d_total, key.d_v, config.max_chunk)) if config.num_stages == 1 else 0
    return (operands + max(weights, again)) * key.element_size + payloads + _SMALL_BYTES


def bwd_smem_bytes(config: BwdConfig, key: ConfigKey) -> int:
    """Return an upper bound of the shared memory of the backward kernel: q, dout, the buffers of rows, P and dS."""
    value, width = padded_widths(key.d_total, key.d_v, config.max_chunk)
    # How many rows the products for the logits and for dq have. The products for dkv have a row for each key.
    logits_rows = dq_rows = config.block_h
    if config.is_key_major:
        block_dv, block_dt = chunk_widths(key.d_total, key.d_v, config.max_chunk)
        logits_rows, dq_rows = config.block_k, min(block_dv, block_dt) if width > value else block_dv
    has_asynchronous_logits = _is_asynchronous(key.arch, logits_rows, config.num_warps)
    kinds = {
        has_asynchronous_logits,
        _is_asynchronous(key.arch, dq_rows, config.num_warps),
        _is_asynchronous(key.arch, config.block_k, config.num_warps),
    }
    # Asynchronous products read other layouts than synchronous products. Synchronous products of a key-major kernel
    # read q and dout in two layouts. An operand is held once in each layout that something reads.
    query_forms = 2 if len(kinds) == 2 or (config.is_key_major and kinds == {False}) else 1
    row_forms = _row_buffers(config.num_stages, has_asynchronous_logits) + len(kinds) - 1
    operands = query_forms * config.block_h * (width + value) + row_forms * config.block_k * width
    # dS is held twice: one product has its heads as rows, another as columns. Then comes a tile of dkv, which is staged
    # to be added 16 bytes at a time.
    weights = 3 * config.block_h * config.block_k * key.element_size
    staging = 4 * config.block_k * max(chunk_widths(key.d_total, key.d_v, config.max_chunk))
    payloads = config.block_k * width if key.has_payloads else 0
    return operands * key.element_size + weights + staging + payloads + _SMALL_BYTES


def hopper_smem_bytes(config: HopperConfig) -> int:
    """Return an upper bound of the shared memory of the Hopper forward: q, the tiles of rows, and the weights."""
    width = config.left + config.right
    # Weights lie in the tails of the tiles, which have 64 channels for them if there is no tail.
    tiles = 2 * config.pairs * (width + max(config.tail, 64))
    return 2 * 64 * (width + config.tail + tiles) + config.pairs * _HOPPER_SMALL_BYTES + _HOPPER_PLACES_BYTES


def few_heads_smem_bytes(config: FewHeadsConfig, *, has_scales: bool) -> int:
    """Return an upper bound of the shared memory of the forward for few heads: q, the tiles of rows, and the weights.

    Rows with scales have weights for each 128 channels of the value, and the scales in shared memory.
    """
    rows = config.q_buffers * config.block_h + config.stages * 64
    weights = 64 * config.block_h * (-(-config.value // 128) if has_scales else 1)
    # Whether a slot is valid, and up to eight scales, for each row of a tile.
    words = config.stages * 64 * (9 if has_scales else 1)
    return 2 * (rows * (config.value + config.tail) + weights) + 4 * words + _SMALL_BYTES


def hopper_bwd_smem_bytes(config: HopperBwdConfig) -> int:
    """Return an upper bound of the shared memory of the Hopper backward: q, dout, a tile of rows, P and dS."""
    channels = 2 * 2 * (config.half_value + config.half_tail) + 2 * config.half_value
    return 2 * 64 * (channels + 2 * 64) + _HOPPER_SMALL_BYTES


def _is_asynchronous(arch: int, rows: int, num_warps: int) -> bool:
    """Return whether a product of `rows` rows reads its operands from shared memory while the program goes on."""
    return 90 <= arch < 120 and rows >= 64 and num_warps >= 4


def _row_buffers(num_stages: int, is_asynchronous: bool) -> int:
    """Return how many blocks of rows are in shared memory at a time.

    Asynchronous products read a block while the next ones arrive; the others have copied it to registers by then.
    """
    if num_stages == 1:
        return 1
    return num_stages if is_asynchronous else num_stages - 1


Config = TypeVar("Config", FwdConfig, BwdConfig)


def shrink_to_fit(config: Config, limit: int, smem_bytes: Callable[[Config], int]) -> Config | None:
    """Return `config`, or the first that fits of: one stage, fewer keys, fewer heads; None when none does."""
    while smem_bytes(config) > limit:
        if config.num_stages > 1:
            config = replace(config, num_stages=1)
        elif config.block_k > 16:
            config = replace(config, block_k=config.block_k // 2)
        elif config.block_h > 16:
            config = replace(config, block_h=config.block_h // 2)
        else:
            return None
    return config


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

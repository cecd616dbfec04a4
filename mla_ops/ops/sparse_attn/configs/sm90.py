"""sm90 (H100, H200): 232448 B of shared memory, wgmma for products of 64 and more rows."""

from __future__ import annotations

from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    FewHeadsConfig,
    FwdConfig,
    HopperBwdConfig,
    HopperConfig,
    Row,
)

# Measured rows: H100 80GB HBM3, torch 2.11, triton 3.6, bf16, random distinct indices; names in parentheses are shapes
# of mla_ops/cli/shapes.py. What the rows reach in use stands in benchmarks/results/*-h100-sparse-attn.json and
# *-h100-sweeps.json; figures here were seen while choosing, mostly of the kernel alone, and have no result file. Narrow
# rows are gathered by one warp: nothing is exchanged between warps.
ROWS: tuple[Row, ...] = (
    # Measured (NAM8). The cap lets 16 programs share an SM: 88 against 83 TFLOP/s forward.
    Row(
        family="128x64",
        heads=8,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2, max_registers=128),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=3, is_key_major=False),),
    ),
    # Measured with 16 heads: 1.55 times the forward and 1.11 times the backward of the row for 144/80 as it was.
    Row(
        family="128x64",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2, max_registers=128),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=3, is_key_major=False),),
    ),
    # Measured (NAM28, NAM32). Forward: capped at 168 registers nothing spills and 12 programs share an SM instead of 8:
    # 199 against 180 TFLOP/s. Backward: the same cap lets 12 warps share it, and with 64 keys queries are read less
    # often: 845 us at both, against 858 and 873 of two warps with 32 keys. Stored rows: 1.20 against 1.48 ms.
    Row(
        family="128x64",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=1, num_stages=2, max_registers=168),
        bwd=(
            BwdConfig(
                block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False, max_registers=168
            ),
        ),
        placed=BwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
    ),
    # Measured at 128/64 and 192/64: with heads as rows the backward takes 0.88 of the time of keys as rows.
    Row(
        family="128x64",
        heads=64,
        fwd=FwdConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    # Measured (NAM2). Backward with 240 registers: 1.17 against 1.18 ms with 255. Stored rows: 1.80 against 1.98 ms.
    Row(
        family="192x64",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=1, num_stages=2, max_registers=200),
        bwd=(
            BwdConfig(
                block_h=32, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False, max_registers=240
            ),
        ),
        placed=BwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
    ),
    # Measured. Few warps exchange little: 1.4 times the forward and 1.7 times the backward of four.
    Row(
        family="144x80",
        heads=12,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=3),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False),),
        placed=BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=3, is_key_major=False),
    ),
    # Measured. One warp without a cap: 1.2 times the forward of two warps, 1.4 times that of four.
    Row(
        family="192x128",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False),),
    ),
    # Measured. Forward: one warp without a cap takes 188 us, capped at 232 registers 226 and at 200 340; two warps 221.
    Row(
        family="192x128",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=1, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=32, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False, max_registers=240
            ),
        ),
        placed=BwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
    ),
    # Measured. With heads as rows the backward takes 0.93 of the time of keys as rows.
    Row(
        family="192x128",
        heads=64,
        fwd=FwdConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    # Measured: 229 against 250 us forward and 906 against 964 backward of the row for 320/256. Stored rows: 644 against
    # 856 us of the kernel with heads as rows.
    Row(
        family="256x192",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=2, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False),),
        placed=BwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
    ),
    # Measured: 217 against 236 us forward and 935 against 951 backward of the row for 32 heads.
    Row(
        family="320x256",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=2, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False),),
    ),
    # Measured (MID). Five value chunks of 64 against one of 256: 270 against 181 TFLOP/s with the keys to match.
    # Backward with keys as rows: 4.62 against 4.67 ms of the kernel with heads as rows, 16 keys and two warps. Stored
    # rows: 4.43 ms with three programs an SM, 4.59 with two.
    Row(
        family="320x256",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=128, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2),),
        placed=BwdConfig(
            block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False, max_registers=168
        ),
    ),
    # Measured (DS16). Backward with three programs an SM: 6.59 against 6.66 ms of two with three stages, which is the
    # faster one where rows are stored: 5.7 ms.
    Row(
        family="576x512",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=128, num_warps=2, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=16,
                block_k=32,
                max_chunk=64,
                num_warps=4,
                num_stages=2,
                is_key_major=False,
                is_ahead=False,
                max_registers=168,
            ),
        ),
        placed=BwdConfig(
            block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=3, is_key_major=False, is_ahead=False
        ),
    ),
    # Measured as the two 32-head blocks of DS64: 282 TFLOP/s forward, 184 backward.
    Row(
        family="576x512",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=3, is_key_major=False, is_ahead=False
            ),
        ),
    ),
    # Measured (DS64, DS). Forward: two 32-head blocks on mma.sync reach 282, one 64-head block on wgmma 264 TFLOP/s.
    # Backward: 32-head blocks double the atomics and are still 2.5 times as fast as 64-head blocks, whose accumulators
    # spill (0.7 to 2.3 kB of stack); positions loaded ahead cost 10 %, eight warps instead of four a third.
    Row(
        family="576x512",
        heads=64,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=3, is_key_major=False, is_ahead=False
            ),
        ),
    ),
    # Measured at 1024/960 as two 16-head blocks: 2.1 against 3.4 ms forward of 512-wide chunks and eight warps, 8.3
    # against 18.8 ms backward of 128-wide ones and one stage.
    Row(
        family="1024x1024",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False, is_ahead=False
            ),
        ),
    ),
    # Measured at 1024/960: 1.6 ms forward and 6.5 ms backward.
    Row(
        family="1024x1024",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=8, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=32, block_k=32, max_chunk=64, num_warps=8, num_stages=2, is_key_major=False, is_ahead=False
            ),
        ),
    ),
    # Derived by shared-memory arithmetic, not yet measured.
    Row(
        family="128x64",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=1, is_key_major=False),),
        element_size=4,
    ),
    # Derived by shared-memory arithmetic, not yet measured.
    Row(
        family="576x512",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=8, num_stages=1),
        bwd=(
            BwdConfig(
                block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1, is_key_major=False, is_ahead=False
            ),
        ),
        element_size=4,
    ),
    # Derived by shared-memory arithmetic, not yet measured.
    Row(
        family="1024x1024",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1, is_key_major=False),),
        element_size=4,
    ),
)

# The warp-specialised forward, by the widest value and the widest row a configuration takes; the first that does is it.
# Measured at 576/512, 512/512 and 320/256 with 64 heads and more (benchmarks/results/*-h100-wide-forward.json): 1.8 to
# 2.1 times the plain kernel, 1.7 times at 320/256.
HOPPER: tuple[tuple[int, int, HopperConfig], ...] = tuple(
    (width, width + tail, HopperConfig(left, width - left, tail, value_registers, gather_registers, pairs))
    for left, width, value_registers, gather_registers in (
        (128, 256, 112, 96),
        # 256 channels are 128 accumulators a thread: at 152 registers they spill, and the gather gets what is left.
        (256, 320, 160, 56),
        (256, 384, 160, 56),
        (256, 512, 160, 56),
    )
    for tail in (0, 64, 128)
    # A second pair of tiles fits up to 320 channels, of which P has 64 at least.
    for pairs in (2 if width + max(tail, 64) <= 320 else 1,)
)

# The warp-specialised forward for few heads, in the same manner; of one width fewest heads go first, then what holds
# most rows.
FEW_HEADS: tuple[tuple[int, int, FewHeadsConfig], ...] = tuple(
    (value, value + tail, FewHeadsConfig(value, tail, block_h, stages, q_buffers))
    for value in (256, 320, 384, 448, 512)
    for tail in (0, 64, 128)
    for block_h in (16, 32)
    for stages, q_buffers in ((4, 2), (3, 2), (2, 2), (2, 1))
)

# The warp-specialised backward, in the same manner. Beside the plain kernel in one process, 64 heads and more, three
# rounds: 2.0 to 2.1 times as fast at 576/512 and 320/256 with topk 2048 (with 48 heads 2.1 times, with 32 heads 1.1
# times), 1.7 to 1.9 times with topk 512 at 576/512, 512/512 and 320/256. Other widths were run, not timed.
HOPPER_BWD: tuple[tuple[int, int, HopperBwdConfig], ...] = tuple(
    (2 * half_value, 2 * (half_value + half_tail), HopperBwdConfig(half_value, half_tail))
    for half_value in (128, 256)
    for half_tail in (0, 32, 64)
)

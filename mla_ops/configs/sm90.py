"""sm90 (H100, H200): 232448 B of shared memory, wgmma for products of 64 and more rows."""

from __future__ import annotations

from mla_ops.configs.launch import BwdConfig, FwdConfig, Row

# Measured rows: H100 80GB HBM3, torch 2.11, triton 3.6, bf16, random distinct indices; shapes and figures are those of
# benchmarks/results/*-h100-sparse-attn.json. What other configurations gave, here and in benchmarks/NOTES.md, was seen
# while choosing and has no result file. Narrow rows are gathered by one warp: nothing is exchanged between warps.
ROWS: tuple[Row, ...] = (
    # Measured (NAM8). Forward: one warp with 64 keys falls to 33 TFLOP/s, its accumulators no longer fit beside them.
    Row(
        family="128x64",
        heads=8,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=3, is_key_major=False),),
    ),
    # Measured (NAM28, NAM32). Backward: key-major wgmma with four warps reaches 110 to 136, this 131 to 149 TFLOP/s.
    Row(
        family="128x64",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=1, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=16, max_chunk=64, num_warps=1, num_stages=3, is_key_major=False),),
    ),
    # Derived by shared-memory arithmetic, not yet measured.
    Row(
        family="128x64",
        heads=64,
        fwd=FwdConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=64, block_k=64, max_chunk=64, num_warps=4, num_stages=2),),
    ),
    # Measured (NAM2).
    Row(
        family="192x64",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=1, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=2, num_stages=2, is_key_major=False),),
    ),
    # Derived by shared-memory arithmetic, not yet measured.
    Row(
        family="144x80",
        heads=12,
        fwd=FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    # Measured (MID). Five value chunks of 64 against one of 256: 270 against 181 TFLOP/s with the keys to match.
    Row(
        family="320x256",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=128, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=16, max_chunk=64, num_warps=2, num_stages=3, is_key_major=False),),
    ),
    # Measured (DS16).
    Row(
        family="576x512",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=128, num_warps=2, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=128, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    # Measured as the two 32-head blocks of DS64: 261 TFLOP/s forward, 169 backward.
    Row(
        family="576x512",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    # Measured (DS64, DS). Backward: 32-head blocks double the atomics and are still 2.3 times as fast as 64-head
    # blocks, whose accumulators spill (0.7 to 2.3 kB of stack); eight warps instead of four cost a third.
    Row(
        family="576x512",
        heads=64,
        fwd=FwdConfig(block_h=64, block_k=64, max_chunk=512, num_warps=8, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    # Derived by shared-memory arithmetic, not yet measured.
    Row(
        family="1024x1024",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=512, num_warps=8, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=128, num_warps=8, num_stages=1, is_key_major=False),),
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
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1, is_key_major=False),),
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

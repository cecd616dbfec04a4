"""sm80 (A100): 166912 B of shared memory; sm86 and sm89 have 101376 B and take these rows shrunk. mma.sync only."""

from __future__ import annotations

from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig, Row

# Every row is derived by shared-memory arithmetic, not measured, unless a comment above it says otherwise.
ROWS: tuple[Row, ...] = (
    Row(
        family="128x64",
        heads=8,
        fwd=FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    Row(
        family="128x64",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=3),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    Row(
        family="144x80",
        heads=12,
        fwd=FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(
            BwdConfig(
                block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False, is_ahead=False
            ),
        ),
    ),
    Row(
        family="320x256",
        heads=32,
        fwd=FwdConfig(block_h=32, block_k=64, max_chunk=256, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=8, num_stages=2, is_key_major=False),),
    ),
    Row(
        family="576x512",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False),),
    ),
    Row(
        family="576x512",
        heads=64,
        fwd=FwdConfig(block_h=64, block_k=32, max_chunk=512, num_warps=8, num_stages=2),
        bwd=(BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=8, num_stages=2, is_key_major=False),),
    ),
    Row(
        family="1024x1024",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=512, num_warps=8, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=128, num_warps=8, num_stages=1, is_key_major=False),),
    ),
    Row(
        family="128x64",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=1, is_key_major=False),),
        element_size=4,
    ),
    Row(
        family="576x512",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=8, num_stages=1),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1, is_key_major=False),),
        element_size=4,
    ),
    Row(
        family="1024x1024",
        heads=16,
        fwd=FwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1),
        bwd=(BwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=8, num_stages=1, is_key_major=False),),
        element_size=4,
    ),
)

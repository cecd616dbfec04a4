"""What sizes and strides decide about a launch of either side, and the tensors as the kernels read them."""

from __future__ import annotations

from typing import NamedTuple

from mla_ops.device import DeviceTraits
from mla_ops.launching import (
    INT32_OFFSETS,
    LaunchRecord,
    alignment,
    contiguous,
    launch_record,
    strides_as_read,
    with_unit_inner_stride,
)
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Side
from mla_ops.tiling import TileConfig, TileKey

# What `explain` says of a plan without work.
NOTHING = "no queries or no slots: nothing is launched"


class Launch(NamedTuple):
    """What the kernels of both sides are launched with."""

    config: TileConfig
    record: LaunchRecord
    shape: tuple[int, ...]  # of the indices
    q_strides: tuple[int, int, int]
    k_strides: tuple[int, int, int]
    indices_strides: tuple[int, int, int]
    sizes: tuple[int, int, int]  # seq_q, seq_kv, topk
    constants: tuple[int, ...]  # from HEADS to BLOCK_K
    stride_align: int
    use_int64_offsets: bool


def key_of(problem: IndexScoresProblem, traits: DeviceTraits) -> TileKey:
    """Return what the tables are asked with."""
    return TileKey.of(traits, problem.heads_per_group, problem.index_head_dim, problem.dtype.itemsize)


def plan_launch(side: Side, call: IndexScoresCall, config: TileConfig, use_int64_offsets: bool | None) -> Launch:
    """Plan launches of a side with `config`. Sizes and strides may be symbolic; None is derived, and adds a guard."""
    q, k, weights, indices, _, relu = call
    seq_q, heads, width = q.shape[-3:]
    seq_kv, kv_group = k.shape[-3:-1]
    q_strides, k_strides, indices_strides = (strides_as_read(tensor) for tensor in (q, k, indices))
    if use_int64_offsets is None:
        # Those of keys, or of a contiguous gradient of them.
        use_int64_offsets = bool(seq_kv * max(k_strides[1], kv_group * width) >= INT32_OFFSETS)
    kernel = (f"index_scores {side}", width, heads, kv_group, relu, q.dtype, weights.dtype, indices.dtype)
    return Launch(
        config,
        launch_record(q.device, *kernel, config),
        shape=(*indices.shape,),
        q_strides=q_strides,
        k_strides=k_strides,
        indices_strides=indices_strides,
        sizes=(seq_q, seq_kv, indices.shape[-1]),
        constants=(heads, kv_group, width, config.block_h, config.block_k),
        stride_align=alignment((*q_strides, *k_strides)),
        use_int64_offsets=use_int64_offsets,
    )


def readable(call: IndexScoresCall) -> IndexScoresCall:
    """Return `call` with inner strides of 1 and contiguous weights and lengths, copied where they are not so."""
    return IndexScoresCall(
        with_unit_inner_stride(call.q_idx),
        with_unit_inner_stride(call.k_idx),
        call.weights.contiguous(),
        with_unit_inner_stride(call.indices),
        contiguous(call.topk_length),
        call.relu,
    )

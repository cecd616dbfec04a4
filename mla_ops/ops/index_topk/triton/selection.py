"""Launches of the selection of one strip: in registers, streamed, or split over programs."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from mla_ops.launching import Wrap
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.launch import SelectConfig, StreamConfig, launch_options
from mla_ops.ops.index_topk.configs.lookup import MAX_IN_REGISTERS, select_config, split_count, stream_config
from mla_ops.ops.index_topk.triton.scores import Strip, ranges

Selecting = Literal["in registers", "streamed", "split"]

# The kernels are told that rows of a strip begin at multiples of so many words; keys are loaded 4 words at a time.
ROW_ALIGN = 16


class SelectionLaunch(NamedTuple):
    """What sizes decide about the launches of the selection."""

    way: Selecting
    config: SelectConfig | StreamConfig
    splits: int  # programs of a row; 1 unless split
    capacity: int  # keys of a segment; 0 unless split
    row_words: int  # of scratch that a row takes beside its scores
    constants: dict[str, Any]


def plan_selection(
    call: IndexTopkCall,
    problem: IndexTopkProblem,
    num_sms: int,
    row_stride: int,
    way: Selecting | None = None,
    config: SelectConfig | StreamConfig | None = None,
) -> SelectionLaunch:
    """Plan the selection; `way` and `config` are chosen by hand in measurements and tests."""
    seq_q, seq_kv = call.q_idx.shape[-3], call.k_idx.shape[-3]
    rows = call.q_idx.shape[:-3].numel() * seq_q * problem.kv_group
    if way is None:
        is_few = bool(rows <= num_sms // 2)
        way = "in registers" if seq_kv <= MAX_IN_REGISTERS else "split" if is_few else "streamed"
    if config is None:
        config = select_config(seq_kv) if way == "in registers" else stream_config(problem.topk, way == "split")
    constants = {
        "KV_GROUP": problem.kv_group, "TOPK": problem.topk, "TOPK_BLOCK": 1 << (problem.topk - 1).bit_length(),
        "WARPS": config.num_warps, "STRIDE_ALIGN": ROW_ALIGN, "IS_CAUSAL": call.causal,
        **launch_options(config),
    }  # fmt: skip
    if isinstance(config, SelectConfig):
        return SelectionLaunch(way, config, 1, 0, 0, constants | {"BLOCK": config.block})
    constants |= {"CHUNK": config.chunk, "BUFFER": config.buffer, "SAMPLE": config.sample}
    if way == "streamed":
        return SelectionLaunch(way, config, 1, 0, 2 * config.buffer, constants)
    splits = split_count(rows, num_sms)
    capacity = -(-row_stride // (splits * config.chunk)) * config.chunk
    row_words = splits * (2 * capacity + 1) + 2 * config.buffer
    return SelectionLaunch(way, config, splits, capacity, row_words, constants | {"SPLITS": splits})


def run_selection(
    call: IndexTopkCall,
    strip: Strip,
    scratch: torch.Tensor,
    row_stride: int,
    indices: torch.Tensor,
    launch: SelectionLaunch,
    wrap: Wrap,
) -> None:
    """Write the choices of a strip, whose scores are at the beginning of `scratch`, to `indices`."""
    rows = strip.rows
    place = (strip.first_plane, strip.first_query, strip.num_queries, call.q_idx.shape[-3], call.k_idx.shape[-3])
    arguments = (*ranges(call), *place)
    if launch.way == "in registers":
        wrap(_kernels().select)[(rows,)](scratch, row_stride, indices, *arguments, **launch.constants)
        return
    behind_scores = scratch[rows * row_stride :]
    if launch.way == "streamed":
        wrap(_kernels().stream)[(rows,)](scratch, row_stride, behind_scores, indices, *arguments, **launch.constants)
        return
    buffer_words = 0 if isinstance(launch.config, SelectConfig) else 2 * launch.config.buffer
    buffers, gathered, counts = behind_scores.split_with_sizes(
        [
            rows * buffer_words,
            rows * launch.splits * 2 * launch.capacity,
            behind_scores.numel() - rows * (buffer_words + launch.splits * 2 * launch.capacity),
        ]
    )
    gathering = {name: launch.constants[name] for name in launch.constants if name not in ("TOPK_BLOCK", "BUFFER")}
    wrap(_kernels().gather_splits)[(rows * launch.splits,)](
        scratch, row_stride, gathered, launch.capacity, counts, *arguments, **gathering
    )
    wrap(_kernels().select_splits)[(rows,)](
        scratch, row_stride, gathered, launch.capacity, counts, buffers, indices, *arguments, **launch.constants
    )


class _Kernels(NamedTuple):
    """The kernels of the three ways."""

    select: Any
    stream: Any
    gather_splits: Any
    select_splits: Any


@lru_cache(maxsize=1)
def _kernels() -> _Kernels:
    """Return the kernels; importing them imports triton."""
    from mla_ops.ops.index_topk.kernels.select import _select_kernel
    from mla_ops.ops.index_topk.kernels.select_split import _gather_splits_kernel, _select_splits_kernel
    from mla_ops.ops.index_topk.kernels.select_stream import _select_stream_kernel

    return _Kernels(_select_kernel, _select_stream_kernel, _gather_splits_kernel, _select_splits_kernel)

"""The launcher of `mla::index_topk`: planned once for calls alike, then run strip by strip.

NOTE [Strips]
Scores take 4 bytes for every query and key, so they are made for as many rows at a time as the workspace holds, and the
selection of these rows follows before the next ones overwrite them. Everything that a call needs beside its result is
one allocation of the same width for every strip. Where all rows fit there is one strip, and no loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import LaunchRecord, Wrap, as_it_is, as_read, launch_record, unfilled, with_unit_inner_stride
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.launch import ScoresConfig, SelectConfig, StreamConfig
from mla_ops.ops.index_topk.triton.scores import ScoresLaunch, Strip, plan_scores, run_scores, transposed_weights
from mla_ops.ops.index_topk.triton.selection import (
    ROW_ALIGN,
    Selecting,
    SelectionLaunch,
    plan_selection,
    run_selection,
)

# Bytes that a call may allocate beside its result, whatever its sizes; a single row that takes more gets more.
MAX_WORKSPACE = 256 * 2**20


class TopkPlan(NamedTuple):
    """What sizes, strides and settings decide about a call."""

    scores: ScoresLaunch
    selection: SelectionLaunch
    record: LaunchRecord
    strips: tuple[Strip, ...]  # none where there is nothing to compute
    row_stride: int  # words from one row of scores to the next
    scratch_words: int
    out_shape: tuple[int, ...]
    is_readable: bool  # kernels read the tensors of a call as they come

    @property
    def is_inlinable(self) -> bool:
        """Whether a compiler can trace the launches: one strip, and scratch that nothing takes a part of."""
        return len(self.strips) == 1 and self.selection.way == "in registers"


def plan_topk(
    call: IndexTopkCall,
    problem: IndexTopkProblem,
    traits: DeviceTraits,
    *,
    scores: ScoresConfig | None = None,
    way: Selecting | None = None,
    selection: SelectConfig | StreamConfig | None = None,
) -> TopkPlan:
    """Plan a call on a device with `traits`; what is None is derived."""
    device, is_readable = call.q_idx.device, all(t.stride(-1) == 1 for t in (call.q_idx, call.k_idx))
    call = call._replace(q_idx=as_read(call.q_idx), k_idx=as_read(call.k_idx))
    *batch, seq_q, _, _ = call.q_idx.shape
    seq_kv, kv_group, topk = call.k_idx.shape[-3], problem.kv_group, problem.topk
    scoring = plan_scores(call, problem, traits, scores)
    config = scoring.config
    # No row ends inside a tile, so stores need no mask along a row.
    row_align = max(ROW_ALIGN, config.block_k)
    row_stride = max(1, -(-seq_kv // row_align)) * row_align
    choosing = plan_selection(call, problem, traits.num_sms, row_stride, way, selection)
    planes = (batch[0] if batch else 1) * kv_group
    is_empty = bool(planes * seq_q * topk * seq_kv == 0)
    row_words = row_stride + choosing.row_words
    budget = MAX_WORKSPACE - (4 * call.weights.numel() if scoring.copies_weights else 0)
    strips = () if is_empty else cut_strips(planes, seq_q, budget // (4 * row_words), config.block_rows)
    kernel = ("index_topk", problem, call.weights.dtype, call.causal, call.relu, config, choosing.way, choosing.config)
    bounds = tuple(None if bound is None else bound.dtype for bound in (call.starts, call.ends, call.k_scale))
    return TopkPlan(
        scoring,
        choosing,
        launch_record(device, *kernel, bounds),
        strips,
        row_stride,
        scratch_words=max((strip.rows for strip in strips), default=0) * row_words,
        out_shape=(*batch, seq_q, kv_group, topk),
        is_readable=is_readable,
    )


def cut_strips(planes: int, seq_q: int, max_rows: int, block_q: int) -> tuple[Strip, ...]:
    """Cut all rows into strips of up to `max_rows`, one at least: whole planes if they fit, else queries of a plane."""
    if seq_q <= max_rows:
        step = min(planes, max_rows // seq_q)
        return tuple(Strip(first, min(step, planes - first), 0, seq_q) for first in range(0, planes, step))
    step = max(1, max_rows // block_q * block_q or max_rows)
    return tuple(
        Strip(plane, 1, first, min(step, seq_q - first)) for plane in range(planes) for first in range(0, seq_q, step)
    )


def describe_topk(plan: TopkPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if not plan.strips:
        return ("no queries, no keys or no slots: nothing is launched",)
    selection = plan.selection
    splits = f" over {selection.splits} programs a row" if selection.way == "split" else ""
    strips, megabytes = len(plan.strips), plan.scratch_words * 4 / 2**20
    return (
        f"scores: {plan.scores.config}; {plan.record}",
        f"selection {selection.way}{splits}: {selection.config}",
        f"{strips} strip{'s' * (strips > 1)} of up to {plan.strips[0].rows} rows, {megabytes:.1f} MiB of workspace",
    )


def launch_topk(call: IndexTopkCall, plan: TopkPlan, *, wrap: Wrap = as_it_is) -> torch.Tensor:
    """Run the kernels; `wrap` is applied to every kernel that is launched."""
    is_traced = wrap is not as_it_is
    if is_traced and not plan.is_inlinable:
        raise UnsupportedProblemError(
            f"a trace takes one strip chosen from in registers, got {len(plan.strips)} chosen from "
            f"{plan.selection.way}; leave the call as it is"
        )
    indices = unfilled(plan.out_shape, torch.int32, call.q_idx, is_traced=is_traced)
    if not plan.strips:
        return indices.fill_(-1)
    call = call if plan.is_readable else readable(call)
    if plan.scores.copies_weights:
        call = call._replace(weights=transposed_weights(call))
    scratch = unfilled((plan.scratch_words,), torch.int32, call.q_idx, is_traced=is_traced)
    for strip in plan.strips:
        run_scores(call, strip, scratch, plan.row_stride, plan.scores, wrap)
        run_selection(call, strip, scratch, plan.row_stride, indices, plan.selection, wrap)
    plan.record.is_warm |= not is_traced
    return indices


def readable(call: IndexTopkCall) -> IndexTopkCall:
    """Return `call` with inner strides of 1 of queries and keys, copied where they are not so."""
    return call._replace(q_idx=with_unit_inner_stride(call.q_idx), k_idx=with_unit_inner_stride(call.k_idx))

"""The launcher of the backward: all gradients in one pass, dk summed by atomics or in a fixed order.

Rows too wide for one program get a launch for every slab of columns.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import INT32_OFFSETS, Wrap, as_it_is, unfilled
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Wanted
from mla_ops.ops.index_scores.configs.tables import backward_config, column_slabs
from mla_ops.ops.index_scores.triton.launch import NOTHING, Launch, key_of, plan_launch, readable
from mla_ops.row_sums import sum_in_query_order
from mla_ops.tiling import TileConfig, chunk_widths

# Registers of a thread of the backward, more or less: how many programs an SM holds follows.
REGISTERS = 255


class BackwardPlan(NamedTuple):
    """What sizes, strides and settings decide about a backward."""

    launch: Launch
    head_blocks: int  # programs of a query and KV group
    is_deterministic: bool  # dk is summed in the order of the queries
    wave_programs: int  # programs that run at a time


def plan_backward(
    call: IndexScoresCall,
    traits: DeviceTraits,
    wanted: Wanted = Wanted(),  # noqa: B008  # a named tuple of constants
    *,
    config: TileConfig | None = None,
    use_int64_offsets: bool | None = None,
) -> BackwardPlan:
    """Plan a backward on a device with `traits`, in the mode that torch is in; what is None is derived."""
    problem = IndexScoresProblem.of(call)
    config = config or backward_config(key_of(problem, traits))
    registers = 32 * config.num_warps * (config.max_registers or REGISTERS)
    return BackwardPlan(
        plan_launch("backward", call, config, use_int64_offsets),
        head_blocks=-(-problem.heads_per_group // config.block_h),
        is_deterministic=wanted.dk and torch.are_deterministic_algorithms_enabled(),
        wave_programs=traits.num_sms * max(1, 65536 // registers),
    )


def describe_backward(plan: BackwardPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    launch = plan.launch
    if 0 in launch.shape:
        return (NOTHING,)
    order = ", dk summed in the order of the queries" if plan.is_deterministic else ""
    return (f"backward: {launch.config}{order}; {launch.record}",)


def launch_backward(
    call: IndexScoresCall, dscores: torch.Tensor, wanted: Wanted, plan: BackwardPlan, *, wrap: Wrap = as_it_is
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward kernels; `wrap` is applied to every kernel that is launched."""
    launch, is_traced = plan.launch, wrap is not as_it_is
    call = readable(call)
    q, k, weights, indices, topk_length, relu = call
    if indices.numel() == 0 or not any(wanted):
        return (
            q.new_zeros(q.shape if wanted.dq else 0),
            k.new_zeros(k.shape if wanted.dk else 0),
            weights.new_zeros(weights.shape if wanted.dw else 0),
        )
    dscores = dscores.contiguous()
    dq = unfilled(q.shape, q.dtype, q, is_traced=is_traced) if wanted.dq else None
    dw = unfilled(weights.shape, weights.dtype, q, is_traced=is_traced) if wanted.dw else None
    rows, kv_group, width = prod(indices.shape[:-2]), indices.shape[-2], q.shape[-1]

    def run(dk: torch.Tensor | None, places: torch.Tensor | None, first_row: int, num_rows: int) -> None:
        has_far_places = places is not None and dk is not None and dk.numel() >= INT32_OFFSETS
        for first, end in column_slabs(launch.config, width):
            wrap(_backward_kernel())[(num_rows * kv_group * plan.head_blocks,)](
                q, *launch.q_strides, k, *launch.k_strides, indices, *launch.indices_strides, topk_length,
                weights, dscores, dq, dk, dw if first == 0 else None, places, first_row, *launch.sizes,
                *launch.constants, *chunk_widths(end - first, launch.config.max_chunk), first, end,
                launch.stride_align, launch.use_int64_offsets or has_far_places, relu, **launch.config.options,
            )  # fmt: skip
        launch.record.is_warm |= not is_traced

    if not wanted.dk:
        run(None, None, 0, rows)
        dk = k.new_empty(0)
    elif plan.is_deterministic:
        # Rows of slots in fp32: dk is rounded once.
        dk = sum_in_query_order(
            k, indices, topk_length, torch.float32, run, plan.head_blocks, plan.wave_programs, wrap, orders_repeats=True
        )
    else:
        sums = k.new_zeros(k.shape, dtype=torch.float32)
        run(sums, None, 0, rows)
        dk = sums.to(k.dtype)
    return q.new_empty(0) if dq is None else dq, dk, weights.new_empty(0) if dw is None else dw


@lru_cache(maxsize=1)
def _backward_kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.index_scores.kernels.backward import _index_scores_bwd_kernel

    return _index_scores_bwd_kernel

"""The launcher of the reader: planned once for calls alike, then run."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import LaunchRecord, launch_record, unfilled
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem
from mla_ops.row_formats import row_format
from mla_ops.row_tiling import PoolStrides, RowPieces


class ReadConfig(NamedTuple):
    """How the reader is launched."""

    block_n: int  # rows of a program
    num_warps: int


CONFIG = ReadConfig(block_n=4, num_warps=4)


class ReadPlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    config: ReadConfig
    record: LaunchRecord
    grid: tuple[int]
    shape: tuple[int, int, int]  # of the result
    pool: tuple[int, int, int, int]  # distances of pages, rows, groups, and from a page to its scales
    scale_stride: int
    sizes: tuple[int, int, int]  # entries, rows of the pool, rows of a page
    constants: tuple[int | bool | str, ...]  # of the kernel, from KV_GROUP on


def plan_read(
    call: ReadRowsCall, problem: ReadRowsProblem, traits: DeviceTraits, *, config: ReadConfig = CONFIG
) -> ReadPlan:
    """Plan a launch on a device with `traits`."""
    pages, rows, d_total, _, name, _, cache_scale = call
    form, layout, entries = row_format(name), call.layout, rows.shape[0]
    pool = PoolStrides.of(pages, layout)
    return ReadPlan(
        config,
        launch_record(pages.device, "read_rows", problem, rows.dtype, pool.unit, config),
        grid=(-(-entries // config.block_n) * problem.kv_group,),
        shape=(entries, problem.kv_group, d_total),
        pool=(pool.page, pool.row, pool.group, pool.page_scales),
        scale_stride=0 if cache_scale is None or cache_scale.numel() == 1 else cache_scale.stride(0),
        sizes=(entries, pages.shape[0] * pages.shape[1], pages.shape[1]),
        constants=(
            *(problem.kv_group, layout.d_payload, d_total, pool.unit, form.scale),
            *(layout.scale_offset, layout.scale_bytes, layout.tail_offset),
            *RowPieces.of(form, layout, d_total),
            *(config.block_n, traits.has_e4m3),
        ),
    )


def describe_read(plan: ReadPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if 0 in plan.shape:
        return ("no rows: nothing is launched",)
    return (f"read_rows: {plan.config}; {plan.record}",)


def launch_read(call: ReadRowsCall, plan: ReadPlan) -> torch.Tensor:
    """Run the reader."""
    out = unfilled(plan.shape, call.dtype, call.pages, is_traced=False)
    if out.numel() > 0:
        _kernel()[plan.grid](*arguments_of(call, plan, out), num_warps=plan.config.num_warps)
        plan.record.is_warm = True
    return out


def arguments_of(call: ReadRowsCall, plan: ReadPlan, out: torch.Tensor) -> tuple[Any, ...]:
    """Return the arguments of the reader, which writes `out`."""
    pages, rows, _, _, name, _, cache_scale = call
    return (
        pages if name == "dense" else pages.view(torch.uint8), *plan.pool, rows, rows.stride(0),
        cache_scale, plan.scale_stride, out, *plan.sizes, *plan.constants,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.read_rows.kernels.read import _read_rows_kernel

    return _read_rows_kernel

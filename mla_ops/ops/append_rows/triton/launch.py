"""The launcher of the writer: planned once for calls alike, then run."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import LaunchRecord, alignment, launch_record, unfilled, with_unit_inner_stride
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.row_formats import row_format
from mla_ops.row_tiling import PoolStrides, RowPieces

# Up to so many entries a row's twin is looked for by comparing: see NOTE [One of equal rows].
MAX_COMPARED = 1024
BLOCK_CLAIMED = 128
# Compute capability from which on a kernel may start before the one in front of it has ended.
FIRST_EARLY = 90


class AppendConfig(NamedTuple):
    """How the writer is launched."""

    block_n: int  # rows of a program
    num_warps: int


class AppendPlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    config: AppendConfig
    record: LaunchRecord
    grid: tuple[int]
    is_claimed: bool  # which of equal rows is written, a kernel of its own decides
    is_early: bool  # the writer starts while that kernel runs
    strides: tuple[tuple[int, int], tuple[int, int], int]  # of latent, tail and rows
    pool: tuple[int, int, int, int]  # distances of pages, rows, groups, and from a page to its scales
    scale_stride: int
    sizes: tuple[int, int, int]  # entries, rows of the pool, rows of a page
    constants: tuple[int | bool | str, ...]  # of the kernel, from KV_GROUP on

    @property
    def options(self) -> dict[str, int | bool]:
        """How Triton compiles and launches the writer."""
        return {"num_warps": self.config.num_warps, "launch_pdl": self.is_early}


def append_config(entries: int) -> AppendConfig:
    """Return how to write so many rows."""
    return AppendConfig(block_n=1, num_warps=4) if entries <= MAX_COMPARED else AppendConfig(block_n=8, num_warps=4)


def plan_append(
    call: AppendRowsCall,
    problem: AppendRowsProblem,
    traits: DeviceTraits,
    *,
    config: AppendConfig | None = None,
    is_claimed: bool | None = None,
    is_early: bool | None = None,
) -> AppendPlan:
    """Plan a launch on a device with `traits`; what is None is derived."""
    latent, tail, rows, pages, _, name, scale_rule, cache_scale = call
    form, layout, entries = row_format(name), call.layout, latent.shape[0]
    config = config or append_config(entries)
    pool = PoolStrides.of(pages, layout)
    strides = _outer_strides(latent), (0, 0) if tail is None else _outer_strides(tail)
    is_claimed = entries > MAX_COMPARED if is_claimed is None else is_claimed
    is_early = is_claimed and traits.arch >= FIRST_EARLY if is_early is None else is_early
    return AppendPlan(
        config,
        launch_record(
            pages.device, "append_rows", problem, rows.dtype, tail is None, pool.unit, config, is_claimed, is_early
        ),
        grid=(-(-entries // config.block_n) * problem.kv_group,),
        is_claimed=is_claimed,
        is_early=is_early,
        strides=(*strides, rows.stride(0)),
        pool=(pool.page, pool.row, pool.group, pool.page_scales),
        scale_stride=0 if cache_scale is None or cache_scale.numel() == 1 else cache_scale.stride(0),
        sizes=(entries, pages.shape[0] * pages.shape[1], pages.shape[1]),
        constants=(
            *(problem.kv_group, latent.shape[-1], layout.d_payload, problem.d_total),
            *(alignment((*strides[0], *strides[1])), pool.unit),
            {"fp32": scale_rule, "ue8m0": "ue8m0", "none": "cache"}[form.scale],
            *(layout.scale_offset, layout.scale_bytes, layout.tail_offset),
            *RowPieces.of(form, layout, problem.d_total),
            *(config.block_n, MAX_COMPARED, traits.has_e4m3, is_early),
        ),
    )


def describe_append(plan: AppendPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if 0 in plan.sizes:
        return ("no rows, or a pool without pages: nothing is launched",)
    order = "rows are claimed first, one of equal rows is written" if plan.is_claimed else "of equal rows the last wins"
    return (f"append_rows: {plan.config}, {order}; {plan.record}",)


def launch_append(call: AppendRowsCall, plan: AppendPlan) -> None:
    """Run the writer."""
    if 0 in plan.sizes:
        return
    entries, num_rows, _ = plan.sizes
    append, claim = _kernels()
    owners = unfilled((num_rows,), torch.int32, call.pages, is_traced=False) if plan.is_claimed else None
    # Inputs are copied before rows are claimed: what the writer reads early has been written by then.
    arguments = arguments_of(call, plan, owners)
    if owners is not None:
        grid = (-(-entries // BLOCK_CLAIMED),)
        claim[grid](call.rows, plan.strides[2], owners, entries, num_rows, BLOCK_CLAIMED, plan.is_early)
    append[plan.grid](*arguments, **plan.options)
    plan.record.is_warm = True


def arguments_of(call: AppendRowsCall, plan: AppendPlan, owners: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the arguments of the writer; `owners` are what rows have been claimed in."""
    latent, tail, rows, pages, _, name, _, cache_scale = call
    of_latent, of_tail, of_rows = plan.strides
    return (
        with_unit_inner_stride(latent), *of_latent, None if tail is None else with_unit_inner_stride(tail), *of_tail,
        rows, of_rows, owners, pages if name == "dense" else pages.view(torch.uint8), *plan.pool,
        cache_scale, plan.scale_stride, *plan.sizes, *plan.constants,
    )  # fmt: skip


def _outer_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the strides of entries and groups of `with_unit_inner_stride(tensor)`."""
    _, groups, width = tensor.shape
    entry, group, inner = tensor.stride()
    return (entry, group) if inner == 1 else (groups * width, width)


@lru_cache(maxsize=1)
def _kernels() -> tuple[Any, Any]:
    """Return the writer and the kernel that claims rows; importing them imports triton."""
    from mla_ops.ops.append_rows.kernels.append import _append_rows_kernel, _claim_rows_kernel

    return _append_rows_kernel, _claim_rows_kernel

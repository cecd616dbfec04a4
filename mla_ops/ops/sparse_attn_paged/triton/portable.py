"""The portable kernel set: one Triton kernel for every device from sm80 on, any format, widths, heads and topk."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import LaunchRecord, alignment, as_it_is, launch_record, outer_strides, unfilled
from mla_ops.ops.sparse_attn.configs.launch import (
    ConfigKey,
    FwdConfig,
    launch_options,
    program_count,
    programs_by_registers,
)
from mla_ops.ops.sparse_attn.triton.portable import run_merge, split_count
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.configs.tables import (
    MAX_FOLDING_HEADS,
    cut_row,
    paged_config,
    quantised_smem_bytes,
)
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints, Pool
from mla_ops.ops.sparse_attn_paged.triton.resolve import ResolvePlan, resolve
from mla_ops.row_formats import row_format

# Fewer slots a program, or more programs a row, never pay: the merge takes longer than they save.
MIN_SLOTS, MAX_SPLITS = 64, 32


class PortablePlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    config: FwdConfig
    record: LaunchRecord
    resolve: ResolvePlan | None  # None: indices are row numbers
    grid: tuple[int, int]
    partials: tuple[int, int, int]  # rows, splits, heads: the shape of a partial lse
    q_strides: tuple[int, int, int]
    pool: tuple[int, int, int, int]  # stride_p_page to page_scales
    indices_strides: tuple[int, int, int]
    scale_stride: int  # of cache_scale, from one KV group to the next
    sizes: tuple[int, ...]  # seq_q to slots_per_split
    constants: tuple[int | bool | str, ...]  # of the kernel, from HEADS to USE_INT64_OFFSETS
    multiplies: str  # how rows are multiplied by their scales, for a person


class PortableKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "portable"

    def refusal(self, problem: SparseAttnPagedProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why the kernel can't run `problem`: 16 rows must fit shared memory."""
        if traits.vendor != "nvidia" or traits.arch < 80:
            return f"the device is {traits}, they need one of nvidia with compute capability 8.0 or later"
        if paged_config(problem.row_format, key_of(problem, traits)) is None:
            return (
                f"no configuration fits: the device has {traits.smem_bytes} B of shared memory per block, which is too "
                f"little for 16 rows of d_total={problem.d_total}"
            )
        return None

    def plan(
        self,
        call: SparseAttnPagedCall,
        traits: DeviceTraits,
        *,
        config: FwdConfig | None = None,
        num_splits: int | None = None,
        use_int64_offsets: bool | None = None,
    ) -> PortablePlan:
        """Plan a launch; what is None is derived."""
        problem, pool, found = SparseAttnPagedProblem.of(call), Pool.of(call), None
        if call.block_table is not None:
            found = ResolvePlan.of(call, call.pages.shape[1])
            call = found.as_resolved(call)
        key, name = key_of(problem, traits), call.row_format
        config = config or paged_config(name, key)
        assert config is not None, f"no configuration for {problem}; dispatch has refused it"
        form, layout = row_format(name), call.layout
        heads, kv_group, topk = problem.heads, problem.kv_group, problem.topk
        num_pages, page_size = call.pages.shape[:2]
        programs = program_count(call.rows, heads, kv_group, config.block_h)
        if num_splits is None:
            num_splits = split_count_of(name, programs, topk, config, traits, key)
        q_strides = outer_strides(call.q.stride())
        cut = cut_row(name, problem.d_total, problem.d_v, config.max_chunk)
        # A power of two times a payload is exact, and costs fewer registers than parts of the logits.
        folds = form.scale == "fp32" and config.block_h <= MAX_FOLDING_HEADS
        is_native = traits.has_e4m3
        return PortablePlan(
            config,
            launch_record(
                call.q.device, "sparse_attn_paged", problem.d_total, problem.d_v, heads, kv_group, problem.dtype, name,
                call.indices.dtype, problem.has_block_table, pool.has_one_stride, num_splits > 1, config,
            ),
            resolve=found,
            grid=(programs, num_splits),
            partials=(call.rows, num_splits, heads),
            q_strides=q_strides,
            pool=(pool.page, pool.row, pool.group, pool.page_scales),
            indices_strides=outer_strides(call.indices.stride()),
            scale_stride=0 if call.cache_scale is None or call.cache_scale.numel() == 1 else 1,
            sizes=(
                *(call.q.shape[-3], num_pages * page_size, page_size, topk),
                topk if num_splits == 1 else -(-topk // (num_splits * config.block_k)) * config.block_k,
            ),
            constants=(
                *(heads, kv_group, problem.d_total, problem.d_v, config.block_h, config.block_k),
                *cut,
                *(alignment(q_strides), pool.unit),
                *(form.payload != "none", layout.d_tail16 > 0, layout.tail_offset),
                *(form.scale, form.tile, layout.scale_offset, layout.scale_bytes),
                *(pool.has_one_stride, folds, is_native),
                pool.is_far if use_int64_offsets is None else use_int64_offsets,
            ),
            multiplies=_FOLDED if folds else _PLAIN if form.scale == "none" else _ROUNDED,
        )  # fmt: skip

    def describe(self, plan: PortablePlan) -> tuple[str, ...]:
        """Say what `plan` launches."""
        splits = f", slots split over {plan.grid[1]} programs"
        return (f"portable: {plan.config}{splits}; {plan.record}", plan.multiplies)

    def run(self, call: SparseAttnPagedCall, plan: PortablePlan, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Run the kernel, and the merge kernel when a row's slots are shared out over programs."""
        if plan.resolve is not None:
            call = resolve(call, plan.resolve)
        kernel_out, kernel_lse, is_split = out, lse, plan.grid[1] > 1
        if is_split:
            kernel_out = unfilled((*plan.partials, call.d_v), torch.float32, call.q, is_traced=False)
            kernel_lse = unfilled(plan.partials, torch.float32, call.q, is_traced=False)
        _kernel()[plan.grid](*arguments_of(call, plan, kernel_out, kernel_lse), **launch_options(plan.config))
        if is_split:
            run_merge(kernel_out, kernel_lse, call.attn_sink, out, lse, as_it_is)


def arguments_of(
    call: SparseAttnPagedCall, plan: PortablePlan, out: torch.Tensor, lse: torch.Tensor
) -> tuple[Any, ...]:
    """Return the arguments of the kernel for a call by row number.

    `out` and `lse` are what the kernel writes: partial results where slots are split.
    """
    q, pages, indices, _, softmax_scale, name, _, _, topk_length, attn_sink, cache_scale = call
    return (
        q, *plan.q_strides, pages if name == "dense" else pages.view(torch.uint8), *plan.pool,
        indices, *plan.indices_strides, topk_length, attn_sink, cache_scale, plan.scale_stride, out, lse,
        softmax_scale, *plan.sizes, *plan.constants, plan.grid[1] > 1, softmax_scale < 0,
    )  # fmt: skip


_PLAIN = "rows are multiplied as they are"
_FOLDED = "scales join logits and weights in fp32: any scale is exact"
_ROUNDED = "rows are multiplied by their scales in fp32 and rounded: exact where scales are powers of two"


def key_of(problem: SparseAttnPagedProblem, traits: DeviceTraits) -> ConfigKey:
    """Return what the tables are asked with for a problem on a device."""
    heads = max(1, problem.heads_per_group)
    return ConfigKey(traits.arch, traits.smem_bytes, heads, problem.d_total, problem.d_v, problem.dtype.itemsize)


def split_count_of(name: str, programs: int, topk: int, config: FwdConfig, traits: DeviceTraits, key: ConfigKey) -> int:
    """Return over how many programs the slots of one row are shared out.

    Dense rows: as `mla::sparse_attn` does. Quantised rows: as many as give the device all programs it holds, of
    MIN_SLOTS slots each or more. At 576/512 with 16 heads and topk 2048 that is the best of three or four choices for
    1, 16, 64 and 128 requests.
    """
    if name == "dense":
        return split_count(programs, topk, config, traits, key)
    by_memory = traits.smem_bytes // quantised_smem_bytes(config, name, key)
    places = traits.num_sms * max(1, min(by_memory, programs_by_registers(config, 232)))
    blocks = -(-topk // config.block_k)
    splits = min(places // max(1, programs), topk // max(MIN_SLOTS, config.block_k), MAX_SPLITS)
    return -(-blocks // -(-blocks // max(1, splits))) if blocks else 1


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.sparse_attn_paged.kernels.forward import _sparse_attn_paged_fwd_kernel

    return _sparse_attn_paged_fwd_kernel

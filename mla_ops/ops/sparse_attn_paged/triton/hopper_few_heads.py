"""The Hopper kernel set for few heads: the warp-specialised forward of `mla::sparse_attn` for few heads, on pages."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import LaunchRecord, launch_record
from mla_ops.ops.sparse_attn.configs.launch import FewHeadsConfig
from mla_ops.ops.sparse_attn.configs.lookup import few_heads_config
from mla_ops.ops.sparse_attn.triton.hopper_few_heads import (
    FewHeadsForward,
    Rows,
    plan_items,
    problem_refusal,
    run_few_heads,
)
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints, Pool
from mla_ops.ops.sparse_attn_paged.triton.portable import key_of
from mla_ops.row_formats import ROW_ALIGN, row_format

FORMATS = ("dense", "fp8", "fp8_all", "fp8_cache")
# Positions are of 32 bits; a pool of more rows fits no device.
MAX_POSITIONS = 2**31 - 1
# Heads up to which the portable kernels are faster on rows with scales: at 576/512 with topk 2048 on an H100, 64 and
# 128 requests of 16 heads take them 66 and 116 to 120 us, and this kernel 68 to 72 and 111 to 131 us. With 32 heads
# 128 requests take 165 and 125 us.
SLOW_HEADS = 16


class FewHeadsPlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    record: LaunchRecord
    forward: FewHeadsForward
    rows: Rows  # without the tensors of the call


class HopperFewHeadsKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "hopper_few_heads"

    def refusal(self, problem: SparseAttnPagedProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why `problem` is not run by this kernel."""
        if problem.row_format not in FORMATS:
            return f"rows are {problem.row_format!r}, they read {', '.join(FORMATS)}"
        form, key = row_format(problem.row_format), key_of(problem, traits)
        has_scales = form.scales_at == "row"
        reason = problem_refusal(key, problem.dtype, has_scales=has_scales)
        if reason is not None:
            return reason
        layout = form.layout(problem.d_total, problem.d_v)
        config = few_heads_config(key, has_scales=has_scales)
        if layout.d_tail16 and config is not None and config.value != problem.d_v:
            return f"d_v is {problem.d_v}, a 16-bit tail must begin at a multiple of 64 channels"
        if layout.d_payload % ROW_ALIGN:
            return f"the payload has {layout.d_payload} channels, they take multiples of {ROW_ALIGN}"
        if has_scales and problem.heads_per_group <= SLOW_HEADS and hints is not None:
            return f"{problem.heads_per_group} heads share a row with scales of its own; portable kernels are faster"
        if hints is not None and hints.pool.unit < ROW_ALIGN:
            return f"rows start at multiples of {hints.pool.unit} bytes, not of {ROW_ALIGN}"
        return None

    def plan(
        self,
        call: SparseAttnPagedCall,
        traits: DeviceTraits,
        *,
        config: FewHeadsConfig | None = None,
        num_splits: int | None = None,
    ) -> FewHeadsPlan:
        """Plan a launch; what is None is derived."""
        problem, pool, layout = SparseAttnPagedProblem.of(call), Pool.of(call), call.layout
        key, form = key_of(problem, traits), row_format(call.row_format)
        has_scales = form.scales_at == "row"
        config = config or few_heads_config(key, has_scales=has_scales)
        assert config is not None, f"no configuration for {problem}; `refusal` has refused it"
        num_pages, page_size, kv_group, _ = call.pages.shape
        num_positions = num_pages * page_size
        if call.block_table is not None:
            num_positions = call.block_table.shape[-1] * page_size
        is_paged = call.block_table is not None or not pool.has_one_stride
        # Of rows in e4m3 in bytes, of others in channels.
        unit = pool.unit if layout.d_payload else pool.unit // call.pages.element_size()
        # As a dense call on the same pool decides, whose results have the same bits.
        pool_bytes = ((num_pages - 1) * pool.page + page_size * pool.row) * pool.unit
        is_streamed = layout.d_payload == 0 and pool_bytes > traits.l2_bytes
        groups = call.rows * kv_group
        forward = plan_items(config, groups, problem.topk, traits, num_splits, is_streamed=is_streamed)
        record = launch_record(
            call.q.device, "sparse_attn_paged", problem.d_total, problem.d_v, problem.heads, kv_group, problem.dtype,
            call.row_format, call.indices.dtype, problem.has_block_table, is_paged, forward.num_splits > 1, config,
        )  # fmt: skip
        rows = Rows(
            strides=(pool.page * unit if is_paged else 0, pool.row * unit, pool.group * unit),
            num_positions=min(num_positions, MAX_POSITIONS),
            page_size=page_size,
            num_pages=num_pages,
            is_paged=is_paged,
            format=(
                *(layout.d_payload, layout.d_tail16 if layout.d_payload else 0),
                *(layout.num_scales if has_scales else 0, layout.scale_offset, layout.tail_offset),
            ),
        )
        return FewHeadsPlan(record, forward, rows)

    def describe(self, plan: FewHeadsPlan) -> tuple[str, ...]:
        """Say what `plan` launches."""
        forward, rows = plan.forward, plan.rows
        multiplies = "scales join logits and weights in fp32" if rows.format[2] else "rows are multiplied as they are"
        splits = f", slots split over {forward.num_splits} programs"
        return (f"hopper_few_heads: {forward.config}{splits}; {plan.record}", multiplies)

    def run(self, call: SparseAttnPagedCall, plan: FewHeadsPlan, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Run the kernel, and the merge kernel when a row's slots are shared out over programs."""
        rows = plan.rows._replace(block_table=call.block_table, seq_lens=call.seq_lens, cache_scale=call.cache_scale)
        pages = call.pages.view(torch.uint8) if rows.format[0] else call.pages
        run_few_heads(
            call.q, pages, call.indices, call.softmax_scale, call.topk_length, call.attn_sink, out, lse, plan.forward,
            call.pages.shape[2], rows,
        )  # fmt: skip

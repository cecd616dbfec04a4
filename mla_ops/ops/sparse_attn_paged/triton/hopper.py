"""The Hopper kernel set: the warp-specialised forward of `mla::sparse_attn` on pages of dense or e4m3 rows, on sm90."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import LaunchRecord, launch_record, with_aligned_rows
from mla_ops.ops.sparse_attn.call import Hints as DenseHints
from mla_ops.ops.sparse_attn.call import SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.lookup import hopper_config, key_of
from mla_ops.ops.sparse_attn.triton.hopper import HopperForward, HopperKernels, HopperRows, plan_items, run_items
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints, Pool
from mla_ops.row_formats import ROW_ALIGN, RowLayout

FORMATS = ("dense", "fp8", "fp8_all", "fp8_cache")
# Channels behind the value that a tile has room for as bytes beside its weights.
MAX_TAIL = 64


class HopperPlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    launch: HopperForward
    record: LaunchRecord
    layout: RowLayout
    strides: tuple[int, int, int]  # of pages, rows and KV groups, in elements
    row_bytes: int


class HopperPagedKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "hopper"

    def refusal(self, problem: SparseAttnPagedProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why `problem` is not run by the Hopper forward: it can't, or portable kernels are faster.

        What the Hopper forward refuses of dense rows it refuses here. The bytes of a row wait in one of the two sides
        of its tile, so both are equally wide.
        """
        form = problem.row_format
        if form not in FORMATS:
            return f"rows are {form!r}, they take {', '.join(map(repr, FORMATS))}"
        dense = dense_problem(problem)
        dense_hints = None if hints is None else DenseHints(batch=hints.rows, seq_q=1, seq_kv=0)
        reason = HopperKernels().refusal("forward", dense, dense_hints, traits)
        if reason is not None:
            return reason
        if hints is not None and hints.pool.unit < ROW_ALIGN:
            return f"rows start at multiples of {hints.pool.unit} bytes, not of {ROW_ALIGN}"
        config = hopper_config(key_of(dense, traits))
        assert config is not None, "the refusal of the dense problem asked for it"
        if form == "dense":
            return None
        if problem.d_v != 2 * config.left or config.left != config.right:
            return f"d_v is {problem.d_v}, rows of e4m3 are taken where it is 256 or 512"
        if form != "fp8" and (config.tail > MAX_TAIL or problem.d_total % ROW_ALIGN):
            return f"d_tail is {problem.d_total - problem.d_v}, in e4m3 they take multiples of 16 up to {MAX_TAIL}"
        if form == "fp8_cache" and problem.kv_group > 1:
            return f"{problem.kv_group} KV groups may have a cache_scale each, they take one"
        return None

    def plan(self, call: SparseAttnPagedCall, traits: DeviceTraits, *, num_splits: int | None = None) -> HopperPlan:
        """Plan a launch; what is None is derived."""
        problem, pool = SparseAttnPagedProblem.of(call), Pool.of(call)
        config = hopper_config(key_of(dense_problem(problem), traits))
        assert config is not None, f"no configuration for {problem}; it was refused"
        num_pages = call.pages.shape[0]
        launch = plan_items(
            *(call.rows, problem.heads, problem.kv_group, problem.topk),
            *(num_pages * pool.page * pool.unit, config, traits, num_splits),
        )
        itemsize = call.q.element_size() if problem.row_format == "dense" else 1
        record = launch_record(
            call.q.device, "sparse_attn_paged", problem, call.indices.dtype, launch.num_splits > 1,
            launch.is_cold, config,
        )  # fmt: skip
        page, row, group = (pool.unit * distance // itemsize for distance in (pool.page, pool.row, pool.group))
        layout = call.layout
        return HopperPlan(launch, record, layout, (page, row, group), layout.row_bytes)

    def describe(self, plan: HopperPlan) -> tuple[str, ...]:
        """Say what `plan` launches."""
        launch = plan.launch
        splits = f", slots split over {launch.num_splits} programs" if launch.num_splits > 1 else ""
        line = f"hopper: {launch.config}{splits}; {plan.record}"
        return (line, _ROUNDED if plan.layout.d_payload else "rows are multiplied as they are")

    def run(self, call: SparseAttnPagedCall, plan: HopperPlan, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Run the kernel, and the merge kernel where the slots of a query are shared out."""
        pages, layout, table = call.pages, plan.layout, call.block_table
        num_pages, page_size = pages.shape[:2]
        rows = HopperRows(
            pages if call.row_format == "dense" else pages.view(torch.uint8),
            plan.strides,
            plan.row_bytes,
            (num_pages if table is None else table.shape[-1]) * page_size,
            page_size,
            num_pages,
            table,
            call.seq_lens,
            call.cache_scale,
            layout.d_payload,
            layout.scale_offset if layout.num_scales else 0,
            layout.tail_offset,
        )
        q = with_aligned_rows(call.q)
        dense = SparseAttnCall(q, pages, call.indices, call.d_v, call.softmax_scale, call.topk_length, call.attn_sink)
        run_items(dense, rows, out, lse, plan.launch)


_ROUNDED = "rows are multiplied by their scales in fp32 and rounded: exact where scales are powers of two"


def dense_problem(problem: SparseAttnPagedProblem) -> SparseAttnProblem:
    """Return the problem of `mla::sparse_attn` with these sizes."""
    return SparseAttnProblem(problem.d_total, problem.d_v, problem.topk, problem.heads, problem.kv_group, problem.dtype)

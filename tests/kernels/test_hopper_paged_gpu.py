"""The Hopper forward on pages, on an sm90 GPU, asked for by its kernel set: formats, by row number and by table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_pools import PagedCase, make_paged_inputs

from mla_ops.device import traits_of
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.ops.sparse_attn_paged.triton.forward import launch_forward, plan_forward, readable
from mla_ops.ops.sparse_attn_paged.triton.hopper import FORMATS, HopperPagedKernels
from mla_ops.testing.closeness import assert_forward_bars

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory", "on_hopper")]

KERNELS = HopperPagedKernels()
WIDE = PagedCase("fp8", 576, 512, heads=128, topk=300)
Results = tuple[torch.Tensor, torch.Tensor]


def run(call: SparseAttnPagedCall, **options: Any) -> Results:
    """Run the Hopper forward, whoever would be asked first; options as of `HopperPagedKernels.plan`."""
    out = torch.full((*call.q.shape[:-1], call.d_v), torch.nan, dtype=call.q.dtype, device=call.q.device)
    lse = torch.full(call.q.shape[:-1], torch.nan, device=call.q.device)
    call = readable(call)
    KERNELS.run(call, KERNELS.plan(call, traits_of(call.q.device), **options), out, lse)
    return out, lse


def check(case: PagedCase, **options: Any) -> Results:
    """Hold both ways to name rows to the oracle and to one another, and return the results."""
    inputs = make_paged_inputs(case, "cuda")
    results = run(inputs.by_row, **options)
    is_rounded = case.rule == "any" and case.row_format != "dense"
    assert_forward_bars(*results, inputs.out, inputs.lse, lse_error=inputs.largest_logit / 256 if is_rounded else 1e-5)
    assert_same_bits(results, run(inputs.by_table, **options))
    return results


def assert_same_bits(one: Results, other: Results) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


# Where the sides of a tile differ in width, only dense rows are taken.
WIDTHS = [(name, *widths) for name in FORMATS for widths in ((576, 512), (512, 512), (320, 256))]


@pytest.mark.parametrize(("name", "d_total", "d_v"), [*WIDTHS, ("dense", 384, 320)])
def test_formats_and_widths(name: str, d_total: int, d_v: int) -> None:
    case = replace(WIDE, row_format=name, d_total=d_total, d_v=d_v)
    check(replace(case, rule="pow2"))
    check(replace(case, heads=40, topk=2048, num_pages=60, page_size=69, padded_rows=1))


@pytest.mark.parametrize("num_splits", [2, 3, 16])
@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_shares_of_the_slots_are_merged(name: str, num_splits: int) -> None:
    # Lengths from none to all: some shares have no slot.
    check(replace(WIDE, row_format=name, topk=2048, num_pages=60, rule="pow2"), num_splits=num_splits)


@pytest.mark.parametrize("name", ["dense", "fp8", "fp8_all"])
def test_more_items_than_programs(name: str) -> None:
    check(replace(WIDE, row_format=name, seq_q=150, rule="pow2", softmax_scale=-0.5))


@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_groups_fp16_and_positions_of_64_bits(name: str) -> None:
    case = replace(WIDE, row_format=name, heads=80, kv_group=2, dtype=torch.float16, index_dtype=torch.int64)
    check(replace(case, rule="pow2"))


@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_page_sizes_give_the_same_bits(name: str) -> None:
    call = make_paged_inputs(replace(WIDE, row_format=name, num_pages=1, page_size=53 * 69), "cuda").by_row
    whole = run(call)
    for page_size in (1, 53, 69):
        pages = call.pages.reshape(-1, page_size, *call.pages.shape[2:])
        padded = pages.new_full((len(pages), page_size + 1, *pages.shape[2:]), 0x7F)[:, :page_size]
        padded.copy_(pages)
        assert_same_bits(whole, run(call._replace(pages=pages)))
        assert_same_bits(whole, run(call._replace(pages=padded)))


@pytest.mark.parametrize("part", [slice(0, 1), slice(300, 301), slice(512, 516), slice(528, 530)])
def test_a_selected_nan_reaches_the_result(part: slice) -> None:
    case = replace(WIDE, batch=1, seq_q=1, has_lengths=False)
    call = make_paged_inputs(case, "cuda").by_row
    selected = call.indices.flatten()
    row = int(selected[(selected >= 0) & (selected < case.num_pages * case.page_size)][0])
    call.pages[row // case.page_size, row % case.page_size, 0, part] = 0xFF
    out, lse = run(call)
    assert lse.isnan().all()
    assert out.isnan().all() if part.start != 300 else out[..., 300].isnan().all()


# Dense pages a whole number of rows apart are the kv of a dense call.
@pytest.mark.parametrize(("name", "kernels"), [("dense", "dense"), ("fp8", "hopper")])
def test_a_graph_replays_with_other_tables_lengths_and_rows(name: str, kernels: str) -> None:
    case = replace(WIDE, row_format=name, seq_q=40, rule="pow2")
    inputs = [make_paged_inputs(case, "cuda", seed) for seed in range(3)]
    call = inputs[0].by_table
    tensors = [value for value in call if isinstance(value, torch.Tensor)]
    plan = plan_forward(call, traits_of(call.q.device))
    assert plan.choice.kernels.name == kernels
    launch_forward(call, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = launch_forward(call, plan)
    for other in (inputs[1], inputs[2]):
        for tensor, value in zip(tensors, (v for v in other.by_table if isinstance(v, torch.Tensor)), strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_forward_bars(*results, other.out, other.lse)

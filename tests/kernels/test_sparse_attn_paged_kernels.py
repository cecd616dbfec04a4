"""The paged kernel against the fp64 oracle, called through its launcher, on pools whose other rows are NaN.

Runs on a GPU, or without one under TRITON_INTERPRET=1 (see test_kernels_interpret.py), where CPU tensors stand in.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_pools import PagedCase, make_paged_inputs

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.ops.sparse_attn_paged.triton.forward import launch_forward, plan_forward, readable
from mla_ops.ops.sparse_attn_paged.triton.kernel_sets import PORTABLE
from mla_ops.testing.closeness import assert_forward_bars

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter converts both codes of NaN to numbers; where integers decode it does not convert.
TRAITS = DeviceTraits(type="cuda", arch=80, smem_bytes=166912, num_sms=108) if INTERPRETED else None
# The interpreter multiplies the bit patterns of bf16.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16

pytestmark = [pytest.mark.usefixtures("poisoned_memory")] + ([] if INTERPRETED else [pytest.mark.gpu])
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")

Results = tuple[torch.Tensor, torch.Tensor]
# Heads from which on rows are multiplied by their scales and rounded.
ROUNDED_HEADS = 33


def portable(call: SparseAttnPagedCall, *, traits: DeviceTraits | None = TRAITS, **options: Any) -> Results:
    """Run the portable kernel, whoever would be asked first; options as of `PortableKernels.plan`."""
    out = torch.full((*call.q.shape[:-1], call.d_v), torch.nan, dtype=call.q.dtype, device=call.q.device)
    lse = torch.full(call.q.shape[:-1], torch.nan, device=call.q.device)
    call = readable(call)
    PORTABLE.run(call, PORTABLE.plan(call, traits or traits_of(call.q.device), **options), out, lse)
    return out, lse


def chosen(call: SparseAttnPagedCall) -> Results:
    """Run the kernels that are chosen."""
    return launch_forward(call, plan_forward(call, TRAITS or traits_of(call.q.device)))


def check(case: PagedCase, **options: Any) -> Results:
    """Hold both ways to name rows to the oracle and to one another, and return the results."""
    inputs = make_paged_inputs(case, DEVICE)
    results = portable(inputs.by_row, **options)
    is_rounded = case.heads >= ROUNDED_HEADS and case.rule == "any" and case.row_format in ("fp8", "fp8_all")
    lse_error = inputs.largest_logit / 256 if is_rounded else 1e-5
    if case.dtype == torch.float16:
        lse_error = max(lse_error, 1e-5)
    assert_forward_bars(*results, inputs.out, inputs.lse, lse_error=lse_error)
    assert_same_bits(results, portable(inputs.by_table, **options))
    return results


def assert_same_bits(one: Results, other: Results) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


FORMATS = ["dense", "fp8", "fp8_all", "fp8_cache"]
# What a page holds, as (page size, rows by which pages are padded).
SMALL_CASES = {
    "dense": PagedCase("dense", 24, 16, page_size=5, padded_rows=1),
    "dense rows of one stride": PagedCase("dense", 24, 16, page_size=1, num_pages=40),
    "fp8": PagedCase("fp8", 40, 32, page_size=7),
    "fp8 two scales": PagedCase("fp8", 176, 160, page_size=5, padded_rows=1, kv_group=2),
    "fp8 pow2, int64": PagedCase("fp8", 24, 16, page_size=7, rule="pow2", index_dtype=torch.int64),
    "fp8_all": PagedCase("fp8_all", 176, 96, page_size=1, num_pages=40),
    "fp8_cache": PagedCase("fp8_cache", 40, 24, page_size=5, padded_rows=2, softmax_scale=-0.5),
    "model1": PagedCase("model1", 144, 144, page_size=5, padded_rows=1),
    "mxfp8": PagedCase("mxfp8", 64, 64, page_size=7),
    "no slots": PagedCase("fp8", 24, 16, topk=0, page_size=5),
}


@pytest.mark.parametrize("name", SMALL_CASES)
def test_rows_are_read_as_they_are_defined(name: str) -> None:
    case = replace(SMALL_CASES[name], dtype=DTYPE)
    if case.topk:
        case = replace(case, topk=20, batch=2, seq_q=1)
    check(case)


@pytest.mark.parametrize("name", ["fp8", "dense"])
def test_split_slots_are_merged(name: str) -> None:
    case = replace(SMALL_CASES[name], dtype=DTYPE, topk=70, seq_q=1)
    whole, split = check(case), check(case, num_splits=2)
    for one, other in zip(whole, split, strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("heads", [4, 40])
def test_offsets_of_64_bits_give_the_same_bits(heads: int) -> None:
    inputs = make_paged_inputs(PagedCase("fp8", 24, 16, topk=20, seq_q=1, heads=heads, dtype=DTYPE), DEVICE)
    for call in (inputs.by_row, inputs.by_table):
        assert_same_bits(portable(call), portable(call, use_int64_offsets=True))


def test_a_selected_nan_reaches_the_result() -> None:
    case = PagedCase("fp8", 24, 16, topk=20, batch=1, seq_q=1, has_lengths=False, dtype=DTYPE)
    call = make_paged_inputs(case, DEVICE).by_row
    selected = call.indices.flatten()
    row = int(selected[(selected >= 0) & (selected < case.num_pages * case.page_size)][0])
    for part in (slice(0, 1), slice(16, 20), slice(32, 34)):  # payload, scale, tail
        pages = call.pages.clone()
        pages[row // case.page_size, row % case.page_size, 0, part] = 0xFF
        out, lse = portable(call._replace(pages=pages))
        assert lse.isnan().all()
        assert out.isnan().all()


@pytest.mark.parametrize("padded_rows", [0, 1])
def test_dense_rows_are_a_dense_call(padded_rows: int) -> None:
    inputs = make_paged_inputs(PagedCase("dense", 32, 16, topk=20, padded_rows=padded_rows, dtype=DTYPE), DEVICE)
    plan = plan_forward(inputs.by_row, TRAITS or traits_of(inputs.by_row.q.device))
    assert plan.choice.kernels.name == "dense"
    results = chosen(inputs.by_row)
    assert_forward_bars(*results, inputs.out, inputs.lse)
    assert_same_bits(results, chosen(inputs.by_table))
    call = inputs.by_row
    assert call.topk_length is not None
    flat = call._replace(q=call.q[0], indices=call.indices[0], topk_length=call.topk_length[0])
    assert_same_bits((results[0][0], results[1][0]), chosen(flat))


def test_pages_that_lie_any_distance_apart() -> None:
    call = make_paged_inputs(PagedCase("dense", 32, 16, topk=20, page_size=5, dtype=DTYPE), DEVICE).by_row
    apart = torch.full((len(call.pages), 5 * 32 + 8), torch.nan, dtype=DTYPE, device=DEVICE)
    apart[:, : 5 * 32] = call.pages.flatten(1)
    odd = call._replace(pages=apart[:, : 5 * 32].unflatten(1, (5, 1, 32)))
    plan = plan_forward(odd, TRAITS or traits_of(odd.q.device))
    assert plan.choice.kernels.name == "portable"
    reasons = " ".join(plan.choice.refusals)
    assert "pages are not as far apart as a whole number of rows" in reasons
    assert_same_bits(portable(call), chosen(odd))


WIDTHS = [(576, 512), (512, 512), (320, 256), (192, 128), (128, 64), (72, 64), (100, 96)]
HEADS = [1, 8, 16, 28, 64, 128]
# Every format at every width, each with two numbers of heads in turn: all 504 would compile for a quarter of an hour.
LARGE_CASES = [
    (name, d_total, d_v, HEADS[(place + 3 * again) % len(HEADS)])
    for place, (name, (d_total, d_v)) in enumerate(
        [(name, widths) for widths in WIDTHS for name in FORMATS]
        + [(name, widths) for name in ("model1", "mxfp8") for widths in ((512, 512), (128, 128))]
    )
    for again in (0, 1)
]


@on_gpu_only
@pytest.mark.parametrize(("name", "d_total", "d_v", "heads"), LARGE_CASES)
def test_formats_widths_and_heads(name: str, d_total: int, d_v: int, heads: int) -> None:
    for topk in (0, 1, 63, 2048):
        for rule in ("pow2", "any"):
            page_size, padded_rows = {0: (64, 0), 1: (1, 0), 63: (53, 0), 2048: (69, 1)}[topk]
            case = PagedCase(name, d_total, d_v, heads=heads, topk=topk, page_size=page_size, padded_rows=padded_rows)
            check(replace(case, rule=rule, num_pages=60))


@on_gpu_only
@pytest.mark.parametrize("name", FORMATS)
def test_page_sizes_give_the_same_bits(name: str) -> None:
    case = PagedCase(name, 576, 512, heads=16, topk=512, num_pages=1, page_size=53 * 69)
    call = make_paged_inputs(case, DEVICE).by_row
    whole = portable(call)
    for page_size in (1, 53, 69):
        pages = call.pages.reshape(-1, page_size, *call.pages.shape[2:])
        padded = pages.new_full((len(pages), page_size + 1, *pages.shape[2:]), 0x7F)[:, :page_size]
        padded.copy_(pages)
        assert_same_bits(whole, portable(call._replace(pages=pages)))
        assert_same_bits(whole, portable(call._replace(pages=padded)))


@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [16, 64])
def test_integers_decode_what_the_instruction_does(dtype: torch.dtype, heads: int) -> None:
    call = make_paged_inputs(PagedCase("fp8", 192, 128, heads=heads, topk=512, dtype=dtype), DEVICE).by_row
    traits = traits_of(call.q.device)
    config = PORTABLE.plan(call, traits).config
    native = portable(call, config=config, num_splits=1)
    assert_same_bits(native, portable(call, traits=replace(traits, arch=80), config=config, num_splits=1))


@on_gpu_only
@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_rows_beyond_32_bits(name: str) -> None:
    case = PagedCase(name, 576, 512, heads=16, topk=64, num_pages=4, page_size=64)
    call = make_paged_inputs(case, DEVICE).by_row
    near = portable(call)
    row_bytes = call.pages.shape[-1] * call.pages.element_size()
    far_page = 2**31 // (64 * row_bytes) + 1
    pages = call.pages.new_zeros((far_page + 4, *call.pages.shape[1:]))
    pages[far_page:] = call.pages
    is_row = (call.indices >= 0) & (call.indices < 4 * 64)
    indices = torch.where(is_row, call.indices + far_page * 64, -1)
    far = call._replace(pages=pages, indices=indices)
    assert PORTABLE.plan(far, traits_of(pages.device)).constants[-1] is True
    assert_same_bits(near, portable(far))


@on_gpu_only
@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_a_graph_replays_with_other_tables_lengths_and_rows(name: str) -> None:
    case = PagedCase(name, 576, 512, heads=16, topk=512, num_pages=20)
    inputs = [make_paged_inputs(case, DEVICE, seed) for seed in range(3)]
    call = inputs[0].by_table
    tensors = [value for value in call if isinstance(value, torch.Tensor)]
    plan = plan_forward(call, traits_of(call.q.device))
    launch_forward(call, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = launch_forward(call, plan)
    for other in (inputs[1], inputs[2]):
        for tensor, value in zip(tensors, (v for v in other.by_table if isinstance(v, torch.Tensor)), strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_forward_bars(*results, other.out, other.lse)

"""The warp-specialised forward for few heads on an sm90 GPU, asked for by its configuration: against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hopper_kernels import Results, config_key, replay_with_other_indices, wide_inputs
from paged_pools import PagedCase, make_paged_inputs
from strided_tensors import padded, sliced, transposed

import mla_ops
from mla_ops.device import traits_of
from mla_ops.launching import warm_kernels
from mla_ops.ops.sparse_attn.call import SparseAttnCall
from mla_ops.ops.sparse_attn.configs.launch import FewHeadsConfig
from mla_ops.ops.sparse_attn.configs.lookup import few_heads_config
from mla_ops.ops.sparse_attn.triton.direct import run_forward, run_max_logits
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.forward import launch_forward, plan_forward
from mla_ops.ops.sparse_attn_paged.triton.hopper_few_heads import HopperFewHeadsKernels
from mla_ops.testing import Case, Inputs, assert_matches_oracle
from mla_ops.testing.closeness import assert_forward_bars

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory", "on_hopper")]

FEW = Case(d_total=576, d_v=512, topk=200, heads=16, seq_q=6, seq_kv=300)


def run(inputs: Inputs, num_splits: int | None = None) -> Results:
    config = few_heads_config(config_key(inputs))
    assert config is not None
    return run_forward(SparseAttnCall(*inputs.args), config=config, num_splits=num_splits)._asdict()


def check(inputs: Inputs, num_splits: int | None = None) -> Results:
    results = run(inputs, num_splits)
    assert_matches_oracle(results, inputs)
    return results


def assert_same(actual: Results, expected: Results) -> None:
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


# The first to run when something is wrong: one program, every slot valid, then one more of each.
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize(("topk", "seq_q"), [(64, 1), (128, 1), (192, 1), (64, 400)])
def test_a_program_and_a_tile_at_a_time(topk: int, seq_q: int, num_splits: int) -> None:
    check(wide_inputs(replace(FEW, batch=1, topk=topk, seq_q=seq_q, seq_kv=512), invalid=False), num_splits)


@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("d_v", [256, 264, 320, 384, 448, 512])
@pytest.mark.parametrize("d_tail", [0, 32, 64])
def test_widths(d_v: int, d_tail: int, heads: int) -> None:
    check(wide_inputs(replace(FEW, d_total=d_v + d_tail, d_v=d_v, heads=heads), topk_length=True, attn_sink=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("topk", [1, 63, 65, 129, 2048])
def test_partial_tiles(topk: int, dtype: torch.dtype) -> None:
    check(wide_inputs(replace(FEW, topk=topk, seq_kv=4096), dtype))


@pytest.mark.parametrize(("heads", "kv_group"), [(1, 1), (5, 1), (17, 1), (32, 1), (64, 2), (24, 3)])
def test_partial_head_blocks_and_groups(heads: int, kv_group: int) -> None:
    check(wide_inputs(replace(FEW, heads=heads, kv_group=kv_group), attn_sink=True))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("use", ["plain", "length", "sink"])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_optional_arguments(num_splits: int, use: str, index_dtype: torch.dtype) -> None:
    inputs = wide_inputs(FEW, index_dtype=index_dtype, topk_length=use == "length", attn_sink=use == "sink")
    check(inputs, num_splits)


@pytest.mark.parametrize("bad", [-1, -(2**31), 300, 2**31 - 1, 2**40, -(2**40), 2**63 - 1], ids=str)
def test_positions_outside_are_invalid_whatever_their_bits(bad: int) -> None:
    inputs = wide_inputs(FEW, index_dtype=torch.int64)
    inputs.indices[:, 1::2, :, ::3] = bad
    check(inputs)


def test_lengths_of_64_bits_are_clamped_before_they_are_narrowed() -> None:
    inputs = wide_inputs(FEW, invalid=False)
    lengths = torch.tensor([-(2**40) + 5, 2**40 + 5, 5, -(2**31), 0, 200], device="cuda")
    check(replace(inputs, topk_length=lengths.expand(inputs.q.shape[:2])))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_zero_and_negative_scale(scale: float) -> None:
    check(replace(wide_inputs(FEW), softmax_scale=scale))


def test_infinite_sinks() -> None:
    inputs = wide_inputs(FEW, attn_sink=True)
    inputs.attn_sink[0], inputs.attn_sink[1] = torch.inf, -torch.inf
    assert (check(inputs)["out"][..., 0, :] == 0).all()


# One buffer of queries at the last, two at the others.
@pytest.mark.parametrize(("d_total", "d_v", "heads"), [(576, 512, 16), (320, 256, 32), (640, 512, 32)], ids=str)
def test_more_items_than_programs_with_lengths_from_none_to_all(d_total: int, d_v: int, heads: int) -> None:
    sizes = {"d_total": d_total, "d_v": d_v, "seq_q": 700, "heads": heads, "topk": 300, "seq_kv": 1000}
    inputs = wide_inputs(replace(FEW, batch=2, **sizes), topk_length=True)
    inputs.topk_length.copy_(torch.arange(1400, device="cuda").view(2, 700) * 7 % 320 - 10)
    check(inputs)


def test_nan_in_unselected_and_empty_rows_stays_there() -> None:
    inputs = wide_inputs(FEW, attn_sink=True)
    inputs.indices[inputs.indices == 0] = -1
    expected = run(inputs)
    q, kv = inputs.q.clone(), inputs.kv.clone()
    kv[:, 0] = torch.nan
    q[:, 0] = torch.nan  # make_inputs leaves the first query without a valid slot
    actual = run(replace(inputs, q=q, kv=kv))
    assert_same(actual, expected)
    assert torch.isneginf(actual["lse"][:, 0]).all()
    assert (actual["out"][:, 0] == 0).all()


@pytest.mark.parametrize("channel", [0, 255, 300, 575])
def test_nan_in_a_selected_row_reaches_the_output(channel: int) -> None:
    inputs = wide_inputs(FEW, invalid=False)
    inputs.kv[0, inputs.indices[0, 0, 0, 130].item(), 0, channel] = torch.nan
    results = run(inputs)
    assert results["out"][0, 0].isnan().all()
    assert results["lse"][0, 0].isnan().all()


def test_very_negative_and_growing_logits() -> None:
    # Each tile raises the maximum by far more than what the lazy rescaling lets pass.
    inputs = wide_inputs(replace(FEW, topk=512, seq_kv=512, batch=1), invalid=False)
    inputs.indices.copy_(torch.arange(512, device="cuda").expand_as(inputs.indices))
    ramp = torch.linspace(0.05, 1.0, 512, device="cuda").view(1, 512, 1, 1)
    kv = ((inputs.kv.abs() + 0.5) * ramp).to(inputs.kv.dtype)
    for sign in (1.0, -1.0):
        check(replace(inputs, q=torch.full_like(inputs.q, sign * 0.05), kv=kv, softmax_scale=1.0))


def test_strided_inputs_give_the_contiguous_result() -> None:
    inputs = wide_inputs(FEW, topk_length=True)
    expected = run(inputs)
    strided = replace(
        inputs, q=sliced(inputs.q, -2), kv=sliced(inputs.kv, -1), indices=sliced(inputs.indices, -1),
        topk_length=sliced(inputs.topk_length, 1),
    )  # fmt: skip
    assert_same(run(strided), expected)
    assert_same(run(replace(inputs, q=transposed(inputs.q), kv=transposed(inputs.kv))), expected)
    assert_same(run(replace(inputs, q=padded(inputs.q), kv=padded(inputs.kv))), expected)


@pytest.mark.parametrize("sizes", [{"topk": 0}, {"seq_kv": 0}, {"seq_q": 0}], ids=str)
def test_empty_sizes(sizes: dict[str, int]) -> None:
    results = run(wide_inputs(replace(FEW, **sizes), attn_sink=True))
    assert (results["out"] == 0).all()
    assert torch.isneginf(results["lse"]).all()


@pytest.mark.parametrize("heads", [16, 32])
def test_five_hundred_runs_are_bit_equal(heads: int) -> None:
    sizes = {"seq_q": 512, "heads": heads, "topk": 700, "seq_kv": 4096}
    inputs = wide_inputs(replace(FEW, batch=1, **sizes), topk_length=True)
    first = run(inputs)
    for _ in range(500):
        assert_same(run(inputs), first)


def test_a_replay_with_other_indices_is_what_eager_gives() -> None:
    assert_same(*replay_with_other_indices(run, FEW))


@pytest.mark.usefixtures("nothing_warm")
def test_the_operator_takes_it() -> None:
    inputs = wide_inputs(replace(FEW, seq_q=1), topk_length=True, attn_sink=True)
    with torch.no_grad():
        out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    assert FewHeadsConfig in {type(kernel[-1]) for kernel in warm_kernels()}
    assert_matches_oracle({"out": out, "lse": lse}, inputs)


def test_what_it_does_not_do_is_refused() -> None:
    inputs = wide_inputs(FEW)
    with pytest.raises(mla_ops.UnsupportedProblemError, match="pass a FwdConfig"):
        run_max_logits(SparseAttnCall(*inputs.args), config=few_heads_config(config_key(inputs)))


# Pools of pages


def run_paged(call: SparseAttnPagedCall) -> tuple[torch.Tensor, torch.Tensor]:
    kernels, traits = HopperFewHeadsKernels(), traits_of(call.q.device)
    assert kernels.refusal(SparseAttnPagedProblem.of(call), None, traits) is None
    out = torch.full((*call.q.shape[:-1], call.d_v), torch.nan, dtype=call.q.dtype, device=call.q.device)
    lse = torch.full(call.q.shape[:-1], torch.nan, device=call.q.device)
    kernels.run(call, kernels.plan(call, traits), out, lse)
    return out, lse


FORMATS = ["dense", "fp8", "fp8_all", "fp8_cache"]
POOLS = {"pages of 1": (1, 0), "pages of 53": (53, 0), "padded pages of 64": (64, 1)}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize(("d_total", "d_v", "heads"), [(576, 512, 16), (512, 512, 32), (320, 256, 5)], ids=str)
@pytest.mark.parametrize("row_format", FORMATS)
def test_rows_of_pools_by_number_and_by_table(
    row_format: str, d_total: int, d_v: int, heads: int, pool: tuple[int, int]
) -> None:
    page_size, padded_rows = pool
    for topk, kv_group, dtype in ((1, 1, torch.bfloat16), (200, 1, torch.float16), (700, 2, torch.bfloat16)):
        case = PagedCase(
            row_format, d_total, d_v, heads=heads * kv_group, topk=topk, kv_group=kv_group, num_pages=60,
            page_size=page_size, padded_rows=padded_rows, dtype=dtype,
        )  # fmt: skip
        inputs = make_paged_inputs(case, "cuda")
        results = run_paged(inputs.by_row)
        assert_forward_bars(*results, inputs.out, inputs.lse)
        by_table = run_paged(inputs.by_table)
        assert all(torch.equal(one, other) for one, other in zip(results, by_table, strict=True))


def test_more_items_than_programs_by_table() -> None:
    case = PagedCase("fp8", 576, 512, heads=16, topk=300, batch=3, seq_q=200, num_pages=60)
    inputs = make_paged_inputs(case, "cuda")
    assert_forward_bars(*run_paged(inputs.by_table), inputs.out, inputs.lse)


@pytest.mark.parametrize("part", [slice(0, 1), slice(511, 512), slice(516, 520), slice(528, 530)])
def test_a_selected_nan_of_any_part_reaches_the_result(part: slice) -> None:
    case = PagedCase("fp8", 576, 512, heads=16, topk=200, batch=1, seq_q=1, has_lengths=False)
    call = make_paged_inputs(case, "cuda").by_row
    selected = call.indices.flatten()
    row = int(selected[(selected >= 0) & (selected < case.num_pages * case.page_size)][-1])
    call.pages[row // case.page_size, row % case.page_size, 0, part] = 0xFF
    out, lse = run_paged(call)
    assert lse.isnan().all()
    assert out.isnan().all()


def test_the_launcher_of_pages_takes_it() -> None:
    inputs = make_paged_inputs(PagedCase("fp8", 576, 512, heads=32, topk=200), "cuda")
    plan = plan_forward(inputs.by_table, traits_of(inputs.by_table.q.device))
    assert plan.choice.kernels.name == "hopper_few_heads"
    assert_forward_bars(*launch_forward(inputs.by_table, plan), inputs.out, inputs.lse)

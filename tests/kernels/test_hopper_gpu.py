"""The warp-specialised forward on an sm90 GPU, asked for by its configuration: the contract, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_kernels import WIDE, Results, config_key, replay_with_other_indices, wide_inputs
from hopper_kernels import check_forward as check
from hopper_kernels import forward as run
from strided_tensors import padded, sliced, transposed

import mla_ops
from mla_ops.launching import warm_kernels
from mla_ops.ops.sparse_attn.call import SparseAttnCall
from mla_ops.ops.sparse_attn.configs.launch import HopperConfig
from mla_ops.ops.sparse_attn.configs.lookup import hopper_config
from mla_ops.ops.sparse_attn.triton.direct import run_forward, run_max_logits
from mla_ops.testing import Inputs, assert_matches_oracle

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory", "on_hopper")]


def assert_same(actual: Results, expected: Results) -> None:
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


# Shared memory holds one pair of tiles at the first, two at the second.
ONE_AND_TWO_PAIRS = pytest.mark.parametrize(("d_total", "d_v"), [(576, 512), (320, 256)], ids=["576x512", "320x256"])


# The first to run when something is wrong: one program, one pair of tiles, every slot valid, then one more of each.
@ONE_AND_TWO_PAIRS
@pytest.mark.parametrize(
    ("topk", "seq_q"), [(128, 1), (64, 1), (256, 1), (128, 400)], ids=["one pair", "one tile", "two pairs", "two items"]
)
def test_a_program_and_a_pair_at_a_time(topk: int, seq_q: int, d_total: int, d_v: int) -> None:
    sizes = {"d_total": d_total, "d_v": d_v, "topk": topk, "seq_q": seq_q, "seq_kv": 512}
    check(wide_inputs(replace(WIDE, batch=1, **sizes), invalid=False))


@pytest.mark.parametrize("d_v", [256, 320, 384, 448, 512])
@pytest.mark.parametrize("d_tail", [0, 32, 64, 128])
def test_widths(d_v: int, d_tail: int) -> None:
    if (d_v, d_tail) == (512, 128):
        pytest.skip("640 channels do not fit shared memory; the plain kernel serves them")
    check(wide_inputs(replace(WIDE, d_total=d_v + d_tail, d_v=d_v), topk_length=True, attn_sink=True))


def test_lengths_of_64_bits_are_clamped_before_they_are_narrowed() -> None:
    inputs = wide_inputs(invalid=False)
    lengths = torch.tensor([-(2**40) + 5, 2**40 + 5, 5, -(2**31), 0, 200], device="cuda")
    check(replace(inputs, topk_length=lengths.expand(inputs.q.shape[:2])))


def test_infinite_sinks() -> None:
    inputs = wide_inputs(attn_sink=True)
    inputs.attn_sink[0], inputs.attn_sink[1] = torch.inf, -torch.inf
    assert (check(inputs)["out"][..., 0, :] == 0).all()


@ONE_AND_TWO_PAIRS
def test_more_items_than_programs_with_lengths_from_none_to_all(d_total: int, d_v: int) -> None:
    sizes = {"d_total": d_total, "d_v": d_v, "seq_q": 700, "heads": 80, "topk": 300, "seq_kv": 1000}
    inputs = wide_inputs(replace(WIDE, batch=2, **sizes), topk_length=True)
    inputs.topk_length.copy_(torch.arange(1400, device="cuda").view(2, 700) * 7 % 320 - 10)
    check(inputs)


@ONE_AND_TWO_PAIRS
@pytest.mark.parametrize("num_splits", [2, 3, 16])
def test_shares_of_the_slots_are_merged(num_splits: int, d_total: int, d_v: int) -> None:
    sizes = {"d_total": d_total, "d_v": d_v, "seq_q": 40, "heads": 80, "topk": 2000, "seq_kv": 4000}
    inputs = wide_inputs(replace(WIDE, batch=2, **sizes), topk_length=True, attn_sink=True)
    # Lengths from none to all: some shares have no slot.
    inputs.topk_length.copy_(torch.arange(80, device="cuda").view(2, 40) * 53 % 2020 - 10)
    check(inputs, num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_nan_in_unselected_and_empty_rows_stays_there(num_splits: int) -> None:
    inputs = wide_inputs(attn_sink=True)
    inputs.indices[inputs.indices == 0] = -1
    expected = run(inputs, num_splits)
    q, kv = inputs.q.clone(), inputs.kv.clone()
    kv[:, 0] = torch.nan
    q[:, 0] = torch.nan  # make_inputs leaves the first query without a valid slot
    actual = run(replace(inputs, q=q, kv=kv), num_splits)
    assert_same(actual, expected)
    assert torch.isneginf(actual["lse"][:, 0]).all()
    assert (actual["out"][:, 0] == 0).all()


@pytest.mark.parametrize("channel", [0, 255, 300, 575])
def test_nan_in_a_selected_row_reaches_the_output(channel: int) -> None:
    inputs = wide_inputs(invalid=False)
    inputs.kv[0, inputs.indices[0, 0, 0, 130].item(), 0, channel] = torch.nan
    results = run(inputs)
    assert results["out"][0, 0].isnan().all()
    assert results["lse"][0, 0].isnan().all()


def test_very_negative_and_growing_logits() -> None:
    # Each pair of tiles raises the maximum by far more than what the lazy rescaling lets pass.
    inputs = wide_inputs(replace(WIDE, topk=512, seq_kv=512, batch=1), invalid=False)
    inputs.indices.copy_(torch.arange(512, device="cuda").expand_as(inputs.indices))
    ramp = torch.linspace(0.05, 1.0, 512, device="cuda").view(1, 512, 1, 1)
    kv = ((inputs.kv.abs() + 0.5) * ramp).to(inputs.kv.dtype)
    for sign in (1.0, -1.0):
        check(replace(inputs, q=torch.full_like(inputs.q, sign * 0.05), kv=kv, softmax_scale=1.0))


def test_strided_inputs_give_the_contiguous_result() -> None:
    inputs = wide_inputs(topk_length=True)
    expected = run(inputs)
    strided = replace(
        inputs, q=sliced(inputs.q, -2), kv=sliced(inputs.kv, -1), indices=sliced(inputs.indices, -1),
        topk_length=sliced(inputs.topk_length, 1),
    )  # fmt: skip
    assert_same(run(strided), expected)
    assert_same(run(replace(inputs, q=transposed(inputs.q), kv=transposed(inputs.kv))), expected)
    assert_same(run(replace(inputs, q=padded(inputs.q), kv=padded(inputs.kv))), expected)


@pytest.mark.parametrize("sizes", [{"topk": 0}, {"seq_kv": 0}, {"seq_q": 0}, {"topk": 1}, {"seq_q": 1}], ids=str)
def test_empty_and_single_sizes(sizes: dict[str, Any]) -> None:
    inputs = wide_inputs(replace(WIDE, **sizes), attn_sink=True)
    if 0 in sizes.values():
        results = run(inputs)
        assert (results["out"] == 0).all()
        assert torch.isneginf(results["lse"]).all()
    else:
        check(inputs)


def test_rows_beyond_2_to_the_31_elements() -> None:
    seq_kv = 2**31 // 576 + 200
    kv = torch.empty(seq_kv, 1, 576, dtype=torch.bfloat16, device="cuda")
    last = torch.arange(seq_kv - 150, seq_kv, device="cuda")
    kv[last] = torch.randn(150, 1, 576, device="cuda").bfloat16()
    q = torch.randn(2, 64, 576, device="cuda").bfloat16()
    config = HopperConfig(256, 256, 64, 160, 56, 1)
    wide = run_forward(SparseAttnCall(q, kv, last.expand(2, 1, 150), 512, 0.05), config=config)
    near = torch.arange(150, device="cuda").expand(2, 1, 150)
    narrow = run_forward(SparseAttnCall(q, kv[last], near, 512, 0.05), config=config)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@ONE_AND_TWO_PAIRS
@pytest.mark.parametrize("heads", [64, 100])
def test_a_thousand_runs_are_bit_equal(heads: int, d_total: int, d_v: int) -> None:
    sizes = {"d_total": d_total, "d_v": d_v, "seq_q": 512, "heads": heads, "topk": 700, "seq_kv": 4096}
    inputs = wide_inputs(replace(WIDE, batch=1, **sizes), topk_length=True)
    first = run(inputs)
    for _ in range(1000):
        assert_same(run(inputs), first)


def test_a_replay_with_other_indices_is_what_eager_gives() -> None:
    assert_same(*replay_with_other_indices(run))


# As the operator runs it

AUTOMATIC = replace(WIDE, seq_q=70, batch=1)


def operator_step(inputs: Inputs, operator: Callable[..., Any] = torch.ops.mla.sparse_attn) -> list[torch.Tensor]:
    leaves = inputs.requires_grad()
    out, lse = operator(*leaves.args)
    return [out, lse, *torch.autograd.grad([out, lse], leaves.differentiable, [inputs.dout, inputs.dlse])]


@pytest.mark.usefixtures("nothing_warm")
def test_the_operator_takes_it_and_trains_with_it() -> None:
    inputs = wide_inputs(AUTOMATIC, topk_length=True, attn_sink=True)
    results = dict(zip(("out", "lse", "dq", "dkv", "dsink"), operator_step(inputs), strict=True))
    assert HopperConfig in {type(kernel[-1]) for kernel in warm_kernels()}
    assert_matches_oracle(results, inputs)


def test_rows_that_begin_at_an_odd_address_give_the_aligned_result() -> None:
    inputs = wide_inputs(AUTOMATIC)

    def odd(tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy that begins 2 bytes off, in a storage that says it begins at 0."""
        flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].copy_(tensor.flatten())
        return torch.from_dlpack(flat).view(tensor.shape)

    q, kv = odd(inputs.q), odd(inputs.kv)
    assert (q.storage_offset(), q.data_ptr() % 16) == (0, 2)
    actual, expected = operator_step(replace(inputs, q=q, kv=kv)), operator_step(inputs)
    for name, a, e in zip(("out", "lse", "dq"), actual, expected, strict=False):
        assert torch.equal(a, e), name


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_call_gives_eagers_bits(mode: str | None) -> None:
    compiled = torch.compile(lambda *args: torch.ops.mla.sparse_attn(*args), fullgraph=True, mode=mode)
    for seed in range(4):
        inputs = wide_inputs(AUTOMATIC, seed=seed, topk_length=True)
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            for actual, expected in zip(compiled(*inputs.args), torch.ops.mla.sparse_attn(*inputs.args), strict=True):
                assert torch.equal(actual, expected)


def test_a_warm_problem_compiles_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    inputs = wide_inputs(AUTOMATIC)
    mla_ops.warmup(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel is compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", refuse)
    operator_step(wide_inputs(AUTOMATIC, seed=1))


def test_max_logits_are_refused() -> None:
    inputs = wide_inputs()
    with pytest.raises(mla_ops.UnsupportedProblemError, match="pass a FwdConfig"):
        run_max_logits(SparseAttnCall(*inputs.args), config=hopper_config(config_key(inputs)))

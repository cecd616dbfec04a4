"""The warp-specialised backward on an sm90 GPU, asked for by its configuration: the contract, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hopper_kernels import WIDE, Results, backward, forward, replay_with_other_indices, wide_inputs
from hopper_kernels import check_backward as check
from strided_tensors import padded, sliced, transposed

import mla_ops
from mla_ops import row_sums
from mla_ops.launching import warm_kernels
from mla_ops.ops.sparse_attn.call import Gradients, SparseAttnCall
from mla_ops.ops.sparse_attn.configs.launch import HopperBwdConfig
from mla_ops.ops.sparse_attn.triton import backward as triton_backward
from mla_ops.ops.sparse_attn.triton.direct import run_backward, run_forward
from mla_ops.testing import Case, Inputs, assert_matches_oracle

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory", "on_hopper")]


def run(inputs: Inputs, **uses: bool) -> Results:
    return backward(inputs, **forward(inputs), **uses)


def assert_same(actual: Results, expected: Results) -> None:
    """Assert bitwise equality; dkv may differ by the order of its atomic additions."""
    for name, value in actual.items():
        if name == "dkv":
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3 * float(expected[name].abs().max()))
        else:
            assert torch.equal(value, expected[name]), name


# The first to run when something is wrong: one program and one tile, every slot valid, then more of each.
@pytest.mark.parametrize(
    ("topk", "seq_q"), [(64, 1), (128, 1), (320, 1), (128, 400)], ids=["a tile", "two tiles", "five tiles", "400 rows"]
)
def test_a_program_and_a_tile_at_a_time(topk: int, seq_q: int) -> None:
    check(wide_inputs(replace(WIDE, batch=1, topk=topk, seq_q=seq_q, seq_kv=512), invalid=False))


@pytest.mark.parametrize("d_v", [256, 320, 384, 448, 512])
@pytest.mark.parametrize("d_tail", [0, 8, 64, 128])
def test_widths(d_v: int, d_tail: int) -> None:
    if d_v + d_tail > 576:
        pytest.skip("more than 576 channels do not fit shared memory; the plain kernel serves them")
    check(wide_inputs(replace(WIDE, d_total=d_v + d_tail, d_v=d_v), topk_length=True, attn_sink=True))


@pytest.mark.parametrize(("dout", "dlse"), [(True, False), (False, True)])
def test_one_gradient_missing(dout: bool, dlse: bool) -> None:
    check(wide_inputs(attn_sink=True), use_dout=dout, use_dlse=dlse)


def test_needs_flags_skip_one_gradient_and_leave_the_other_unchanged() -> None:
    inputs = wide_inputs(attn_sink=True)
    expected = run(inputs)
    for need_dq, need_dkv in ((True, False), (False, True), (False, False)):
        actual = run(inputs, need_dq=need_dq, need_dkv=need_dkv)
        for name, is_needed in (("dq", need_dq), ("dkv", need_dkv)):
            if not is_needed:
                assert actual.pop(name).shape == (0,)
        assert_same(actual, expected)


def test_infinite_sinks() -> None:
    inputs = wide_inputs(attn_sink=True)
    inputs.attn_sink[0], inputs.attn_sink[1] = torch.inf, -torch.inf
    assert (check(inputs)["dsink"][:2] == 0).all()


def test_more_programs_than_the_device_holds_with_lengths_from_none_to_all() -> None:
    inputs = wide_inputs(replace(WIDE, batch=2, seq_q=700, heads=80, topk=300, seq_kv=1000), topk_length=True)
    inputs.topk_length.copy_(torch.arange(1400, device="cuda").view(2, 700) * 7 % 320 - 10)
    check(inputs)


def test_nan_in_unselected_and_empty_rows_stays_there() -> None:
    inputs = wide_inputs(attn_sink=True)
    inputs.indices[inputs.indices == 0] = -1
    expected = run(inputs)
    clean = {name: getattr(inputs, name).clone() for name in ("q", "kv", "dout", "dlse")}
    for tensor in clean.values():
        tensor[:, 0] = torch.nan  # make_inputs leaves the first query without a valid slot
    actual = run(replace(inputs, **clean))
    assert_same(actual, expected)
    assert (actual["dkv"][:, 0] == 0).all()
    assert (actual["dq"][:, 0] == 0).all()


def test_strided_inputs_give_the_contiguous_result() -> None:
    inputs = wide_inputs(topk_length=True)
    expected = run(inputs)
    strided = replace(
        inputs, q=sliced(inputs.q, -2), kv=sliced(inputs.kv, -1), indices=sliced(inputs.indices, -1),
        dout=sliced(inputs.dout, 1), dlse=sliced(inputs.dlse, -1), topk_length=sliced(inputs.topk_length, 1),
    )  # fmt: skip
    assert_same(run(strided), expected)
    assert_same(run(replace(inputs, q=transposed(inputs.q), kv=transposed(inputs.kv))), expected)
    odd_rows = replace(inputs, **{name: padded(getattr(inputs, name)) for name in ("q", "kv", "dout")})
    assert_same(run(odd_rows), expected)
    summed = replace(inputs, dout=torch.ones_like(inputs.dout), dlse=torch.ones_like(inputs.dlse))
    one = torch.ones((), device="cuda")
    expanded = replace(summed, dout=one.bfloat16().expand_as(summed.dout), dlse=one.expand_as(summed.dlse))
    assert_same(run(expanded), run(summed))


@pytest.mark.parametrize("sizes", [{"topk": 0}, {"seq_kv": 0}, {"seq_q": 0}, {"topk": 1}, {"seq_q": 1}], ids=str)
def test_empty_and_single_sizes(sizes: dict[str, Any]) -> None:
    inputs = wide_inputs(replace(WIDE, **sizes), attn_sink=True)
    if 0 in sizes.values():
        assert all((result == 0).all() for result in run(inputs).values())
    else:
        check(inputs)


def test_rows_beyond_2_to_the_31_elements() -> None:
    seq_kv = 2**31 // 576 + 200
    kv = torch.empty(seq_kv, 1, 576, dtype=torch.bfloat16, device="cuda")
    last = torch.arange(seq_kv - 150, seq_kv, device="cuda")
    kv[last] = torch.randn(150, 1, 576, device="cuda").bfloat16()
    q, dout = torch.randn(2, 64, 576, device="cuda").bfloat16(), torch.randn(2, 64, 512, device="cuda").bfloat16()
    results = []
    for rows, positions in ((kv, last), (kv[last], torch.arange(150, device="cuda"))):
        indices = positions.expand(2, 1, 150)
        call = SparseAttnCall(q, rows, indices, 512, 0.05)
        configs = (HopperBwdConfig(half_value=256, half_tail=32),)
        dq, dkv, _ = run_backward(call, run_forward(call), Gradients(dout, None), configs=configs)
        results.append({"dq": dq, "dkv": dkv[positions]})
    assert_same(*results)


def test_512_unit_contributions_sum_to_exactly_512() -> None:
    case = Case(d_total=320, d_v=256, topk=1, heads=64, batch=None, seq_q=8, seq_kv=4)
    inputs = wide_inputs(case, invalid=False)
    inputs = replace(
        inputs, q=torch.zeros_like(inputs.q), kv=torch.zeros_like(inputs.kv), dout=torch.ones_like(inputs.dout),
        indices=torch.zeros_like(inputs.indices),
    )  # fmt: skip
    dkv = run(inputs, use_dlse=False)["dkv"]
    assert (dkv[0, 0, :256] == 512).all()
    assert (dkv[1:] == 0).all()


@pytest.mark.parametrize("heads", [64, 100])
def test_a_thousand_runs_give_the_same(heads: int) -> None:
    case = replace(WIDE, batch=1, seq_q=512, heads=heads, topk=700, seq_kv=4096)
    inputs = wide_inputs(case, topk_length=True, attn_sink=True)
    results = forward(inputs)
    first = backward(inputs, **results)
    for _ in range(1000):
        assert_same(backward(inputs, **results), first)


def test_a_replay_with_other_indices_is_what_eager_gives() -> None:
    assert_same(*replay_with_other_indices(run))


# As the operator runs it

AUTOMATIC = replace(WIDE, seq_q=70, batch=1)


def operator_gradients(inputs: Inputs) -> Results:
    leaves = inputs.requires_grad()
    out, lse = mla_ops.sparse_attn(leaves.q, leaves.kv, leaves.indices, **leaves.kwargs)
    gradients = torch.autograd.grad([out, lse], leaves.differentiable, [inputs.dout, inputs.dlse])
    return dict(zip(("dq", "dkv", "dsink"), gradients, strict=False))


def launched_backwards() -> set[type]:
    return {type(kernel[-1]) for kernel in warm_kernels() if "Bwd" in type(kernel[-1]).__name__}


@pytest.mark.usefixtures("nothing_warm")
def test_the_operator_takes_it() -> None:
    assert_matches_oracle(operator_gradients(inputs := wide_inputs(AUTOMATIC, attn_sink=True)), inputs)
    assert launched_backwards() == {HopperBwdConfig}


@pytest.mark.parametrize("use", [{}, {"topk_length": True, "attn_sink": True}], ids=str)
def test_key_order(use: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backward, "rows_per_launch", lambda *_: 33)
    check(wide_inputs(replace(WIDE, batch=2, seq_q=40), **use))


@pytest.mark.usefixtures("deterministic", "nothing_warm")
@pytest.mark.parametrize("workspace_bytes", [1 << 20, 1 << 30], ids=["parts", "whole"])
def test_a_deterministic_backward_takes_it_and_repeats_its_bits(
    workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums, "WORKSPACE_BYTES", workspace_bytes)
    inputs = wide_inputs(AUTOMATIC, attn_sink=True, topk_length=True)
    results = operator_gradients(inputs)
    assert_matches_oracle(results, inputs)
    assert launched_backwards() == {HopperBwdConfig}
    repeated = operator_gradients(inputs)
    assert all(torch.equal(result, repeated[name]) for name, result in results.items())


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [{"batch": None}, {"heads": 160, "kv_group": 2}, {"d_total": 320, "d_v": 256}], ids=str
)
def test_deterministic_rows_of_heads_groups_and_widths(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    check(wide_inputs(replace(WIDE, **sizes), dtype, topk_length=True))


@pytest.mark.usefixtures("fresh_dynamo", "nothing_warm")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_backward_gives_eagers_bits(mode: str | None) -> None:
    compiled = torch.compile(lambda *args: torch.ops.mla.sparse_attn(*args), fullgraph=True, mode=mode)
    for seed in range(4):
        inputs = wide_inputs(AUTOMATIC, seed=seed, topk_length=True)
        torch.compiler.cudagraph_mark_step_begin()
        leaves = inputs.requires_grad()
        gradients = torch.autograd.grad(compiled(*leaves.args), leaves.differentiable, [inputs.dout, inputs.dlse])
        assert_same(dict(zip(("dq", "dkv"), gradients, strict=True)), operator_gradients(inputs))
    assert launched_backwards() == {HopperBwdConfig}

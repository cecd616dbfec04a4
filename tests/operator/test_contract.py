"""The contract's semantics, one test each, on every target. The oracle is the reference in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from conftest import Target
from torch.utils._python_dispatch import TorchDispatchMode

import mla_ops
from mla_ops.device import traits_of
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import Gradients, Side, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.testing import (
    CONTRACT_CASES,
    Case,
    Inputs,
    assert_bf16_bars,
    assert_matches_oracle,
    make_inputs,
    run_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EMPTY = torch.empty  # as it was before the fixture poisons it

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = Case(d_total=24, d_v=16, topk=6, heads=4, seq_q=5, seq_kv=11)


def run(inputs: Inputs, target: Target, *, use_dout: bool = True, use_dlse: bool = True) -> dict[str, torch.Tensor]:
    """Forward and backward through autograd; `use_*` leave one of the two results out of the loss."""
    skip_unsupported(inputs, target)
    leaves = inputs.requires_grad()
    out, lse = mla_ops.sparse_attn(leaves.q, leaves.kv, leaves.indices, **leaves.kwargs, backend=target.backend)
    pairs = [(out, inputs.dout)] * use_dout + [(lse, inputs.dlse)] * use_dlse
    grads = torch.autograd.grad([p[0] for p in pairs], leaves.differentiable, [p[1] for p in pairs])
    return {**name_results(out, lse, grads), "max_logits": max_logits_of(leaves, target)}


def max_logits_of(inputs: Inputs, target: Target) -> torch.Tensor:
    kwargs = {name: value for name, value in inputs.kwargs.items() if name != "attn_sink"}
    return mla_ops.sparse_attn_max_logits(inputs.q, inputs.kv, inputs.indices, **kwargs, backend=target.backend)


def skip_unsupported(inputs: Inputs, target: Target) -> None:
    if inputs.q.dtype == torch.float64 and target == Target("cuda", "auto"):
        pytest.skip('no kernel multiplies fp64, and backend="auto" refuses it on CUDA (test_dispatch.py)')


def name_results(out: torch.Tensor, lse: torch.Tensor, grads: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ["out", "lse", "dq", "dkv", "dsink"][: 2 + len(grads)]
    return dict(zip(names, [out.detach(), lse.detach(), *grads], strict=True))


def check(inputs: Inputs, target: Target, **uses: bool) -> dict[str, torch.Tensor]:
    actual = run(inputs, target, **uses)
    assert_matches_oracle(actual, inputs, **uses)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONTRACT_CASES, ids=str)
def test_matches_oracle(case: Case, dtype: torch.dtype, target: Target) -> None:
    check(make_inputs(case, dtype, target.device), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [SMALL, CONTRACT_CASES[8], CONTRACT_CASES[9]], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_optional_arguments_match_oracle(
    case: Case, dtype: torch.dtype, index_dtype: torch.dtype, target: Target
) -> None:
    inputs = make_inputs(case, dtype, target.device, topk_length=True, attn_sink=True, index_dtype=index_dtype)
    check(inputs, target)


@pytest.mark.parametrize("deterministic", [False, True])
def test_bf16_meets_the_absolute_bars(deterministic: bool, target: Target, request: pytest.FixtureRequest) -> None:
    if deterministic:
        request.getfixturevalue("deterministic")
    case = Case(d_total=128, d_v=64, topk=64, heads=16, seq_q=32, seq_kv=256)
    inputs = replace(make_inputs(case, torch.bfloat16, target.device), softmax_scale=128**-0.5)
    oracle = run_reference(inputs, torch.float64)
    assert_bf16_bars(run(inputs, target), oracle, run_reference(inputs, torch.bfloat16))


# 1. Which slots are valid


@pytest.mark.parametrize("bad", [-1, -2, -(2**31), 11, 2**31 - 1, 2**40, -(2**40), 2**63 - 1], ids=str)
def test_invalid_index_is_no_key(bad: int, target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, invalid=False, index_dtype=torch.int64)
    with_bad = inputs.indices.clone()
    with_bad[..., 2] = bad
    without = inputs.indices[..., [0, 1, 3, 4, 5]]
    actual = run(replace(inputs, indices=with_bad), target)
    expected = run(replace(inputs, indices=without), target)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("deterministic")
def test_topk_length_is_clamped_and_counts_a_prefix(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, invalid=False)
    lengths = torch.tensor([[-5, 0, 3, 6, 2**40 + 3], [1, 2, 6, 7, -(2**40) + 3]], device=target.device)
    masked = inputs.indices.masked_fill(
        torch.arange(6, device=target.device) >= lengths.clamp(0, 6)[:, :, None, None], -1
    )
    actual = run(replace(inputs, topk_length=lengths), target)
    expected = run(replace(inputs, indices=masked), target)
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name


# 2. Logits


def test_repeated_indices_count_with_multiplicity(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, invalid=False)
    inputs = replace(inputs, indices=inputs.indices[..., [0, 0, 0, 1, 1, 2]])
    check(inputs, target)


@pytest.mark.parametrize("scale", [0.0, -2.5, 40.0], ids=str)
def test_any_finite_scale(scale: float, target: Target) -> None:
    check(replace(make_inputs(SMALL, device=target.device), softmax_scale=scale), target)


# 4. Rows without a valid slot


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_row_gives_zeros_and_minus_inf_and_taints_nothing(dtype: torch.dtype, target: Target) -> None:
    inputs = make_inputs(SMALL, dtype, target.device, attn_sink=True)
    clean = run(inputs, target)
    inputs.dout[:, 0] = torch.nan  # the first query of each batch element has no valid slot
    inputs.dlse[:, 0] = torch.nan
    inputs.q[:, 0] = torch.nan
    actual = run(inputs, target)
    assert (actual["out"][:, 0] == 0).all()
    assert (actual["lse"][:, 0] == -torch.inf).all()
    assert (actual["max_logits"][:, 0] == -torch.inf).all()
    assert (actual["dq"][:, 0] == 0).all()
    for name, result in actual.items():
        assert torch.equal(result, clean[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_whose_logits_all_overflow_to_minus_inf_looks_empty(dtype: torch.dtype, target: Target) -> None:
    inputs = make_inputs(SMALL, dtype, target.device, invalid=False, attn_sink=True)
    inputs.q.zero_()
    inputs.q[:, 0] = 1e20
    inputs.kv.fill_(-1e20)
    keywords = {"d_v": 16, "softmax_scale": 1.0, "backend": target.backend}
    out, lse = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, attn_sink=inputs.attn_sink, **keywords)
    max_logits = mla_ops.sparse_attn_max_logits(inputs.q, inputs.kv, inputs.indices, **keywords)
    assert (out[:, 0] == 0).all()
    assert (lse[:, 0] == -torch.inf).all()
    assert (max_logits[:, 0] == -torch.inf).all()
    assert (out[:, 1:] < 0).all()
    torch.testing.assert_close(lse[:, 1:], torch.full_like(lse[:, 1:], math.log(SMALL.topk)))


# 5, 6. What is never read


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unselected_kv_rows_are_never_read(dtype: torch.dtype, poison: float, target: Target) -> None:
    inputs = make_inputs(SMALL, dtype, target.device)
    inputs.indices[inputs.indices == 0] = -1  # row 0, where a clamped load would land, is unselected
    expected = run(inputs, target)
    named = torch.zeros(2, 11, dtype=torch.bool, device=target.device)
    for b in range(2):
        valid = inputs.indices[b][(inputs.indices[b] >= 0) & (inputs.indices[b] < 11)]
        named[b, valid.long()] = True
    assert not named.all()
    inputs.kv[~named] = poison
    actual = run(inputs, target)
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name
    assert (actual["dkv"][~named] == 0).all()


def test_invalid_slots_are_masked_by_value(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, invalid=False)
    inputs.q[:] = 1.0
    inputs.kv[:] = -1e4 / 24
    inputs.indices[..., 1:] = -1
    out = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, d_v=16, softmax_scale=1.0, backend=target.backend)
    # Not bitwise: a kernel may scale the logits inside the exponential, where the one weight is 1 but for a rounding.
    torch.testing.assert_close(out.out, inputs.kv[:, :1, :1, :16].expand_as(out.out))
    torch.testing.assert_close(out.lse, torch.full_like(out.lse, -1e4))


# 7, 8. Accumulation of dkv


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dkv_accumulates_512_unit_contributions_exactly(dtype: torch.dtype, target: Target) -> None:
    # One slot and one head per query: each query adds dout = 1 to its key's value columns with weight exactly 1.
    q = torch.zeros(512, 1, 8, dtype=dtype, device=target.device)
    kv = torch.zeros(1, 1, 8, dtype=dtype, device=target.device, requires_grad=True)
    indices = torch.zeros(512, 1, 1, dtype=torch.int32, device=target.device)
    out, _ = mla_ops.sparse_attn(q, kv, indices, d_v=8, softmax_scale=1.0, backend=target.backend)
    out.backward(torch.ones_like(out))
    assert (kv.grad == 512).all()


def test_deterministic_mode_makes_dkv_bitwise_reproducible(target: Target, request: pytest.FixtureRequest) -> None:
    case = Case(d_total=128, d_v=64, topk=32, heads=8, seq_q=128, seq_kv=64)
    inputs = make_inputs(case, torch.bfloat16, target.device).requires_grad()
    out, lse = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs, backend=target.backend)

    def gradients() -> torch.Tensor:
        return torch.autograd.grad([out, lse], inputs.kv, [inputs.dout, inputs.dlse], retain_graph=True)[0]

    request.getfixturevalue("deterministic")  # switched on between forward and backward
    first = gradients()
    assert all(torch.equal(first, gradients()) for _ in range(5))


@pytest.mark.parametrize("deterministic", [False, True])
def test_results_can_be_written_in_place(deterministic: bool, target: Target, request: pytest.FixtureRequest) -> None:
    if deterministic:
        request.getfixturevalue("deterministic")
    inputs = make_inputs(SMALL, device=target.device).requires_grad()
    for result in mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs, backend=target.backend):
        assert (result.zero_() == 0).all()  # autograd refuses it where the results are views


# 9. lse is differentiable


@pytest.mark.parametrize("uses", [{"use_dout": False}, {"use_dlse": False}], ids=["lse-only", "out-only"])
@pytest.mark.parametrize("attn_sink", [False, True], ids=["no-sink", "sink"])
def test_either_result_alone_has_a_gradient(uses: dict[str, bool], attn_sink: bool, target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, topk_length=True, attn_sink=attn_sink)
    if attn_sink and uses == {"use_dout": False}:
        leaves = inputs.requires_grad()
        _, lse = mla_ops.sparse_attn(leaves.q, leaves.kv, leaves.indices, **leaves.kwargs, backend=target.backend)
        (dsink,) = torch.autograd.grad(lse, leaves.attn_sink, inputs.dlse)
        assert (dsink == 0).all()  # lse excludes the sink
        return
    check(inputs, target, **uses)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("names", [("q",), ("kv",), ("attn_sink",), ("q", "attn_sink")], ids="+".join)
def test_gradients_that_are_not_needed_are_not_returned(names: tuple[str, ...], target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, attn_sink=True)
    everything = run(inputs, target)
    leaves = inputs.requires_grad(**{name: name in names for name in ("q", "kv", "attn_sink")})
    out, lse = mla_ops.sparse_attn(leaves.q, leaves.kv, leaves.indices, **leaves.kwargs, backend=target.backend)
    torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    for name in ("q", "kv", "attn_sink"):
        grad = getattr(leaves, name).grad
        if name in names:
            assert torch.equal(grad, everything["d" + name.removeprefix("attn_")]), name
        else:
            assert grad is None


def test_two_halves_merged_by_lse_equal_one_call(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    leaves = inputs.requires_grad()
    halves = [
        mla_ops.sparse_attn(leaves.q, leaves.kv, half.contiguous(), **leaves.kwargs, backend=target.backend)
        for half in inputs.indices.split(3, dim=-1)
    ]
    # Only queries with a valid slot in each half: logaddexp(-inf, -inf) has no gradient in torch.
    whole = (halves[0].lse > -torch.inf) & (halves[1].lse > -torch.inf)
    assert whole.any()
    lse = torch.logaddexp(halves[0].lse[whole], halves[1].lse[whole])
    out = sum(half.out[whole] * torch.exp(half.lse[whole] - lse).unsqueeze(-1) for half in halves)
    grads = torch.autograd.grad([out, lse], leaves.differentiable, [inputs.dout[whole], inputs.dlse[whole]])

    single = mla_ops.sparse_attn(leaves.q, leaves.kv, inputs.indices, **leaves.kwargs, backend=target.backend)
    expected = torch.autograd.grad(
        [single.out[whole], single.lse[whole]], leaves.differentiable, [inputs.dout[whole], inputs.dlse[whole]]
    )
    torch.testing.assert_close(out, single.out[whole], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, single.lse[whole], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)


# The largest logit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_logits_never_exceed_lse_and_equal_it_for_one_key(dtype: torch.dtype, target: Target) -> None:
    inputs = make_inputs(SMALL, dtype, target.device)
    many, one = (run(i, target) for i in (inputs, replace(inputs, indices=inputs.indices[..., :1].contiguous())))
    assert (many["max_logits"] <= many["lse"]).all()
    assert torch.equal(one["max_logits"], one["lse"])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_selected_row_reaches_the_max_logits(poison: float, target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, invalid=False)
    inputs.q[:] = inputs.q.abs()
    inputs.kv[0, inputs.indices[0, 0, 0, 2].item(), 0, 0] = poison
    max_logits = max_logits_of(inputs, target)
    expected = run_reference(inputs, torch.float64)["max_logits"]
    assert torch.equal(max_logits.isnan(), expected.isnan())
    assert torch.equal(max_logits.isposinf(), expected.isposinf())
    assert not max_logits[0, 0].isfinite().any()
    assert max_logits[1].isfinite().all()


def test_max_logits_carry_no_gradient(target: Target) -> None:
    leaves = make_inputs(SMALL, device=target.device).requires_grad()
    assert not max_logits_of(leaves, target).requires_grad
    assert torch.equal(max_logits_of(leaves, target), max_logits_of(make_inputs(SMALL, device=target.device), target))


# Sink


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_sinks(dtype: torch.dtype, target: Target) -> None:
    inputs = make_inputs(SMALL, dtype, target.device)
    sink = torch.tensor([-torch.inf, torch.inf, 0.0, -torch.inf], device=target.device)
    actual = run(replace(inputs, attn_sink=sink), target)
    without = run(inputs, target)
    assert torch.equal(actual["out"][:, :, [0, 3]], without["out"][:, :, [0, 3]])
    assert (actual["out"][:, :, 1] == 0).all()
    assert torch.equal(actual["lse"], without["lse"])
    assert torch.equal(actual["dq"][:, :, [0, 3]], without["dq"][:, :, [0, 3]])
    assert (actual["dsink"][[0, 1, 3]] == 0).all()
    assert actual["dsink"].isfinite().all()
    assert actual["dkv"].isfinite().all()


def test_huge_finite_sink_does_not_overflow(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    sink = torch.tensor([1e4, -1e4, 3e38, -3e38], device=target.device)
    actual = check(replace(inputs, attn_sink=sink), target)
    assert all(actual[name].isfinite().all() for name in ("out", "dq", "dkv", "dsink"))


# 12. Strides


def strided_twin(t: torch.Tensor) -> torch.Tensor:
    """The same values as a column view of a wider buffer with a gap between rows."""
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 5), 7)
    wide[..., 1:-2, 2:-3] = t
    return wide[..., 1:-2, 2:-3]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_inputs_give_the_same_bits(dtype: torch.dtype, target: Target) -> None:
    inputs = make_inputs(SMALL, dtype, target.device, topk_length=True, attn_sink=True)
    expected = run(inputs, target)
    leaves = inputs.requires_grad()
    transposed_length = inputs.topk_length.t().contiguous().t()
    out, lse = mla_ops.sparse_attn(
        strided_twin(leaves.q),
        strided_twin(leaves.kv).transpose(1, 2).contiguous().transpose(1, 2),
        strided_twin(inputs.indices),
        d_v=inputs.d_v,
        softmax_scale=inputs.softmax_scale,
        topk_length=transposed_length,
        attn_sink=leaves.attn_sink.repeat_interleave(2)[::2],
        backend=target.backend,
    )
    grads = torch.autograd.grad(
        [out, lse], leaves.differentiable, [strided_twin(inputs.dout), strided_twin(inputs.dlse)]
    )
    max_logits = mla_ops.sparse_attn_max_logits(
        strided_twin(inputs.q),
        strided_twin(inputs.kv),
        strided_twin(inputs.indices),
        d_v=inputs.d_v,
        softmax_scale=inputs.softmax_scale,
        topk_length=transposed_length,
        backend=target.backend,
    )
    for name, result in {**name_results(out, lse, grads), "max_logits": max_logits}.items():
        assert torch.equal(result, expected[name]), name
        assert name in ("dq", "dkv", "dsink") or result.is_contiguous()


@pytest.mark.usefixtures("deterministic")
def test_expanded_output_gradient(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device)
    ones = run(replace(inputs, dout=torch.ones_like(inputs.dout)), target, use_dlse=False)
    leaves = inputs.requires_grad()
    out, _ = mla_ops.sparse_attn(leaves.q, leaves.kv, leaves.indices, **leaves.kwargs, backend=target.backend)
    grads = torch.autograd.grad(out.sum(), leaves.differentiable)  # autograd hands over an expanded scalar
    for name, grad in zip(("dq", "dkv"), grads, strict=True):
        assert torch.equal(grad, ones[name])


# 11. Zero sizes


@pytest.mark.parametrize("field", ["batch", "seq_q", "seq_kv", "topk", "heads"])
def test_zero_sizes(field: str, target: Target) -> None:
    inputs = make_inputs(replace(SMALL, **{field: 0}), device=target.device, attn_sink=True, topk_length=True)
    actual = run(inputs, target)
    assert (actual["out"] == 0).all()
    assert (actual["lse"] == -torch.inf).all()
    assert (actual["max_logits"] == -torch.inf).all()
    for name, source in (("dq", inputs.q), ("dkv", inputs.kv), ("dsink", inputs.attn_sink)):
        assert actual[name].shape == source.shape
        assert (actual[name] == 0).all()


# 13. Offsets beyond 2**31


def test_kv_rows_beyond_2_to_31_elements() -> None:
    # On the CPU only touched pages exist, so 4.3 GB cost nothing; the GPU's case is in test_kernels_gpu.py.
    rows = 2**31 // 64 + 8
    kv = EMPTY(rows, 1, 64, dtype=torch.float16)  # not poisoned: filling it would make every page real
    last = torch.arange(rows - 4, rows)
    kv[last] = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    q = torch.ones(3, 2, 64, dtype=torch.float16)
    indices = last.expand(3, 1, 4)
    actual = torch.ops.mla.sparse_attn(q, kv, indices, 48, 0.1)
    expected = torch.ops.mla.sparse_attn(q, kv[last], (indices - last[0]), 48, 0.1)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


# 14. Nothing depends on data on the host


def test_no_operator_reads_data_or_shapes_from_it(target: Target) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert torch.Tag.data_dependent_output not in func.tags, func  # .item() and its like
            if func is torch.ops.aten.index.Tensor:  # its shape depends on data for boolean masks only
                assert all(index is None or index.dtype != torch.bool for index in args[1]), func
            else:
                assert torch.Tag.dynamic_output_shape not in func.tags, func
            return func(*args, **(kwargs or {}))

    inputs = make_inputs(SMALL, device=target.device, topk_length=True, attn_sink=True)
    call = SparseAttnCall(*inputs.args)
    problem, traits = SparseAttnProblem.of(call), traits_of(inputs.q.device)
    backend = select(problem, traits, target.backend).require_backend()
    plans = {side: backend.plan(side, call, problem, traits, Wanted()) for side in get_args(Side)}
    with Watch():
        results = backend.forward(call, plans["forward"])
        backend.max_logits(call, plans["max_logits"])
        backend.backward(call, results, Gradients(inputs.dout, inputs.dlse), Wanted(), plans["backward"])


# 15. Double backward


def test_double_backward_raises(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device).requires_grad()
    out, _ = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs, backend=target.backend)
    (dq,) = torch.autograd.grad(out.sum(), inputs.q, create_graph=True)
    with pytest.raises(mla_ops.DoubleBackwardError, match="differentiable once"):
        dq.sum().backward()


@pytest.mark.parametrize("differentiated", ["q", "kv", "attn_sink"])
def test_forward_mode_raises(differentiated: str, target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, attn_sink=True)
    primal = getattr(inputs, differentiated)

    def out_of(value: torch.Tensor) -> torch.Tensor:
        changed = replace(inputs, **{differentiated: value})
        arguments = (changed.q, changed.kv, changed.indices)
        return mla_ops.sparse_attn(*arguments, **changed.kwargs, backend=target.backend).out

    with pytest.raises(mla_ops.ForwardModeError, match="reverse mode"):
        torch.func.jvp(out_of, (primal,), (torch.ones_like(primal),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(primal, torch.ones_like(primal))
        for value in (dual, dual.requires_grad_()):
            with pytest.raises(mla_ops.ForwardModeError, match="reverse mode"):
                out_of(value)
        assert torch.equal(out_of(primal), out_of(primal.clone()))  # without a tangent nothing is refused


def test_inputs_are_not_changed(target: Target) -> None:
    inputs = make_inputs(SMALL, device=target.device, topk_length=True, attn_sink=True)
    before = [t.clone() for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    run(inputs, target)
    after = [t for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradcheck_in_fp64(target: Target) -> None:
    inputs = make_inputs(SMALL, torch.float64, target.device).requires_grad()
    skip_unsupported(inputs, target)

    def out_of(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        result = mla_ops.sparse_attn(q, kv, inputs.indices, **inputs.kwargs, backend=target.backend)
        return result.out

    assert torch.autograd.gradcheck(out_of, (inputs.q, inputs.kv))

"""Scores of listed keys and their gradients: the contract's semantics on every target, and the rest of torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Target
from no_host_reads import NoHostReads
from strided_tensors import padded, transposed
from test_errors import Fp8Wrapper, bad
from torch.utils.flop_counter import FlopCounterMode

import mla_ops
from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.ops.index_scores import backends
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Wanted
from mla_ops.reference import index_scores_bwd_reference, index_scores_reference
from mla_ops.testing import IndexCase, LossInputs, assert_within_budget, make_loss_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = IndexCase(topk=6, index_heads=4, index_head_dim=16, seq_q=5, seq_kv=11)
CASES = [
    SMALL,
    IndexCase(topk=16, index_heads=4, index_head_dim=64, seq_kv=40),
    IndexCase(topk=33, index_heads=3, index_head_dim=24, batch=None),
    IndexCase(topk=5, index_heads=6, index_head_dim=40, kv_group=3),
    IndexCase(topk=64, index_heads=32, index_head_dim=128, seq_q=3, seq_kv=100),
    IndexCase(topk=1, index_heads=1, index_head_dim=1, batch=1, seq_q=1, seq_kv=1),
]
NAMES = ("scores", "dq", "dk", "dw")


def skip_unsupported(inputs: LossInputs, target: Target) -> None:
    if inputs.q_idx.dtype == torch.float64 and target == Target("cuda", "auto"):
        pytest.skip('no kernel multiplies fp64, and backend="auto" refuses it on CUDA')


def upstream(inputs: LossInputs) -> torch.Tensor:
    """A gradient of the scores, NaN where a slot names no key."""
    generator = torch.Generator().manual_seed(1)
    dscores = torch.randn(inputs.indices.shape, generator=generator).to(inputs.indices.device)
    return dscores.masked_fill(~inputs.valid, torch.nan)


def run(inputs: LossInputs, target: Target, dscores: torch.Tensor, relu: bool = True) -> dict[str, torch.Tensor]:
    skip_unsupported(inputs, target)
    leaves = inputs.requires_grad()
    q_idx, k_idx, weights, indices, topk_length = leaves.scores_args
    scores = mla_ops.index_scores(
        q_idx, k_idx, weights, indices, topk_length=topk_length, relu=relu, backend=target.backend
    )
    grads = torch.autograd.grad(scores, leaves.differentiable, dscores)
    return dict(zip(NAMES, (scores.detach(), *grads), strict=True))


def run_reference(inputs: LossInputs, dtype: torch.dtype, dscores: torch.Tensor, relu: bool) -> dict[str, torch.Tensor]:
    cast = inputs.to(dtype)
    dscores = dscores.to(dtype).nan_to_num(0.0)
    scores = index_scores_reference(*cast.scores_args, relu)
    return dict(zip(NAMES, (scores, *index_scores_bwd_reference(dscores, *cast.scores_args, relu)), strict=True))


def check(inputs: LossInputs, target: Target, relu: bool = True) -> dict[str, torch.Tensor]:
    dscores = upstream(inputs)
    actual = run(inputs, target, dscores, relu)
    oracle = run_reference(inputs, torch.float64, dscores, relu)
    low = run_reference(inputs, inputs.q_idx.dtype, dscores, relu)
    heads, width = inputs.q_idx.shape[-2:]
    terms = heads * width + inputs.indices.shape[-1]
    # Scores are fp32 sums of products in fp32: what a computation in bf16 may err does not count.
    assert_within_budget(actual["scores"], oracle["scores"], oracle["scores"], terms=terms, name="scores")
    for name in NAMES[1:]:
        summed = terms + (inputs.indices.numel() if name == "dk" else 0)
        assert_within_budget(actual[name], oracle[name], low[name], terms=summed, name=name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle(case: IndexCase, dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(case, dtype, target.device)
    results = check(inputs, target)
    assert results["scores"].dtype == torch.float32
    assert [results[name].dtype for name in NAMES[1:]] == [t.dtype for t in inputs.differentiable]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_options_match_oracle(relu: bool, index_dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(CASES[3], device=target.device, topk_length=True, index_dtype=index_dtype)
    check(inputs, target, relu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_in_the_dtype_of_q_idx(dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(SMALL, dtype, target.device)
    results = check(replace(inputs, weights=inputs.weights.to(dtype)), target)
    assert results["dw"].dtype == dtype


def test_gradcheck_of_the_reference() -> None:
    # The operator's scores are fp32 for fp64 inputs too, too coarse for differences; its gradients in fp64 are held
    # against those of the reference above.
    inputs = make_loss_inputs(SMALL, torch.float64, invalid=False).requires_grad()
    assert torch.autograd.gradcheck(
        lambda *tensors: index_scores_reference(*tensors, inputs.indices), inputs.differentiable
    )


# 10. Which slots have a score


@pytest.mark.parametrize("bad_index", [-1, -2, -(2**31), 11, 2**31 - 1, 2**40, -(2**40), 2**63 - 1], ids=str)
def test_invalid_slots_score_minus_inf(bad_index: int, target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False, index_dtype=torch.int64)
    expected = run(inputs, target, upstream(inputs))["scores"]
    inputs.indices[..., 2] = bad_index
    actual = check(inputs, target)["scores"]
    assert (actual[..., 2] == -torch.inf).all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(actual[..., others], expected[..., others], rtol=1e-6, atol=1e-6)


def test_topk_length_is_clamped_and_counts_a_prefix(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    lengths = torch.tensor([[-5, 0, 3, 6, 2**40 + 3], [1, 2, 6, 7, -(2**40) + 3]], device=target.device)
    inputs = replace(inputs, topk_length=lengths)
    actual = check(inputs, target)
    assert torch.equal(actual["scores"] == -torch.inf, ~inputs.valid)


def test_no_causal_bound_is_applied_to_a_list(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    inputs.indices[:] = 10  # the last key, for every query
    assert check(inputs, target)["scores"].isfinite().all()


def test_repeated_indices_each_get_their_score(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    inputs = replace(inputs, indices=inputs.indices[..., [0, 0, 0, 1, 1, 2]])
    scores = check(inputs, target)["scores"]
    assert torch.equal(scores[..., 0], scores[..., 2])


@pytest.fixture
def rounded_factors(target: Target) -> Iterator[None]:
    """Let torch round fp32 factors of matrix products, to TF32 or to bf16."""
    matmul = torch.backends.cuda.matmul if target.device == "cuda" else torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if target.device == "cuda" else "bf16"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("rounded_factors")
def test_fp32_factors_are_never_rounded(target: Target) -> None:
    check(make_loss_inputs(CASES[4], device=target.device), target)


# 11. Gradients


def test_the_derivative_of_relu_at_zero_is_zero(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    inputs = replace(inputs, q_idx=torch.zeros_like(inputs.q_idx))
    ones = torch.ones(inputs.indices.shape, device=target.device)
    for name, result in run(inputs, target, ones).items():
        assert (result == 0).all(), name
    assert (run(inputs, target, ones, relu=False)["dq"] != 0).any()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_row_taints_nothing(dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(SMALL, dtype, target.device)
    clean = run(inputs, target, upstream(inputs))
    inputs.q_idx[:, 0] = torch.nan  # the first query of each batch element has no valid slot
    inputs.weights[:, 0] = torch.nan
    actual = run(inputs, target, upstream(inputs))
    assert (actual["scores"][:, 0] == -torch.inf).all()
    assert (actual["dq"][:, 0] == 0).all()
    assert (actual["dw"][:, 0] == 0).all()
    for name, result in actual.items():
        assert torch.equal(result, clean[name]), name


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_no_slot_names_are_never_read(dtype: torch.dtype, poison: float, target: Target) -> None:
    inputs = make_loss_inputs(SMALL, dtype, target.device)
    inputs.indices[inputs.indices == 0] = -1  # key 0, where a clamped load would land
    expected = run(inputs, target, upstream(inputs))
    named = torch.zeros(2, 11, dtype=torch.bool, device=target.device)
    for b in range(2):
        named[b, inputs.indices[b][inputs.valid[b]].long()] = True
    assert not named.all()
    inputs.k_idx[~named] = poison
    actual = run(inputs, target, upstream(inputs))
    for name, result in actual.items():
        assert torch.equal(result, expected[name]), name
    assert (actual["dk"][~named] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dk_accumulates_512_unit_contributions_exactly(dtype: torch.dtype, target: Target) -> None:
    q_idx = torch.ones(512, 1, 8, dtype=dtype, device=target.device)
    k_idx = torch.ones(1, 1, 8, dtype=dtype, device=target.device, requires_grad=True)
    weights = torch.ones(512, 1, device=target.device)
    indices = torch.zeros(512, 1, 1, dtype=torch.int32, device=target.device)
    scores = mla_ops.index_scores(q_idx, k_idx, weights, indices, backend=target.backend)
    scores.backward(torch.ones_like(scores))
    assert (k_idx.grad == 512).all()


@pytest.mark.usefixtures("deterministic")
def test_gradients_are_reproducible_in_deterministic_mode(target: Target) -> None:
    case = IndexCase(topk=32, index_heads=8, index_head_dim=64, seq_q=128, seq_kv=64)
    inputs = make_loss_inputs(case, torch.bfloat16, target.device)
    first = run(inputs, target, upstream(inputs))
    for _ in range(5):
        again = run(inputs, target, upstream(inputs))
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("needed", [("q_idx",), ("k_idx",), ("weights",), ("q_idx", "weights")], ids="+".join)
def test_gradients_that_are_not_needed_are_not_returned(needed: tuple[str, ...], target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device)
    everything = run(inputs, target, upstream(inputs))
    tensors = {name: getattr(inputs, name).clone() for name in ("q_idx", "k_idx", "weights")}
    for name in needed:
        tensors[name].requires_grad_()
    mla_ops.index_scores(**tensors, indices=inputs.indices, backend=target.backend).backward(upstream(inputs))
    for (name, tensor), gradient in zip(tensors.items(), NAMES[1:], strict=True):
        assert tensor.grad is None if name not in needed else torch.equal(tensor.grad, everything[gradient])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_give_the_same_bits(dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(CASES[3], dtype, target.device, topk_length=True)
    expected = run(inputs, target, upstream(inputs))
    twin = replace(
        inputs,
        q_idx=padded(inputs.q_idx),
        k_idx=transposed(inputs.k_idx),
        weights=transposed(inputs.weights),
        indices=transposed(inputs.indices),
        topk_length=transposed(inputs.topk_length),
    )
    leaves = [t.detach().requires_grad_() for t in twin.differentiable]
    scores = mla_ops.index_scores(*leaves, twin.indices, topk_length=twin.topk_length, backend=target.backend)
    grads = torch.autograd.grad(scores, leaves, transposed(upstream(inputs)))
    assert scores.is_contiguous()
    for name, result in zip(NAMES, (scores, *grads), strict=True):
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("field", ["batch", "seq_q", "seq_kv", "topk", "index_heads"])
def test_zero_sizes(field: str, target: Target) -> None:
    inputs = make_loss_inputs(replace(SMALL, **{field: 0}), device=target.device, topk_length=True)
    actual = run(inputs, target, upstream(inputs))
    assert actual["scores"].shape == inputs.indices.shape
    assert (actual["scores"] == torch.where(inputs.valid, 0.0, -torch.inf)).all()
    for name, like in zip(NAMES[1:], inputs.differentiable, strict=True):
        assert actual[name].shape == like.shape
        assert (actual[name] == 0).all()


def test_no_operator_reads_data_or_shapes_from_it(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, topk_length=True)
    call = IndexScoresCall(*inputs.scores_args)
    problem, traits = IndexScoresProblem.of(call), traits_of(call.q_idx.device)
    backend = backends.select(problem, traits, target.backend).require_backend()
    forward, backward = (backend.plan(side, call, problem, traits, Wanted()) for side in ("forward", "backward"))
    with NoHostReads():
        scores = backend.forward(call, forward)
        backend.backward(call, scores, Wanted(), backward)


def test_inputs_are_not_changed(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, topk_length=True)
    tensors = [t for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    run(inputs, target, upstream(inputs))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_second_and_forward_mode_derivatives_raise(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False).requires_grad()
    scores = mla_ops.index_scores(*inputs.differentiable, inputs.indices, backend=target.backend)
    (dq,) = torch.autograd.grad(scores.sum(), inputs.q_idx, create_graph=True)
    with pytest.raises(mla_ops.DoubleBackwardError, match=r"mla_ops\.reference\.index_scores_reference"):
        dq.sum().backward()
    with pytest.raises(mla_ops.ForwardModeError, match="reverse mode"):
        torch.func.jvp(
            lambda w: mla_ops.index_scores(inputs.q_idx, inputs.k_idx, w, inputs.indices, backend=target.backend),
            (inputs.weights.detach(),),
            (torch.ones_like(inputs.weights),),
        )


# Refusals, the same words through the front door, the raw operator and at trace time

RULES = [
    bad({"indices": lambda a: a["indices"][:, :, 0]}, r"indices must have 4 dimensions, .*use indices.unsqueeze\(-2\)"),
    bad({"indices": lambda a: a["indices"].float()}, r"indices must be int32 or int64, got float32; use indices.to"),
    bad({"indices": lambda a: a["indices"].float().requires_grad_()}, r"indices must be int32 or int64, got float32"),
    bad({"indices": lambda a: a["indices"][:1]}, r"size 0 of indices must equal the batch of q_idx \(2\)"),
    bad({"indices": lambda a: a["indices"][:, :4]}, r"size -3 of indices must equal seq_q of q_idx \(5\)"),
    bad({"indices": lambda a: a["indices"][:, :, :1]}, r"size -2 of indices must equal kv_group of k_idx \(2\)"),
    bad({"topk_length": lambda a: a["topk_length"][0]}, r"topk_length must have 2 dimensions, .*got shape \[5\]"),
    bad({"topk_length": lambda a: a["topk_length"].float()}, r"topk_length must be int32 or int64, got float32"),
    bad({"topk_length": lambda a: a["topk_length"][:, :4]}, r"size -1 of topk_length must equal seq_q of q_idx \(5\)"),
    bad({"q_idx": lambda a: a["q_idx"].to(torch.float8_e4m3fn)}, r"q_idx must be bfloat16, .*got float8_e4m3fn"),
    bad({"k_idx": lambda a: a["k_idx"].half()}, r"k_idx must have the dtype of q_idx \(float32\), got float16"),
    bad({"weights": lambda a: a["weights"].half()}, r"weights must be float32, got float16"),
    bad({"indices": lambda a: a["indices"].to_sparse()}, r"indices must be a dense \(strided\) tensor, got torch"),
    bad({"indices": lambda a: a["indices"].to("meta")}, r"indices must be on the device of q_idx \(cpu\), got meta"),
]


def good_call() -> dict[str, Any]:
    inputs = make_loss_inputs(replace(SMALL, kv_group=2), topk_length=True)
    names = ("q_idx", "k_idx", "weights", "indices", "topk_length")
    return {**dict(zip(names, inputs.scores_args, strict=True)), "relu": True, "backend": "auto"}


@pytest.mark.parametrize(("change", "message"), RULES)
@pytest.mark.parametrize("entrance", [mla_ops.index_scores, torch.ops.mla.index_scores], ids=["door", "raw"])
def test_a_broken_rule_is_named(entrance: Any, change: dict[str, Any], message: str) -> None:
    arguments = good_call()
    with pytest.raises(mla_ops.InvalidInputError, match=message):
        entrance(**{**arguments, **{name: make(arguments) for name, make in change.items()}})


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_broken_rule_is_named_at_trace_time() -> None:
    arguments = good_call()
    arguments["indices"] = arguments["indices"].float()
    compiled = torch.compile(mla_ops.index_scores, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"indices must be int32 or int64, got float32"):
        compiled(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": None}, "indices must be a torch.Tensor, got NoneType"),
        ({"relu": 1}, "relu must be a bool, got int"),
        ({"backend": None}, "backend must be a string, got NoneType"),
        ({"backend": "tritn"}, "backend must be one of 'auto'"),
    ],
)
def test_the_front_door_checks_types(change: dict[str, Any], message: str) -> None:
    with pytest.raises(mla_ops.MlaOpsError, match=message):
        mla_ops.index_scores(**{**good_call(), **change})


def test_a_wrapper_tensor_is_refused() -> None:
    arguments = good_call()
    with pytest.raises(mla_ops.InvalidInputError, match="k_idx must be a plain tensor"):
        mla_ops.index_scores(**{**arguments, "k_idx": Fp8Wrapper(arguments["k_idx"])})


@pytest.mark.parametrize(
    ("dscores", "message"),
    [
        (lambda scores: scores.double(), "dscores must be float32, got float64"),
        (lambda scores: scores[0], "dscores must have 4 dimensions"),
        (lambda scores: scores[..., :3], r"size 3 of dscores must equal size 3 of indices \(6\)"),
    ],
)
def test_a_backward_checks_what_arrives(dscores: Any, message: str) -> None:
    inputs = make_loss_inputs(SMALL)
    scores = torch.ops.mla.index_scores(*inputs.scores_args)
    with pytest.raises(mla_ops.InvalidInputError, match=message):
        torch.ops.mla.index_scores_bwd(dscores(scores), *inputs.scores_args)


# The rest of torch

UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, batch=None), replace(SMALL, kv_group=2)], ids=str)
def test_opcheck(case: IndexCase, grads: bool) -> None:
    inputs = make_loss_inputs(case, topk_length=grads)
    inputs = inputs.requires_grad() if grads else inputs
    torch.library.opcheck(torch.ops.mla.index_scores.default, inputs.scores_args, test_utils=UTILITIES)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
def test_opcheck_of_the_backward(needs: tuple[bool, bool, bool]) -> None:
    inputs = make_loss_inputs(SMALL, torch.bfloat16)
    dscores = transposed(upstream(inputs).nan_to_num(0.0))
    args = (dscores, padded(inputs.q_idx), *inputs.scores_args[1:], True, *needs)
    torch.library.opcheck(torch.ops.mla.index_scores_bwd.default, args, test_utils=UTILITIES)
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    results = zip(torch.ops.mla.index_scores_bwd(*args), torch.ops.mla.index_scores_bwd(*on_meta), strict=True)
    for actual, fake in results:
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_q_idx_and_k_idx_only(dtype: torch.dtype) -> None:
    inputs = make_loss_inputs(SMALL).requires_grad()
    with torch.autocast("cpu", dtype):
        scores = torch.ops.mla.index_scores(*inputs.scores_args)
        decision = mla_ops.explain_index_scores(*inputs.scores_args[:4])
    expected = torch.ops.mla.index_scores(inputs.q_idx.to(dtype), inputs.k_idx.to(dtype), *inputs.scores_args[2:])
    assert torch.equal(scores, expected)
    assert decision.problem.dtype == dtype
    grads = torch.autograd.grad(scores, inputs.differentiable, upstream(inputs))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def test_autocast_around_a_backward_changes_no_bit() -> None:
    inputs = make_loss_inputs(SMALL).requires_grad()
    results = []
    for enabled in (False, True):
        scores = torch.ops.mla.index_scores(*inputs.scores_args)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(torch.autograd.grad(scores, inputs.differentiable, upstream(inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("in_dims", [(0, None, None, None), (0, None, 0, 0), (0, 0, 0, 0), (None, 1, None, None)])
@pytest.mark.parametrize("batch", [2, None])
def test_vmap_is_a_loop(batch: int | None, in_dims: tuple[int | None, ...]) -> None:
    inputs = make_loss_inputs(replace(SMALL, batch=batch, kv_group=2))
    args = [
        arg if dim is None else torch.stack([arg, arg.flip(0), arg], dim)
        for arg, dim in zip(inputs.scores_args[:4], in_dims, strict=True)
    ]
    actual = torch.vmap(mla_ops.index_scores, in_dims)(*args)
    for i in range(3):
        element = [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        torch.testing.assert_close(actual[i], mla_ops.index_scores(*element))


def test_per_sample_gradients_by_vmap_of_grad() -> None:
    inputs = make_loss_inputs(SMALL, invalid=False)

    def loss(q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return mla_ops.index_scores(q_idx, k_idx, weights, indices).sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*inputs.scores_args[:4])
    ones = torch.ones(inputs.indices.shape)
    expected = run(inputs, Target("cpu", "auto"), ones)
    for name, grad in zip(NAMES[1:], grads, strict=True):
        torch.testing.assert_close(grad, expected[name])


def test_flops() -> None:
    inputs = make_loss_inputs(SMALL, invalid=False).requires_grad()
    with FlopCounterMode(display=False) as counter:
        scores = torch.ops.mla.index_scores(*inputs.scores_args)
        forward = counter.get_total_flops()
        scores.sum().backward()
    assert forward == 2 * 2 * 5 * 4 * 16 * 6  # two, batch, seq_q, index heads, width, slots
    assert counter.get_total_flops() == 4 * forward  # the products again, dq, dk


def test_calls_that_look_alike_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_plans", dispatch.Plans())
    first = make_loss_inputs(SMALL)
    torch.ops.mla.index_scores(*first.scores_args)
    torch.ops.mla.index_scores(*make_loss_inputs(SMALL, seed=1).scores_args)
    assert len(backends._plans) == 1
    names = ("q_idx", "k_idx", "weights", "indices", "topk_length")
    different: list[dict[str, Any]] = [
        {"relu": False},
        {"backend": "eager"},
        {"indices": first.indices.long()},
        {"weights": transposed(first.weights)},
        {"topk_length": torch.ones(2, 5, dtype=torch.int32)},
    ]
    for number, change in enumerate(different, start=2):
        torch.ops.mla.index_scores(**{**dict(zip(names, first.scores_args, strict=True)), **change})
        assert len(backends._plans) == number, change


def test_eager_is_never_automatic_on_a_gpu() -> None:
    problem = IndexScoresProblem(index_head_dim=64, index_heads=4, kv_group=1, topk=256, dtype=torch.float64)
    device = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, name="H100")
    decision = backends.select(problem, device)
    assert decision.backend is None
    assert 'excluded from backend="auto" on cuda; pass backend="eager"' in str(decision)
    assert backends.select(problem, device, "eager").backend is not None


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_serves_all_lengths() -> None:
    compiled = torch.compile(mla_ops.index_scores, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.config.error_on_recompile = True
    try:
        for seq_q, seq_kv, topk in ((5, 11, 6), (7, 24, 6), (9, 13, 8)):
            inputs = make_loss_inputs(replace(SMALL, seq_q=seq_q, seq_kv=seq_kv, topk=topk)).requires_grad()
            dscores = upstream(inputs)
            scores = compiled(*inputs.scores_args[:4])
            grads = torch.autograd.grad(scores, inputs.differentiable, dscores)
            expected = run(inputs, Target("cpu", "auto"), dscores)
            for name, result in zip(NAMES, (scores, *grads), strict=True):
                assert torch.equal(result, expected[name]), name
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_export_keeps_the_operator() -> None:
    class Scores(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return mla_ops.index_scores(*tensors)

    inputs = make_loss_inputs(SMALL)
    seq_q, seq_kv = torch.export.Dim("seq_q", min=2, max=4096), torch.export.Dim("seq_kv", min=2, max=4096)
    shapes = ({1: seq_q}, {1: seq_kv}, {1: seq_q}, {1: seq_q})
    program = torch.export.export(Scores(), inputs.scores_args[:4], dynamic_shapes=(shapes,))
    longer = make_loss_inputs(replace(SMALL, seq_q=9, seq_kv=30))
    assert torch.equal(program.module()(*longer.scores_args[:4]), mla_ops.index_scores(*longer.scores_args[:4]))

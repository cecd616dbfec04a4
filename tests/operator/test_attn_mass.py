"""Attention mass of listed keys: the contract's semantics on every target, and the rest of torch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Target
from no_host_reads import NoHostReads
from strided_tensors import padded, transposed
from test_errors import bad
from torch.utils.flop_counter import FlopCounterMode

import mla_ops
from mla_ops import dispatch
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.ops.attn_mass import backends
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem
from mla_ops.reference import attn_mass_reference
from mla_ops.testing import IndexCase, LossInputs, assert_within_budget, make_loss_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = IndexCase(topk=6, seq_q=5, seq_kv=11)
# Case, heads of a group, d_total.
CASES = [
    (SMALL, 4, 24),
    (IndexCase(topk=16, seq_kv=40), 28, 128),
    (IndexCase(topk=33, batch=None), 3, 72),
    (IndexCase(topk=5, index_heads=6, kv_group=3), 2, 40),
    (IndexCase(topk=64, seq_q=3, seq_kv=100), 16, 576),
    (IndexCase(topk=1, index_heads=1, batch=1, seq_q=1, seq_kv=1), 1, 1),
]


def run(inputs: LossInputs, target: Target) -> torch.Tensor:
    if inputs.q.dtype == torch.float64 and target == Target("cuda", "auto"):
        pytest.skip('no kernel multiplies fp64, and backend="auto" refuses it on CUDA')
    q, kv, indices, lse, softmax_scale, topk_length = inputs.mass_args
    return mla_ops.attn_mass(
        q, kv, indices, lse, softmax_scale=softmax_scale, topk_length=topk_length, backend=target.backend
    )


def check(inputs: LossInputs, target: Target) -> torch.Tensor:
    mass = run(inputs, target)
    assert mass.dtype == torch.float32
    assert mass.is_contiguous()
    oracle = attn_mass_reference(*inputs.to(torch.float64).mass_args)
    # In fp32 whatever the inputs are: bf16 factors have exact products. The exponential makes of the rounding of a
    # logit a relative error, so terms count as often as the largest logit or normaliser is large.
    low = attn_mass_reference(*inputs.to(torch.float32).mass_args)
    largest = max(1, int(inputs.lse[inputs.lse.isfinite()].abs().max())) if inputs.lse.isfinite().any() else 1
    terms = (inputs.q.shape[-1] + inputs.q.shape[-2]) * largest
    assert_within_budget(mass, oracle, low, terms=terms, name="mass")
    return mass


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "heads", "d_total"), CASES, ids=str)
def test_matches_oracle(case: IndexCase, heads: int, d_total: int, dtype: torch.dtype, target: Target) -> None:
    check(make_loss_inputs(case, dtype, target.device, heads=heads, d_total=d_total), target)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_topk_length_and_index_types(index_dtype: torch.dtype, target: Target) -> None:
    case = IndexCase(topk=5, index_heads=6, kv_group=3)
    inputs = make_loss_inputs(case, device=target.device, topk_length=True, index_dtype=index_dtype)
    mass = check(inputs, target)
    assert (mass[~inputs.valid] == 0).all()
    assert (mass[inputs.valid] > 0).all()


# 12. What is summed


def test_masses_of_attentions_own_lse_sum_to_the_heads(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    total = run(inputs, target).sum(dim=-1)
    torch.testing.assert_close(total, torch.full_like(total, 4.0))


def test_repeated_indices_each_get_their_mass(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    inputs = replace(inputs, indices=inputs.indices[..., [0, 0, 0, 1, 1, 2]])
    mass = check(inputs, target)
    assert torch.equal(mass[..., 0], mass[..., 2])


@pytest.mark.parametrize("scale", [0.0, -2.5, 40.0], ids=str)
def test_any_finite_scale(scale: float, target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device)
    attention = mla_ops.sparse_attn(
        inputs.q, inputs.kv, inputs.indices, d_v=24, softmax_scale=scale, backend=target.backend
    )
    check(replace(inputs, softmax_scale=scale, lse=attention.lse), target)


def test_a_head_whose_lse_is_minus_inf_adds_nothing(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    inputs.lse[:, 1] = -torch.inf
    inputs.q[:, 1] = torch.nan
    inputs.lse[:, 2, :2] = -torch.inf
    mass = run(inputs, target)
    assert (mass[:, 1] == 0).all()
    rest = replace(inputs, q=inputs.q[:, 2:3, 2:], lse=inputs.lse[:, 2:3, 2:], indices=inputs.indices[:, 2:3])
    torch.testing.assert_close(mass[:, 2:3], run(rest, target))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_no_slot_names_are_never_read(dtype: torch.dtype, poison: float, target: Target) -> None:
    inputs = make_loss_inputs(SMALL, dtype, target.device)
    inputs.indices[inputs.indices == 0] = -1  # key 0, where a clamped load would land
    expected = run(inputs, target)
    named = torch.zeros(2, 11, dtype=torch.bool, device=target.device)
    for b in range(2):
        named[b, inputs.indices[b][inputs.valid[b]].long()] = True
    assert not named.all()
    inputs.kv[~named] = poison
    inputs.q[:, 0] = poison  # the first query of each batch element has no valid slot
    assert torch.equal(run(inputs, target), expected)


def test_nothing_gets_a_gradient_and_nobody_warns(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device).requires_grad()
    inputs.lse.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mass = run(inputs, target)
        assert not mass.requires_grad
        (mass.sum() + inputs.q.sum()).backward()
    assert (inputs.q.grad == 1).all()
    assert inputs.kv.grad is None
    assert inputs.lse.grad is None
    with pytest.raises(mla_ops.ForwardModeError, match="reverse mode"):
        torch.func.jvp(lambda q: run(replace(inputs, q=q), target), (inputs.q.detach(),), (inputs.q.detach(),))


# 13, 14. A sum that is not normalised, by whatever normaliser


def test_masses_of_two_halves_of_the_heads_add_up_to_the_whole(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device)
    halves = [replace(inputs, q=inputs.q[:, :, h], lse=inputs.lse[:, :, h]) for h in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(run(halves[0], target) + run(halves[1], target), run(inputs, target))


def test_a_sink_takes_its_share_of_each_head(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, invalid=False)
    sink = torch.tensor([-1.0, 0.0, 2.0, -torch.inf], device=target.device)
    with_sink = replace(inputs, lse=torch.logaddexp(inputs.lse, sink))
    # The share that a sink leaves of a head is the sum of that head's weights.
    kept = torch.sigmoid(inputs.lse - sink).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(check(with_sink, target).sum(dim=-1), kept)


# Shapes, strides, the host


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_inputs_give_the_same_bits(dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(replace(SMALL, kv_group=2), dtype, target.device, topk_length=True)
    twin = replace(
        inputs,
        q=padded(inputs.q),
        kv=transposed(inputs.kv),
        indices=transposed(inputs.indices),
        lse=transposed(inputs.lse),
        topk_length=transposed(inputs.topk_length),
    )
    mass = run(twin, target)
    assert torch.equal(mass, run(inputs, target))
    assert mass.is_contiguous()


@pytest.mark.parametrize("field", ["batch", "seq_q", "seq_kv", "topk"])
def test_zero_sizes(field: str, target: Target) -> None:
    inputs = make_loss_inputs(replace(SMALL, **{field: 0}), device=target.device, topk_length=True)
    mass = run(inputs, target)
    assert mass.shape == inputs.indices.shape
    assert (mass == 0).all()


def test_no_heads(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device)
    assert (run(replace(inputs, q=inputs.q[:, :, :0], lse=inputs.lse[:, :, :0]), target) == 0).all()


def test_same_bits_twice(target: Target) -> None:
    inputs = make_loss_inputs(CASES[1][0], torch.bfloat16, target.device, heads=28, d_total=128)
    first = run(inputs, target)
    assert all(torch.equal(first, run(inputs, target)) for _ in range(3))


def test_no_operator_reads_data_or_shapes_from_it(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device, topk_length=True)
    call = AttnMassCall(*inputs.mass_args)
    problem, traits = AttnMassProblem.of(call), traits_of(call.q.device)
    backend = backends.select(problem, traits, target.backend).require_backend()
    plan = backend.plan(call, problem, traits)
    with NoHostReads():
        backend.run(call, plan)


# Refusals

RULES = [
    bad({"q": lambda a: a["q"][0, 0]}, r"q must be \[batch, seq_q, heads, d_total\] or .*got shape \[8, 24\]"),
    bad({"kv": lambda a: a["kv"][:, :, 0]}, r"kv must have 4 dimensions, .*use kv.unsqueeze\(-2\)"),
    bad({"lse": lambda a: a["lse"][0]}, r"lse must have 3 dimensions, \[batch, seq_q, heads\], got shape \[5, 8\]"),
    bad({"lse": lambda a: a["lse"].double()}, r"lse must be float32, got float64; use lse.float\(\)"),
    bad({"lse": lambda a: a["lse"][..., :4]}, r"size -1 of lse must equal heads of q \(8\)"),
    bad({"lse": lambda a: a["lse"][:, :4]}, r"size -2 of lse must equal seq_q of q \(5\)"),
    bad({"q": lambda a: a["q"].int()}, r"q must be bfloat16, float16, float32 or float64, got int32; use q.to"),
    bad(
        {"kv": lambda a: a["kv"].half()}, r"kv must have the dtype of q \(float32\), got float16; use kv.to\(q.dtype\)"
    ),
    bad({"kv": lambda a: a["kv"].to(torch.int8)}, r"kv must have the dtype of q .*got int8; dequantise it with its"),
    bad({"kv": lambda a: a["kv"][..., :20]}, r"size -1 of kv must equal d_total of q \(24\)"),
    bad({"indices": lambda a: a["indices"].float()}, r"indices must be int32 or int64, got float32"),
    bad({"indices": lambda a: a["indices"][:, :, :1]}, r"size -2 of indices must equal kv_group of kv \(2\)"),
    bad({"q": lambda a: a["q"][:, :, :3]}, r"size -1 of lse must equal heads of q \(3\)"),
    bad(
        {"q": lambda a: a["q"][:, :, :3], "lse": lambda a: a["lse"][..., :3]},
        r"heads must be a multiple of kv_group, got heads=3 \(q\) and kv_group=2 \(kv\)",
    ),
    bad({"topk_length": lambda a: a["topk_length"].float()}, r"topk_length must be int32 or int64, got float32"),
    bad({"softmax_scale": lambda a: float("nan")}, r"softmax_scale must be finite, got nan"),
]


def good_call() -> dict[str, Any]:
    inputs = make_loss_inputs(replace(SMALL, kv_group=2), topk_length=True)
    names = ("q", "kv", "indices", "lse", "softmax_scale", "topk_length")
    return {**dict(zip(names, inputs.mass_args, strict=True)), "backend": "auto"}


@pytest.mark.parametrize(("change", "message"), RULES)
@pytest.mark.parametrize("entrance", [mla_ops.attn_mass, torch.ops.mla.attn_mass], ids=["door", "raw"])
def test_a_broken_rule_is_named(entrance: Any, change: dict[str, Any], message: str) -> None:
    arguments = good_call()
    with pytest.raises(mla_ops.InvalidInputError, match=message):
        entrance(**{**arguments, **{name: make(arguments) for name, make in change.items()}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse": None}, "lse must be a torch.Tensor, got NoneType"),
        ({"softmax_scale": None}, "softmax_scale must be a float, got NoneType"),
        ({"backend": "tritn"}, "backend must be one of 'auto'"),
    ],
)
def test_the_front_door_checks_types(change: dict[str, Any], message: str) -> None:
    with pytest.raises(mla_ops.MlaOpsError, match=message):
        mla_ops.attn_mass(**{**good_call(), **change})


# The rest of torch


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, batch=None), replace(SMALL, kv_group=2)], ids=str)
def test_opcheck(case: IndexCase, grads: bool) -> None:
    inputs = make_loss_inputs(case, topk_length=grads)
    inputs = inputs.requires_grad() if grads else inputs
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mla.attn_mass.default, inputs.mass_args, test_utils=utilities)


def test_autocast_casts_q_and_kv_only() -> None:
    inputs = make_loss_inputs(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        mass = torch.ops.mla.attn_mass(*inputs.mass_args)
        keywords = {"softmax_scale": inputs.softmax_scale}
        assert mla_ops.explain_attn_mass(*inputs.mass_args[:4], **keywords).problem.dtype == torch.bfloat16
    assert torch.equal(mass, torch.ops.mla.attn_mass(*inputs.to(torch.bfloat16).mass_args))


@pytest.mark.parametrize("in_dims", [(0, None, None, 0), (0, None, 0, None), (0, 0, 0, 0), (None, 1, None, None)])
@pytest.mark.parametrize("batch", [2, None])
def test_vmap_is_a_loop(batch: int | None, in_dims: tuple[int | None, ...]) -> None:
    inputs = make_loss_inputs(replace(SMALL, batch=batch, kv_group=2))
    args = [
        arg if dim is None else torch.stack([arg, arg.flip(0), arg], dim)
        for arg, dim in zip(inputs.mass_args[:4], in_dims, strict=True)
    ]

    def mass_of(*tensors: torch.Tensor) -> torch.Tensor:
        return mla_ops.attn_mass(*tensors, softmax_scale=0.5)

    actual = torch.vmap(mass_of, in_dims)(*args)
    for i in range(3):
        element = [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        torch.testing.assert_close(actual[i], mass_of(*element))


def test_flops() -> None:
    inputs = make_loss_inputs(SMALL)
    with FlopCounterMode(display=False) as counter:
        torch.ops.mla.attn_mass(*inputs.mass_args)
    assert counter.get_total_flops() == 2 * 2 * 5 * 4 * 24 * 6  # two, batch, seq_q, heads, d_total, slots


def test_calls_that_look_alike_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_plans", dispatch.Plans())
    first = make_loss_inputs(SMALL)
    torch.ops.mla.attn_mass(*first.mass_args)
    torch.ops.mla.attn_mass(*make_loss_inputs(SMALL, seed=1).mass_args)
    assert len(backends._plans) == 1
    changes: list[dict[str, Any]] = [
        {"softmax_scale": 1.0},
        {"indices": first.indices.long()},
        {"lse": transposed(first.lse)},
    ]
    for number, change in enumerate(changes, start=2):
        torch.ops.mla.attn_mass(*replace(first, **change).mass_args)
        assert len(backends._plans) == number, change


def test_eager_is_never_automatic_on_a_gpu() -> None:
    problem = AttnMassProblem(d_total=576, heads=128, kv_group=1, topk=2048, dtype=torch.float64)
    device = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, name="H100")
    decision = backends.select(problem, device)
    assert decision.backend is None
    assert 'excluded from backend="auto" on cuda; pass backend="eager"' in str(decision)

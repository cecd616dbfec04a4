"""The indexer's loss on selected keys: exact gradients, empty rows, sums of masses; eager, compiled, exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Target

import mla_ops
from mla_ops.reference import attn_mass_reference, index_scores_reference
from mla_ops.testing import IndexCase, LossInputs, assert_within_budget, make_loss_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = IndexCase(topk=6, index_heads=4, index_head_dim=16, seq_q=5, seq_kv=11)
GROUPS = replace(SMALL, kv_group=2)


def loss_of(inputs: LossInputs, backend: str = "auto") -> torch.Tensor:
    return mla_ops.index_loss(
        inputs.q,
        inputs.kv,
        inputs.indices,
        inputs.lse,
        *inputs.differentiable,
        softmax_scale=inputs.softmax_scale,
        topk_length=inputs.topk_length,
        backend=backend,
    )


def kl_in_fp64(mass: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The definition, by torch's own divergence, on rows that are not empty."""
    target = mass.double() / mass.double().sum(-1, keepdim=True)
    log_softmax = scores.double().log_softmax(-1)
    terms = torch.nn.functional.kl_div(log_softmax, target, reduction="none")
    return terms.masked_fill(target == 0, 0.0).sum(-1)


def upstream(loss: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """A gradient of the loss, NaN in empty rows."""
    dloss = torch.randn(loss.shape, generator=torch.Generator().manual_seed(2)).to(loss)
    return dloss.masked_fill(empty, torch.nan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [SMALL, GROUPS, replace(SMALL, batch=None, topk=33, seq_kv=100)], ids=str)
def test_matches_fp64(case: IndexCase, dtype: torch.dtype, target: Target) -> None:
    inputs = make_loss_inputs(case, dtype, target.device, topk_length=True)
    leaves = inputs.requires_grad()
    loss = loss_of(leaves, target.backend)
    empty = ~inputs.valid.any(dim=-1)
    assert empty.any()
    dloss = upstream(loss, empty)
    grads = torch.autograd.grad(loss, leaves.differentiable, dloss)

    def truth(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        cast = inputs.to(dtype).requires_grad()
        mass = attn_mass_reference(*inputs.to(torch.float64).mass_args)
        scores = index_scores_reference(*cast.scores_args)
        expected = kl_in_fp64(mass[~empty], scores[~empty])
        return expected.detach(), *torch.autograd.grad(expected, cast.differentiable, dloss[~empty].double())

    oracle, low = truth(torch.float64), truth(dtype)
    # A score is a sum of products; its rounding comes through unchanged in the loss, and in its gradient.
    largest = 64 * int(oracle[0].max() + 1)
    assert (loss[empty] == 0).all()
    assert_within_budget(loss[~empty], oracle[0], oracle[0], terms=largest, name="loss")
    for name, grad, want, plain in zip(("dq", "dk", "dw"), grads, oracle[1:], low[1:], strict=True):
        assert_within_budget(grad, want, plain, terms=largest * 64, name=name)


# 15, 16. No eps, no clamp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_is_softmax_minus_target(dtype: torch.dtype, target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(7, 9, generator=generator, dtype=dtype)
    mass[:, 3] = 0.0  # a mass that underflowed, on a valid slot
    scores = 5 * torch.randn(7, 9, generator=generator, dtype=dtype)
    mass, scores = mass.to(target.device), scores.to(target.device).requires_grad_()
    loss = mla_ops.index_kl(mass, scores)
    dloss = torch.randn(7, generator=generator, dtype=dtype).to(target.device)
    (grad,) = torch.autograd.grad(loss, scores, dloss)
    share = mass.double() / mass.double().sum(-1, keepdim=True)
    expected = dloss.double().unsqueeze(-1) * (scores.double().softmax(-1) - share)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected, rtol=8 * eps, atol=64 * eps)
    torch.testing.assert_close(loss.double(), kl_in_fp64(mass, scores), rtol=8 * eps, atol=64 * eps)


def test_gradcheck_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    scores = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: mla_ops.index_kl(mass, s), scores)


@pytest.mark.parametrize("gap", [60.0, 200.0, 1e4])
def test_a_loss_of_50_and_more_keeps_its_gradient(gap: float, target: Target) -> None:
    # Attention is all on the first key, the indexer's softmax all on the last one.
    mass = torch.tensor([[28.0, 1e-30, 0.0, 1e-38]], device=target.device)
    scores = torch.tensor([[0.0, 1.0, 2.0, gap]], device=target.device, requires_grad=True)
    loss = mla_ops.index_kl(mass, scores)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    torch.testing.assert_close(loss, torch.tensor([gap], device=target.device))
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 0.0, 0.0, 1.0]], device=target.device), rtol=0, atol=1e-15)


def test_a_loss_of_zero_is_not_clamped_and_has_no_gradient(target: Target) -> None:
    scores = torch.tensor([[0.5, -1.0, 3.0, -torch.inf]], device=target.device, requires_grad=True)
    loss = mla_ops.index_kl(7 * scores.detach().exp(), scores)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    assert loss.abs() <= 1e-6
    assert grad.abs().max() <= 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_scores_that_are_not_finite_make_the_loss_nan(value: float) -> None:
    mass, scores = torch.ones(2, 3), torch.tensor([[1.0, value, 2.0], [1.0, 2.0, 3.0]])
    loss = mla_ops.index_kl(mass, scores)
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert mla_ops.index_kl(torch.tensor([[1.0, torch.nan, 1.0]]), torch.ones(1, 3)).isnan().all()


def test_mass_on_a_score_of_minus_inf_makes_the_loss_infinite() -> None:
    assert mla_ops.index_kl(torch.ones(1, 2), torch.tensor([[0.0, -torch.inf]])).item() == torch.inf


# 17. Rows without a valid slot, or without mass


@pytest.mark.parametrize("dloss", [1.0, torch.nan, torch.inf], ids=str)
def test_an_empty_row_has_no_loss_and_no_gradient(dloss: float, target: Target) -> None:
    mass = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 3.0]], device=target.device)
    scores = torch.tensor([[-torch.inf, -torch.inf], [2.0, -torch.inf], [1.0, 2.0]], device=target.device)
    scores.requires_grad_()
    loss = mla_ops.index_kl(mass, scores)
    assert (loss[:2] == 0).all()
    assert loss[2] > 0
    arrives = torch.tensor([dloss, dloss, 1.0], device=target.device)
    (grad,) = torch.autograd.grad(loss, scores, arrives)
    assert (grad[:2] == 0).all()
    assert grad[2].isfinite().all()


def test_no_slots_at_all() -> None:
    scores = torch.zeros(3, 0, requires_grad=True)
    loss = mla_ops.index_kl(torch.zeros(3, 0), scores)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros(3))


# 13. Masses add up before they are normalised


def test_masses_of_layers_and_of_ranks_add_up(target: Target) -> None:
    first = make_loss_inputs(GROUPS, device=target.device)
    other = make_loss_inputs(GROUPS, device=target.device, seed=1)
    second = replace(other, indices=first.indices)  # a layer that reuses the list
    scores = mla_ops.index_scores(*first.scores_args[:4], backend=target.backend)
    masses = [torch.ops.mla.attn_mass(*layer.mass_args, target.backend) for layer in (first, second)]
    loss = mla_ops.index_kl(masses[0] + masses[1], scores)
    truth = sum(attn_mass_reference(*layer.to(torch.float64).mass_args) for layer in (first, second))
    rows = first.valid.any(dim=-1)
    expected = kl_in_fp64(truth[rows], scores[rows]).float()
    torch.testing.assert_close(loss[rows], expected, rtol=1e-5, atol=1e-5)


# 18. One number for each query and group; only the indexer learns


def test_only_the_indexer_gets_gradients(target: Target) -> None:
    inputs = make_loss_inputs(GROUPS, device=target.device).requires_grad()
    inputs.lse.requires_grad_()
    loss = loss_of(inputs, target.backend)
    assert loss.shape == (2, 5, 2)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert all(t.grad is None for t in (inputs.q, inputs.kv, inputs.lse))
    assert all(t.grad.isfinite().all() for t in inputs.differentiable)


def test_a_second_derivative_raises(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device).requires_grad()
    (dq,) = torch.autograd.grad(loss_of(inputs, target.backend).sum(), inputs.q_idx, create_graph=True)
    with pytest.raises(mla_ops.DoubleBackwardError, match="differentiable once"):
        dq.sum().backward()


def test_a_mass_of_another_shape_is_refused() -> None:
    with pytest.raises(mla_ops.InvalidInputError, match=r"mass must have the shape of scores \(shape \[2, 3\]\), got"):
        mla_ops.index_kl(torch.ones(2, 2), torch.ones(2, 3))
    with pytest.raises(mla_ops.InvalidInputError, match=r"scores must be a torch\.Tensor, got NoneType"):
        mla_ops.index_kl(torch.ones(2, 2), None)


@pytest.mark.usefixtures("deterministic")
def test_same_bits_twice(target: Target) -> None:
    inputs = make_loss_inputs(replace(SMALL, seq_q=64, seq_kv=64, topk=32), torch.bfloat16, target.device)
    inputs = inputs.requires_grad()

    def everything() -> list[torch.Tensor]:
        loss = loss_of(inputs, target.backend)
        return [loss, *torch.autograd.grad(loss.sum(), inputs.differentiable)]

    first = everything()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))


def test_warmup_runs_what_a_step_runs(target: Target) -> None:
    inputs = make_loss_inputs(SMALL, device=target.device)
    arguments = (inputs.q, inputs.kv, inputs.indices, inputs.lse, *inputs.differentiable)
    for needs_grad in (True, False):
        mla_ops.warmup_index_loss(
            *arguments, softmax_scale=inputs.softmax_scale, backend=target.backend, needs_grad=needs_grad
        )
    with pytest.raises(mla_ops.InvalidInputError, match="lse must be float32"):
        mla_ops.warmup_index_loss(*arguments[:3], inputs.lse.double(), *arguments[4:], softmax_scale=1.0)


# Graphs


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_serves_all_lengths() -> None:
    compiled = torch.compile(loss_of_tensors, fullgraph=True, dynamic=True)
    torch._dynamo.config.error_on_recompile = True
    try:
        for seq_q, seq_kv in ((5, 11), (7, 24), (9, 13)):
            inputs = make_loss_inputs(replace(SMALL, seq_q=seq_q, seq_kv=seq_kv)).requires_grad()
            tensors = (inputs.q, inputs.kv, inputs.indices, inputs.lse, *inputs.differentiable)
            results = []
            for function in (loss_of_tensors, compiled):
                loss = function(*tensors)
                dloss = upstream(loss, ~inputs.valid.any(dim=-1))
                results.append([loss, *torch.autograd.grad(loss, inputs.differentiable, dloss)])
            for eager, in_graph in zip(*results, strict=True):
                torch.testing.assert_close(in_graph, eager, rtol=1e-5, atol=1e-5)
    finally:
        torch._dynamo.config.error_on_recompile = False


def loss_of_tensors(*tensors: torch.Tensor) -> torch.Tensor:
    return mla_ops.index_loss(*tensors, softmax_scale=0.5)


def test_export_keeps_two_operators() -> None:
    class Loss(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return loss_of_tensors(*tensors)

    inputs = make_loss_inputs(SMALL)
    tensors = (inputs.q, inputs.kv, inputs.indices, inputs.lse, *inputs.differentiable)
    program = torch.export.export(Loss(), tensors)
    called = [str(node.target) for node in program.graph.nodes if "mla" in str(node.target)]
    assert called == ["mla.attn_mass.default", "mla.index_scores.default"]
    torch.testing.assert_close(program.module()(*tensors), loss_of_tensors(*tensors))


def test_vmap_is_a_loop() -> None:
    inputs = make_loss_inputs(SMALL)
    tensors = (inputs.q, inputs.kv, inputs.indices, inputs.lse, *inputs.differentiable)
    torch.testing.assert_close(torch.vmap(loss_of_tensors)(*tensors), loss_of_tensors(*tensors))


def test_autocast_gives_an_fp32_loss() -> None:
    inputs = make_loss_inputs(SMALL).requires_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(inputs)
    low = inputs.to(torch.bfloat16)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_of(replace(low, weights=inputs.weights)))

"""The reference against the contract's formulas written as plain Python loops over scalars, and its own gradients."""

from __future__ import annotations

import math

import pytest
import torch

from mla_ops.ops.sparse_attn.reference import sparse_attn_bwd_reference, sparse_attn_reference
from mla_ops.testing import Case, Inputs, make_inputs

CASE = Case(batch=2, seq_q=3, heads=4, kv_group=2, seq_kv=5, d_total=6, d_v=4, topk=5)


def loops(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    q, kv, indices = inputs.q.tolist(), inputs.kv.tolist(), inputs.indices.tolist()
    out, lse = torch.zeros(2, 3, 4, 4, dtype=torch.float64), torch.full((2, 3, 4), -math.inf, dtype=torch.float64)
    for b in range(2):
        for s in range(3):
            for h in range(4):
                g = h // 2
                slots = indices[b][s][g]
                if inputs.topk_length is not None:
                    slots = slots[: max(int(inputs.topk_length[b, s]), 0)]
                rows = [kv[b][j][g] for j in slots if 0 <= j < 5]
                logits = [
                    inputs.softmax_scale * math.fsum(x * y for x, y in zip(q[b][s][h], row, strict=True))
                    for row in rows
                ]
                total = sum(math.exp(x) for x in logits)
                if not rows:
                    continue
                lse[b, s, h] = math.log(total)
                if inputs.attn_sink is not None:
                    total += math.exp(inputs.attn_sink[h])
                for c in range(4):
                    out[b, s, h, c] = sum(math.exp(x) * row[c] for x, row in zip(logits, rows, strict=True)) / total
    return out, lse


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_forward_equals_loops(optional: bool, seed: int) -> None:
    inputs = make_inputs(CASE, torch.float64, seed=seed, topk_length=optional, attn_sink=optional)
    out, lse = sparse_attn_reference(*inputs.args)
    expected_out, expected_lse = loops(inputs)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("optional", [False, True])
def test_gradients_equal_finite_differences(optional: bool) -> None:
    inputs = make_inputs(CASE, torch.float64, topk_length=optional, attn_sink=optional).to(torch.float64)
    leaves = inputs.requires_grad()

    def loss_terms(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sink = tensors[2] if optional else None
        out, lse = sparse_attn_reference(tensors[0], tensors[1], *inputs.args[2:6], sink)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(loss_terms, tuple(leaves.differentiable))


def test_three_dimensional_form_is_the_one_batch_form() -> None:
    inputs = make_inputs(CASE, torch.float64, topk_length=True, attn_sink=True)
    whole = sparse_attn_reference(*inputs.args)
    for b in range(2):
        one = sparse_attn_reference(
            inputs.q[b],
            inputs.kv[b],
            inputs.indices[b],
            inputs.d_v,
            inputs.softmax_scale,
            inputs.topk_length[b],
            inputs.attn_sink,
        )
        for a, e in zip(one, whole, strict=True):
            assert torch.equal(a, e[b])


def test_missing_gradients_are_zero() -> None:
    inputs = make_inputs(CASE, torch.float64, attn_sink=True)
    dq, dkv, dsink = sparse_attn_bwd_reference(None, inputs.dlse.double(), *inputs.args)
    assert dq.abs().sum() > 0
    assert dkv.abs().sum() > 0
    assert (dsink == 0).all()

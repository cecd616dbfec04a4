"""The drop-ins for FlashMLA and TileLang: their signatures, orders and conventions, held against the oracle."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch

import mla_ops
from mla_ops.adapters.flash_mla import flash_mla_sparse_fwd, sparse_mla
from mla_ops.testing import Case, assert_matches_oracle, make_inputs

# Head counts, a topk and lengths that FlashMLA refuses, and its own widths.
CASES = [
    Case(d_total=576, d_v=512, batch=None, topk=33),
    Case(d_total=128, d_v=64, batch=None, heads=28),
    Case(d_total=72, d_v=64, batch=None, heads=6, kv_group=3, topk=5),
]


@pytest.mark.parametrize("optional", [False, True], ids=["plain", "length+sink"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_mla_results_and_their_conventions(case: Case, dtype: torch.dtype, optional: bool) -> None:
    inputs = make_inputs(case, dtype, topk_length=optional, attn_sink=optional)
    out, max_logits, lse = flash_mla_sparse_fwd(
        inputs.q, inputs.kv, inputs.indices, inputs.softmax_scale, case.d_v, inputs.attn_sink, inputs.topk_length
    )
    empty = max_logits == -torch.inf
    assert empty[0].all()  # make_inputs leaves the first query without a valid slot
    assert torch.equal(lse == torch.inf, empty)
    assert (out[empty] == 0).all()
    natural = lse.masked_fill(empty, -torch.inf)
    assert_matches_oracle({"out": out, "max_logits": max_logits, "lse": natural}, inputs)
    assert (out.dtype, max_logits.dtype, lse.dtype) == (dtype, torch.float32, torch.float32)


def test_flash_mla_signature_is_the_published_one() -> None:
    parameters = inspect.signature(flash_mla_sparse_fwd).parameters.values()
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    assert {p.name: p.default for p in parameters} == {
        "q": inspect.Parameter.empty,
        "kv": inspect.Parameter.empty,
        "indices": inspect.Parameter.empty,
        "sm_scale": inspect.Parameter.empty,
        "d_v": 512,
        "attn_sink": None,
        "topk_length": None,
        "indexer_topk": 0,
    }


def test_flash_mla_arguments_that_are_not_honoured_raise() -> None:
    inputs = make_inputs(CASES[1])
    call = (inputs.q, inputs.kv, inputs.indices, 0.5)
    with pytest.raises(mla_ops.InvalidInputError, match=r"indexer_topk must be 0, got 512; for that lse call"):
        flash_mla_sparse_fwd(*call, d_v=64, indexer_topk=512)
    with pytest.raises(TypeError, match="causal"):
        flash_mla_sparse_fwd(*call, d_v=64, causal=True)
    with pytest.raises(mla_ops.InvalidInputError, match=r"q must be \[s_q, h_q, d_qk\], got shape \[1, 5, 28, 128\]"):
        flash_mla_sparse_fwd(*(t[None] for t in call[:3]), 0.5, d_v=64)
    with pytest.raises(mla_ops.InvalidInputError, match=r"d_v must be at most d_total \(128, .*got 512"):
        flash_mla_sparse_fwd(*call)


def test_the_lse_of_the_first_slots_is_a_call_away() -> None:
    inputs = make_inputs(CASES[0])
    first = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices[..., :8], d_v=512, softmax_scale=0.5).lse
    masked = inputs.indices.clone()
    masked[..., 8:] = -1
    _, _, lse = flash_mla_sparse_fwd(inputs.q, inputs.kv, masked, 0.5)
    torch.testing.assert_close(lse.masked_fill(lse == torch.inf, -torch.inf), first)


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
def test_sparse_mla_is_differentiable_and_its_lse_is_base_2(batch: int | None) -> None:
    inputs = make_inputs(replace(CASES[2], batch=batch))
    leaves = inputs.requires_grad()
    out, lse = sparse_mla(leaves.q, leaves.kv, leaves.indices, leaves.softmax_scale, leaves.d_v)
    dq, dkv = torch.autograd.grad([out, lse], [leaves.q, leaves.kv], [inputs.dout, inputs.dlse * math.log(2)])
    natural = lse.detach() * math.log(2)
    assert_matches_oracle({"out": out.detach(), "lse": natural, "dq": dq, "dkv": dkv}, inputs)
    assert (lse > -torch.inf).any()


def test_sparse_mla_takes_the_arguments_of_its_originals_and_no_default_width() -> None:
    assert list(inspect.signature(sparse_mla).parameters) == ["q", "kv", "indices", "scaling", "d_v"]
    inputs = make_inputs(CASES[1])
    with pytest.raises(TypeError, match="d_v"):
        sparse_mla(inputs.q, inputs.kv, inputs.indices, 0.5)
    with pytest.raises(TypeError, match="topk_length"):
        sparse_mla(inputs.q, inputs.kv, inputs.indices, 0.5, 64, topk_length=None)


def test_both_compile_whole() -> None:
    inputs = make_inputs(CASES[2])

    def both(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *flash_mla_sparse_fwd(q, kv, indices, 0.5, 64), *sparse_mla(q, kv, indices, 0.5, 64)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs.args[:3]), both(*inputs.args[:3]), strict=True):
        assert torch.equal(actual, expected)

"""torch's own checks of a custom operator, over everything that changes what it sees."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_contract import strided_twin

from mla_ops.testing import Case, Inputs, make_inputs

ALL_UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SIZES = {
    "4d": Case(d_total=24, d_v=16, topk=6, seq_q=3, seq_kv=9),
    "3d": Case(d_total=24, d_v=16, topk=6, seq_q=3, seq_kv=9, batch=None),
    "groups": Case(d_total=12, d_v=12, topk=5, heads=6, kv_group=3, seq_q=3, seq_kv=9),
}
GRADS = {"no-grad": (False, False), "q": (True, False), "kv": (False, True), "all": (True, True)}


def check(inputs: Inputs) -> None:
    torch.library.opcheck(torch.ops.mla.sparse_attn.default, inputs.args, test_utils=ALL_UTILITIES)


@pytest.mark.parametrize(("size", "grads", "optional"), list(itertools.product(SIZES, GRADS, [False, True])))
def test_forward(size: str, grads: str, optional: bool) -> None:
    inputs = make_inputs(SIZES[size], topk_length=optional, attn_sink=optional)
    q, kv = GRADS[grads]
    check(inputs.requires_grad(q=q, kv=kv, attn_sink=q and kv))


@pytest.mark.parametrize("only", ["topk_length", "attn_sink"])
def test_forward_with_one_optional_argument(only: str) -> None:
    check(make_inputs(SIZES["4d"], **{only: True}).requires_grad())


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("field", ["batch", "seq_q", "seq_kv", "topk", "heads"])
def test_forward_with_zero_size(field: str, grads: str) -> None:
    q, kv = GRADS[grads]
    check(make_inputs(replace(SIZES["4d"], **{field: 0}), attn_sink=True).requires_grad(q=q, kv=kv, attn_sink=q))


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("size", SIZES)
def test_forward_with_non_contiguous_inputs(size: str, grads: str) -> None:
    inputs = make_inputs(SIZES[size])
    q, kv = GRADS[grads]
    check(
        replace(
            inputs,
            q=strided_twin(inputs.q).requires_grad_(q),
            kv=strided_twin(inputs.kv).requires_grad_(kv),
            indices=strided_twin(inputs.indices),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_forward_in_other_dtypes(dtype: torch.dtype) -> None:
    check(make_inputs(SIZES["4d"], dtype, index_dtype=torch.int64).requires_grad())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("present", ["dout", "dlse", "both"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_backward(size: str, present: str, needs: tuple[bool, bool]) -> None:
    optional = present == "both"
    inputs = make_inputs(SIZES[size], topk_length=optional, attn_sink=optional)
    q, kv, indices, *rest = inputs.args
    out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    dout = None if present == "dlse" else strided_twin(inputs.dout)
    dlse = None if present == "dout" else inputs.dlse
    args = (dout, dlse, q, kv, indices, out, lse, *rest, *needs)
    torch.library.opcheck(torch.ops.mla.sparse_attn_bwd.default, args, test_utils=ALL_UTILITIES)
    for actual, fake in zip(torch.ops.mla.sparse_attn_bwd(*args), backward_on_meta(args), strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_backward_in_other_dtypes(dtype: torch.dtype) -> None:
    inputs = make_inputs(SIZES["4d"], dtype, attn_sink=True)
    q, kv, indices, *rest = inputs.args
    args = (inputs.dout, inputs.dlse, q, kv, indices, *torch.ops.mla.sparse_attn(*inputs.args), *rest)
    for actual, fake in zip(torch.ops.mla.sparse_attn_bwd(*args), backward_on_meta(args), strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("grads", ["no-grad", "all"])
@pytest.mark.parametrize("size", SIZES)
def test_max_logits(size: str, grads: str) -> None:
    inputs = make_inputs(SIZES[size], topk_length=grads == "all").requires_grad(q=grads == "all", kv=grads == "all")
    q, kv, indices, d_v, softmax_scale, topk_length, _ = inputs.args
    for q_, kv_ in ((q, kv), (strided_twin(q), strided_twin(kv))):
        args = (q_, kv_, indices, d_v, softmax_scale, topk_length)
        torch.library.opcheck(torch.ops.mla.sparse_attn_max_logits.default, args, test_utils=ALL_UTILITIES)
        actual = torch.ops.mla.sparse_attn_max_logits(*args)
        fake = torch.ops.mla.sparse_attn_max_logits(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)
        assert not actual.requires_grad


def backward_on_meta(args: tuple) -> tuple[torch.Tensor, ...]:
    return torch.ops.mla.sparse_attn_bwd(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.parametrize("size", SIZES)
def test_fake_strides_are_the_real_strides(size: str) -> None:
    inputs = make_inputs(SIZES[size])
    args = (strided_twin(inputs.q), strided_twin(inputs.kv), *inputs.args[2:])
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    for actual, fake in zip(torch.ops.mla.sparse_attn(*args), torch.ops.mla.sparse_attn(*on_meta), strict=True):
        assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)

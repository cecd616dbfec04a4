"""Index selection and the rest of torch: opcheck, plans, autocast, vmap, FLOP counts, checkpointing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from strided_tensors import padded, transposed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import mla_ops
from mla_ops import dispatch
from mla_ops.device import DeviceTraits
from mla_ops.ops.index_topk import backends
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.testing import IndexCase, IndexInputs, make_index_inputs

FP8 = torch.float8_e4m3fn
CASE = IndexCase(seq_q=5, seq_kv=11, topk=6)
SIZES = {
    "4d": CASE,
    "3d": replace(CASE, batch=None),
    "groups": replace(CASE, index_heads=6, kv_group=3, topk=20),
    "no-queries": replace(CASE, seq_q=0),
    "no-keys": replace(CASE, seq_kv=0),
    "topk-0": replace(CASE, topk=0),
}


# opcheck and the fake


def opcheck(*args: Any) -> None:
    utilities: tuple[str, ...] = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if args[0].dtype != FP8:  # torch compares the inputs before and after, and cannot compare e4m3
        utilities += ("test_schema",)
    torch.library.opcheck(torch.ops.mla.index_topk.default, args, test_utils=utilities)


@pytest.mark.parametrize(("size", "grads", "bounds"), list(itertools.product(SIZES, [False, True], [False, True])))
def test_opcheck(size: str, grads: bool, bounds: bool) -> None:
    inputs = make_index_inputs(SIZES[size], bounds=bounds and size != "no-keys")
    floats = {name: getattr(inputs, name).requires_grad_(grads) for name in ("q_idx", "k_idx", "weights")}
    opcheck(*replace(inputs, **floats).args, not bounds)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, FP8], ids=str)
def test_opcheck_in_other_dtypes(dtype: torch.dtype) -> None:
    opcheck(*make_index_inputs(CASE, dtype, bounds=True, bounds_dtype=torch.int64).args)


@pytest.mark.parametrize("size", ["4d", "3d", "groups"])
def test_opcheck_and_fake_strides_of_strided_inputs(size: str) -> None:
    inputs = make_index_inputs(SIZES[size], bounds=True)
    args = (padded(inputs.q_idx), transposed(inputs.k_idx), transposed(inputs.weights), *inputs.args[3:])
    opcheck(*args)
    actual = torch.ops.mla.index_topk(*args)
    fake = torch.ops.mla.index_topk(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    assert (actual.shape, actual.stride(), actual.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_fake_tensors_take_a_symbolic_topk() -> None:
    shape_env = ShapeEnv()
    inputs = make_index_inputs(CASE)
    with FakeTensorMode(shape_env=shape_env) as mode:
        topk = shape_env.create_unbacked_symint()
        fakes = [mode.from_tensor(t) for t in (inputs.q_idx, inputs.k_idx, inputs.weights)]
        indices = torch.ops.mla.index_topk(*fakes, topk)
    assert str(indices.shape[-1]) == str(topk)
    assert indices.dtype == torch.int32


# Plans


def test_calls_that_look_alike_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_plans", dispatch.Plans())
    first = make_index_inputs(CASE, bounds=True)
    mla_ops.index_topk(*first.args[:4], **first.kwargs)
    mla_ops.index_topk(*make_index_inputs(CASE, bounds=True, seed=1).args[:4], **first.kwargs)
    assert len(backends._plans) == 1
    different: list[dict[str, Any]] = [
        {"topk": 3},
        {"starts": None},
        {"ends": None},
        {"ends": first.ends.long()},
        {"starts": first.starts[0]},
        {"causal": False},
        {"relu": False},
        {"backend": "eager"},
        {"weights": first.weights.transpose(1, 2).contiguous().transpose(1, 2)},
        {"q_idx": first.q_idx.bfloat16(), "k_idx": first.k_idx.bfloat16()},
    ]
    for number, change in enumerate(different, start=2):
        torch.ops.mla.index_topk(**{**vars(first), **change})
        assert len(backends._plans) == number, change


def test_explain_prints_the_plan_and_the_reasons() -> None:
    inputs = make_index_inputs(CASE, bounds=True)
    text = str(mla_ops.explain_index_topk(*inputs.args[:4], **inputs.kwargs, backend="eager"))
    for words in ("mla::index_topk on cpu", "index_heads=4", "topk=6", "tiles of 256 queries", "nothing to warm"):
        assert words in text
    mla_ops.warmup_index_topk(*inputs.args[:4], **inputs.kwargs)


def test_eager_is_never_automatic_on_a_gpu() -> None:
    problem = IndexTopkProblem(index_head_dim=64, index_heads=4, kv_group=1, topk=256, dtype=torch.float64)
    device = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, name="H100")
    decision = backends.select(problem, device)
    assert decision.backend is None
    assert 'excluded from backend="auto" on cuda; pass backend="eager"' in str(decision)
    named = backends.select(problem, device, "eager").backend
    assert named is not None
    assert named.name == "eager"


def test_eager_refuses_dtypes_by_name() -> None:
    problem = IndexTopkProblem(index_head_dim=64, index_heads=4, kv_group=1, topk=256, dtype=torch.int8)
    decision = backends.select(problem, DeviceTraits(type="cpu"))
    assert "dtype is torch.int8, needs bf16, fp16, fp32, fp64 or e4m3" in str(decision)


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_queries_and_keys_and_leaves_weights(dtype: torch.dtype) -> None:
    inputs = make_index_inputs(replace(CASE, seq_kv=2000, topk=500))
    low = inputs.to(dtype)
    expected = torch.ops.mla.index_topk(low.q_idx, low.k_idx, inputs.weights, 500)
    assert not torch.equal(expected, torch.ops.mla.index_topk(*inputs.args))
    with torch.autocast("cpu", dtype):
        assert torch.equal(torch.ops.mla.index_topk(*inputs.args), expected)
        assert torch.equal(mla_ops.index_topk(low.q_idx, inputs.k_idx, inputs.weights, 500), expected)
        decision = mla_ops.explain_index_topk(inputs.q_idx, inputs.k_idx, inputs.weights, 500)
    assert decision.problem.dtype == dtype


def test_autocast_keeps_weights_that_lose_their_partner() -> None:
    low = make_index_inputs(CASE, exact=True).to(torch.bfloat16)
    expected = torch.ops.mla.index_topk(*low.args)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(torch.ops.mla.index_topk(*low.args), expected)
        with pytest.raises(mla_ops.InvalidInputError, match="or the dtype of q_idx"):
            torch.ops.mla.index_topk(low.q_idx.float(), low.k_idx.float(), low.weights, 6)


@pytest.mark.parametrize("dtype", [torch.float64, FP8], ids=str)
def test_autocast_leaves_fp64_and_e4m3_alone(dtype: torch.dtype) -> None:
    inputs = make_index_inputs(CASE, dtype)
    expected = torch.ops.mla.index_topk(*inputs.args)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.mla.index_topk(*inputs.args), expected)
        assert mla_ops.explain_index_topk(*inputs.args[:4], **inputs.kwargs).problem.dtype == dtype


# vmap


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
@pytest.mark.parametrize("bound", ["none", "own", "per-query"])
@pytest.mark.parametrize("vmapped", ["q_idx", "k_idx", "weights", "starts", "ends", "all"])
def test_vmap(batch: int | None, bound: str, vmapped: str) -> None:
    case = replace(CASE, batch=batch, kv_group=2)
    calls = [make_index_inputs(case, exact=True, bounds=bound != "none", seed=seed) for seed in range(3)]
    if bound == "per-query" and batch is not None:
        calls = [replace(call, starts=call.starts[0], ends=call.ends[0]) for call in calls]
    fields = ["q_idx", "k_idx", "weights", "starts", "ends"] if vmapped == "all" else [vmapped]
    fields = [field for field in fields if getattr(calls[0], field) is not None]
    if not fields:
        pytest.skip("a call without bounds has none to vmap over")

    def one(*tensors: torch.Tensor) -> torch.Tensor:
        inputs = replace(calls[0], **dict(zip(fields, tensors, strict=True)))
        return mla_ops.index_topk(*inputs.args[:4], **inputs.kwargs)

    columns = [[getattr(call, field) for call in calls] for field in fields]
    expected = torch.stack([one(*tensors) for tensors in zip(*columns, strict=True)])
    assert torch.equal(torch.vmap(one)(*map(torch.stack, columns)), expected)
    last = tuple(-1 for _ in fields)
    assert torch.equal(torch.vmap(one, last)(*(torch.stack(c, dim=-1) for c in columns)), expected)


def test_vmap_of_scaled_keys_and_over_nothing() -> None:
    calls = [make_index_inputs(CASE, FP8, seed=seed) for seed in range(3)]

    def one(*tensors: torch.Tensor) -> torch.Tensor:
        q_idx, k_idx, weights, k_scale = tensors
        return mla_ops.index_topk(q_idx, k_idx, weights, 6, k_scale=k_scale)

    tensors = [(c.q_idx, c.k_idx, c.weights, c.k_scale) for c in calls]
    columns = [torch.stack(column) for column in zip(*tensors, strict=True)]
    assert torch.equal(torch.vmap(one)(*columns), torch.stack([one(*t) for t in tensors]))
    assert torch.vmap(one)(*(c[:0] for c in columns)).shape == (0, 2, 5, 1, 6)


def test_vmap_refuses_in_the_sizes_of_an_element() -> None:
    inputs = make_index_inputs(CASE)
    q_idx = torch.stack([inputs.q_idx] * 3)
    with pytest.raises(mla_ops.InvalidInputError, match=r"seq_q of q_idx \(5\), got weights shape \[2, 4, 4\]"):
        torch.vmap(lambda q: torch.ops.mla.index_topk(q, inputs.k_idx, inputs.weights[:, 1:], 6))(q_idx)


# FLOPs


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_all_pairs(causal: bool) -> None:
    inputs = make_index_inputs(CASE)
    with FlopCounterMode(display=False) as counter:
        mla_ops.index_topk(*inputs.args[:4], causal=causal)
    assert counter.get_total_flops() == 2 * (2 * 5) * 11 * 4 * 16
    with FlopCounterMode(display=False) as counter:
        torch.vmap(lambda q: torch.ops.mla.index_topk(q, inputs.k_idx, inputs.weights, 6))(inputs.q_idx[None])
    assert counter.get_total_flops() == 2 * (2 * 5) * 11 * 4 * 16


# Selective activation checkpointing


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.mla.index_topk.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "executions"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)], ids=str
)
def test_a_choice_is_saved_or_made_again(policy: CheckpointPolicy, executions: int) -> None:
    inputs: IndexInputs = make_index_inputs(CASE)
    q_idx = inputs.q_idx.requires_grad_()
    values = torch.randn(11, requires_grad=True)

    def block(q: torch.Tensor) -> torch.Tensor:
        indices = torch.ops.mla.index_topk(q.sin(), inputs.k_idx, inputs.weights, 6, causal=False)
        return values[indices.long()].sin() * q.sum()

    def decide(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if func is torch.ops.mla.index_topk.default else CheckpointPolicy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(block(q_idx).sum(), [q_idx, values])
    with CountCalls() as calls:
        out = checkpoint(
            block, q_idx, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(decide)
        )
        actual = torch.autograd.grad(out.sum(), [q_idx, values])
    assert calls.count == executions
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_a_call_is_its_arguments() -> None:
    names = [argument.name for argument in torch.ops.mla.index_topk.default._schema.arguments]
    assert names == [*IndexTopkCall._fields, "backend"]

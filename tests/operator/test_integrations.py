"""What the rest of torch does with the operators: autocast, vmap, FLOP counting, selective checkpointing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import mla_ops
from mla_ops.testing import Case, Inputs, make_inputs

CASE = Case(batch=2, seq_q=5, heads=4, seq_kv=11, d_total=24, d_v=16, topk=6)


# FLOPs


@pytest.mark.parametrize("need_q", [False, True])
@pytest.mark.parametrize("need_kv", [False, True])
def test_flops_of_forward_and_backward(need_q: bool, need_kv: bool) -> None:
    inputs = make_inputs(CASE).requires_grad(q=need_q, kv=need_kv)
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.mla.sparse_attn(*inputs.args)[0]
        forward = counter.get_total_flops()
        if need_q or need_kv:
            out.sum().backward()
    logits = 2 * 5 * 4 * 6  # batch, seq_q, heads, topk
    assert forward == 2 * logits * (24 + 16)
    widths = (24 + 16) + (24 if need_q else 0) + (24 + 16 if need_kv else 0)
    assert counter.get_total_flops() - forward == (2 * logits * widths if need_q or need_kv else 0)


def test_flops_without_batch() -> None:
    inputs = make_inputs(replace(CASE, batch=None))
    with FlopCounterMode(display=False) as counter:
        torch.ops.mla.sparse_attn(*inputs.args)
    assert counter.get_total_flops() == 2 * 5 * 4 * 6 * (24 + 16)


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, None, 0), (0, 0, 0)], ids=str)
def test_flops_of_vmap_are_those_of_its_elements(in_dims: tuple[int | None, ...]) -> None:
    inputs = make_inputs(CASE)
    args = [arg if dim is None else torch.stack([arg] * 3) for arg, dim in zip(inputs.args, in_dims, strict=False)]
    with FlopCounterMode(display=False) as counter:
        torch.vmap(lambda *tensors: torch.ops.mla.sparse_attn(*tensors, 16, 0.5)[0], in_dims)(*args)
    assert counter.get_total_flops() == 3 * 2 * 2 * 5 * 4 * 6 * (24 + 16)


@pytest.mark.parametrize("first", ["mla_ops", "torch.utils.flop_counter"])
def test_formulas_wait_for_the_counter_whichever_is_imported_first(first: str) -> None:
    program = f"""
import {first}
import torch, mla_ops, torch.utils.flop_counter
q, kv, indices = torch.randn(5, 4, 24), torch.randn(11, 1, 24), torch.zeros(5, 1, 6, dtype=torch.int32)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    mla_ops.sparse_attn(q, kv, indices, d_v=16, softmax_scale=1.0)
print(counter.get_total_flops())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 2 * 5 * 4 * 6 * (24 + 16)


def test_flops_of_max_logits() -> None:
    inputs = make_inputs(CASE)
    with FlopCounterMode(display=False) as counter:
        torch.ops.mla.sparse_attn_max_logits(*inputs.args[:5])
    assert counter.get_total_flops() == 2 * 2 * 5 * 4 * 6 * 24


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_q_and_kv_only(dtype: torch.dtype) -> None:
    inputs = make_inputs(CASE, attn_sink=True).requires_grad()
    with torch.autocast("cpu", dtype=dtype):
        out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    low = inputs.to(dtype)
    expected = torch.ops.mla.sparse_attn(low.q, low.kv, *inputs.args[2:])
    assert out.dtype == dtype
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    grads = torch.autograd.grad(out.float().sum(), inputs.differentiable)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def test_autocast_leaves_fp64_alone_and_unifies_mixed_inputs() -> None:
    inputs = make_inputs(CASE, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.ops.mla.sparse_attn(*inputs.args)[0].dtype == torch.float64
        mixed = torch.ops.mla.sparse_attn(inputs.q.float(), inputs.kv.bfloat16(), *inputs.args[2:])
    assert mixed[0].dtype == torch.bfloat16


def test_autocast_still_refuses_what_it_does_not_cast() -> None:
    inputs = make_inputs(CASE)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(mla_ops.InvalidInputError, match="must be bfloat16"),
    ):
        torch.ops.mla.sparse_attn(inputs.q.int(), inputs.kv, *inputs.args[2:])


def test_autocast_inside_a_compiled_graph() -> None:
    inputs = make_inputs(CASE).requires_grad()

    def step(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.ops.mla.sparse_attn(q, kv, indices, 16, 0.5)[0]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = function(*inputs.args[:3])
        results.append([out, *torch.autograd.grad(out.float().sum(), inputs.differentiable)])
    assert results[0][0].dtype == torch.bfloat16
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_casts_for_max_logits_too() -> None:
    inputs = make_inputs(CASE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.ops.mla.sparse_attn_max_logits(*inputs.args[:5])
    low = inputs.to(torch.bfloat16)
    assert torch.equal(actual, torch.ops.mla.sparse_attn_max_logits(*low.args[:5]))
    assert not torch.equal(actual, torch.ops.mla.sparse_attn_max_logits(*inputs.args[:5]))


def gradients(inputs: Inputs, autocast: bool) -> tuple[torch.Tensor, ...]:
    out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return torch.autograd.grad([out, lse], inputs.differentiable, [inputs.dout.to(out.dtype), inputs.dlse])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_autocast_around_the_backward_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = make_inputs(CASE, dtype, topk_length=True, attn_sink=True).requires_grad()
    for inside, outside in zip(gradients(inputs, autocast=True), gradients(inputs, autocast=False), strict=True):
        assert torch.equal(inside, outside)


def test_autocast_around_other_ways_into_the_backward_changes_no_bit() -> None:
    inputs = make_inputs(CASE, attn_sink=True).requires_grad()
    out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs.args]
    douts = torch.stack([inputs.dout, -inputs.dout])

    def raw() -> Any:
        arguments = (*detached[:3], out.detach(), lse.detach(), *detached[3:])
        return torch.ops.mla.sparse_attn_bwd(inputs.dout, inputs.dlse, *arguments)

    def batched() -> Any:
        return torch.autograd.grad(out, inputs.differentiable, douts, is_grads_batched=True, retain_graph=True)

    torch._dynamo.reset()
    compiled = torch.compile(torch.ops.mla.sparse_attn, fullgraph=True, backend="aot_eager")(*inputs.args)[0]

    def traced_outside() -> Any:
        return torch.autograd.grad(compiled, inputs.differentiable, inputs.dout, retain_graph=True)

    for backward in (raw, batched, traced_outside):
        outside = backward()
        with torch.autocast("cpu", torch.bfloat16):
            inside = backward()
        for a, b in zip(inside, outside, strict=True):
            assert torch.equal(a, b), backward.__name__


@pytest.mark.parametrize("low", ["q", "kv", "neither"])
def test_entrances_see_what_autocast_makes_of_mixed_inputs(low: str) -> None:
    inputs = make_inputs(CASE, attn_sink=True).requires_grad()
    q, kv = (getattr(inputs, name).bfloat16() if name == low else getattr(inputs, name) for name in ("q", "kv"))
    keywords = inputs.kwargs
    with torch.autocast("cpu", torch.bfloat16):
        decision = mla_ops.explain(q, kv, inputs.indices, **keywords)
        mla_ops.warmup(q, kv, inputs.indices, **keywords)
        vmapped = torch.vmap(lambda q: mla_ops.sparse_attn(q, kv, inputs.indices, **keywords).out)(q[None])
        out, _ = mla_ops.sparse_attn(q, kv, inputs.indices, **keywords)
    assert decision.problem.dtype == torch.bfloat16
    assert decision.problem.needs_grad
    assert out.dtype == torch.bfloat16
    assert torch.equal(vmapped[0], out)
    if low != "neither":
        with pytest.raises(mla_ops.InvalidInputError, match="kv must have the dtype of q"):
            mla_ops.explain(q, kv, inputs.indices, **keywords)


def test_autocast_drops_no_scales_of_a_float8_kv() -> None:
    inputs = make_inputs(CASE)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(mla_ops.InvalidInputError, match="dequantise it with its scales"),
    ):
        torch.ops.mla.sparse_attn(inputs.q, inputs.kv.to(torch.float8_e4m3fn), *inputs.args[2:])


# Function transforms


def weighted(inputs: Inputs) -> Callable[..., torch.Tensor]:
    """A loss of `q`, `kv` and `attn_sink` that reaches both results."""

    def loss(q: torch.Tensor, kv: torch.Tensor, attn_sink: torch.Tensor) -> torch.Tensor:
        out, lse = torch.ops.mla.sparse_attn(q, kv, *inputs.args[2:6], attn_sink)
        return (out * inputs.dout).sum() + (lse.masked_fill(lse == -torch.inf, 0.0) * inputs.dlse).sum()

    return loss


@pytest.fixture
def transformed() -> tuple[Inputs, Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]:
    """A call, its loss, and the gradients that `torch.autograd.grad` gives."""
    inputs = make_inputs(CASE, attn_sink=True)
    leaves = inputs.requires_grad()
    loss = weighted(inputs)
    return inputs, loss, torch.autograd.grad(loss(*leaves.differentiable), leaves.differentiable)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_grad_and_vmap_of_grad(transformed: Any, compiled: bool) -> None:
    inputs, loss, expected = transformed
    function = torch.func.grad(loss, (0, 1, 2))
    per_sample = torch.vmap(function, (0, 0, None))
    if compiled:
        torch._dynamo.reset()
        function, per_sample = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (function, per_sample))
    for actual, want in zip(function(*inputs.differentiable), expected, strict=True):
        assert torch.equal(actual, want)
    stacked = per_sample(*(torch.stack([t, t]) for t in (inputs.q, inputs.kv)), inputs.attn_sink)
    for actual, want in zip(stacked, expected, strict=True):
        assert torch.equal(actual, torch.stack([want, want]))


def test_vjp_and_jacrev(transformed: Any) -> None:
    inputs, loss, expected = transformed
    value, pullback = torch.func.vjp(loss, *inputs.differentiable)
    for actual, want in zip(pullback(torch.ones_like(value)), expected, strict=True):
        assert torch.equal(actual, want)

    def out(q: torch.Tensor) -> torch.Tensor:
        return torch.ops.mla.sparse_attn(q, *inputs.args[1:])[0]

    leaf = inputs.q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(out(leaf), leaf, inputs.dout)
    jacobian = torch.func.jacrev(out)(inputs.q)
    torch.testing.assert_close(torch.tensordot(inputs.dout, jacobian, dims=4), dq)


def test_levels_that_record_nothing_stay_right(transformed: Any) -> None:
    inputs, loss, expected = transformed

    def half_recorded(q: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            unrecorded = loss(q, *inputs.differentiable[1:])
        return loss(q, *inputs.differentiable[1:]) + unrecorded

    assert torch.equal(torch.func.grad(half_recorded)(inputs.q), expected[0])
    leaves = inputs.requires_grad().differentiable
    with torch.no_grad():
        dq = torch.func.grad(loss)(*leaves)
    assert torch.equal(dq, expected[0])
    assert not dq.requires_grad
    # The sink belongs to no transform, only to the graph outside.
    captured = torch.func.grad(lambda scale: scale * loss(*leaves))(torch.tensor(2.0))
    for actual, want in zip(torch.autograd.grad(captured, leaves), expected, strict=True):
        torch.testing.assert_close(actual, want)


def test_transforms_refuse_second_and_forward_derivatives(transformed: Any) -> None:
    inputs, loss, _ = transformed

    def of_q(q: torch.Tensor) -> torch.Tensor:
        return loss(q, *inputs.differentiable[1:])

    first = torch.func.grad(of_q)
    for second in (
        lambda: torch.func.grad(lambda q: first(q).sum())(inputs.q),
        lambda: torch.func.jacrev(first)(inputs.q),
        lambda: first(inputs.q.clone().requires_grad_()).sum().backward(),
    ):
        with pytest.raises(mla_ops.DoubleBackwardError, match="differentiable once"):
            second()
    for forward in (
        lambda: torch.func.jvp(of_q, (inputs.q,), (inputs.q,)),
        lambda: torch.func.jvp(first, (inputs.q,), (inputs.q,)),
        lambda: torch.func.hessian(of_q)(inputs.q),
        lambda: torch.func.grad(lambda q: torch.func.jvp(of_q, (q,), (inputs.q,))[1])(inputs.q),
    ):
        with pytest.raises(mla_ops.ForwardModeError, match="reverse mode"):
            forward()


def test_compiled_autograd_runs_the_formula(transformed: Any) -> None:
    inputs, loss, expected = transformed
    leaves = inputs.requires_grad().differentiable
    value = loss(*leaves)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(value.backward, backend="aot_eager")()
    for leaf, want in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, want)


# vmap


def stack(make: Callable[[int], Inputs], count: int = 3) -> list[Inputs]:
    return [make(seed) for seed in range(count)]


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "length+sink"])
def test_vmap_over_everything(batch: int | None, optional: bool) -> None:
    case = replace(CASE, batch=batch)
    calls = stack(lambda seed: make_inputs(case, seed=seed, topk_length=optional, attn_sink=optional))

    def one(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, *rest: torch.Tensor) -> Any:
        length, sink = rest or (None, None)
        return tuple(mla_ops.sparse_attn(q, kv, indices, d_v=16, softmax_scale=0.5, topk_length=length, attn_sink=sink))

    tensors = [[c.q, c.kv, c.indices, *([c.topk_length, c.attn_sink] if optional else [])] for c in calls]
    stacked = [torch.stack(column) for column in zip(*tensors, strict=True)]
    expected = [one(*arguments) for arguments in tensors]
    for position, result in enumerate(torch.vmap(one)(*stacked)):
        assert torch.equal(result, torch.stack([e[position] for e in expected]))


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
def test_vmap_over_queries_with_shared_kv_and_inner_dims(batch: int | None) -> None:
    calls = stack(lambda seed: make_inputs(replace(CASE, batch=batch), seed=seed))
    shared = calls[0]

    def one(q: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return torch.ops.mla.sparse_attn(q, shared.kv, indices, 16, 0.5, shared.topk_length)[0]

    expected = torch.stack([one(c.q, c.indices) for c in calls], dim=1)
    q, indices = torch.stack([c.q for c in calls], dim=1), torch.stack([c.indices for c in calls], dim=-1)
    assert torch.equal(torch.vmap(one, in_dims=(1, -1), out_dims=1)(q, indices), expected)


class SeeCalls(TorchDispatchMode):
    """Keeps the arguments of every call of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mla":
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
@pytest.mark.parametrize("kv_group", [1, 2])
@pytest.mark.parametrize("vmapped", ["q", "q+sink", "q+indices", "q+length", "sink"])
def test_vmap_shares_what_its_elements_share(batch: int | None, kv_group: int, vmapped: str) -> None:
    case = replace(CASE, batch=batch, kv_group=kv_group)
    calls = stack(lambda seed: make_inputs(case, seed=seed, topk_length=True, attn_sink=True))
    names = {"q": "q", "indices": "indices", "length": "topk_length", "sink": "attn_sink"}
    fields = [names[part] for part in vmapped.split("+")]
    shared = calls[0]

    def one(*tensors: torch.Tensor) -> Any:
        inputs = replace(shared, **dict(zip(fields, tensors, strict=True)))
        max_logits = torch.ops.mla.sparse_attn_max_logits(*inputs.args[:6])
        return (*torch.ops.mla.sparse_attn(*inputs.args), max_logits)

    columns = [[getattr(call, field) for call in calls] for field in fields]
    expected = [one(*tensors) for tensors in zip(*columns, strict=True)]
    with SeeCalls() as seen:
        results = torch.vmap(one)(*map(torch.stack, columns))
    for position, result in enumerate(results):
        torch.testing.assert_close(result, torch.stack([e[position] for e in expected]))
    storages = [(args[1].data_ptr(), args[2].data_ptr()) for args in seen.arguments]
    assert {kv for kv, _ in storages} == {shared.kv.data_ptr()}
    if kv_group == 1 and vmapped in ("q", "q+sink", "sink"):
        assert {indices for _, indices in storages} == {shared.indices.data_ptr()}
        assert len(seen.arguments) == 2  # of the operators, one each


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
@pytest.mark.parametrize("vmapped", [(0,), (0, 1), (0, 1, 2), (0, 2), (0, 1, 6), (6,)], ids=str)
def test_vmap_over_a_dimension_of_size_zero(batch: int | None, vmapped: tuple[int, ...]) -> None:
    inputs = make_inputs(replace(CASE, batch=batch), topk_length=True, attn_sink=True)
    out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    dims = tuple(0 if position in vmapped else None for position in range(7))
    args = [a if dim is None else a.new_empty((0, *a.shape)) for a, dim in zip(inputs.args, dims, strict=True)]
    results = torch.vmap(torch.ops.mla.sparse_attn, dims)(*args)
    assert [(r.shape, r.dtype) for r in results] == [((0, *r.shape), r.dtype) for r in (out, lse)]
    if vmapped != (6,):
        assert torch.vmap(torch.ops.mla.sparse_attn_max_logits, dims[:6])(*args[:6]).shape == (0, *lse.shape)
    douts = inputs.dout.new_empty((0, *inputs.dout.shape))

    def backward(dout: torch.Tensor) -> Any:
        return torch.ops.mla.sparse_attn_bwd(dout, None, *inputs.args[:3], out, lse, *inputs.args[3:])

    assert [tuple(g.shape) for g in torch.vmap(backward)(douts)] == [(0, *t.shape) for t in inputs.differentiable]


def test_vmap_refuses_in_the_sizes_of_an_element() -> None:
    inputs = make_inputs(CASE)
    q = torch.stack([inputs.q] * 3)
    with pytest.raises(mla_ops.InvalidInputError, match=r"seq_q of q \(5\), got indices shape \[2, 4, 1, 6\]"):
        torch.vmap(lambda q: torch.ops.mla.sparse_attn(q, inputs.kv, inputs.indices[:, 1:], 16, 0.5))(q)
    with pytest.raises(mla_ops.InvalidInputError, match=r"q must be \[batch, .* got shape \[5\]"):
        torch.vmap(lambda q: torch.ops.mla.sparse_attn(q, inputs.kv, inputs.indices, 16, 0.5))(q[0, 0, :, 0, :5])


@pytest.mark.parametrize("batch", [None, 2], ids=["3d", "4d"])
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "length"])
def test_vmap_of_max_logits(batch: int | None, optional: bool) -> None:
    calls = stack(lambda seed: make_inputs(replace(CASE, batch=batch), seed=seed, topk_length=optional))
    shared = calls[0]

    def one(q: torch.Tensor, indices: torch.Tensor, *length: torch.Tensor) -> torch.Tensor:
        return torch.ops.mla.sparse_attn_max_logits(q, shared.kv, indices, 16, 0.5, *length)

    tensors = [[c.q, c.indices, *([c.topk_length] if optional else [])] for c in calls]
    stacked = [torch.stack(column) for column in zip(*tensors, strict=True)]
    assert torch.equal(torch.vmap(one)(*stacked), torch.stack([one(*arguments) for arguments in tensors]))


def test_batched_gradients_run_the_backward_under_vmap() -> None:
    inputs = make_inputs(CASE, attn_sink=True).requires_grad()
    out, _ = torch.ops.mla.sparse_attn(*inputs.args)
    douts = torch.stack([inputs.dout, 2 * inputs.dout, -inputs.dout])
    batched = torch.autograd.grad(out, inputs.differentiable, douts, is_grads_batched=True, retain_graph=True)
    for i, dout in enumerate(douts):
        single = torch.autograd.grad(out, inputs.differentiable, dout, retain_graph=True)
        for b, s in zip(batched, single, strict=True):
            assert torch.equal(b[i], s)


# Selective activation checkpointing


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.mla.sparse_attn.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "executions"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)], ids=str
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_selective_checkpointing(policy: CheckpointPolicy, executions: int, compiled: bool) -> None:
    inputs = make_inputs(CASE).requires_grad()

    def block(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        out, _ = torch.ops.mla.sparse_attn(q.sin(), kv, inputs.indices, 16, 0.5)
        return out.cos()

    def decide(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return policy if func is torch.ops.mla.sparse_attn.default else CheckpointPolicy.PREFER_RECOMPUTE

    def run(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        context_fn = partial(create_selective_checkpoint_contexts, decide)
        return checkpoint(block, q, kv, use_reentrant=False, context_fn=context_fn)

    expected = torch.autograd.grad(block(inputs.q, inputs.kv).sum(), [inputs.q, inputs.kv])
    if compiled:
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        backend = torch._dynamo.backends.common.aot_autograd(
            fw_compiler=keep,
            bw_compiler=keep,
            partition_fn=torch._functorch.partitioners.min_cut_rematerialization_partition,
        )
        run = torch.compile(run, fullgraph=True, backend=backend)
        grads = torch.autograd.grad(run(inputs.q, inputs.kv).sum(), [inputs.q, inputs.kv])
        calls = sum(n.target is torch.ops.mla.sparse_attn.default for g in graphs for n in g.graph.nodes)
    else:
        with CountCalls() as mode:
            grads = torch.autograd.grad(run(inputs.q, inputs.kv).sum(), [inputs.q, inputs.kv])
        calls = mode.count
    assert calls == executions
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want)


# What comes between a call and its kernel


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_profile_shows_a_call_once(needs_grad: bool) -> None:
    inputs = make_inputs(CASE).requires_grad(q=needs_grad, kv=needs_grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.mla.sparse_attn(*inputs.args)
    assert [event.count for event in profile.key_averages() if event.key == "mla::sparse_attn"] == [1]

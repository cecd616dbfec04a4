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

"""Calls on a CUDA device that is not the current one: how `device_map` and pipeline stages in one process run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import mla_ops
from mla_ops.launching import warm_kernels
from mla_ops.testing import Case, Inputs, assert_matches_oracle, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.gpu2, pytest.mark.usefixtures("fresh_dynamo", "current_device_0")]

SECOND = "cuda:1"
CASES = [
    Case(d_total=128, d_v=64, topk=64, heads=28, seq_q=128, seq_kv=256),
    Case(d_total=128, d_v=64, topk=256, heads=16, seq_q=1, seq_kv=1024),  # split forward
    Case(d_total=576, d_v=512, topk=256, heads=64, seq_q=70, batch=1, seq_kv=512),  # Hopper kernels on sm90
]


@pytest.fixture
def current_device_0() -> None:
    torch.cuda.set_device(0)


def draw(case: Case, seed: int = 0) -> Inputs:
    return make_inputs(case, torch.bfloat16, SECOND, seed=seed, topk_length=True, attn_sink=True)


def moved(inputs: Inputs, device: str) -> Inputs:
    tensors = {name: value.to(device) for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    return replace(inputs, **tensors)


def step(inputs: Inputs, operator: Callable = torch.ops.mla.sparse_attn) -> dict[str, torch.Tensor]:
    leaves = inputs.requires_grad()
    out, lse = operator(*leaves.args)
    grads = torch.autograd.grad([out, lse], leaves.differentiable, [inputs.dout, inputs.dlse])
    return dict(zip(("out", "lse", "dq", "dkv", "dsink"), (out.detach(), lse.detach(), *grads), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_eager_training(case: Case) -> None:
    inputs = draw(case)
    results = step(inputs)
    assert {tensor.device for tensor in results.values()} == {torch.device(SECOND)}
    assert_matches_oracle(results, inputs)
    max_logits = torch.ops.mla.sparse_attn_max_logits(*inputs.args[:-1])
    assert_matches_oracle({"max_logits": max_logits}, inputs)
    assert torch.cuda.current_device() == 0


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_deterministic_training_has_the_bits_of_the_first_device(case: Case) -> None:
    inputs = draw(case)
    results = step(inputs)
    assert_matches_oracle(results, inputs)
    for name, expected in step(moved(inputs, "cuda:0")).items():
        assert torch.equal(results[name].to("cuda:0"), expected), name


@pytest.mark.usefixtures("nothing_warm")
def test_warmup_serves_the_device_of_its_tensors_and_a_capture_follows() -> None:
    static = draw(CASES[0])
    mla_ops.warmup(static.q, static.kv, static.indices, **static.kwargs)
    assert {device for device, *_ in warm_kernels()} == {torch.device(SECOND)}
    on_first = moved(static, "cuda:0")
    assert "; warm" in str(mla_ops.explain(static.q, static.kv, static.indices, **static.kwargs))
    assert "; warm" not in str(mla_ops.explain(on_first.q, on_first.kv, on_first.indices, **on_first.kwargs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph):
        out, lse = torch.ops.mla.sparse_attn(*static.args)
    fresh = draw(CASES[0], seed=1)
    for name, value in vars(static).items():
        if isinstance(value, torch.Tensor):
            value.copy_(getattr(fresh, name))
    graph.replay()
    torch.cuda.synchronize(1)
    assert_matches_oracle({"out": out, "lse": lse}, fresh)


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
def test_compiled_training(mode: str | None) -> None:
    inputs = draw(replace(CASES[0], heads=32))
    compiled = torch.compile(lambda *args: torch.ops.mla.sparse_attn(*args), fullgraph=True, mode=mode)
    assert_matches_oracle(step(inputs, compiled), inputs)


def test_the_two_devices_take_turns() -> None:
    first, second = moved(draw(CASES[0]), "cuda:0"), draw(CASES[0], seed=1)
    for _ in range(3):
        for inputs in (first, second):
            assert_matches_oracle(step(inputs), inputs)

"""Index selection under torch.compile and torch.export: whole graphs, one for all sizes, the same bits as eager."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mla_ops
from mla_ops.testing import IndexCase, make_index_inputs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Different sizes: equal ones would share a symbol, and a later call that tells them apart would recompile.
DISTINCT = IndexCase(batch=2, seq_q=5, index_heads=6, index_head_dim=24, seq_kv=31, kv_group=3, topk=7)


def core(q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor, topk: int) -> torch.Tensor:
    return torch.ops.mla.index_topk(q_idx, k_idx, weights, topk)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_choice_is_one_graph_and_bitwise_eager(backend: str, dynamic: bool, dtype: torch.dtype) -> None:
    inputs = make_index_inputs(DISTINCT, dtype, bounds=True)

    def choose(q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return mla_ops.index_topk(q_idx, k_idx, weights, inputs.topk, **inputs.kwargs, causal=False)

    compiled = torch.compile(choose, fullgraph=True, dynamic=dynamic, backend=backend)
    assert torch.equal(compiled(*inputs.args[:3]), choose(*inputs.args[:3]))


def test_one_graph_serves_all_sizes() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(core, fullgraph=True, dynamic=True, backend=counter)
    changes = (
        {},
        {"topk": 40},
        {"seq_q": 9},
        {"seq_kv": 70},
        {"batch": 11},
        {"index_heads": 12},
        {"index_head_dim": 8},
    )
    for change in changes:
        inputs = make_index_inputs(replace(DISTINCT, **change))
        assert torch.equal(compiled(*inputs.args[:4]), core(*inputs.args[:4]))
    assert counter.frame_count == 1


def test_every_size_stays_symbolic() -> None:
    counter = CompileCounterWithBackend("eager")
    torch.compile(core, fullgraph=True, dynamic=True, backend=counter)(*make_index_inputs(DISTINCT).args[:4])
    (graph,) = counter.graphs
    (node,) = [n for n in graph.graph.nodes if "index_topk" in str(n.target)]
    q_idx, k_idx = (node.args[i].meta["example_value"] for i in range(2))
    sizes = [*q_idx.shape, *k_idx.shape[1:3], node.meta["example_value"].shape[-1]]
    assert all(isinstance(size, torch.SymInt) and size.node.expr.is_symbol for size in sizes)
    assert len({str(size) for size in sizes}) == 7


def test_training_with_a_choice_inside_is_one_graph() -> None:
    inputs = make_index_inputs(DISTINCT, exact=True)

    def loss(q_idx: torch.Tensor) -> torch.Tensor:
        indices = mla_ops.index_topk(q_idx, inputs.k_idx, inputs.weights, 7)
        return (q_idx.sum(dim=(-1, -2)) * indices.float().sum(dim=(-1, -2))).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = inputs.q_idx.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf)[0])
    assert torch.equal(*grads)


def test_export_keeps_the_sizes_symbolic() -> None:
    class Module(torch.nn.Module):
        def forward(
            self, q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor
        ) -> torch.Tensor:
            return mla_ops.index_topk(q_idx, k_idx, weights, 7, ends=ends)

    auto = torch.export.Dim.DYNAMIC
    first = make_index_inputs(DISTINCT, bounds=True)
    exported = torch.export.export(
        Module(),
        (*first.args[:3], first.ends),
        dynamic_shapes=({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}),
    )
    assert "mla.index_topk.default" in exported.graph_module.code
    inputs = make_index_inputs(replace(DISTINCT, batch=3, seq_q=8, seq_kv=50), bounds=True)
    arguments = (*inputs.args[:3], inputs.ends)
    assert torch.equal(exported.module()(*arguments), Module()(*arguments))

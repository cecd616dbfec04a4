"""The operator under torch.compile and torch.export: whole graphs, symbolic widths, the same bits as eager."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

import mla_ops
from mla_ops.testing import Case, Inputs, make_inputs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

WIDTHS = [(576, 512), (128, 64), (192, 128)]
# Eight different sizes: equal ones would share a symbol, and a later call that tells them apart would recompile.
DISTINCT = Case(batch=2, seq_q=5, heads=6, d_total=24, seq_kv=31, kv_group=3, topk=7, d_v=16)


def core(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Nothing that Inductor could fuse or round differently stands beside the operator, and the scale is a constant, as
    # it is in models: a float argument makes dynamo trace twice before it specialises it.
    return torch.ops.mla.sparse_attn(q, kv, indices, d_v, 0.5)


def train_step(function: Callable, inputs: Inputs, mark: Callable[[Inputs], None] | None = None) -> list[torch.Tensor]:
    leaves = inputs.requires_grad()
    if mark is not None:
        mark(leaves)
    out, lse = function(*leaves.args[:4])
    return [out, lse, *torch.autograd.grad([out, lse], [leaves.q, leaves.kv], [inputs.dout, inputs.dlse])]


def assert_bitwise(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_is_one_graph_and_bitwise_eager(backend: str, dynamic: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(d_total=128, d_v=64), dtype)
    compiled = torch.compile(core, fullgraph=True, dynamic=dynamic, backend=backend)
    assert_bitwise(train_step(compiled, inputs), train_step(core, inputs))


@pytest.mark.parametrize("optional", [False, True])
def test_front_door_compiles_with_and_without_optional_arguments(optional: bool) -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16), topk_length=optional, attn_sink=optional)

    def function(leaves: Inputs) -> mla_ops.SparseAttnOutput:
        return mla_ops.sparse_attn(leaves.q, leaves.kv, leaves.indices, **leaves.kwargs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, function):
        leaves = inputs.requires_grad()
        result = f(leaves)
        assert isinstance(result, mla_ops.SparseAttnOutput)
        grads = torch.autograd.grad([result.out, result.lse], leaves.differentiable, [inputs.dout, inputs.dlse])
        results.append([result.out, result.lse, *grads])
    assert_bitwise(*results)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_graph_serves_all_widths(training: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(core, fullgraph=True, dynamic=True, backend=counter)

    def mark(leaves: Inputs) -> None:
        torch._dynamo.mark_dynamic(leaves.q, 3)
        torch._dynamo.mark_dynamic(leaves.kv, 3)

    for d_total, d_v in WIDTHS:
        inputs = make_inputs(replace(DISTINCT, d_total=d_total, d_v=d_v))
        if training:
            assert_bitwise(train_step(compiled, inputs, mark), train_step(core, inputs))
        else:
            mark(inputs)
            assert_bitwise(list(compiled(*inputs.args[:4])), list(core(*inputs.args[:4])))
    assert counter.frame_count == 1


def test_max_logits_ride_along_in_the_one_graph_of_all_widths() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def clipped(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int) -> tuple[torch.Tensor, ...]:
        max_logits = mla_ops.sparse_attn_max_logits(q, kv, indices, d_v=d_v, softmax_scale=0.5)
        return *core(q, kv, indices, d_v), max_logits

    compiled = torch.compile(clipped, fullgraph=True, dynamic=True, backend=counter)
    for d_total, d_v in WIDTHS:
        inputs = make_inputs(replace(DISTINCT, d_total=d_total, d_v=d_v))
        results = []
        for function in (compiled, clipped):
            leaves = inputs.requires_grad()
            torch._dynamo.mark_dynamic(leaves.q, 3)
            torch._dynamo.mark_dynamic(leaves.kv, 3)
            out, lse, max_logits = function(*leaves.args[:4])
            assert not max_logits.requires_grad
            grads = torch.autograd.grad([out, lse], [leaves.q, leaves.kv], [inputs.dout, inputs.dlse])
            results.append([out, lse, max_logits, *grads])
        assert_bitwise(*results)
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_graph_serves_all_lengths(training: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(core, fullgraph=True, dynamic=True, backend=counter)
    for change in ({}, {"topk": 40}, {"seq_q": 9}, {"seq_kv": 70}, {"batch": 11}):
        case = replace(DISTINCT, **change)
        inputs = make_inputs(case)
        if training:
            assert_bitwise(train_step(compiled, inputs), train_step(core, inputs))
        else:
            assert_bitwise(list(compiled(*inputs.args[:4])), list(core(*inputs.args[:4])))
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_sizes_of_one_specialise_unless_they_are_marked_unbacked(training: bool) -> None:
    # torch specialises sizes of 1; documented, with the cure, in the README.
    def mark(leaves: Inputs) -> None:
        for tensor in (leaves.q, leaves.kv, leaves.indices):
            mark_unbacked(tensor, 0)
            mark_unbacked(tensor, 1)

    def frames(*marks: Callable[[Inputs], None]) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(core, fullgraph=True, dynamic=True, backend=counter)
        for change in ({}, {"seq_q": 1}, {"batch": 1}, {"batch": 1, "seq_q": 1}, {"seq_kv": 1}):
            inputs = make_inputs(replace(DISTINCT, **change))
            if training:
                assert_bitwise(train_step(compiled, inputs, *marks), train_step(core, inputs))
            else:
                for prepare in marks:
                    prepare(inputs)
                assert_bitwise(list(compiled(*inputs.args[:4])), list(core(*inputs.args[:4])))
        return counter.frame_count

    assert frames() == 5
    assert frames(mark) == 1


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_bad_call_keeps_its_words_inside_the_error_of_torch(fullgraph: bool) -> None:
    inputs = make_inputs(DISTINCT)
    compiled = torch.compile(core, fullgraph=fullgraph, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"kv must have the dtype of q \(float32\), got float16; use") as raised:
        compiled(inputs.q, inputs.kv.half(), inputs.indices, inputs.d_v)
    assert not isinstance(raised.value, mla_ops.InvalidInputError)


def test_every_size_stays_symbolic() -> None:
    counter = CompileCounterWithBackend("eager")
    inputs = make_inputs(DISTINCT)
    torch.compile(core, fullgraph=True, dynamic=True, backend=counter)(*inputs.args[:4])
    (graph,) = counter.graphs
    (node,) = [n for n in graph.graph.nodes if "sparse_attn" in str(n.target)]
    q, kv, indices = (node.args[i].meta["example_value"] for i in range(3))
    out, lse = node.meta["example_value"]
    sizes = [*q.shape, kv.shape[1], kv.shape[2], indices.shape[3], out.shape[-1]]
    assert all(isinstance(size, torch.SymInt) and size.node.expr.is_symbol for size in sizes)
    assert len({str(size) for size in sizes}) == 8
    assert [str(s) for s in lse.shape] == [str(s) for s in q.shape[:-1]]


def test_export_keeps_the_widths_symbolic() -> None:
    class Module(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ops.mla.sparse_attn(q, kv, indices, d_v, 0.1)

    auto = torch.export.Dim.DYNAMIC
    first = make_inputs(Case(d_total=576, d_v=512))
    sizes = dict.fromkeys(range(4), auto)
    exported = torch.export.export(
        Module(),
        (first.q, first.kv, first.indices, first.d_v),
        dynamic_shapes=(sizes, {0: auto, 1: auto, 3: auto}, {0: auto, 1: auto, 3: auto}, auto),
    )
    assert "mla.sparse_attn.default" in exported.graph_module.code
    for d_total, d_v in WIDTHS:
        inputs = make_inputs(Case(d_total=d_total, d_v=d_v, batch=3, seq_q=7, seq_kv=31, topk=9))
        actual = exported.module()(inputs.q, inputs.kv, inputs.indices, d_v)
        expected = torch.ops.mla.sparse_attn(inputs.q, inputs.kv, inputs.indices, d_v, 0.1)
        assert_bitwise(list(actual), list(expected))


def test_a_program_that_returns_the_named_tuple_is_saved_and_loaded(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> mla_ops.SparseAttnOutput:
            return mla_ops.sparse_attn(q, kv, indices, d_v=5, softmax_scale=0.1)

    inputs = make_inputs(Case(d_total=8, d_v=5))
    arguments = (inputs.q, inputs.kv, inputs.indices)
    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(Module(), arguments), path)
    loaded = torch.export.load(path).module()(*arguments)
    assert type(loaded) is mla_ops.SparseAttnOutput
    assert_bitwise(list(loaded), list(Module()(*arguments)))


def test_a_missing_file_of_tuned_rows_is_named() -> None:
    inputs = make_inputs(Case(d_total=8, d_v=5))

    @torch.compile(backend="eager", fullgraph=True)
    def run() -> torch.Tensor:
        return torch.ops.mla.sparse_attn(inputs.q, inputs.kv, inputs.indices, 5, 0.1)[0]

    with (
        mla_ops.settings.override(tuned_rows="/nowhere/rows.json"),
        pytest.raises(Exception, match=r"InvalidSettingError.*nowhere.*MLA_OPS_TUNED_ROWS"),
    ):
        run()


def test_first_call_of_a_process_may_be_the_compiled_one() -> None:
    program = """
import torch, mla_ops
from mla_ops.testing import Case, make_inputs
inputs = make_inputs(Case(d_total=24, d_v=16)).requires_grad()
@torch.compile(fullgraph=True, backend="aot_eager")
def step(q, kv, indices):
    return mla_ops.sparse_attn(q, kv, indices, d_v=16, softmax_scale=0.5).out.sum()
step(*inputs.args[:3]).backward()
compiled = inputs.q.grad.clone()
inputs.q.grad = None
torch.ops.mla.sparse_attn(*inputs.args[:4], 0.5)[0].sum().backward()
assert torch.equal(inputs.q.grad, compiled)
print("same bits")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "same bits", result.stderr


def test_compiled_double_backward_is_refused_by_torch() -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16)).requires_grad()
    out, _ = torch.compile(core, fullgraph=True, backend="aot_eager")(*inputs.args[:4])
    (dq,) = torch.autograd.grad(out.sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dq.sum().backward()


def test_width_as_module_attribute_recompiles_once_per_value() -> None:
    # torch specialises integers on modules; documented, with the cure, in the README.
    class Module(torch.nn.Module):
        def __init__(self, d_v: int) -> None:
            super().__init__()
            self.d_v = d_v

        def forward(self, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            return torch.ops.mla.sparse_attn(q, kv, indices, self.d_v, 0.1)[0]

    def frames(**config: bool) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        with torch._dynamo.config.patch(**config):
            forward = torch.compile(lambda m, *args: m(*args), fullgraph=True, dynamic=True, backend=counter)
            for d_v in (16, 12, 8):
                forward(Module(d_v), *make_inputs(Case(d_total=24, d_v=d_v)).args[:3])
        return counter.frame_count

    assert frames() == 3
    assert frames(allow_unspec_int_on_nn_module=True) == 1

"""The graphs torch.compile builds, as text.

`EXPECTTEST_ACCEPT=1 python -m pytest tests/compile/test_graphs.py` rewrites the snapshots.
"""

from __future__ import annotations

import expecttest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, normalize_gm

from mla_ops.testing import Case, make_inputs

CASE = Case(batch=2, seq_q=5, heads=3, d_total=128, seq_kv=24, topk=16, d_v=64)


def function(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.mla.sparse_attn(q, kv, indices, d_v, 0.125)


def record(*, dynamic: bool, training: bool = False) -> AotEagerAndRecordGraphs:
    torch._dynamo.reset()
    inputs = make_inputs(CASE)  # fresh tensors: dynamo leaves notes about dynamic sizes on those it has seen
    if training:
        inputs = inputs.requires_grad()
    backend = AotEagerAndRecordGraphs()
    results = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)(*inputs.args[:4])
    if training:
        torch.autograd.backward(results, [inputs.dout, inputs.dlse])
    return backend


def text(graph: torch.fx.GraphModule) -> str:
    return normalize_gm(graph.print_readable(print_output=False))


class GraphTest(expecttest.TestCase):
    def test_forward(self) -> None:
        (graph,) = record(dynamic=False).fw_graphs
        self.assertExpectedInline(
            text(graph),
            """\
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "f32[2, 5, 3, 128]", arg1_1: "f32[2, 24, 1, 128]", arg2_1: "i32[2, 5, 1, 16]"):
        sparse_attn = torch.ops.mla.sparse_attn.default(arg0_1, arg1_1, arg2_1, 64, 0.125);  arg0_1 = arg1_1 = arg2_1 = None
        getitem: "f32[2, 5, 3, 64]" = sparse_attn[0]
        getitem_1: "f32[2, 5, 3]" = sparse_attn[1];  sparse_attn = None
        return (getitem, getitem_1)
""",
        )

    def test_dynamic_forward(self) -> None:
        (graph,) = record(dynamic=True).fw_graphs
        self.assertExpectedInline(
            text(graph),
            """\
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "Sym(s85)", arg1_1: "Sym(s34)", arg2_1: "Sym(s0)", arg3_1: "Sym(s77)", arg4_1: "f32[s85, s34, s0, s77]", arg5_1: "Sym(s44)", arg6_1: "f32[s85, s44, 1, s77]", arg7_1: "Sym(s6)", arg8_1: "i32[s85, s34, 1, s6]", arg9_1: "Sym(s63)"):
        sparse_attn = torch.ops.mla.sparse_attn.default(arg4_1, arg6_1, arg8_1, arg9_1, 0.125);  arg4_1 = arg6_1 = arg8_1 = arg9_1 = None
        getitem: "f32[s85, s34, s0, s63]" = sparse_attn[0]
        getitem_1: "f32[s85, s34, s0]" = sparse_attn[1];  sparse_attn = None
        return (getitem, getitem_1)
""",
        )

    def test_backward(self) -> None:
        (graph,) = record(dynamic=False, training=True).bw_graphs
        self.assertExpectedInline(
            text(graph),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[2, 5, 3, 128]", primals_2: "f32[2, 24, 1, 128]", primals_3: "i32[2, 5, 1, 16]", detach_2: "f32[2, 5, 3, 64]", detach_3: "f32[2, 5, 3]", tangents_1: "f32[2, 5, 3, 64]", tangents_2: "f32[2, 5, 3]"):
        sparse_attn_bwd = torch.ops.mla.sparse_attn_bwd.default(tangents_1, tangents_2, primals_1, primals_2, primals_3, detach_2, detach_3, 64, 0.125);  tangents_1 = tangents_2 = primals_1 = primals_2 = primals_3 = detach_2 = detach_3 = None
        getitem_2: "f32[2, 5, 3, 128]" = sparse_attn_bwd[0]
        getitem_3: "f32[2, 24, 1, 128]" = sparse_attn_bwd[1];  sparse_attn_bwd = None
        return (getitem_2, getitem_3, None)
""",
        )

    def test_dynamic_backward(self) -> None:
        (graph,) = record(dynamic=True, training=True).bw_graphs
        self.assertExpectedInline(
            text(graph),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, primals_10: "Sym(s63)", primals_3: "Sym(s0)", primals_2: "Sym(s34)", primals_4: "Sym(s77)", primals_1: "Sym(s85)", primals_6: "Sym(s44)", primals_8: "Sym(s6)", primals_5: "f32[s85, s34, s0, s77]", primals_7: "f32[s85, s44, 1, s77]", primals_9: "i32[s85, s34, 1, s6]", detach_2: "f32[s85, s34, s0, s63]", detach_3: "f32[s85, s34, s0]", tangents_1: "f32[s85, s34, s0, s63]", tangents_2: "f32[s85, s34, s0]"):
        sparse_attn_bwd = torch.ops.mla.sparse_attn_bwd.default(tangents_1, tangents_2, primals_5, primals_7, primals_9, detach_2, detach_3, primals_10, 0.125);  tangents_1 = tangents_2 = primals_5 = primals_7 = primals_9 = detach_2 = detach_3 = primals_10 = None
        getitem_2: "f32[s85, s34, s0, s77]" = sparse_attn_bwd[0]
        getitem_3: "f32[s85, s44, 1, s77]" = sparse_attn_bwd[1];  sparse_attn_bwd = None
        return (None, None, None, None, getitem_2, None, getitem_3, None, None, None)
""",
        )

    def test_post_grad_training_step(self) -> None:
        from fake_gpu import LoweringBackend

        def loss(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
            return torch.ops.mla.sparse_attn(q.sin(), kv, indices, 64, 0.125)[0].sum()

        torch._dynamo.reset()
        backend = LoweringBackend()
        inputs = make_inputs(CASE).requires_grad()
        torch.compile(loss, fullgraph=True, backend=backend)(*inputs.args[:3]).backward()
        self.assertExpectedInline(
            "\n".join(text(graph) for graph in backend.graphs),
            """\
class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[2, 5, 3, 128]", primals_2: "f32[2, 24, 1, 128]", primals_3: "i32[2, 5, 1, 16]"):
        sin: "f32[2, 5, 3, 128]" = torch.ops.aten.sin.default(primals_1)
        sparse_attn = torch.ops.mla.sparse_attn.default(sin, primals_2, primals_3, 64, 0.125)
        getitem: "f32[2, 5, 3, 64]" = sparse_attn[0]
        getitem_1: "f32[2, 5, 3]" = sparse_attn[1];  sparse_attn = None
        sum_1: "f32[]" = torch.ops.aten.sum.default(getitem)
        return (sum_1, primals_1, primals_2, primals_3, sin, getitem, getitem_1)

class GraphModule(torch.nn.Module):
    def forward(self, primals_1: "f32[2, 5, 3, 128]", primals_2: "f32[2, 24, 1, 128]", primals_3: "i32[2, 5, 1, 16]", sin: "f32[2, 5, 3, 128]", alias_2: "f32[2, 5, 3, 64]", alias_3: "f32[2, 5, 3]", tangents_1: "f32[]"):
        expand: "f32[2, 5, 3, 64]" = torch.ops.aten.expand.default(tangents_1, [2, 5, 3, 64]);  tangents_1 = None
        sparse_attn_bwd = torch.ops.mla.sparse_attn_bwd.default(expand, None, sin, primals_2, primals_3, alias_2, alias_3, 64, 0.125);  expand = sin = primals_2 = primals_3 = alias_2 = alias_3 = None
        getitem_2: "f32[2, 5, 3, 128]" = sparse_attn_bwd[0]
        getitem_3: "f32[2, 24, 1, 128]" = sparse_attn_bwd[1];  sparse_attn_bwd = None
        cos: "f32[2, 5, 3, 128]" = torch.ops.aten.cos.default(primals_1);  primals_1 = None
        mul: "f32[2, 5, 3, 128]" = torch.ops.aten.mul.Tensor(getitem_2, cos);  getitem_2 = cos = None
        return (mul, getitem_3, None)
""",
        )

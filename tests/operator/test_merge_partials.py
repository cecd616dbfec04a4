"""Partial results over shards of the keys: merged they are the result over all keys, whatever is empty."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from generated_code import generated_code
from test_errors import bad

import mla_ops
from mla_ops.testing import Case, make_inputs

CASE = Case(batch=2, seq_q=5, heads=4, seq_kv=33, d_total=24, d_v=16, topk=12)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def shards(dtype: torch.dtype, *cuts: int) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
    """Return partial results over slots between `cuts`, and the inputs of the whole."""
    inputs = make_inputs(CASE, dtype, attn_sink=True)
    parts = [
        mla_ops.sparse_attn(
            inputs.q, inputs.kv, inputs.indices[..., a:b], d_v=CASE.d_v, softmax_scale=inputs.softmax_scale
        )
        for a, b in itertools.pairwise(cuts)
    ]
    return [part.out for part in parts], [part.lse for part in parts], inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 0, 7, 7, 8, 12, 12)], ids=str)
def test_shards_are_the_whole(cuts: tuple[int, ...], sink: bool, dtype: torch.dtype) -> None:
    outs, lses, inputs = shards(dtype, *cuts)
    attn_sink = inputs.attn_sink if sink else None
    options = {"d_v": CASE.d_v, "softmax_scale": inputs.softmax_scale, "attn_sink": attn_sink}
    whole = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **options)
    merged = mla_ops.merge_partials(outs, lses, attn_sink)
    assert merged.out.dtype == dtype
    assert merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-5, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(merged.out, whole.out, rtol=tolerance, atol=tolerance / 10)


def test_a_sink_is_a_part_whose_value_is_0() -> None:
    outs, lses, inputs = shards(torch.float32, 0, 5, 12)
    merged = mla_ops.merge_partials(outs, lses, inputs.attn_sink)
    sink_as_a_part = mla_ops.merge_partials(
        [*outs, torch.zeros_like(outs[0])], [*lses, inputs.attn_sink.expand_as(lses[0])]
    )
    # A key of value 0 is what a sink is to the output; a query without keys keeps 0 either way.
    torch.testing.assert_close(merged.out, sink_as_a_part.out)
    assert not torch.allclose(merged.out, mla_ops.merge_partials(outs, lses).out)
    for infinite, out in ((-torch.inf, mla_ops.merge_partials(outs, lses).out), (torch.inf, torch.zeros_like(outs[0]))):
        torch.testing.assert_close(
            mla_ops.merge_partials(outs, lses, torch.full_like(inputs.attn_sink, infinite)).out, out
        )


def test_an_empty_part_counts_for_nothing_whatever_it_holds() -> None:
    outs, lses, _ = shards(torch.float32, 0, 12)
    poisoned = torch.full_like(outs[0], torch.nan)
    merged = mla_ops.merge_partials([poisoned, *outs], [torch.full_like(lses[0], -torch.inf), *lses])
    assert torch.equal(merged.out, outs[0])
    assert torch.equal(merged.lse, lses[0])


def test_only_empty_parts_are_empty() -> None:
    out, lse = torch.full((3, 4, 16), torch.nan), torch.full((3, 4), -torch.inf)
    for sink in (None, torch.zeros(4)):
        merged = mla_ops.merge_partials([out, out], [lse, lse], sink)
        assert (merged.out == 0).all()
        assert (merged.lse == -torch.inf).all()


def test_a_merge_of_merges_is_the_merge_of_all() -> None:
    outs, lses, inputs = shards(torch.float64, 0, 3, 3, 7, 12)
    left, right = (mla_ops.merge_partials(outs[s], lses[s]) for s in (slice(0, 2), slice(2, 4)))
    nested = mla_ops.merge_partials([left.out, right.out], [left.lse, right.lse], inputs.attn_sink)
    flat = mla_ops.merge_partials(outs, lses, inputs.attn_sink)
    torch.testing.assert_close(nested.out, flat.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nested.lse, flat.lse)


def test_nan_and_a_foreign_plus_infinity_are_loud() -> None:
    outs, lses, _ = shards(torch.float32, 0, 5, 12)
    for poison in (torch.nan, torch.inf):
        lses[0][1, 2, 3] = poison
        merged = mla_ops.merge_partials(outs, lses)
        assert merged.out[1, 2, 3].isnan().all()
        assert merged.out[0].isfinite().all()


def test_large_logits_do_not_overflow() -> None:
    outs = [torch.ones(1, 1, 4), 3 * torch.ones(1, 1, 4)]
    merged = mla_ops.merge_partials(outs, [torch.tensor([[5000.0]]), torch.tensor([[5000.0]])])
    torch.testing.assert_close(merged.out, torch.full((1, 1, 4), 2.0))
    torch.testing.assert_close(merged.lse, torch.tensor([[5000.0 + math.log(2)]]))


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_it_is_one_kernel() -> None:
    outs, lses, inputs = shards(torch.float32, 0, 5, 12)
    code = generated_code(mla_ops.merge_partials, outs, lses, inputs.attn_sink)
    kernels = set(re.findall(r"^ *(cpp_fused\w+)\(", code, re.MULTILINE))
    assert len(kernels) == 1, kernels


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_serves_all_sizes() -> None:
    compiled = torch.compile(mla_ops.merge_partials, fullgraph=True, dynamic=True, backend="eager")
    outs, lses, inputs = shards(torch.float32, 0, 5, 12)
    sink = inputs.attn_sink
    for count in (len(outs[0]), 1):
        parts = [out[:count] for out in outs], [lse[:count] for lse in lses]
        torch.testing.assert_close(compiled(*parts, sink), mla_ops.merge_partials(*parts, sink))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad({"lses": lambda a: a["lses"][:1]}, r"outs and lses must have one tensor of each part, .*got 2 and 1"),
        bad({"outs": lambda a: [], "lses": lambda a: []}, r"at least one, got 0 and 0"),
        bad({"outs": lambda a: [a["outs"][0], None]}, r"outs\[1\] must be a torch.Tensor, got NoneType"),
        bad({"lses": lambda a: [a["lses"][0].half()] * 2}, r"lses\[0\] must be float32, got float16; use .float\(\)"),
        bad({"outs": lambda a: [a["outs"][0], a["outs"][1].half()]}, r"outs\[1\] must have the dtype of outs\[0\]"),
        bad({"lses": lambda a: [x.mT for x in a["lses"]]}, r"lses\[0\] must be outs\[0\] without d_v"),
        bad({"outs": lambda a: [a["outs"][0], a["outs"][1][:1]]}, r"outs\[1\] must have the shape of outs\[0\]"),
        bad(
            {"lses": lambda a: [a["lses"][0], a["lses"][1].to("meta")]}, r"lses\[1\] must be on the device of outs\[0\]"
        ),
        bad({"attn_sink": lambda a: torch.zeros(3)}, r"attn_sink must be \[heads\], got shape \[3\]"),
        bad({"attn_sink": lambda a: torch.zeros(4).double()}, r"attn_sink must be float32, got float64"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    outs, lses, inputs = shards(torch.float32, 0, 5, 12)
    arguments = {"outs": outs, "lses": lses, "attn_sink": inputs.attn_sink}
    with pytest.raises(mla_ops.InvalidInputError, match=message):
        mla_ops.merge_partials(**{**arguments, **{name: make(arguments) for name, make in change.items()}})

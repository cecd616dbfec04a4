"""Bad calls of index selection: each raises the typed error that names the argument, the rule, what came and the fix.

The same words in eager, through the front door and the raw operator, and at trace time; before any work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_errors import Fp8Wrapper, bad, unescaped

import mla_ops
from mla_ops.errors import InvalidInputError, UnknownBackendError
from mla_ops.ops.index_topk.rules import check_index_tensors
from mla_ops.testing import IndexCase, make_index_inputs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CASE = IndexCase(batch=2, seq_q=5, index_heads=4, kv_group=2, seq_kv=11, index_head_dim=24, topk=6)
FP8 = torch.float8_e4m3fn


def good_call(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs = make_index_inputs(CASE, dtype, bounds=True)
    return {**vars(inputs), "causal": True, "relu": True, "backend": "auto"}


# Rules on tensors: front door, raw operator and fake alike.
TENSOR_RULES = [
    bad(
        {"q_idx": lambda a: a["q_idx"][0, 0]},
        r"q_idx must be \[batch, seq_q, index_heads, index_head_dim\] or .*got shape \[4, 24\]",
    ),
    bad({"q_idx": lambda a: a["q_idx"][None]}, r"q_idx must be \[batch, .*got shape \[1, 2, 5, 4, 24\]"),
    bad(
        {"k_idx": lambda a: a["k_idx"][:, :, 0]},
        r"k_idx must have 4 dimensions, \[batch, seq_kv, kv_group, index_head_dim\], got shape \[2, 11, 24\]; if "
        r"kv_group is what it lacks, use k_idx.unsqueeze\(-2\)",
    ),
    bad({"weights": lambda a: a["weights"][0]}, r"weights must have 3 dimensions, \[batch, seq_q, index_heads\], got"),
    bad({"q_idx": lambda a: a["q_idx"].int()}, r"q_idx must be bfloat16, .*got int32; use q_idx.to\(k_idx.dtype\)"),
    bad(
        {"q_idx": lambda a: a["q_idx"].to(torch.uint8)}, r"q_idx must be bfloat16, .*got uint8; dequantise it with its"
    ),
    bad({"q_idx": lambda a: a["q_idx"].to(torch.float8_e5m2)}, r"q_idx must be .* or float8_e4m3fn, got float8_e5m2"),
    bad(
        {"k_idx": lambda a: a["k_idx"].half()},
        r"k_idx must have the dtype of q_idx \(float32\), got float16; use k_idx.to\(q_idx.dtype\)",
    ),
    bad({"k_idx": lambda a: a["k_idx"].to(FP8)}, r"k_idx must have the dtype .*got float8_e4m3fn; quantise both or"),
    bad(
        {"q_idx": lambda a: a["q_idx"].to(FP8)}, r"k_idx must have the dtype of q_idx \(float8_e4m3fn\), got float32; q"
    ),
    bad({"weights": lambda a: a["weights"].half()}, r"weights must be float32, got float16; use weights.float\(\)"),
    bad(
        {
            "q_idx": lambda a: a["q_idx"].half(),
            "k_idx": lambda a: a["k_idx"].half(),
            "weights": lambda a: a["weights"].bfloat16(),
        },
        r"weights must be float32 or the dtype of q_idx \(float16\), got bfloat16",
    ),
    bad({"k_idx": lambda a: a["k_idx"][:1]}, r"size 0 of k_idx must equal the batch of q_idx \(2\), got k_idx shape"),
    bad({"k_idx": lambda a: a["k_idx"][..., :20]}, r"size -1 of k_idx must equal index_head_dim of q_idx \(24\), got"),
    bad({"weights": lambda a: a["weights"][:1]}, r"size 0 of weights must equal the batch of q_idx \(2\)"),
    bad({"weights": lambda a: a["weights"][:, :4]}, r"size -2 of weights must equal seq_q of q_idx \(5\)"),
    bad({"weights": lambda a: a["weights"][..., :3]}, r"size -1 of weights must equal index_heads of q_idx \(4\)"),
    bad(
        {"k_idx": lambda a: a["k_idx"][:, :, :0]},
        r"kv_group \(k_idx.shape\[-2\]\) must be at least 1, got k_idx shape \[2, 11, 0, 24\]",
    ),
    bad(
        {"q_idx": lambda a: a["q_idx"][:, :, :3], "weights": lambda a: a["weights"][..., :3]},
        r"index_heads must be a multiple of kv_group, got index_heads=3 \(q_idx\) and kv_group=2 \(k_idx\)",
    ),
    bad({"topk": lambda a: -1}, r"topk must be at least 0, got -1"),
    *(
        rule
        for name in ("starts", "ends")
        for rule in (
            bad(
                {name: lambda a, n=name: a[n].float()}, rf"{name} must be int32 or int64, got float32; use {name}.to\("
            ),
            bad({name: lambda a, n=name: a[n] > 0}, rf"{name} must be int32 or int64, got bool"),
            bad(
                {name: lambda a, n=name: a[n][None]}, rf"{name} must be \[batch, seq_q\] or \[seq_q\], got shape \[1, 2"
            ),
            bad({name: lambda a, n=name: a[n][:1]}, rf"size 0 of {name} must equal the batch of q_idx \(2\)"),
            bad({name: lambda a, n=name: a[n][:, :3]}, rf"size -1 of {name} must equal seq_q of q_idx \(5\)"),
            bad({name: lambda a, n=name: a[n][0, :3]}, rf"size -1 of {name} must equal seq_q of q_idx \(5\)"),
            bad({name: lambda a, n=name: a[n].to("meta")}, rf"{name} must be on the device of q_idx \(cpu\), got meta"),
        )
    ),
    bad(
        {"k_scale": lambda a: torch.ones(2, 11, 2)},
        r"k_scale must be None unless k_idx is float8_e4m3fn, got one with float32 keys; multiply k_idx by it",
    ),
    bad({"k_idx": lambda a: a["k_idx"].to("meta")}, r"k_idx must be on the device of q_idx \(cpu\), got meta"),
    bad({"backend": lambda a: "tritn"}, r"backend must be one of 'auto', .*'eager'.*got 'tritn'"),
]
# Of calls in e4m3.
FP8_RULES = [
    bad(
        {"k_scale": lambda a: None}, r"k_scale must come with float8_e4m3fn keys, got None; pass ones if they have none"
    ),
    bad({"k_scale": lambda a: a["k_scale"].half()}, r"k_scale must be float32, got float16; use k_scale.float\(\)"),
    bad(
        {"k_scale": lambda a: a["k_scale"][..., 0]}, r"k_scale must have 3 dimensions, \[batch, seq_kv, kv_group\], got"
    ),
    bad(
        {"k_scale": lambda a: a["k_scale"][:, :9]}, r"size 1 of k_scale must equal size 1 of k_idx \(11\), got k_scale"
    ),
    bad({"k_scale": lambda a: a["k_scale"][..., :1]}, r"size 2 of k_scale must equal size 2 of k_idx \(2\)"),
    bad({"weights": lambda a: a["weights"].to(FP8)}, r"weights must be float32, got float8_e4m3fn; use weights.float"),
    bad({"weights": lambda a: a["weights"].bfloat16()}, r"weights must be float32, got bfloat16; use weights.float"),
]
# Rules on Python types: the front door's, because the dispatcher refuses or unwraps before any code of ours runs.
TYPE_RULES = [
    bad({"q_idx": lambda a: a["q_idx"].tolist()}, r"q_idx must be a torch.Tensor, got list"),
    bad({"weights": lambda a: None}, r"weights must be a torch.Tensor, got NoneType"),
    bad({"ends": lambda a: 6}, r"ends must be a torch.Tensor or None, got int"),
    bad({"k_scale": lambda a: 0.5}, r"k_scale must be a torch.Tensor or None, got float"),
    bad({"topk": lambda a: 16.0}, r"topk must be an int, got float; use int\(topk\)"),
    bad({"topk": lambda a: True}, r"topk must be an int, got bool"),
    bad({"causal": lambda a: 1}, r"causal must be a bool, got int; use bool\(causal\)"),
    bad({"relu": lambda a: None}, r"relu must be a bool, got NoneType"),
    bad({"backend": lambda a: None}, r"backend must be a string, got NoneType"),
]


def spoil(change: dict[str, Callable], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    arguments = good_call(dtype)
    return {**arguments, **{name: make(arguments) for name, make in change.items()}}


def front_door(arguments: dict[str, Any]) -> torch.Tensor:
    arguments = dict(arguments)
    tensors = [arguments.pop(name) for name in ("q_idx", "k_idx", "weights", "topk")]
    return mla_ops.index_topk(*tensors, **arguments)


def explain(arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    tensors = [arguments.pop(name) for name in ("q_idx", "k_idx", "weights", "topk")]
    return mla_ops.explain_index_topk(*tensors, **arguments)


def raw_operator(arguments: dict[str, Any]) -> torch.Tensor:
    return torch.ops.mla.index_topk(**arguments)


def eager_error(call: Callable, arguments: dict[str, Any], message: str) -> str:
    is_name = arguments["backend"] == "tritn"
    with pytest.raises(UnknownBackendError if is_name else InvalidInputError, match=message) as info:
        call(arguments)
    assert isinstance(info.value, ValueError)
    return str(info.value)


def traced_error(call: Callable, arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as info:
        torch.compile(call, fullgraph=True, backend="eager", dynamic=False)(arguments)
    return unescaped(str(info.value))


def test_the_good_calls_are_good() -> None:
    for dtype in (torch.float32, FP8):
        assert front_door(good_call(dtype)).shape == (2, 5, 2, 6)
        assert explain(good_call(dtype)).backend is not None


@pytest.mark.parametrize(("change", "message"), TENSOR_RULES)
def test_tensor_rules(change: dict, message: str) -> None:
    words = {eager_error(call, spoil(change), message) for call in (front_door, raw_operator, explain)}
    assert len(words) == 1
    assert words.pop() in traced_error(front_door, spoil(change))


@pytest.mark.parametrize(("change", "message"), FP8_RULES)
def test_rules_of_e4m3(change: dict, message: str) -> None:
    words = eager_error(front_door, spoil(change, FP8), message)
    assert words == eager_error(raw_operator, spoil(change, FP8), message)
    assert words in traced_error(raw_operator, spoil(change, FP8))


@pytest.mark.parametrize(("change", "message"), TYPE_RULES)
def test_type_rules(change: dict, message: str) -> None:
    words = eager_error(front_door, spoil(change), message)
    assert words == eager_error(explain, spoil(change), message)
    assert words in traced_error(front_door, spoil(change))


@pytest.mark.parametrize("name", ["q_idx", "k_idx", "weights"])
def test_sparse_layouts_are_refused(name: str) -> None:
    change = {name: lambda a: a[name].to_sparse()}
    eager_error(front_door, spoil(change), rf"{name} must be a dense \(strided\) tensor, got torch.sparse_coo")


@pytest.mark.parametrize("name", ["q_idx", "k_idx", "weights", "k_scale"])
def test_wrapper_tensors_are_refused_and_never_dequantised(name: str) -> None:
    Fp8Wrapper.dequantised.clear()
    change = {name: lambda a: Fp8Wrapper(torch.ones(2, 11, 2) if name == "k_scale" else a[name])}
    eager_error(front_door, spoil(change), f"{name} must be a plain tensor, got the wrapper subclass Fp8Wrapper")
    assert Fp8Wrapper.dequantised == []


def test_symbolic_topk_is_checked_when_the_graph_runs_or_before() -> None:
    with pytest.raises(RuntimeError, match="topk must be at least 0"):
        torch.compile(front_door, fullgraph=True, backend="eager", dynamic=True)(spoil({"topk": lambda a: -1}))


def test_scores_on_a_list_share_the_rules_and_have_no_e4m3() -> None:
    inputs = make_index_inputs(CASE, FP8)
    with pytest.raises(InvalidInputError, match="q_idx must be bfloat16, float16, float32, float64, got float8_e4m3fn"):
        check_index_tensors(inputs.q_idx, inputs.k_idx, inputs.weights, allow_fp8=False)


def test_no_backend_on_this_device_says_why() -> None:
    arguments = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in good_call().items()}
    decision = explain(arguments)
    assert decision.backend is None
    assert 'pass backend="eager"' in str(decision)

"""Bad calls: each raises the typed error that names the argument, the rule, what arrived and the fix.

The same words in eager, through the front door and the raw operator, and at trace time; before any work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

import mla_ops
from mla_ops.errors import InvalidInputError, UnknownBackendError
from mla_ops.testing import Case, make_inputs

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CASE = Case(batch=2, seq_q=5, heads=4, kv_group=2, seq_kv=11, d_total=24, d_v=16, topk=6)


def good_call() -> dict[str, Any]:
    inputs = make_inputs(CASE, topk_length=True, attn_sink=True)
    return {"q": inputs.q, "kv": inputs.kv, "indices": inputs.indices, **inputs.kwargs, "backend": "auto"}


class Fp8Wrapper(torch.Tensor):
    """What quantised training stacks hand around: says bf16, stores bytes, has no storage, dequantises when asked."""

    dequantised: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Fp8Wrapper:
        wrapper = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)
        wrapper.payload = data
        return wrapper

    def __repr__(self) -> str:
        return "Fp8Wrapper"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.dequantised.append(str(func))
        plain = [a.payload.to(torch.bfloat16) if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


class FlattenableFp8Wrapper(Fp8Wrapper):
    """The same, with the methods torch.compile wants of a wrapper."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["payload"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict, metadata: None, size: Any, stride: Any) -> FlattenableFp8Wrapper:
        return FlattenableFp8Wrapper(inner["payload"])


def bad(change: dict[str, Callable[[dict[str, Any]], Any]], message: str, **marks: Any) -> Any:
    return pytest.param(change, message, id=re.sub(r"[^a-z0-9]+", "-", message.lower())[:60], **marks)


# Rules on tensors: front door, raw operator and fake alike.
TENSOR_RULES = [
    bad({"q": lambda a: a["q"][0, 0]}, r"q must be \[batch, seq_q, heads, d_total\] or .*got shape \[4, 24\]"),
    bad({"q": lambda a: a["q"][None]}, r"q must be \[batch, .*got shape \[1, 2, 5, 4, 24\]"),
    bad({"kv": lambda a: a["kv"][0]}, r"kv must have 4 dimensions, \[batch, seq_kv, kv_group, d_total\], got shape"),
    bad(
        {"kv": lambda a: a["kv"][:, :, 0]},
        r"kv must have 4 dimensions, .*got shape \[2, 11, 24\]; if kv_group is what it lacks, use kv.unsqueeze\(-2\)",
    ),
    bad(
        {"indices": lambda a: a["indices"][:, :, 0]},
        r"indices must have 4 dimensions, .*got shape \[2, 5, 6\]; if kv_group .* use indices.unsqueeze\(-2\)",
    ),
    bad({"indices": lambda a: a["indices"][0, 0]}, r"indices must have 4 dimensions, .*got shape \[2, 6\]$"),
    bad({"topk_length": lambda a: a["topk_length"][0]}, r"topk_length must have 2 dimensions, .*got shape \[5\]"),
    bad({"attn_sink": lambda a: a["attn_sink"][None]}, r"attn_sink must be \[heads\], got shape \[1, 4\]"),
    bad({"q": lambda a: a["q"].int()}, r"q must be bfloat16, float16, float32 or float64, got int32"),
    bad({"q": lambda a: a["q"].to(torch.complex64)}, r"q must be bfloat16, .*got complex64"),
    bad({"q": lambda a: a["q"].to(torch.float8_e4m3fn)}, r"q must be bfloat16, .*got float8_e4m3fn; a payload without"),
    bad(
        {"kv": lambda a: a["kv"].half()}, r"kv must have the dtype of q \(float32\), got float16; use kv.to\(q.dtype\)"
    ),
    bad(
        {"kv": lambda a: a["kv"].to(torch.float8_e5m2)},
        r"kv must have the dtype of q .*got float8_e5m2; dequantise it with its scales",
    ),
    bad(
        {"kv": lambda a: a["kv"].to(torch.int8)},
        r"kv must have the dtype of q \(float32\), got int8; dequantise it with its scales",
    ),
    bad({"kv": lambda a: a["kv"].int()}, r"kv must have the dtype of q \(float32\), got int32; use kv.to\(q.dtype\)"),
    bad({"kv": lambda a: a["kv"] > 0}, r"kv must have the dtype of q \(float32\), got bool; use kv.to\(q.dtype\)"),
    bad(
        {"kv": lambda a: a["indices"], "indices": lambda a: a["kv"]},
        r"kv must have the dtype of q .*got int32; kv and indices look swapped, the order is q, kv, indices",
    ),
    bad(
        {"q": lambda a: a["indices"], "indices": lambda a: a["q"]},
        r"q must be bfloat16, .*got int32; q and indices look swapped, the order is q, kv, indices",
    ),
    bad({"q": lambda a: a["q"].long()}, r"q must be bfloat16, .*got int64; use q.to\(kv.dtype\)"),
    bad({"q": lambda a: a["q"].to(torch.uint8)}, r"q must be bfloat16, .*got uint8; a payload without its scales"),
    bad({"indices": lambda a: a["indices"].float()}, r"indices must be int32 or int64, got float32; use indices.to"),
    bad(
        {"indices": lambda a: a["indices"].float().requires_grad_()},
        r"indices must be int32 or int64, got float32",
    ),
    bad({"indices": lambda a: a["indices"].to(torch.int16)}, r"indices must be int32 or int64, got int16"),
    bad({"indices": lambda a: a["indices"] > 0}, r"indices must be int32 or int64, got bool"),
    bad({"topk_length": lambda a: a["topk_length"].float()}, r"topk_length must be int32 or int64, got float32"),
    bad(
        {"attn_sink": lambda a: a["attn_sink"].double()}, r"attn_sink must be float32, got float64; use attn_sink.float"
    ),
    bad({"attn_sink": lambda a: a["attn_sink"].bfloat16()}, r"attn_sink must be float32, got bfloat16"),
    bad(
        {"kv": lambda a: a["kv"][..., :20]},
        r"size -1 of kv must equal d_total of q \(24\), got kv shape \[2, 11, 2, 20\]",
    ),
    bad({"kv": lambda a: a["kv"][:1]}, r"size 0 of kv must equal the batch of q \(2\), got kv shape \[1, 11, 2, 24\]"),
    bad({"indices": lambda a: a["indices"][:1]}, r"size 0 of indices must equal the batch of q \(2\)"),
    bad(
        {"indices": lambda a: a["indices"][:, :4]}, r"size -3 of indices must equal seq_q of q \(5\), got indices shape"
    ),
    bad({"indices": lambda a: a["indices"][:, :, :1]}, r"size -2 of indices must equal kv_group of kv \(2\)"),
    bad(
        {"kv": lambda a: a["kv"][:, :, :0], "indices": lambda a: a["indices"][:, :, :0]},
        r"kv_group \(kv.shape\[-2\]\) must be at least 1, got kv shape \[2, 11, 0, 24\]",
    ),
    bad(
        {"q": lambda a: a["q"][:, :, :3], "attn_sink": lambda a: None},
        r"heads must be a multiple of kv_group, got heads=3 \(q\) and kv_group=2 \(kv\)",
    ),
    bad({"topk_length": lambda a: a["topk_length"][:1]}, r"size 0 of topk_length must equal the batch of q \(2\)"),
    bad({"topk_length": lambda a: a["topk_length"][:, :3]}, r"size -1 of topk_length must equal seq_q of q \(5\)"),
    bad({"attn_sink": lambda a: a["attn_sink"][:3]}, r"size 0 of attn_sink must equal heads of q \(4\), got attn_sink"),
    bad({"d_v": lambda a: 0}, r"d_v must be at least 1, got 0"),
    bad({"d_v": lambda a: -3}, r"d_v must be at least 1, got -3"),
    bad({"d_v": lambda a: 25}, r"d_v must be at most d_total \(24, the last size of q\), got 25"),
    bad({"softmax_scale": lambda a: math.nan}, r"softmax_scale must be finite, got nan"),
    bad({"softmax_scale": lambda a: -math.inf}, r"softmax_scale must be finite, got -inf"),
    bad({"kv": lambda a: a["kv"].to("meta")}, r"kv must be on the device of q \(cpu\), got meta"),
    bad({"indices": lambda a: a["indices"].to("meta")}, r"indices must be on the device of q \(cpu\), got meta"),
    bad({"attn_sink": lambda a: a["attn_sink"].to("meta")}, r"attn_sink must be on the device of q \(cpu\), got meta"),
    bad({"backend": lambda a: "tritn"}, r"backend must be one of 'auto', .*'eager'.*got 'tritn'"),
]
SPARSE_RULES = [
    bad(
        {"q": lambda a: a["q"].to_sparse()},
        r"q must be a dense \(strided\) tensor, got torch.sparse_coo; use .to_dense",
    ),
    bad({"kv": lambda a: a["kv"].to_sparse()}, r"kv must be a dense \(strided\) tensor, got torch.sparse_coo"),
    bad(
        {"indices": lambda a: a["indices"].to_sparse()}, r"indices must be a dense \(strided\) tensor, got torch.sparse"
    ),
]
# Rules on Python types: the front door's, because the dispatcher refuses or unwraps before any code of ours runs.
TYPE_RULES = [
    bad({"q": lambda a: a["q"].tolist()}, r"q must be a torch.Tensor, got list"),
    bad({"kv": lambda a: None}, r"kv must be a torch.Tensor, got NoneType"),
    bad({"topk_length": lambda a: 6}, r"topk_length must be a torch.Tensor or None, got int"),
    bad({"attn_sink": lambda a: 0.5}, r"attn_sink must be a torch.Tensor or None, got float"),
    bad({"d_v": lambda a: 16.0}, r"d_v must be an int, got float; use int\(d_v\)"),
    bad({"d_v": lambda a: True}, r"d_v must be an int, got bool"),
    bad({"d_v": lambda a: "16"}, r"d_v must be an int, got str"),
    bad({"softmax_scale": lambda a: "0.1"}, r"softmax_scale must be a float, got str"),
    bad(
        {"softmax_scale": lambda a: None},
        r"softmax_scale must be a float, got NoneType; .*: pass \(qk_nope_head_dim \+ qk_rope_head_dim\) \*\* -0.5",
    ),
    bad({"softmax_scale": lambda a: torch.tensor(0.1)}, r"softmax_scale must be a float, got Tensor"),
    bad({"backend": lambda a: None}, r"backend must be a string, got NoneType"),
]
WRAPPERS = [
    bad({"q": lambda a: Fp8Wrapper(a["q"])}, r"q must be a plain tensor, got the wrapper subclass Fp8Wrapper"),
    bad({"kv": lambda a: Fp8Wrapper(a["kv"])}, r"kv must be a plain tensor, got the wrapper subclass Fp8Wrapper"),
    bad({"kv": lambda a: FlattenableFp8Wrapper(a["kv"])}, r"kv must be a plain tensor, .*FlattenableFp8Wrapper"),
]


# The rules of mla::sparse_attn_max_logits are those of mla::sparse_attn for the arguments it takes.
SHARED_RULES = [rule for rule in TENSOR_RULES if "attn_sink" not in rule.values[0]]


def spoil(change: dict[str, Callable]) -> dict[str, Any]:
    arguments = good_call()
    return {**arguments, **{name: make(arguments) for name, make in change.items()}}


def front_door(arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    tensors = [arguments.pop(name) for name in ("q", "kv", "indices")]
    return mla_ops.sparse_attn(*tensors, **arguments)


def raw_operator(arguments: dict[str, Any]) -> Any:
    return torch.ops.mla.sparse_attn(**arguments)


def max_logits_front_door(arguments: dict[str, Any]) -> Any:
    arguments = {name: value for name, value in arguments.items() if name != "attn_sink"}
    tensors = [arguments.pop(name) for name in ("q", "kv", "indices")]
    return mla_ops.sparse_attn_max_logits(*tensors, **arguments)


def raw_max_logits(arguments: dict[str, Any]) -> Any:
    return torch.ops.mla.sparse_attn_max_logits(**{n: value for n, value in arguments.items() if n != "attn_sink"})


def values(arguments: dict[str, Any]) -> list[torch.Tensor]:
    tensors = [a for a in arguments.values() if isinstance(a, torch.Tensor) and a.device.type == "cpu"]
    return [t.detach().to_dense() if t.layout != torch.strided else t.detach().clone() for t in tensors]


def eager_error(call: Callable, change: dict[str, Callable], message: str) -> str:
    arguments = spoil(change)
    expected = (
        UnknownBackendError if "backend" in change and isinstance(arguments["backend"], str) else InvalidInputError
    )
    wrapped = any(isinstance(a, Fp8Wrapper) for a in arguments.values())
    before = [] if wrapped else values(arguments)
    with pytest.raises(expected, match=message) as info:
        call(arguments)
    assert isinstance(info.value, ValueError)
    if not wrapped:
        assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, values(arguments), strict=True))
    return str(info.value)


def test_the_good_call_is_good() -> None:
    assert front_door(good_call()).out.shape == (2, 5, 4, 16)


@pytest.mark.parametrize("call", [front_door, raw_operator])
@pytest.mark.parametrize(("change", "message"), TENSOR_RULES)
def test_tensor_rules_in_eager(change: dict, message: str, call: Callable) -> None:
    eager_error(call, change, message)


@pytest.mark.parametrize("call", [max_logits_front_door, raw_max_logits])
@pytest.mark.parametrize(("change", "message"), SHARED_RULES)
def test_max_logits_refuse_in_the_same_words(change: dict, message: str, call: Callable) -> None:
    assert eager_error(call, change, message) == eager_error(front_door, change, message)


@pytest.mark.parametrize(("change", "message"), [r for r in TYPE_RULES if "attn_sink" not in r.values[0]])
def test_type_rules_of_max_logits(change: dict, message: str) -> None:
    assert eager_error(max_logits_front_door, change, message) == eager_error(front_door, change, message)


def test_max_logits_refuse_at_trace_time_in_the_same_words() -> None:
    change = {"kv": lambda a: a["kv"][..., :20]}
    words = eager_error(front_door, change, "size -1 of kv")
    for call in (max_logits_front_door, raw_max_logits):
        with pytest.raises(RuntimeError) as info:
            torch.compile(call, fullgraph=True, backend="eager", dynamic=False)(spoil(change))
        assert words in unescaped(str(info.value))


@pytest.mark.parametrize(("change", "message"), SPARSE_RULES)
def test_sparse_layouts_are_refused(change: dict, message: str) -> None:
    eager_error(front_door, change, message)


@pytest.mark.parametrize(("change", "message"), TYPE_RULES)
def test_type_rules_in_eager(change: dict, message: str) -> None:
    eager_error(front_door, change, message)


@pytest.mark.parametrize(("change", "message"), TENSOR_RULES + TYPE_RULES)
def test_rules_at_trace_time_in_the_same_words(change: dict, message: str) -> None:
    words = eager_error(front_door, change, message)
    compiled = torch.compile(front_door, fullgraph=True, backend="eager", dynamic=False)
    with pytest.raises(RuntimeError) as info:
        compiled(spoil(change))
    assert words in unescaped(str(info.value))


@pytest.mark.parametrize(("change", "message"), TENSOR_RULES)
def test_rules_of_the_raw_operator_at_trace_time(change: dict, message: str) -> None:
    words = eager_error(raw_operator, change, message)
    with pytest.raises(RuntimeError) as info:
        torch.compile(raw_operator, fullgraph=True, backend="eager", dynamic=False)(spoil(change))
    assert words in unescaped(str(info.value))


def unescaped(text: str) -> str:
    return text.replace("\\'", "'").replace('\\"', '"')


def test_symbolic_sizes_are_refused_at_trace_time() -> None:
    arguments = spoil({"d_v": lambda a: 25})
    with pytest.raises(RuntimeError, match=r"InvalidInputError.*d_v must be at most d_total"):
        torch.compile(front_door, fullgraph=True, backend="eager", dynamic=True)(arguments)


@pytest.mark.parametrize(("change", "message"), WRAPPERS)
def test_wrapper_tensors_are_refused_and_never_dequantised(change: dict, message: str) -> None:
    Fp8Wrapper.dequantised.clear()
    eager_error(front_door, change, message)
    assert Fp8Wrapper.dequantised == []


def test_wrapper_tensors_are_refused_at_trace_time() -> None:
    arguments = spoil({"kv": lambda a: FlattenableFp8Wrapper(a["kv"])})
    with pytest.raises(RuntimeError, match="wrapper subclass FlattenableFp8Wrapper"):
        torch.compile(front_door, fullgraph=True, backend="eager")(arguments)


# The backward operator


@pytest.mark.parametrize(
    ("position", "make", "message"),
    [
        (0, lambda t: t[..., :15], r"size 3 of dout must equal size 3 of the forward's result \(16\), got dout shape"),
        (0, lambda t: t.double(), r"dout must be float32, got float64"),
        (1, lambda t: t[0], r"dlse must have 3 dimensions, \[..., heads\], got shape \[5, 4\]"),
        (1, lambda t: t.bfloat16(), r"dlse must be float32, got bfloat16"),
        (5, lambda t: t[:, :3], r"size 1 of out must equal size 1 of the forward's result \(5\)"),
        (6, lambda t: t.to("meta"), r"lse must be on the device of q \(cpu\), got meta"),
    ],
)
def test_backward_rules(position: int, make: Callable, message: str) -> None:
    inputs = make_inputs(CASE)
    out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    args = [inputs.dout, inputs.dlse, inputs.q, inputs.kv, inputs.indices, out, lse, inputs.d_v, inputs.softmax_scale]
    args[position] = make(args[position])
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.mla.sparse_attn_bwd(*args)
    on_meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    if position != 6:
        with pytest.raises(InvalidInputError, match=message.replace("cpu", "meta")):
            torch.ops.mla.sparse_attn_bwd(*on_meta)

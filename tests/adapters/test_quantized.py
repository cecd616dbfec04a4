"""Quantised wrapper tensors: refused by default, dequantised or fused on request only, opened without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from scaled_calls import ScaledInputs, assert_matches_scaled_oracle
from torch._subclasses import FakeTensorMode

import mla_ops
from mla_ops.adapters.flash_mla import flash_mla_sparse_fwd, sparse_mla
from mla_ops.adapters.quantized import as_scaled
from mla_ops.errors import InvalidInputError, QuantizedInputError
from mla_ops.ops.sparse_attn.call import Scales
from mla_ops.testing import Case, Inputs, make_inputs
from mla_ops.wrappers import is_wrapper

torchao = pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mla_ops[torchao]'")
from torchao.float8.float8_training_tensor import Float8TrainingTensor, hp_tensor_and_scale_to_float8  # noqa: E402
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # noqa: E402
from torchao.quantization import Float8Tensor, PerRow, PerTensor  # noqa: E402

INPUTS = make_inputs(Case(d_total=32, d_v=16, batch=None), torch.bfloat16)
CALL = {"d_v": 16, "softmax_scale": 0.5}


class TeLike(torch.Tensor):
    """Transformer Engine's convention: bytes and an inverse scale, and an unknown operator dequantises everything."""

    dequantised: ClassVar[list[str]] = []
    _fp8_dtype = "DType.kFloat8E4M3"

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> TeLike:
        self = torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16, device=data.device)
        self._scale_inv = (data.abs().amax() / 448).float()
        self._data = (data / self._scale_inv).to(torch.float8_e4m3fn).view(torch.uint8)
        return self

    def __repr__(self) -> str:
        return type(self).__name__

    def dequantize(self) -> torch.Tensor:
        TeLike.dequantised.append("dequantize")
        return (self._data.view(torch.float8_e4m3fn).float() * self._scale_inv).bfloat16()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.dequantize() if isinstance(a, TeLike) else a for a in args]
        return func(*plain, **(kwargs or {}))


class DerivedFromTeLike(TeLike):
    """What a training stack makes of its base class."""


def torchao_inference(t: torch.Tensor) -> torch.Tensor:
    return Float8Tensor.from_hp(t, granularity=PerRow())


def torchao_training(t: torch.Tensor) -> torch.Tensor:
    return hp_tensor_and_scale_to_float8(t, 448 / t.abs().amax().float(), torch.float8_e4m3fn)


QUANTISE = {f.__name__: f for f in (TeLike, DerivedFromTeLike, torchao_inference, torchao_training)}


def of_the_loss(front_door: Callable[..., Any]) -> Callable[..., Any]:
    """Call a front door that takes attention's tensors and the indexer's, of which the latter are plain."""

    def call(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> Any:
        lse = torch.zeros(q.shape[:-1])
        return front_door(q, kv, indices, lse, INPUTS.q, INPUTS.kv, lse, softmax_scale=0.5)

    return call


FRONT_DOORS: dict[str, Callable[..., Any]] = {
    "sparse_attn": lambda q, kv, i: mla_ops.sparse_attn(q, kv, i, **CALL),
    "sparse_attn_max_logits": lambda q, kv, i: mla_ops.sparse_attn_max_logits(q, kv, i, **CALL),
    "warmup": lambda q, kv, i: mla_ops.warmup(q, kv, i, **CALL),
    "explain": lambda q, kv, i: mla_ops.explain(q, kv, i, **CALL),
    "attn_mass": lambda q, kv, i: mla_ops.attn_mass(q, kv, i, torch.zeros(q.shape[:-1]), softmax_scale=0.5),
    "explain_attn_mass": lambda q, kv, i: mla_ops.explain_attn_mass(q, kv, i, torch.zeros(q.shape[:-1])),
    "index_loss": of_the_loss(mla_ops.index_loss),
    "warmup_index_loss": of_the_loss(mla_ops.warmup_index_loss),
    "flash_mla_sparse_fwd": lambda q, kv, i: flash_mla_sparse_fwd(q, kv, i, 0.5, 16),
    "sparse_mla": lambda q, kv, i: sparse_mla(q, kv, i, 0.5, 16),
}
every_class = pytest.mark.parametrize("quantise", QUANTISE.values(), ids=QUANTISE)


@pytest.fixture(autouse=True)
def dequantisations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every dequantisation by any of the classes, however it came about."""
    count = TeLike.dequantised
    count.clear()
    for cls, name in ((Float8Tensor, "dequantize"), (Float8TrainingTensor, "to_original_precision")):
        original = getattr(cls, name)

        def counted(self: torch.Tensor, *args: Any, original: Any = original, **kwargs: Any) -> torch.Tensor:
            count.append(type(self).__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, counted)
    return count


def raw(q: torch.Tensor, kv: torch.Tensor) -> Any:
    return torch.ops.mla.sparse_attn(q, kv, INPUTS.indices, 16, 0.5)


# The front door


@every_class
@pytest.mark.parametrize("call", FRONT_DOORS.values(), ids=FRONT_DOORS)
@pytest.mark.parametrize("argument", ["q", "kv"])
def test_every_front_door_refuses(argument: str, call: Callable, quantise: Callable, dequantisations: list) -> None:
    arguments = {"q": INPUTS.q, "kv": INPUTS.kv}
    arguments[argument] = quantise(arguments[argument])
    name = type(arguments[argument]).__name__
    with pytest.raises(
        QuantizedInputError,
        match=rf"{argument} must be a plain tensor, got the wrapper subclass {name}, .*nothing is dequantised unasked",
    ) as info:
        call(arguments["q"], arguments["kv"], INPUTS.indices)
    assert isinstance(info.value, (ValueError, TypeError))
    assert dequantisations == []


@every_class
def test_dequantize_is_the_wrappers_own_and_happens_once_each(quantise: Callable, dequantisations: list) -> None:
    q, kv = quantise(INPUTS.q), quantise(INPUTS.kv)
    actual = mla_ops.sparse_attn(q, kv, INPUTS.indices, **CALL, quantized="dequantize")
    assert len(dequantisations) == 2
    plain = [t.to_original_precision() if isinstance(t, Float8TrainingTensor) else t.dequantize() for t in (q, kv)]
    expected = mla_ops.sparse_attn(*plain, INPUTS.indices, **CALL)
    assert torch.equal(actual.out, expected.out)
    assert torch.equal(actual.lse, expected.lse)
    mixed = mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL, quantized="dequantize")
    assert torch.equal(mixed.lse, mla_ops.sparse_attn(INPUTS.q, plain[1], INPUTS.indices, **CALL).lse)


def test_dequantize_changes_nothing_for_plain_tensors(dequantisations: list) -> None:
    actual = mla_ops.sparse_attn(*INPUTS.args[:3], **CALL, quantized="dequantize")
    assert torch.equal(actual.out, mla_ops.sparse_attn(*INPUTS.args[:3], **CALL).out)
    assert dequantisations == []


def test_gradients_reach_what_was_quantised() -> None:
    kv = INPUTS.kv.detach().clone().requires_grad_()
    out = mla_ops.sparse_attn(INPUTS.q, torchao_training(kv), INPUTS.indices, **CALL, quantized="dequantize").out
    out.float().sum().backward()
    plain = torchao_training(INPUTS.kv).to_original_precision().requires_grad_()
    mla_ops.sparse_attn(INPUTS.q, plain, INPUTS.indices, **CALL).out.float().sum().backward()
    assert torch.equal(kv.grad, plain.grad)


def test_other_values_of_quantized_raise() -> None:
    for value in ("fp8", "", None, True):
        with pytest.raises(InvalidInputError, match=r'quantized must be "error", "dequantize" or "fused", got '):
            mla_ops.sparse_attn(*INPUTS.args[:3], **CALL, quantized=value)


@pytest.mark.parametrize("quantized", ["error", "dequantize", "fused"])
def test_what_is_no_tensor_is_refused_either_way(quantized: str) -> None:
    with pytest.raises(InvalidInputError, match=r"q must be a torch\.Tensor, got list"):
        mla_ops.sparse_attn([1], INPUTS.kv, INPUTS.indices, **CALL, quantized=quantized)


def test_a_wrapper_without_a_way_back_is_refused_either_way() -> None:
    class Opaque(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError("reached")

    kv = torch.Tensor._make_wrapper_subclass(Opaque, INPUTS.kv.shape, dtype=torch.bfloat16)
    for quantized in ("error", "dequantize"):
        with pytest.raises(InvalidInputError, match=r"wrapper subclass Opaque, .*convert it yourself first") as info:
            mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL, quantized=quantized)
        assert not isinstance(info.value, QuantizedInputError)


def test_what_is_no_quantised_wrapper_passes() -> None:
    class Named(torch.Tensor):
        pass

    named = INPUTS.kv.clone().as_subclass(Named)
    for kv in (torch.nn.Parameter(INPUTS.kv.clone()), named, torch.nn.Buffer(INPUTS.kv.clone()), INPUTS.kv[:0]):
        assert mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL).out.shape == (5, 4, 16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in INPUTS.args[:3]]
        assert mla_ops.sparse_attn(*fakes, **CALL).out.shape == (5, 4, 16)
    from torch.distributed.tensor import DTensor

    assert not is_wrapper(DTensor)


def test_compiled_front_door_refuses_and_dequantises_as_eager_does() -> None:
    kv = torchao_inference(INPUTS.kv)

    def call(kv: torch.Tensor, quantized: str) -> torch.Tensor:
        return mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL, quantized=quantized).out

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(kv, "dequantize"), call(kv, "dequantize"))
    with pytest.raises(RuntimeError, match="wrapper subclass Float8Tensor"):
        compiled(kv, "error")


# The fused path


def wrapped(inputs: Inputs, quantise: Callable, is_q_too: bool) -> ScaledInputs:
    """Return the parts of what `quantise` makes, and what they stand for."""
    (q, q_scale), kv = (inputs.q, None), as_scaled(quantise(inputs.kv))
    if is_q_too:
        q, q_scale, _ = vars(as_scaled(quantise(inputs.q))).values()
    return ScaledInputs(inputs, q, kv.data, Scales(q_scale, kv.scale, inputs.q.dtype))


@every_class
@pytest.mark.parametrize("is_q_too", [False, True], ids=["kv", "q and kv"])
@pytest.mark.parametrize("way", ["front door", "raw"])
def test_fused_is_the_reference_on_real_numbers(
    way: str, is_q_too: bool, quantise: Callable, dequantisations: list
) -> None:
    inputs = make_inputs(Case(d_total=32, d_v=16, batch=None), torch.bfloat16, topk_length=True, attn_sink=True)
    sink = inputs.attn_sink.clone().requires_grad_()
    kv = quantise(inputs.kv).requires_grad_()
    q = (quantise(inputs.q) if is_q_too else inputs.q.clone()).requires_grad_()
    constants = {**inputs.kwargs, "attn_sink": sink}
    if way == "front door":
        out, lse = mla_ops.sparse_attn(q, kv, inputs.indices, **constants, quantized="fused")
    else:
        with fused(type(kv)):
            out, lse = torch.ops.mla.sparse_attn(q, kv, inputs.indices, *constants.values())
            torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    if way == "front door":
        torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    assert dequantisations == []
    assert (q.grad.dtype, kv.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert type(q.grad) is type(kv.grad) is torch.Tensor
    actual = {"out": out, "lse": lse, "dq": q.grad, "dkv": kv.grad, "dsink": sink.grad}
    assert_matches_scaled_oracle(actual, wrapped(inputs, quantise, is_q_too))


@contextmanager
def fused(cls: type) -> Iterator[None]:
    mla_ops.fuse_wrapper(cls)
    try:
        yield
    finally:
        mla_ops.refuse_wrapper(cls)


def test_fused_gradients_reach_what_was_quantised(dequantisations: list) -> None:
    latent = INPUTS.kv.detach().clone().requires_grad_()
    out = mla_ops.sparse_attn(INPUTS.q, torchao_training(latent), INPUTS.indices, **CALL, quantized="fused").out
    out.float().sum().backward()
    kv = torchao_training(INPUTS.kv).requires_grad_()
    mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL, quantized="fused").out.float().sum().backward()
    assert torch.equal(latent.grad, kv.grad)
    assert dequantisations == []


@pytest.mark.parametrize("way", ["front door", "raw"])
def test_fused_saves_half_of_the_bytes(way: str) -> None:
    q, kv = INPUTS.q.clone().requires_grad_(), torchao_inference(INPUTS.kv)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), fused(Float8Tensor):
        if way == "raw":
            raw(q, kv)
        else:
            mla_ops.sparse_attn(q, kv, INPUTS.indices, **CALL, quantized="fused")
    (of_kv,) = (t for t in saved if t.shape == kv.shape)
    payload = of_kv.qdata if way == "raw" else of_kv
    assert payload.data_ptr() == kv.qdata.data_ptr()
    assert payload.nbytes * 2 == INPUTS.kv.nbytes


@pytest.mark.parametrize("quantise", [torchao_inference, torchao_training])
def test_fused_traces_into_one_graph(quantise: Callable) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(graph.code)
        return make_boxed_func(graph)

    def gradients(call: Callable) -> list[torch.Tensor]:
        q, kv = INPUTS.q.clone().requires_grad_(), quantise(INPUTS.kv).requires_grad_()
        out = call(q, kv)
        out.float().sum().backward()
        return [out, q.grad, kv.grad]

    compiled = torch.compile(fused_out, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    for actual, expected in zip(gradients(compiled), gradients(fused_out), strict=True):
        assert torch.equal(actual, expected)
    forward, backward = graphs
    assert ("sparse_attn_scaled.default" in forward, "sparse_attn_scaled_bwd.default" in backward) == (True, True)
    assert "_to_copy" not in forward  # nothing is dequantised on the way


def test_fused_needs_a_class_that_torch_can_trace() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="TeLike"):
        torch.compile(fused_out, fullgraph=True, backend="aot_eager")(INPUTS.q, TeLike(INPUTS.kv))


def fused_out(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    return mla_ops.sparse_attn(q, kv, INPUTS.indices, **CALL, quantized="fused").out


def test_fused_without_autograd() -> None:
    expected = mla_ops.sparse_attn(INPUTS.q, TeLike(INPUTS.kv), INPUTS.indices, **CALL, quantized="fused")
    TeLike.dequantised.clear()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            actual = mla_ops.sparse_attn(INPUTS.q, TeLike(INPUTS.kv), INPUTS.indices, **CALL, quantized="fused")
        assert torch.equal(actual.out, expected.out)
    assert TeLike.dequantised == []


def test_fused_under_torch_func(dequantisations: list) -> None:
    kv = torchao_inference(INPUTS.kv)
    leaves = [INPUTS.q.clone().requires_grad_(), torchao_inference(INPUTS.kv).requires_grad_()]
    fused_out(*leaves).float().sum().backward()
    gradient = torch.func.grad(lambda q: fused_out(q, kv).float().sum())(INPUTS.q)
    assert torch.equal(gradient, leaves[0].grad)
    with fused(Float8Tensor):  # a transform hides what it differentiates from the front door
        gradient = torch.func.grad(lambda kv: fused_out(INPUTS.q, kv).float().sum())(kv)
    assert torch.equal(gradient, leaves[1].grad)
    assert dequantisations == []


def test_fused_under_autocast(dequantisations: list) -> None:
    kv = Float8Tensor.from_hp(INPUTS.kv.float(), granularity=PerRow())
    assert kv.dtype == torch.float32
    with pytest.raises(
        InvalidInputError, match=r"kv must have the dtype of q \(bfloat16\), got float32; quantise both"
    ):
        mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL, quantized="fused")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = mla_ops.sparse_attn(INPUTS.q.float(), kv, INPUTS.indices, **CALL, quantized="fused")
    assert actual.out.dtype == torch.bfloat16
    data, scale, _ = vars(as_scaled(kv)).values()
    op = torch.ops.mla.sparse_attn_scaled
    expected, _ = op(INPUTS.q, None, data, scale, INPUTS.indices, 16, 0.5, torch.bfloat16)
    assert torch.equal(actual.out, expected)
    assert dequantisations == []


def test_fused_changes_nothing_for_plain_tensors() -> None:
    actual = mla_ops.sparse_attn(*INPUTS.args[:3], **CALL, quantized="fused")
    assert torch.equal(actual.out, mla_ops.sparse_attn(*INPUTS.args[:3], **CALL).out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: spoiled(_fp8_dtype="DType.kFloat8E5M2"),
            "kv must hold an e4m3 payload .*quantise q and kv to torch.f",
        ),
        (lambda: spoiled(_data=None), "kv must hold its payload, .*_data is None; quantise it row-wise"),
        (
            lambda: spoiled(_scale_inv=torch.ones(24, 1, 2)),
            r"kv must have one float32 scale .*; quantise it per row or",
        ),
        (lambda: spoiled(_scale_inv=torch.ones(24, 1)), r"kv must have one float32 scale or one per row, .*\[24, 1\]"),
        (lambda: MXTensor.to_mx(INPUTS.kv.contiguous(), torch.float8_e4m3fn, 32), "kv must have one float32 scale or"),
    ],
    ids=["e5m2", "transposed only", "blocks", "wrong shape", "mx"],
)
@pytest.mark.parametrize("way", ["front door", "raw"])
def test_fused_refuses_what_it_cannot_read(way: str, make: Callable[[], torch.Tensor], message: str) -> None:
    kv = make()
    call = raw if way == "raw" else fused_out
    with fused(type(kv)), pytest.raises(QuantizedInputError, match=message):
        call(INPUTS.q, kv)


# Raw operator calls


def test_a_raw_call_dequantises_silently_until_its_class_is_refused(dequantisations: list) -> None:
    class Unnamed(TeLike):
        pass

    raw(INPUTS.q, Unnamed(INPUTS.kv))
    assert len(dequantisations) == 1  # the trap: nobody asked for it
    dequantisations.clear()
    mla_ops.refuse_wrapper(Unnamed)
    mla_ops.refuse_wrapper(Unnamed)  # again is nothing new
    out, lse = raw(INPUTS.q, INPUTS.kv)
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "kv": lambda w: raw(INPUTS.q, w),
        "q": lambda w: torch.ops.mla.sparse_attn_max_logits(w, INPUTS.kv, INPUTS.indices, d_v=16, softmax_scale=0.5),
        "dout": lambda w: torch.ops.mla.sparse_attn_bwd(
            w, None, INPUTS.q, INPUTS.kv, INPUTS.indices, out, lse, 16, 0.5
        ),
    }
    for name, call in calls.items():
        tensor = INPUTS.dout if name == "dout" else getattr(INPUTS, name)
        with pytest.raises(QuantizedInputError, match=f"{name} must be a plain tensor, got the wrapper subclass Unn"):
            call(Unnamed(tensor))
    with pytest.raises(QuantizedInputError, match="kv must be a plain tensor"):
        raw(INPUTS.q.detach().requires_grad_(), Unnamed(INPUTS.kv))
    assert dequantisations == []


def test_a_refusal_is_for_one_exact_class(dequantisations: list) -> None:
    class Base(TeLike):
        pass

    class Derived(Base):
        pass

    mla_ops.refuse_wrapper(Base)
    raw(INPUTS.q, Derived(INPUTS.kv))
    assert len(dequantisations) == 1
    dequantisations.clear()
    mla_ops.refuse_wrapper(Derived)
    with pytest.raises(QuantizedInputError):
        raw(INPUTS.q, Derived(INPUTS.kv))
    assert dequantisations == []


@pytest.mark.parametrize("quantise", [torchao_inference, torchao_training])
def test_raw_calls_with_torchao_tensors_are_refused_in_our_words(quantise: Callable, dequantisations: list) -> None:
    kv = quantise(INPUTS.kv)
    mla_ops.refuse_wrapper(type(kv))
    with pytest.raises(QuantizedInputError, match=f"kv must be a plain tensor, .*{type(kv).__name__}"):
        raw(INPUTS.q, kv)
    assert dequantisations == []


def test_only_wrapper_classes_can_be_named() -> None:
    for cls in (torch.Tensor, torch.nn.Parameter, int, "Float8Tensor"):
        for name in (mla_ops.refuse_wrapper, mla_ops.fuse_wrapper):
            with pytest.raises(InvalidInputError, match="classes must be tensor subclasses with a __torch_dispatch__"):
                name(cls)


def test_the_last_rule_for_a_class_holds(dequantisations: list) -> None:
    class Named(TeLike):
        pass

    class Other(TeLike):
        pass

    kv = Named(INPUTS.kv)
    mla_ops.refuse_wrapper(Named, Other)
    mla_ops.fuse_wrapper(Named)
    expected = mla_ops.sparse_attn(INPUTS.q, kv, INPUTS.indices, **CALL, quantized="fused").out
    assert torch.equal(raw(INPUTS.q, kv)[0], expected)
    with torch.inference_mode():
        assert torch.equal(raw(INPUTS.q, kv)[0], expected)
    with pytest.raises(QuantizedInputError, match="q must be a plain tensor, got the wrapper subclass Other"):
        raw(Other(INPUTS.q), kv)
    with pytest.raises(QuantizedInputError, match="kv must be a plain tensor, got the wrapper subclass Named"):
        torch.ops.mla.sparse_attn_max_logits(INPUTS.q, kv, INPUTS.indices, 16, 0.5)
    with pytest.raises(InvalidInputError, match=r"kv must have the dtype of q \(float32\), got bfloat16"):
        raw(INPUTS.q.float(), kv)
    mla_ops.refuse_wrapper(Named)
    with pytest.raises(QuantizedInputError, match="kv must be a plain tensor"):
        raw(INPUTS.q, kv)
    assert dequantisations == []


# as_scaled


@pytest.mark.parametrize(
    ("quantise", "payload", "is_per_row"),
    [
        (TeLike, "_data", False),
        (DerivedFromTeLike, "_data", False),
        (torchao_inference, "qdata", True),
        (lambda t: Float8Tensor.from_hp(t, granularity=PerTensor()), "qdata", False),
        (torchao_training, "_data", False),
    ],
    ids=["te-like", "derived", "torchao-row", "torchao-tensor", "torchao-training"],
)
def test_as_scaled_shares_the_payload_and_means_the_same_numbers(
    quantise: Callable, payload: str, is_per_row: bool, dequantisations: list
) -> None:
    wrapper = quantise(INPUTS.kv)
    scaled = as_scaled(wrapper)
    assert dequantisations == []
    assert scaled.data.data_ptr() == getattr(wrapper, payload).data_ptr()
    assert type(scaled.data) is type(scaled.scale) is torch.Tensor
    assert (scaled.data.dtype, scaled.data.shape) == (torch.float8_e4m3fn, INPUTS.kv.shape)
    assert (scaled.logical_dtype, scaled.is_per_row) == (torch.bfloat16, is_per_row)
    own = wrapper.to_original_precision() if isinstance(wrapper, Float8TrainingTensor) else wrapper.dequantize()
    torch.testing.assert_close(scaled.dequantize(), own)
    assert (scaled.dequantize() - INPUTS.kv).abs().max() <= INPUTS.kv.abs().max() / 16  # e4m3 keeps 3 bits


def spoiled(**attributes: Any) -> torch.Tensor:
    wrapper = TeLike(INPUTS.kv)
    for name, value in attributes.items():
        setattr(wrapper, name, value)
    return wrapper


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: INPUTS.kv, r"must hold a payload and a scale named as one of \(qdata, scale\), .*got Tensor"),
        (lambda: spoiled(_data=None), r"got TeLike whose _data is None; quantise it row-wise"),
        (lambda: spoiled(_scale_inv=None), r"got TeLike whose _scale_inv is None; quantise it with a float32 scale"),
        (lambda: spoiled(_fp8_dtype="DType.kFloat8E5M2"), r"must hold an e4m3 payload .*with torch.uint8"),
        (lambda: spoiled(_data=torch.zeros(3, dtype=torch.float8_e4m3fn)), r"of its own shape \[24, 1, 32\], .*\[3\]"),
        (lambda: spoiled(_scale_inv=torch.ones(2)), r"one float32 scale or one per row, .*torch.float32 \[2\]"),
        (lambda: spoiled(_scale_inv=torch.ones((), dtype=torch.float16)), r"one float32 scale .*torch.float16"),
        (
            lambda: Float8Tensor.from_hp(INPUTS.kv, float8_dtype=torch.float8_e5m2),
            r"must hold an e4m3 payload .*got Float8Tensor with torch.float8_e5m2",
        ),
    ],
)
def test_as_scaled_refuses_what_it_cannot_mean(make: Callable[[], torch.Tensor], message: str) -> None:
    with pytest.raises(QuantizedInputError, match=message):
        as_scaled(make())


def test_as_scaled_warns_once_of_an_untested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_ops import scaled_tensors

    scaled_tensors._warn_if_untested.cache_clear()
    monkeypatch.setattr(torchao, "__version__", "0.99.1")
    wrapper = torchao_inference(INPUTS.kv)
    with pytest.warns(RuntimeWarning, match=r"torchao 0.99.1, which is not tested; tested: torchao 0.18"):
        as_scaled(wrapper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_scaled(wrapper)
    scaled_tensors._warn_if_untested.cache_clear()

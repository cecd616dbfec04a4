"""`mla::sparse_attn_scaled` on the CPU: payloads of e4m3 with scales mean the reference on `payload * scale`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_gpu import H100_TRAITS
from scaled_calls import KINDS, Kind, ScaledInputs, assert_matches_scaled_oracle, run_scaled
from torch.utils._python_dispatch import TorchDispatchMode

from mla_ops.device import DeviceTraits
from mla_ops.errors import DoubleBackwardError, InvalidInputError
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import SCALED_FORMAT, Gradients, Hints, Results, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.eager import EagerBackend
from mla_ops.ops.sparse_attn.triton.kernel_sets import choose
from mla_ops.testing import Case, make_inputs

SMALL = Case(d_total=24, d_v=16, heads=6, kv_group=3)
every_kind = pytest.mark.parametrize(("q_kind", "kv_kind"), KINDS, ids=lambda kind: kind)


def scaled(q_kind: Kind = "plain", kv_kind: Kind = "row", case: Case = SMALL, **options: Any) -> ScaledInputs:
    options = {"dtype": torch.bfloat16, "topk_length": True, "attn_sink": True, **options}
    return ScaledInputs.of(make_inputs(case, **options), q_kind, kv_kind)


@every_kind
@pytest.mark.parametrize("case", [SMALL, Case(d_total=72, d_v=64, heads=3, batch=None, topk=33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_matches_the_reference_on_real_numbers(q_kind: Kind, kv_kind: Kind, case: Case, dtype: torch.dtype) -> None:
    inputs = scaled(q_kind, kv_kind, case, dtype=dtype)
    actual = run_scaled(inputs)
    assert {actual[name].dtype for name in ("out", "dq", "dkv")} == {dtype}
    assert_matches_scaled_oracle(actual, inputs)


def test_unselected_rows_may_hold_anything() -> None:
    inputs = scaled("plain", "row", index_dtype=torch.int64)
    used = SMALL.seq_kv // 2
    inputs = replace(inputs, plain=replace(inputs.plain, indices=inputs.plain.indices.clamp_max(used - 1)))
    expected = run_scaled(inputs)
    inputs.kv.view(torch.uint8)[:, used:] = 0x7F  # NaN
    inputs.scales.kv[:, used:] = float("nan")
    for name, value in run_scaled(inputs).items():
        assert torch.equal(value, expected[name]), name


def test_scales_are_any_numbers() -> None:
    inputs = scaled("row", "row", dtype=torch.float32)
    inputs.scales.kv[:, 0] = 0.0
    inputs.scales.kv[:, 1] *= -1
    inputs.scales.kv[:, 2] *= 1e-20
    inputs.scales.q[:, 1] *= -1
    inputs.scales.q[:, 2] = 0.0
    assert_matches_scaled_oracle(run_scaled(inputs), inputs)


def test_a_scale_or_a_code_that_is_nan_reaches_the_queries_that_select_it() -> None:
    plain = scaled(topk_length=False, invalid=False).plain
    indices = torch.zeros_like(plain.indices)
    indices[:, 0] = 1
    for spoil in ("code", "scale"):
        inputs = ScaledInputs.of(replace(plain, indices=indices), "plain", "row")
        if spoil == "code":
            inputs.kv.view(torch.uint8)[:, 1, :, 0] = 0x7F
        else:
            inputs.scales.kv[:, 1] = float("nan")
        out = run_scaled(inputs)["out"]
        assert out[:, 0].isnan().any()
        assert not out[:, 1:].isnan().any()


class Outputs(TorchDispatchMode):
    """Collects what every operator of torch returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [t for t in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(t)]
        return result


def test_no_dequantised_copy_of_kv_is_ever_made() -> None:
    inputs = scaled("plain", "row", Case(d_total=32, d_v=16, seq_kv=4096, seq_q=2, topk=8, batch=1))
    backend = EagerBackend()
    with Outputs() as outputs:
        out, lse = backend.forward(inputs.call, None, inputs.scales)
        gradients = Gradients(inputs.plain.dout, inputs.plain.dlse)
        dq, _, _ = backend.backward(inputs.call, Results(out, lse), gradients, Wanted(dkv=False), None, inputs.scales)
    assert dq.isfinite().all()
    largest = max((t for t in outputs.seen if t.dtype != inputs.kv.dtype), key=lambda t: t.numel())
    assert largest.numel() < inputs.kv.numel() // 16


def test_autograd_saves_the_payload() -> None:
    inputs = scaled("plain", "row")
    q = inputs.q.clone().requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, lse = torch.ops.mla.sparse_attn_scaled(q, *inputs.args[1:])
    pointers = [t.data_ptr() for t in saved if t.shape == inputs.kv.shape]
    assert pointers == [inputs.kv.data_ptr()]
    torch.autograd.backward([out, lse], [inputs.plain.dout, inputs.plain.dlse])
    assert torch.equal(q.grad, run_scaled(inputs)["dq"])


def test_it_is_differentiable_once() -> None:
    inputs = scaled("plain", "row")
    q = inputs.q.clone().requires_grad_()
    out, _ = torch.ops.mla.sparse_attn_scaled(q, *inputs.args[1:])
    (dq,) = torch.autograd.grad(out.float().sum(), q, create_graph=True)
    with pytest.raises(DoubleBackwardError, match=r"mla::sparse_attn_scaled is .*\.sparse_attn_reference"):
        dq.float().sum().backward()


def test_transforms() -> None:
    inputs = scaled("plain", "row")
    op, rest = torch.ops.mla.sparse_attn_scaled, inputs.args[4:8]
    expected, _ = op(*inputs.tensors, *rest)

    def one(q: torch.Tensor, kv: torch.Tensor, kv_scale: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return op(q, None, kv, kv_scale, indices, *rest[1:])[0]

    batched = (inputs.q, inputs.kv, inputs.scales.kv, inputs.plain.indices)
    assert torch.equal(torch.vmap(one)(*batched), expected)
    gradient = torch.func.grad(lambda q: one(q, *batched[1:]).float().sum())(inputs.q)
    leaf = inputs.q.clone().requires_grad_()
    one(leaf, *batched[1:]).float().sum().backward()
    assert torch.equal(gradient, leaf.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = op(inputs.q.float(), *inputs.tensors[1:], *rest[:3], torch.float32)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_opcheck(which: str) -> None:
    inputs = scaled("plain", "row")
    # Without the test of the schema, which compares arguments before and after: torch compares no e4m3 on the CPU.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if which == "forward":
        q = inputs.q.clone().requires_grad_()
        torch.library.opcheck(torch.ops.mla.sparse_attn_scaled.default, (q, *inputs.args[1:]), test_utils=tests)
        return
    out, lse = torch.ops.mla.sparse_attn_scaled(*inputs.args)
    bwd = torch.ops.mla.sparse_attn_scaled_bwd.default
    torch.library.opcheck(bwd, inputs.bwd_args(out, lse), test_utils=tests)


def without_scales(inputs: ScaledInputs) -> tuple[Any, ...]:
    return (inputs.plain.q, None, inputs.plain.kv, None, *inputs.args[4:])


def with_(**changes: Any) -> Callable[[ScaledInputs], tuple[Any, ...]]:
    names = ("q", "q_scale", "kv", "kv_scale", "indices", "d_v", "softmax_scale", "dtype")

    def change(inputs: ScaledInputs) -> tuple[Any, ...]:
        return tuple({**dict(zip(names, inputs.args, strict=False)), **changes}.values())

    return change


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (without_scales, "q_scale or kv_scale must be given, got neither; plain tensors are for mla::sparse_attn"),
        (with_(dtype=torch.float32), r"q must have dtype \(float32\) where it has no scale, got bfloat16"),
        (with_(dtype=torch.int32), "dtype must be bfloat16, float16, float32 or float64, got int32"),
        (with_(kv=torch.zeros(2, 24, 3, 24)), "kv must be float8_e4m3fn where it has a scale, got float32"),
        (with_(kv=torch.zeros(2, 24, 3, 24).to(torch.float8_e5m2)), "kv must be float8_e4m3fn .*got float8_e5m2"),
        (with_(kv_scale=torch.ones(2, 24, 3, 1, dtype=torch.bfloat16)), "kv_scale must be float32, got bfloat16"),
        (with_(kv_scale=torch.ones(2, 24, 3)), r"kv_scale must have 4 dimensions, .*got shape \[2, 24, 3\]"),
        (with_(kv_scale=torch.ones(2, 24, 1, 1)), r"size 2 of kv_scale must equal that of kv"),
        (with_(kv_scale=torch.ones(2, 24, 3, 2)), r"size 3 of kv_scale must equal .*\(1\)"),
        (with_(kv_scale=torch.ones(2, 24, 3, 1, device="meta")), r"kv_scale must be on the device of q \(cpu\), got"),
        (with_(d_v=25), r"d_v must be at most d_total \(24"),
    ],
)
def test_errors_name_the_argument(arguments: Callable[[ScaledInputs], tuple[Any, ...]], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        torch.ops.mla.sparse_attn_scaled(*arguments(scaled("plain", "row")))


def test_a_payload_takes_no_gradient() -> None:
    inputs = scaled("plain", "row")
    kv = inputs.kv.detach().requires_grad_()
    with pytest.raises(InvalidInputError, match="kv must not require grad where it has a scale, got float8_e4m3fn"):
        torch.ops.mla.sparse_attn_scaled(inputs.q, None, kv, *inputs.args[3:])


def test_dispatch_knows_the_format() -> None:
    inputs = scaled("row", "row")
    problem = SparseAttnProblem.of(inputs.call, scales=inputs.scales, needs_grad=True)
    h100 = DeviceTraits("cuda", 90, 232448, 132, 50 << 20)
    assert "bf16 q_format=e4m3 kv_format=e4m3" in str(problem)
    assert select(problem, h100).backend.name == "triton"
    decision = select(replace(problem, dtype=torch.float16), h100)
    assert decision.backend is None
    assert "needs bf16 where rows are e4m3" in str(decision)


def test_symbolic_lengths_make_one_graph() -> None:
    counts = []

    def backend(graph: Any, _: Any) -> Any:
        counts.append(graph)
        return graph

    compiled = torch.compile(torch.ops.mla.sparse_attn_scaled, fullgraph=True, dynamic=True, backend=backend)
    for seq in (5, 7, 9):
        inputs = scaled("plain", "row", replace(SMALL, seq_q=seq, seq_kv=10 * seq))
        assert torch.equal(compiled(*inputs.args)[0], torch.ops.mla.sparse_attn_scaled(*inputs.args)[0])
    assert len(counts) == 1


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("formats", [(SCALED_FORMAT, "dense"), ("dense", SCALED_FORMAT)])
def test_payloads_of_wide_rows_are_for_the_portable_kernels(heads: int, formats: tuple[str, str]) -> None:
    kv_format, q_format = formats
    problem = SparseAttnProblem(576, 512, 2048, heads, 1, torch.bfloat16, kv_format=kv_format, q_format=q_format)
    hints = Hints(batch=64, seq_q=1, seq_kv=2**17)
    assert choose("forward", problem, hints, H100_TRAITS).kernels.name == "portable"
    plain = replace(problem, kv_format="dense", q_format="dense")
    assert choose("forward", plain, hints, H100_TRAITS).kernels.name != "portable"

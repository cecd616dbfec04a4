"""The indexer's loss over all eligible keys: values and gradients against fp64, bounds, memory, graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from no_host_reads import NoHostReads
from strided_tensors import padded, transposed
from test_errors import bad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mla_ops
from mla_ops.ops.index_loss_dense import eager
from mla_ops.reference import index_loss_dense_reference
from mla_ops.testing import IndexCase, assert_within_budget, make_index_inputs, make_loss_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SMALL = IndexCase(index_heads=4, index_head_dim=16, seq_q=9, seq_kv=12, kv_group=2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NAMES = ("loss", "dq", "dk", "dw")


def good_call(
    case: IndexCase = SMALL, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> dict[str, Any]:
    inputs = make_loss_inputs(case, dtype, device, invalid=False)
    bounds = make_index_inputs(case, device=device, bounds=True)
    generator = torch.Generator().manual_seed(3)
    return {
        "q": inputs.q,
        "k": inputs.kv,
        "lse": inputs.lse,
        "q_idx": inputs.q_idx,
        "k_idx": inputs.k_idx,
        "weights": inputs.weights,
        "row_weight": torch.rand(*case.lead, case.seq_q, generator=generator).to(device),
        "softmax_scale": inputs.softmax_scale,
        "starts": bounds.starts,
        "ends": bounds.ends,
        **options,
    }


def run(call: dict[str, Any], function: Any = mla_ops.index_loss_dense, dloss: float = 1.0) -> dict[str, torch.Tensor]:
    leaves = {name: call[name].detach().clone().requires_grad_() for name in ("q_idx", "k_idx", "weights")}
    loss = function(**{**call, **leaves})
    return dict(zip(NAMES, (loss.detach(), *torch.autograd.grad(loss * dloss, list(leaves.values()))), strict=True))


def in_dtype(call: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floats = ("q", "k", "q_idx", "k_idx", "weights")
    return {name: value.to(dtype) if name in floats else value for name, value in call.items()}


def check(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    actual = run(call)
    oracle = run(in_dtype(call, torch.float64), index_loss_dense_reference)
    low = run(in_dtype(call, call["q_idx"].dtype), index_loss_dense_reference)
    for name in NAMES:
        plain = oracle if name == "loss" else low
        assert_within_budget(actual[name], oracle[name], plain[name], terms=64 * 64, name=name)
    return actual


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("workspace", [192 * 2**20, 4000], ids=["one-strip", "many-strips"])
def test_matches_fp64(workspace: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_WORKSPACE_BYTES", workspace)
    results = check(good_call(SMALL, dtype, device))
    assert results["loss"].shape == ()
    assert results["loss"].dtype == torch.float32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bounds", ["none", "shared", "each"])
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, batch=None), replace(SMALL, seq_q=15, kv_group=1)], ids=str)
def test_options_match_fp64(case: IndexCase, bounds: str, relu: bool, causal: bool) -> None:
    call = good_call(case, causal=causal, relu=relu)
    if bounds == "none":
        call |= {"starts": None, "ends": None}
    elif bounds == "shared" and case.batch is not None:
        call |= {"starts": call["starts"][0].long(), "ends": call["ends"][0].long()}
    check(call)


def test_weights_of_rows_and_groups_and_what_arrives() -> None:
    call = good_call(SMALL, torch.float64)
    each = torch.rand(2, 9, 2)
    whole = run({**call, "row_weight": each}, dloss=3.0)
    expected = run(in_dtype({**call, "row_weight": each}, torch.float64), index_loss_dense_reference, dloss=3.0)
    torch.testing.assert_close(whole["loss"].double(), expected["loss"], rtol=1e-6, atol=1e-6)
    for name in NAMES[1:]:
        torch.testing.assert_close(whole[name], expected[name])


def test_it_is_the_sparse_loss_where_the_list_holds_every_eligible_key() -> None:
    call = good_call(replace(SMALL, seq_q=12), starts=None, ends=None)
    lists = torch.arange(12).expand(2, 12, 2, 12)
    lists = lists.masked_fill(lists > torch.arange(12)[:, None, None], -1)
    index = [call[name] for name in ("q_idx", "k_idx", "weights")]
    scale = call["softmax_scale"]
    rows = mla_ops.index_loss(call["q"], call["k"], lists, call["lse"], *index, softmax_scale=scale)
    torch.testing.assert_close(run(call)["loss"], (rows * call["row_weight"].unsqueeze(-1)).sum())


def test_rows_that_count_nothing_taint_nothing() -> None:
    call = good_call()
    call["ends"][:, 3] = 0  # no eligible key
    call["lse"][:, 4] = -torch.inf  # no mass
    call["row_weight"][:, 5] = 0.0
    clean = check(call)
    for name in ("q", "q_idx", "weights"):
        call[name][:, 3:6] = torch.nan
    call["row_weight"][:, 3:5] = torch.nan
    actual = run(call)
    for name in NAMES:
        assert torch.equal(actual[name], clean[name]), name
    assert (actual["dq"][:, 3:6] == 0).all()


def test_a_near_one_hot_target_keeps_its_gradient() -> None:
    q, k = torch.tensor([[[1.0]]]), torch.tensor([[[0.0]], [[60.0]]])
    lse = torch.tensor([[60.0]])
    q_idx, k_idx = torch.tensor([[[1.0]]], requires_grad=True), torch.tensor([[[80.0]], [[0.0]]])
    loss = mla_ops.index_loss_dense(
        q, k, lse, q_idx, k_idx, torch.ones(1, 1), torch.ones(1), softmax_scale=1.0, relu=False
    )
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(80.0))
    torch.testing.assert_close(q_idx.grad, torch.tensor([[[80.0]]]))


@pytest.mark.parametrize("field", ["batch", "seq_q", "seq_kv"])
def test_zero_sizes(field: str) -> None:
    call = good_call(replace(SMALL, **{field: 0}), starts=None, ends=None)
    for result in run(call).values():
        assert (result == 0).all()


def test_strided_inputs() -> None:
    call = good_call()
    expected = run(call)
    twin = {name: padded(call[name]) for name in ("q", "q_idx")}
    twin |= {name: transposed(call[name]) for name in ("k", "k_idx", "weights", "lse", "row_weight", "starts")}
    actual = run({**call, **twin})
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


# Memory


class Largest(TorchDispatchMode):
    """Sees the largest tensor that an operator allocates."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_nothing_of_the_size_of_all_pairs_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_WORKSPACE_BYTES", 2**18)
    call = good_call(replace(SMALL, batch=1, seq_q=1500, seq_kv=1500, kv_group=1), starts=None, ends=None)
    call = {**call, "causal": True, "relu": True}
    arguments = eager.IndexLossDenseCall(**call)
    with Largest() as largest:
        eager.index_loss_dense(arguments, need_grad=True)
    results = max(call[name].numel() for name in ("q", "k", "q_idx"))
    assert largest.numbers <= max(results, 2**18 // 4)
    assert largest.numbers < 1500 * 1500 // 10


@pytest.mark.gpu
def test_peak_memory_is_bounded_at_any_length() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    length = 32768
    q, k, q_idx, k_idx = normal(length, 4, 64), normal(length, 1, 64), normal(length, 4, 64), normal(length, 1, 64)
    lse = torch.full((length, 4), 40.0, device="cuda")
    weights, row_weight = torch.ones(length, 4, device="cuda"), torch.ones(length, device="cuda")
    results = 2 * (q_idx.numel() + 3 * k_idx.numel()) + 4 * weights.numel()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mla_ops.index_loss_dense(q, k, lse, q_idx.requires_grad_(), k_idx, weights, row_weight, softmax_scale=0.1)
    assert torch.cuda.max_memory_allocated() - before - results <= 256 * 2**20


def test_no_operator_reads_data_or_shapes_from_it() -> None:
    call = eager.IndexLossDenseCall(**good_call())
    with NoHostReads():
        eager.index_loss_dense(call, need_grad=True)


# Derivatives


def test_derivatives_that_do_not_exist_raise() -> None:
    call = good_call()
    q_idx = call["q_idx"].requires_grad_()
    (dq,) = torch.autograd.grad(mla_ops.index_loss_dense(**call), q_idx, create_graph=True)
    with pytest.raises(mla_ops.DoubleBackwardError, match="mla::index_loss_dense is differentiable once"):
        dq.sum().backward()
    with pytest.raises(mla_ops.ForwardModeError, match="reverse mode"):
        torch.func.jvp(
            lambda w: mla_ops.index_loss_dense(**{**call, "weights": w}), (call["weights"],), (call["weights"],)
        )
    loss = torch.ops.mla.index_loss_dense(**call, need_grad=False)[0]
    with pytest.raises(mla_ops.InvalidInputError, match="need_grad must be True for a backward"):
        loss.backward()


def test_without_gradients_none_are_computed() -> None:
    call = good_call()
    with FlopCounterMode(display=False) as counter:
        loss = mla_ops.index_loss_dense(**call)
    pairs = 2 * 9 * 12
    assert not loss.requires_grad
    assert counter.get_total_flops() == 2 * pairs * (8 * 24 + 4 * 16)
    with FlopCounterMode(display=False) as counter:
        call["q_idx"].requires_grad_()
        mla_ops.index_loss_dense(**call)
    assert counter.get_total_flops() == 2 * pairs * (8 * 24 + 4 * 4 * 16)


def test_func_grad_and_vmap_of_it() -> None:
    call = good_call()
    names = ("q", "k", "lse", "q_idx", "k_idx", "weights", "row_weight")

    def loss_of(*tensors: torch.Tensor) -> torch.Tensor:
        return mla_ops.index_loss_dense(*tensors, softmax_scale=0.5)

    grads = torch.func.vmap(torch.func.grad(loss_of, argnums=(3, 4, 5)))(*(call[name] for name in names))
    expected = run({**{name: call[name] for name in names}, "softmax_scale": 0.5})
    for name, grad in zip(NAMES[1:], grads, strict=True):
        torch.testing.assert_close(grad, expected[name], msg=name)


# Refusals

RULES = [
    bad({"k": lambda a: a["k"][..., :20]}, r"size -1 of k must equal d_total of q \(24\)"),
    bad({"k": lambda a: a["k"].half()}, r"k must have the dtype of q \(float32\), got float16; use k.to\(q.dtype\)"),
    bad({"lse": lambda a: a["lse"].double()}, r"lse must be float32, got float64"),
    bad({"q_idx": lambda a: a["q_idx"][:1]}, r"size 0 of k_idx must equal the batch of q_idx \(1\)"),
    bad({"k_idx": lambda a: a["k_idx"][:, :9]}, r"size -3 of k_idx must equal seq_kv of k \(12\)"),
    bad({"starts": lambda a: a["starts"].float()}, r"starts must be int32 or int64, got float32"),
    bad({"ends": lambda a: a["ends"][:, :4]}, r"size -1 of ends must equal seq_q of q_idx \(9\)"),
    bad({"row_weight": lambda a: a["row_weight"].double()}, r"row_weight must be float32, got float64"),
    bad({"row_weight": lambda a: a["row_weight"][0]}, r"row_weight must be \[batch, seq_q\] or .*got shape \[9\]"),
    bad({"row_weight": lambda a: a["row_weight"][:, :3]}, r"size 1 of row_weight must equal size 1 of q \(9\)"),
    bad(
        {"row_weight": lambda a: a["row_weight"].unsqueeze(-1)},
        r"size -1 of row_weight must equal kv_group of k \(2\)",
    ),
    bad({"row_weight": lambda a: a["row_weight"].requires_grad_()}, r"row_weight must not require grad"),
    bad({"q_idx": lambda a: a["q_idx"].to(torch.float8_e4m3fn)}, r"q_idx must be bfloat16, .*got float8_e4m3fn"),
    bad({"softmax_scale": lambda a: float("inf")}, r"softmax_scale must be finite, got inf"),
]


@pytest.mark.parametrize(("change", "message"), RULES)
@pytest.mark.parametrize("entrance", [mla_ops.index_loss_dense, torch.ops.mla.index_loss_dense], ids=["door", "raw"])
def test_a_broken_rule_is_named(entrance: Any, change: dict[str, Any], message: str) -> None:
    arguments = good_call()
    with pytest.raises(mla_ops.InvalidInputError, match=message):
        entrance(**{**arguments, **{name: make(arguments) for name, make in change.items()}})


def test_the_front_door_checks_types() -> None:
    with pytest.raises(mla_ops.InvalidInputError, match=r"row_weight must be a torch\.Tensor, got float"):
        mla_ops.index_loss_dense(**good_call(row_weight=1.0))
    with pytest.raises(mla_ops.InvalidInputError, match="causal must be a bool, got int"):
        mla_ops.index_loss_dense(**good_call(causal=1))


# Graphs


@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(grads: bool) -> None:
    call = good_call()
    if grads:
        call |= {name: call[name].requires_grad_() for name in ("q_idx", "k_idx", "weights")}
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mla.index_loss_dense.default, tuple(call.values()), test_utils=utilities)


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_serves_all_lengths() -> None:
    compiled = torch.compile(mla_ops.index_loss_dense, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.config.error_on_recompile = True
    try:
        for seq_q, seq_kv in ((9, 12), (7, 24), (13, 13)):
            call = good_call(replace(SMALL, seq_q=seq_q, seq_kv=seq_kv), softmax_scale=0.5)
            eager_results, in_graph = run(call), run(call, compiled)
            for name in NAMES:
                assert torch.equal(in_graph[name], eager_results[name]), name
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_autocast_casts_queries_and_keys() -> None:
    call = good_call()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mla_ops.index_loss_dense(**call)
    low = {name: call[name].bfloat16() for name in ("q", "k", "q_idx", "k_idx")}
    assert torch.equal(loss, mla_ops.index_loss_dense(**{**call, **low}))


def test_the_graph_of_the_attention_is_left_to_its_own_backward() -> None:
    call = good_call()
    q = call["q"].clone().requires_grad_()
    for name in ("q_idx", "k_idx", "weights"):
        call[name].requires_grad_()
    made = (q * 2.0).square()  # saves a tensor that a backward frees
    mla_ops.index_loss_dense(**{**call, "q": made}).backward()
    made.sum().backward()
    assert torch.equal(q.grad, 8.0 * q)

"""The portable kernels on e4m3 payloads with scales, against the reference on `payload * scale`.

Runs on a GPU, or without one under TRITON_INTERPRET=1 (see test_kernels_interpret.py), where the bytes stand for fp16.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from scaled_calls import KINDS, Kind, ScaledInputs, assert_matches_scaled_oracle

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.ops.sparse_attn.call import Gradients, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig
from mla_ops.ops.sparse_attn.triton.scaled import (
    launch_scaled_backward,
    launch_scaled_forward,
    plan_scaled_backward,
    plan_scaled_forward,
)
from mla_ops.testing import Case, make_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies the bit patterns of bf16.
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16

pytestmark = [pytest.mark.usefixtures("poisoned_memory")] + ([] if INTERPRETED else [pytest.mark.gpu])
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="takes the interpreter too long")

SMALL = Case(d_total=40, d_v=24, topk=20, heads=6, kv_group=2, seq_q=3, seq_kv=12)


def make(q_kind: Kind = "plain", kv_kind: Kind = "row", case: Case = SMALL, **options: Any) -> ScaledInputs:
    return ScaledInputs.of(
        make_inputs(case, DTYPE, DEVICE, topk_length=True, attn_sink=True, **options), q_kind, kv_kind
    )


def traits(arch: int) -> DeviceTraits:
    """What decides how e4m3 is decoded: with integers below sm89, on a later device too."""
    here = DeviceTraits("cuda", 90, 232448, 132, 50 << 20) if INTERPRETED else traits_of(torch.device("cuda"))
    return replace(here, arch=arch)


def check(
    inputs: ScaledInputs,
    *,
    arch: int = 90,
    fwd: FwdConfig | None = None,
    bwd: BwdConfig | None = None,
    num_splits: int | None = None,
) -> dict[str, torch.Tensor]:
    problem = SparseAttnProblem.of(inputs.call, scales=inputs.scales, needs_grad=True)
    plan = plan_scaled_forward(inputs.call, traits(arch), problem, config=fwd, num_splits=num_splits)
    results = launch_scaled_forward(inputs.call, inputs.scales, plan)
    configs = None if bwd is None else (bwd,)
    bwd_plan = plan_scaled_backward(inputs.call, traits(arch), Wanted(), problem, configs=configs)
    gradients = Gradients(inputs.plain.dout, inputs.plain.dlse)
    launched = launch_scaled_backward(inputs.call, inputs.scales, results, gradients, Wanted(), bwd_plan)
    actual = {**results._asdict(), **dict(zip(("dq", "dkv", "dsink"), launched, strict=True))}
    assert {actual[name].dtype for name in ("out", "dq", "dkv")} == {DTYPE}
    assert_matches_scaled_oracle(actual, inputs)
    return actual


@pytest.mark.parametrize(("q_kind", "kv_kind"), KINDS, ids=lambda kind: kind)
def test_matches_the_reference_on_real_numbers(q_kind: Kind, kv_kind: Kind) -> None:
    check(make(q_kind, kv_kind))


@pytest.mark.parametrize("is_key_major", [False, True])
def test_tiles_splits_and_decoding_with_integers(is_key_major: bool) -> None:
    bwd = BwdConfig(16, 16, 16, 1, 2, is_key_major=is_key_major, is_ahead=is_key_major)
    check(make("row", "row"), arch=80, fwd=FwdConfig(16, 16, 16, 1, 2), bwd=bwd, num_splits=2)


def test_deterministic_gradients_repeat() -> None:
    inputs = make("tensor", "row")
    torch.use_deterministic_algorithms(True)
    try:
        first, second = check(inputs), check(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_unselected_rows_may_hold_anything_and_scales_are_any_numbers() -> None:
    inputs = make("plain", "row")
    used = SMALL.seq_kv // 2
    inputs = replace(inputs, plain=replace(inputs.plain, indices=inputs.plain.indices.clamp_max(used - 1)))
    kv_scale = inputs.scales.kv
    kv_scale[:, 0], kv_scale[:, 1] = 0.0, -kv_scale[:, 1]
    expected = check(inputs)
    inputs.kv.view(torch.uint8)[:, used:] = 0x7F  # NaN
    kv_scale[:, used:] = float("nan")
    problem = SparseAttnProblem.of(inputs.call, scales=inputs.scales)
    plan = plan_scaled_forward(inputs.call, traits(90), problem)
    actual = launch_scaled_forward(inputs.call, inputs.scales, plan)
    assert torch.equal(actual.out, expected["out"])
    assert torch.equal(actual.lse, expected["lse"])


@on_gpu_only
@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(d_total=128, d_v=64, heads=28, topk=70, seq_kv=100),
        Case(d_total=576, d_v=512, heads=16, topk=70, seq_kv=100),
        Case(d_total=576, d_v=512, heads=64, topk=70, seq_kv=100),
        Case(d_total=320, d_v=256, heads=32, topk=70, seq_kv=100),
        Case(d_total=72, d_v=64, heads=28),
        Case(d_total=100, d_v=96, heads=1),
        Case(d_total=1024, d_v=1024, heads=2, topk=9),
    ],
    ids=str,
)
def test_widths(case: Case, is_deterministic: bool) -> None:
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        check(make("plain", "row", case))
        check(make("row", "tensor", case))
    finally:
        torch.use_deterministic_algorithms(False)


@on_gpu_only
def test_operator_runs_in_a_graph() -> None:
    inputs = make("plain", "row", Case(d_total=128, d_v=64, heads=28))
    op = torch.ops.mla.sparse_attn_scaled
    expected, _ = op(*inputs.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = op(*inputs.args)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)

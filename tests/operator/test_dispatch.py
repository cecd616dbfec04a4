"""Decisions, refusals, explanations and settings: all of it without a GPU."""

from __future__ import annotations

import runpy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mla_ops
from mla_ops import dispatch, settings
from mla_ops.device import DeviceTraits
from mla_ops.errors import InvalidSettingError
from mla_ops.ops.sparse_attn import backends
from mla_ops.ops.sparse_attn.backends import BACKENDS, select
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, SparseAttnCall, SparseAttnProblem, call_like
from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    ConfigKey,
    FwdConfig,
    HopperBwdConfig,
    HopperConfig,
    program_count,
)
from mla_ops.ops.sparse_attn.configs.lookup import (
    backward_configs,
    forward_config,
    hopper_backward_config,
    hopper_config,
)
from mla_ops.ops.sparse_attn.configs.tuned import TunedRow, write_rows
from mla_ops.ops.sparse_attn.triton import hopper
from mla_ops.ops.sparse_attn.triton.direct import run_backward, run_forward, run_max_logits
from mla_ops.ops.sparse_attn.triton.forward import plan_forward
from mla_ops.ops.sparse_attn.triton.key_order import rows_per_launch
from mla_ops.ops.sparse_attn.triton.portable import split_count
from mla_ops.testing import Case, make_inputs

CPU = DeviceTraits(type="cpu")
H100 = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, l2_bytes=50 << 20, name="H100")
NAM56R = SparseAttnProblem(d_total=128, d_v=64, topk=256, heads=28, kv_group=1, dtype=torch.bfloat16)


def test_auto_on_the_cpu_is_eager() -> None:
    decision = select(NAM56R, CPU)
    assert decision.require_backend().name == "eager"
    assert "eager: runs it" in str(decision)


def test_auto_never_detours_to_eager_on_cuda() -> None:
    verdicts = {verdict.backend: verdict for verdict in select(NAM56R, H100).verdicts}
    assert any('pass backend="eager"' in reason for reason in verdicts["eager"].reasons)


def test_refusal_lists_every_backend_with_its_reasons_and_the_problem() -> None:
    unknown_format = SparseAttnProblem(
        d_total=576, d_v=512, topk=2048, heads=128, kv_group=1, dtype=torch.bfloat16, kv_format="fp8_v32"
    )
    decision = select(unknown_format, H100)
    assert decision.backend is None
    with pytest.raises(mla_ops.UnsupportedProblemError) as info:
        decision.require_backend()
    text = str(info.value)
    assert "d_total=576 d_v=512 heads=128 kv_group=1 topk=2048 bf16 kv_format=fp8_v32" in text
    assert "sm90 (H100, 132 SMs, 232448 B shared memory per block)" in text
    for backend in BACKENDS:
        assert f"\n  {backend.name}: " in text
    assert isinstance(info.value, NotImplementedError)


def test_named_backend_never_falls_back() -> None:
    refused = SparseAttnProblem(**{**vars(NAM56R), "kv_format": "fp8_v32"})
    decision = select(refused, CPU, "eager")
    assert decision.backend is None
    assert [verdict.backend for verdict in decision.verdicts] == ["eager"]


def test_no_heads_is_a_problem_like_any_other() -> None:
    problem = SparseAttnProblem(d_total=128, d_v=64, topk=8, heads=0, kv_group=1, dtype=torch.bfloat16)
    assert select(problem, H100).require_backend().name == "triton"


def test_auto_on_a_gpu_is_triton_and_refusals_name_what_is_missing() -> None:
    assert select(NAM56R, H100).require_backend().name == "triton"
    old = DeviceTraits(type="cuda", arch=75, smem_bytes=65536, num_sms=40, name="T4")
    refusals = {
        select(NAM56R, old): "compute capability is 7.5, needs 8.0 or later",
        select(
            SparseAttnProblem(**{**vars(NAM56R), "dtype": torch.float64}), H100
        ): "dtype is torch.float64, needs bf16",
        select(SparseAttnProblem(**{**vars(NAM56R), "d_total": 2048}), H100): "d_total is 2048, needs at most 1024",
    }
    for decision, reason in refusals.items():
        with pytest.raises(mla_ops.UnsupportedProblemError, match=reason):
            decision.require_backend()


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(mla_ops.UnknownBackendError, match=r"one of 'auto', .*'eager', got 'cuda'|'auto'.*got 'cuda'"):
        select(NAM56R, CPU, "cuda")
    assert "eager" in mla_ops.backend_names()


@pytest.mark.parametrize("batch", [None, 2])
def test_problem_and_hints_read_off_tensors(batch: int | None) -> None:
    inputs = make_inputs(Case(batch=batch, seq_q=5, heads=6, kv_group=3, seq_kv=11, d_total=24, d_v=16, topk=7))
    call = SparseAttnCall(*inputs.args)
    problem = SparseAttnProblem.of(call, needs_grad=True)
    assert (problem.d_total, problem.d_v, problem.d_tail, problem.topk) == (24, 16, 8, 7)
    assert (problem.heads, problem.kv_group, problem.heads_per_group) == (6, 3, 2)
    assert problem.needs_grad
    assert Hints.of(call) == Hints(batch=batch or 1, seq_q=5, seq_kv=11)


def test_explain_runs_nothing_and_prints_the_decision() -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16)).requires_grad()
    decision = mla_ops.explain(inputs.q, inputs.kv, inputs.indices, d_v=16)
    assert decision.problem.needs_grad
    assert str(decision).splitlines() == [
        "backend 'eager' (backend=\"auto\") for mla::sparse_attn on cpu",
        "  d_total=24 d_v=16 heads=4 kv_group=1 topk=16 fp32 kv_format=dense needs_grad=True",
        *[f"  {verdict}" for verdict in decision.verdicts],
        "  rows are gathered in chunks of 8 MiB; nothing to warm",
    ]
    assert "  eager: runs it" in str(decision)
    with pytest.raises(mla_ops.InvalidInputError, match="d_v must be at most"):
        mla_ops.explain(inputs.q, inputs.kv, inputs.indices, d_v=25)


def test_explain_of_a_refusal_is_an_answer_not_an_error() -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16))
    on_meta = [t.to("meta") for t in (inputs.q, inputs.kv, inputs.indices)]
    decision = mla_ops.explain(*on_meta, d_v=16)
    assert decision.backend is None
    assert str(decision).startswith("no backend")


def test_decision_is_logged_once_per_problem(caplog: pytest.LogCaptureFixture) -> None:
    inputs = make_inputs(Case(d_total=25, d_v=17, topk=19))
    with caplog.at_level("INFO", logger="mla_ops.dispatch"):
        for _ in range(3):
            mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs)
    assert len([r for r in caplog.records if "d_total=25" in r.getMessage()]) == 1


def test_hints_choose_the_split_and_nothing_else() -> None:
    problem = replace(NAM56R, needs_grad=True)
    training = select(problem, H100, hints=Hints(batch=4, seq_q=4096, seq_kv=4096))
    decode = select(problem, H100, hints=Hints(batch=1, seq_q=1, seq_kv=4096))
    assert training.backend is decode.backend is select(problem, H100).backend
    assert "split over 1 programs" in training.launch[0]
    assert "split over 8 programs" in decode.launch[0]
    launches = [line for line in training.launch if " not by " not in line]
    assert [line.split(":")[0] for line in launches] == ["forward", "backward"]
    assert all("not warm" in line for line in launches)
    assert select(problem, H100).launch == ()


# Tuned rows


def tuned_file(path: Path, **fields: object) -> str:
    row = TunedRow(arch=90, d_total=128, d_v=64, heads=28, element_size=2)
    other = replace(row, heads=27, fwd=FwdConfig(16, 16, 16, 1, 1))
    write_rows(path, {"device": "by hand"}, [other, replace(row, **fields)])
    return str(path)


def test_a_tuned_row_goes_first_where_it_is_for_this_problem(tmp_path: Path) -> None:
    key = ConfigKey(90, 232448, 28, 128, 64, 2)
    table = forward_config(key)
    fwd = FwdConfig(block_h=16, block_k=64, max_chunk=32, num_warps=2, num_stages=3, max_registers=96)
    path = tuned_file(tmp_path / "rows.json", fwd=fwd)
    assert forward_config(key, path) == fwd != table
    assert backward_configs(key, path) == backward_configs(key)  # was not tuned
    for other in ((80, 166912, 28, 128, 64, 2), (90, 232448, 32, 128, 64, 2), (90, 232448, 28, 128, 64, 4)):
        assert forward_config(ConfigKey(*other), path) == forward_config(ConfigKey(*other))
    with settings.override(tuned_rows=path):
        launch = select(NAM56R, H100, hints=Hints(batch=4, seq_q=4096, seq_kv=4096)).launch
    assert str(fwd) in launch[0]


def test_a_tuned_backward_is_shrunk_where_it_does_not_fit(tmp_path: Path) -> None:
    huge = BwdConfig(block_h=32, block_k=128, max_chunk=64, num_warps=4, num_stages=8)
    path = tuned_file(tmp_path / "rows.json", bwd=(huge,))
    assert backward_configs(ConfigKey(90, 232448, 28, 128, 64, 2), path) == (replace(huge, num_stages=1),)


@pytest.mark.parametrize("text", [None, "rows", '{"rows": [{"arch": 90}]}', "[]"])
def test_a_bad_file_of_tuned_rows_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(
        InvalidSettingError, match=r"tuned_rows must name a file that mla-ops tune wrote, got .*rows\.json"
    ):
        forward_config(ConfigKey(90, 232448, 28, 128, 64, 2), str(path))


# Settings


def test_override_is_local_and_restored() -> None:
    before = settings.current()
    seen = []
    with settings.override(eager_workspace_mb=3):
        assert settings.current().eager_workspace_mb == 3
        thread = threading.Thread(target=lambda: seen.append(settings.current()))
        thread.start()
        thread.join()
    assert settings.current() == before
    assert seen == [before]  # another thread keeps its own


def test_workspace_setting_changes_chunks_not_results() -> None:
    inputs = make_inputs(Case(d_total=128, d_v=64, topk=512, heads=8, seq_q=64, seq_kv=512), attn_sink=True)
    results = []
    for megabytes in (1, 64):
        leaves = inputs.requires_grad()
        with settings.override(eager_workspace_mb=megabytes):
            out, lse = torch.ops.mla.sparse_attn(*leaves.args)
            grads = torch.autograd.grad([out, lse], leaves.differentiable, [inputs.dout, inputs.dlse])
        results.append([out, lse, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8"])
def test_bad_override_is_refused(value: object) -> None:
    with (
        pytest.raises(InvalidSettingError, match="eager_workspace_mb must be an integer >= 1"),
        settings.override(eager_workspace_mb=value),
    ):
        pass


def test_unknown_setting_is_refused() -> None:
    with (
        pytest.raises(InvalidSettingError, match="unknown setting workspace; expected one of"),
        settings.override(workspace=1),
    ):
        pass


@pytest.mark.parametrize(("text", "outcome"), [("3", "3"), ("none", "got 'none'"), ("0", "got 0")])
def test_environment_variable(text: str, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLA_OPS_EAGER_WORKSPACE_MB", text)
    loaded = runpy.run_path(settings.__file__)  # as a new process would import it
    if text == "3":
        assert str(loaded["current"]().eager_workspace_mb) == outcome
    else:
        with pytest.raises(InvalidSettingError, match=outcome):
            loaded["current"]()


# Decisions that are kept


def test_a_call_is_checked_and_decided_once_for_all_that_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case(d_total=26, d_v=18, topk=21))
    checked = []
    check = backends.check_inputs
    monkeypatch.setattr(backends, "check_inputs", lambda call, **_: (checked.append(call), check(call)))
    for _ in range(3):
        mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs)
    assert len(checked) == 1
    for change in ({"d_v": 17}, {"softmax_scale": 0.25}, {"topk_length": torch.full(inputs.q.shape[:2], 3)}):
        mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **{**inputs.kwargs, **change})
    mla_ops.sparse_attn(inputs.q.double(), inputs.kv.double(), inputs.indices, **inputs.kwargs)
    mla_ops.sparse_attn(inputs.q[:, :3], inputs.kv, inputs.indices[:, :3], **inputs.kwargs)
    assert len(checked) == 6
    for bad in ({"d_v": 27}, {"softmax_scale": float("nan")}):
        with pytest.raises(mla_ops.InvalidInputError):
            torch.ops.mla.sparse_attn(inputs.q, inputs.kv, inputs.indices, **{**inputs.kwargs, **bad})
    with pytest.raises(mla_ops.UnsupportedProblemError, match="device is cpu"):
        mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs, backend="triton")


def test_kept_decisions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_plans", dispatch.Plans())
    monkeypatch.setattr(dispatch, "MAX_PLANS", 4)
    for seq_q in range(1, 12):
        inputs = make_inputs(Case(d_total=8, d_v=8, topk=2, seq_q=seq_q))
        mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs)
        assert 1 <= len(backends._plans) <= 4


@pytest.mark.parametrize(
    ("d_total", "d_v", "chunks"),
    [
        (576, 512, (256, 256, 64)),
        (512, 512, (256, 256, 0)),
        (480, 448, (256, 256, 0)),
        (512, 384, (256, 128, 128)),
        (352, 320, (256, 64, 64)),
        (320, 256, (128, 128, 64)),
    ],
)
def test_the_hopper_forward_covers_a_row_with_as_few_channels_as_it_can(
    d_total: int, d_v: int, chunks: tuple[int, int, int]
) -> None:
    config = hopper_config(ConfigKey(H100.arch, H100.smem_bytes, 64, d_total, d_v, 2))
    assert config is not None
    assert (config.left, config.right, config.tail) == chunks


@pytest.mark.parametrize(
    ("d_total", "d_v", "halves"),
    [(576, 512, (256, 32)), (512, 512, (256, 0)), (480, 448, (256, 0)), (320, 256, (128, 32)), (384, 256, (128, 64))],
)
def test_the_hopper_backward_covers_a_row_in_two_equal_halves(d_total: int, d_v: int, halves: tuple[int, int]) -> None:
    key = ConfigKey(H100.arch, H100.smem_bytes, 64, d_total, d_v, 2)
    assert hopper_backward_config(key) == HopperBwdConfig(*halves)


@pytest.mark.parametrize(
    ("arch", "d_total", "d_v", "element_size"),
    [
        (80, 576, 512, 2),
        (100, 576, 512, 2),
        (90, 576, 512, 4),
        (90, 640, 512, 2),
        (90, 128, 64, 2),
        (90, 572, 512, 2),
        (90, 576, 508, 2),
    ],
)
def test_the_hopper_kernels_are_for_wide_rows_of_two_byte_channels_on_sm90(
    arch: int, d_total: int, d_v: int, element_size: int
) -> None:
    key = ConfigKey(arch, H100.smem_bytes, 64, d_total, d_v, element_size)
    assert hopper_config(key) is None
    assert hopper_backward_config(key) is None


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        ({}, True),
        ({"d_v": 256, "d_total": 320}, True),
        ({"heads": 33}, True),
        ({"heads": 32}, False),  # half of its products would be of heads that are not there
        ({"heads": 128, "kv_group": 4}, False),
        ({"heads": 128, "kv_group": 2}, True),
        ({"seq_q": 44}, True),
        ({"seq_q": 2}, False),  # 32 shares of slots for 132 SMs
        ({"heads": 128, "seq_q": 22}, True),
        ({"d_v": 192, "d_total": 256}, False),
        ({"dtype": torch.float32}, False),
        ({"arch": 80}, False),
        ({"topk": 192}, True),
        ({"topk": 64}, False),  # less than what a work item costs besides its slots
    ],
    ids=str,
)
def test_when_the_hopper_kernels_are_taken(change: dict[str, Any], is_taken: bool) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    sizes = {"d_total": 576, "d_v": 512, "heads": 64, "kv_group": 1, "topk": 2048, "seq_q": 4096, "arch": 90}
    sizes |= {"dtype": torch.bfloat16} | change
    hints = Hints(batch=1, seq_q=sizes.pop("seq_q"), seq_kv=8192)
    traits = replace(H100, arch=sizes.pop("arch"))
    decision = select(SparseAttnProblem(needs_grad=True, **sizes), traits, hints=hints)
    assert ("HopperConfig" in str(decision)) == is_taken
    assert ("HopperBwdConfig" in str(decision)) == is_taken
    sides_with_a_reason = {line.split()[0] for line in decision.launch if "not by hopper kernels: " in line}
    assert sides_with_a_reason == (set() if is_taken else {"forward", "backward"})


def test_the_hopper_forward_shares_slots_out_where_queries_are_few_and_the_backward_does_not() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    problem = SparseAttnProblem(
        d_total=576, d_v=512, topk=2048, heads=64, kv_group=1, dtype=torch.bfloat16, needs_grad=True
    )
    launches = select(problem, H100, hints=Hints(batch=1, seq_q=43, seq_kv=8192)).launch
    assert "HopperConfig" in launches[0]
    assert "split over 3 programs" in launches[0]
    assert any(line.startswith("backward not by hopper kernels: 43 programs") for line in launches)


@pytest.mark.parametrize(
    ("rows", "topk", "expected"),
    [(2, 2048, 16), (4, 2048, 16), (8, 2048, 8), (16, 2048, 4), (32, 2048, 2), (48, 2048, 1), (64, 2048, 1),
     (128, 2048, 1), (16, 512, 4), (4096, 2048, 1), (16, 100, 1), (16, 0, 1)],
)  # fmt: skip
def test_the_hopper_forward_shares_slots_out_as_measured(rows: int, topk: int, expected: int) -> None:
    assert hopper.split_count(2 * rows, topk, H100.num_sms) == expected


def test_the_hopper_forward_pays_from_fewer_slots_on_than_the_backward() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    problem = SparseAttnProblem(
        d_total=576, d_v=512, topk=100, heads=64, kv_group=1, dtype=torch.bfloat16, needs_grad=True
    )
    hints = Hints(batch=1, seq_q=4096, seq_kv=8192)
    launches = select(problem, H100, hints=hints).launch
    assert ["Config" in launch and "Hopper" in launch for launch in launches] == [True, False, False, False]
    assert "backward not by hopper kernels: topk is 100, they pay from 192 on" in launches


@pytest.mark.parametrize(
    ("heads", "rows", "topk", "expected"),
    [
        (28, 1, 2048, 32),  # as many as ever pay
        (28, 1, 256, 8),  # as there are blocks: there is an SM for each
        (28, 48, 256, 4),
        (28, 48, 2048, 16),  # of four blocks
        (28, 128, 2048, 8),  # as many as find a place
        (28, 300, 2048, 3),
        (28, 300, 128, 1),
        (28, 1, 64, 1),
        (28, 4096, 2048, 1),
        (28, 0, 2048, 1),
    ],
)
def test_slots_are_split_until_the_device_is_full(heads: int, rows: int, topk: int, expected: int) -> None:
    key = ConfigKey(H100.arch, H100.smem_bytes, heads, 128, 64, 2)
    config = forward_config(key)
    assert config is not None
    programs = program_count(rows, heads, 1, config.block_h)
    assert split_count(programs, topk, config, H100, key) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 264),  # two waves of 132 programs
        ({"heads": 128}, 132),
        ({"seq_kv": 8192}, None),  # kv and dkv fit the cache
        ({"d_total": 128, "d_v": 64}, None),
        ({"topk": 256}, None),  # few queries of a launch have a key in common
    ],
    ids=str,
)
def test_when_a_backward_goes_through_the_keys_in_order(change: dict[str, int], expected: int | None) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    sizes = {"d_total": 576, "d_v": 512, "heads": 64, "kv_group": 1, "topk": 2048, "seq_kv": 65536} | change
    seq_kv = sizes.pop("seq_kv")
    problem = SparseAttnProblem(**sizes, dtype=torch.bfloat16, needs_grad=True)
    hints = Hints(1, 4096, seq_kv)
    assert rows_per_launch(HopperBwdConfig(256, 32), problem, hints, H100) == expected
    launches = select(problem, H100, hints=hints).launch
    assert ("in key order" in str(launches)) == (expected is not None)


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_backward_takes_it_too() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    problem = SparseAttnProblem(
        d_total=576, d_v=512, topk=2048, heads=64, kv_group=1, dtype=torch.bfloat16, needs_grad=True
    )
    hints = Hints(batch=1, seq_q=4096, seq_kv=8192)
    assert "HopperBwdConfig" in str(select(problem, H100, hints=hints))


def test_a_tuned_row_never_chooses_between_kernel_sets(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    fwd = FwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2)
    bwd = (BwdConfig(block_h=32, block_k=32, max_chunk=64, num_warps=4, num_stages=1),)
    path = tuned_file(tmp_path / "rows.json", d_total=576, d_v=512, heads=64, fwd=fwd, bwd=bwd)
    problem = SparseAttnProblem(
        d_total=576, d_v=512, topk=2048, heads=64, kv_group=1, dtype=torch.bfloat16, needs_grad=True
    )
    hints = Hints(batch=1, seq_q=4096, seq_kv=8192)
    with settings.override(tuned_rows=path):
        many_slots = select(problem, H100, hints=hints).launch
        few_slots = select(replace(problem, topk=64), H100, hints=hints).launch
    assert many_slots == select(problem, H100, hints=hints).launch
    assert str(fwd) in few_slots[0]
    assert str(bwd[0]) in str(few_slots)


@pytest.mark.usefixtures("deterministic")
def test_a_tuned_row_of_atomic_sums_leaves_the_deterministic_pass_alone(tmp_path: Path) -> None:
    bwd = (BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=1, num_stages=2),)
    path = tuned_file(tmp_path / "rows.json", bwd=bwd)
    key = ConfigKey(90, 232448, 28, 128, 64, 2)
    assert backward_configs(key, path) == bwd
    assert backward_configs(key, path, True) == backward_configs(key, "", True) != bwd


@pytest.mark.parametrize(("max_logits_only", "expected"), [(False, HopperConfig), (True, FwdConfig)])
def test_a_maximum_of_logits_is_planned_for_the_portable_kernel(max_logits_only: bool, expected: type) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    problem = SparseAttnProblem(d_total=576, d_v=512, topk=2048, heads=64, kv_group=1, dtype=torch.bfloat16)
    plan = plan_forward(call_like(problem, Hints(1, 4096, 8192)), H100, max_logits_only=max_logits_only)
    assert type(plan.choice.config) is expected
    assert (plan.out_shape, plan.lse_shape) == ((1, 4096, 64, 512), (1, 4096, 64))


def wrapped(kernel: Any) -> Any:
    """Stand for what a trace applies to every kernel."""
    return kernel


def test_the_hopper_forward_is_refused_where_it_cannot_run() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    call = SparseAttnCall(*make_inputs(Case(d_total=576, d_v=512, heads=64), torch.bfloat16).args)
    config = HopperConfig(256, 256, 64, 160, 56, 1)
    refusals: dict[str, dict[str, Any]] = {
        "got sm80": {"traits": replace(H100, arch=80)},
        "d_v=512, d_total=576": {"config": HopperConfig(256, 128, 64, 160, 56, 1)},
        "traced=True": {"wrap": wrapped},
    }
    for reason, options in refusals.items():
        with pytest.raises(mla_ops.UnsupportedProblemError, match=reason):
            run_forward(call, **{"traits": H100, "config": config, **options})
    with pytest.raises(mla_ops.UnsupportedProblemError, match="max_logits_only=True"):
        run_max_logits(call, traits=H100, config=config)


def test_the_hopper_backward_is_refused_where_it_cannot_run() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    inputs = make_inputs(Case(d_total=576, d_v=512, heads=64), torch.bfloat16)
    arguments = (SparseAttnCall(*inputs.args), Results(inputs.dout, inputs.dlse), Gradients(inputs.dout, None))
    configs = (HopperBwdConfig(256, 32),)
    refusals: dict[str, dict[str, Any]] = {
        "got sm80": {"traits": replace(H100, arch=80)},
        "d_v=512, d_total=576": {"configs": (HopperBwdConfig(256, 0),)},
        "traced=True": {"wrap": wrapped},
    }
    for reason, options in refusals.items():
        with pytest.raises(mla_ops.UnsupportedProblemError, match=reason):
            run_backward(*arguments, **{"traits": H100, "configs": configs, **options})

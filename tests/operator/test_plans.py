"""Plans, launches and settings of a call, without a GPU: on which device, decided by what, kept for how long."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_ops
from mla_ops import device, dispatch, launching, row_sums, settings
from mla_ops.device import DeviceTraits
from mla_ops.errors import InvalidSettingError
from mla_ops.launching import filled_alike, launch_record, with_aligned_rows
from mla_ops.ops.sparse_attn import backends
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, ConfigKey, FwdConfig
from mla_ops.ops.sparse_attn.configs.lookup import forward_config
from mla_ops.ops.sparse_attn.configs.tuned import TunedRow, read_once, read_rows, write_rows
from mla_ops.ops.sparse_attn.eager import EagerBackend
from mla_ops.ops.sparse_attn.triton import backward, forward, hopper, portable
from mla_ops.ops.sparse_attn.triton.backend import TritonBackend
from mla_ops.ops.sparse_attn.triton.direct import run_forward, run_max_logits
from mla_ops.ops.sparse_attn.triton.kernel_sets import choose
from mla_ops.testing import Case, make_inputs

H100 = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, l2_bytes=50 << 20, name="H100")
RTX_3090 = DeviceTraits(type="cuda", arch=86, smem_bytes=101376, num_sms=82, l2_bytes=6 << 20, name="RTX 3090")
NAM28 = SparseAttnProblem(d_total=128, d_v=64, topk=256, heads=28, kv_group=1, dtype=torch.bfloat16, needs_grad=True)
WIDE = replace(NAM28, d_total=576, d_v=512, heads=64, topk=2048)


# The device guard


class Machine:
    """Two CUDA devices that are not there: which is current, which switches were made, where kernels were launched."""

    def __init__(self) -> None:
        self.current, self.switches, self.launches = 0, list[int](), list[tuple[str, int]]()

    def device(self, target: torch.device) -> Any:
        machine = self

        class Switch:
            def __enter__(self) -> None:
                machine.switches.append(target.index)
                self.before, machine.current = machine.current, target.index

            def __exit__(self, *error: object) -> None:
                machine.current = self.before

        return Switch()

    def kernel(self, name: str) -> Any:
        machine = self

        class Kernel:
            def __getitem__(self, grid: object) -> Any:
                return lambda *args, **options: machine.launches.append((name, machine.current))

        return Kernel()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    pytest.importorskip("triton", reason="triton is not installed")
    from mla_ops.kernels import row_sums as row_sum_kernels

    machine = Machine()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    forward, merge = machine.kernel("forward"), machine.kernel("merge")
    monkeypatch.setattr(portable, "_forward_kernels", lambda: (forward, merge))
    monkeypatch.setattr(portable, "_backward_kernel", lambda: machine.kernel("backward"))
    for name in ("_rank_slots_kernel", "_place_slots_kernel", "_sum_placed_rows_kernel"):
        monkeypatch.setattr(row_sum_kernels, name, machine.kernel(name))
    return machine


def run_every_side(index: int, seq_q: int) -> None:
    backend, wanted = TritonBackend(), Wanted()
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, seq_q, 28, 128, dtype=torch.bfloat16, device=f"cuda:{index}")
        kv, indices = q.new_empty(2, 64, 1, 128), q.new_empty(2, seq_q, 1, 256, dtype=torch.int32)
        call = SparseAttnCall(q, kv, indices, 64, 0.1)
        problem = SparseAttnProblem.of(call, needs_grad=True)
        results = backend.forward(call, backend.plan("forward", call, problem, H100, wanted))
        backend.max_logits(call, backend.plan("max_logits", call, problem, H100, wanted))
        plan = backend.plan("backward", call, problem, H100, wanted)
        backend.backward(call, results, Gradients(results.out, results.lse), wanted, plan)


@pytest.mark.parametrize("mode", ["atomics", "in order"])
def test_kernels_are_launched_on_the_device_of_the_tensors(
    mode: str, machine: Machine, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if mode == "in order":
        request.getfixturevalue("deterministic")
        for module in (
            forward,
            backward,
            portable,
            row_sums,
        ):  # memory that is not there takes no storage made by hand
            monkeypatch.setattr(
                module, "unfilled", lambda shape, dtype, like, *, is_traced: like.new_empty(shape, dtype=dtype)
            )
    for seq_q in (1, 512):  # split over programs, and not
        run_every_side(1, seq_q)
    names = {"forward", "merge", "backward"}
    names |= {"_rank_slots_kernel", "_place_slots_kernel", "_sum_placed_rows_kernel"} if mode == "in order" else set()
    assert set(machine.launches) == {(name, 1) for name in names}
    assert machine.switches == [1] * 6
    assert machine.current == 0


def test_the_guard_does_nothing_where_the_device_is_current(machine: Machine) -> None:
    run_every_side(0, 512)
    assert {index for _, index in machine.launches} == {0}
    assert machine.switches == []


def test_cpu_tensors_ask_for_no_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> int:
        raise AssertionError("the CUDA device is asked for")

    monkeypatch.setattr(torch.cuda, "current_device", ask)
    assert device.is_current(torch.device("cpu"))
    assert launching.launch_on(torch.device("cpu"), max, 1, 2) == 2


def test_what_is_warm_is_warm_on_one_device() -> None:
    first, second = (
        launch_record(torch.device("cuda", index), "kernel", FwdConfig(16, 16, 16, 1, 1)) for index in (0, 1)
    )
    first.is_warm = True
    assert launch_record(torch.device("cuda", 0), "kernel", FwdConfig(16, 16, 16, 1, 1)) is first
    assert str(first) == "warm"
    assert str(second).startswith("not warm")


# What decides


def test_two_devices_among_the_arguments_are_refused_by_name() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(4, 2, 24, device="cuda:0")
        kv, indices = torch.empty(8, 1, 24, device="cuda:1"), torch.empty(4, 1, 3, dtype=torch.int32, device="cuda:0")
        with pytest.raises(mla_ops.InvalidInputError, match=r"kv must be on the device of q \(cuda:0\), got cuda:1"):
            mla_ops.sparse_attn(q, kv, indices, d_v=16, softmax_scale=1.0)


@pytest.mark.usefixtures("no_plans")
def test_a_training_call_whose_backward_nobody_runs_is_refused_before_its_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def forward(self: TritonBackend, call: SparseAttnCall, plan: object) -> Results:
        ran.append("forward")
        return Results(call.q.new_zeros(*call.q.shape[:-1], call.d_v), call.q.new_zeros(call.q.shape[:-1]))

    monkeypatch.setattr(TritonBackend, "forward", forward)
    monkeypatch.setattr(backends, "traits_of", lambda device: RTX_3090)
    inputs = make_inputs(Case(d_total=576, d_v=512, heads=16, topk=8))
    leaves = inputs.requires_grad()
    with pytest.raises(mla_ops.UnsupportedProblemError, match="no backward configuration fits"):
        torch.ops.mla.sparse_attn(*leaves.args)
    assert ran == []
    with torch.no_grad():
        torch.ops.mla.sparse_attn(*leaves.args)
    torch.ops.mla.sparse_attn(*inputs.args)
    assert ran == ["forward"] * 2


@pytest.fixture
def amd_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of AMD's, which torch calls "cuda", with the properties that torch gives it and no other."""
    properties = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, multi_processor_count=304)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    device._cuda_traits.cache_clear()
    yield
    device._cuda_traits.cache_clear()


@pytest.mark.usefixtures("amd_device")
def test_a_device_of_another_vendor_is_refused_by_name() -> None:
    traits = device.traits_of(torch.device("cuda", 0))
    with pytest.raises(mla_ops.UnsupportedProblemError, match="device is made by amd, needs nvidia; pass backend="):
        select(NAM28, traits).require_backend()
    assert "on amd (AMD Instinct MI300X, 304 compute units)" in str(select(NAM28, traits))
    assert select(NAM28, traits, "eager").require_backend().name == "eager"


def test_kernels_that_the_installed_triton_cannot_compile_are_missed_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gluon_compat = pytest.importorskip("mla_ops.kernels.gluon_compat", reason="triton is not installed")
    reason = "triton is 3.9.0, the Gluon kernels need >=3.6,<3.9; the plain kernel runs instead"
    monkeypatch.setattr(gluon_compat, "unsupported_reason", lambda: reason)
    hopper.gluon_reason.cache_clear()
    try:
        for _ in range(2):
            launches = select(WIDE, H100, hints=Hints(1, 4096, 8192)).launch
    finally:
        hopper.gluon_reason.cache_clear()
    assert f"forward not by hopper kernels: {reason}" in launches
    assert f"backward not by hopper kernels: {reason}" in launches
    assert [record.levelname for record in caplog.records if reason in record.getMessage()] == ["WARNING"]


# Settings that travel, rows that stay


def tuned_file(path: Path, **fields: object) -> str:
    row = TunedRow(arch=90, d_total=128, d_v=64, heads=28, element_size=2)
    write_rows(path, {"device": "by hand"}, [replace(row, **fields)])
    return str(path)


def test_a_backward_in_another_thread_has_the_settings_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backward = EagerBackend.backward

    def noting(self: EagerBackend, *arguments: Any) -> Any:
        seen.append(settings.current().eager_workspace_mb)
        return backward(self, *arguments)

    monkeypatch.setattr(EagerBackend, "backward", noting)
    leaves = make_inputs(Case(d_total=24, d_v=16)).requires_grad()
    with settings.override(eager_workspace_mb=3):
        out, _ = torch.ops.mla.sparse_attn(*leaves.args)
    thread = threading.Thread(target=out.sum().backward)  # as autograd's thread of a CUDA device: no context of ours
    thread.start()
    thread.join()
    assert seen == [3]
    assert settings.current().eager_workspace_mb != 3


def test_a_file_that_is_rewritten_changes_neither_rows_nor_cache_keys(tmp_path: Path) -> None:
    from torch.compiler import config

    from mla_ops import lowering

    key, first = ConfigKey(90, 232448, 28, 128, 64, 2), FwdConfig(16, 64, 32, 2, 3)
    path = tuned_file(tmp_path / "rows.json", fwd=first)
    with settings.override(tuned_rows=path):
        lowering.enable()
        tag = config.cache_key_tag
        tuned_file(Path(path), fwd=replace(first, block_k=32))
        lowering.enable()
        assert config.cache_key_tag == tag
        assert tag.endswith(read_once(path).digest[:16])
    # A kind of call that nobody has asked for yet takes the rows that were read, too.
    forward_config.cache_clear()
    assert forward_config(key, path) == first
    assert read_rows(path)[0].fwd == replace(first, block_k=32)
    lowering.enable()
    assert config.cache_key_tag != tag


GOOD = {
    "arch": 90,
    "d_total": 128,
    "d_v": 64,
    "heads": 28,
    "element_size": 2,
    "fwd": {"block_h": 16, "block_k": 32, "max_chunk": 64, "num_warps": 1, "num_stages": 2, "max_registers": None},
    "bwd": None,
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r"row 1 must be an object, got \[\]"),
        ({**GOOD, "arch": "90"}, "row 1: arch can't be '90'"),
        ({**GOOD, "heads": 0}, "row 1: heads can't be 0"),
        ({**GOOD, "heads": True}, "row 1: heads can't be True"),
        ({**GOOD, "topk": 64}, "row 1: field topk is unknown"),
        ({name: value for name, value in GOOD.items() if name != "d_v"}, "row 1: field d_v is missing"),
        ({**GOOD, "fwd": [16, 32]}, r"row 1: fwd can't be \[16, 32\]"),
        ({**GOOD, "fwd": {**GOOD["fwd"], "block_k": 24}}, "row 1: fwd: block_k can't be 24"),
        ({**GOOD, "fwd": {**GOOD["fwd"], "num_warps": 3}}, "row 1: fwd: num_warps can't be 3"),
        ({**GOOD, "fwd": {**GOOD["fwd"], "max_registers": 300}}, "row 1: fwd: max_registers can't be 300"),
        ({**GOOD, "fwd": {"block_h": 16}}, "row 1: fwd: field block_k is missing"),
        ({**GOOD, "bwd": []}, "row 1: bwd must hold one pass or two, got 0"),
        ({**GOOD, "bwd": [None]}, r"row 1: bwd\[0\] must be an object, got None"),
        ({**GOOD, "bwd": [{**GOOD["fwd"], "is_key_major": 1, "is_ahead": True}]}, r"bwd\[0\]: is_key_major can't be 1"),
    ],
    ids=str,
)
def test_a_malformed_row_is_named_with_its_field(row: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": [GOOD, row]}))
    with pytest.raises(InvalidSettingError, match=rf"got '.*rows\.json' \(ValueError: .*{message}"):
        forward_config(ConfigKey(90, 232448, 28, 128, 64, 2), str(path))


def test_what_tune_writes_is_read_back(tmp_path: Path) -> None:
    bwd = (BwdConfig(16, 32, 64, 1, 2), BwdConfig(16, 32, 64, 1, 2, is_key_major=False, max_registers=128))
    path = tuned_file(tmp_path / "rows.json", bwd=bwd)
    assert read_rows(path)[0].bwd == bwd


# What is kept


def test_plans_are_bounded_whoever_adds_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two threads that both miss add two plans after one look at the bound, and leave more than the bound.
    monkeypatch.setattr(dispatch, "MAX_PLANS", 4)
    monkeypatch.setattr(backends, "_plans", dispatch.Plans({(number,): None for number in range(6)}))
    inputs = make_inputs(Case(d_total=8, d_v=8, topk=2))
    mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs)
    assert len(backends._plans) == 1


@pytest.mark.usefixtures("no_plans")
def test_explain_prints_the_plan_that_a_call_takes() -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16))
    mla_ops.explain(inputs.q, inputs.kv, inputs.indices, d_v=16, softmax_scale=inputs.softmax_scale)
    (plan,) = backends._plans.values()
    mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, d_v=16, softmax_scale=inputs.softmax_scale)
    assert list(backends._plans.values()) == [plan]


@pytest.mark.usefixtures("no_plans")
def test_calls_that_differ_in_anything_but_values_have_plans_of_their_own() -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16), topk_length=True, attn_sink=True)
    strided = inputs.q.new_empty(*inputs.q.shape[:-1], 48)[..., :24].copy_(inputs.q)
    kinds = [
        {},
        {"q": strided},
        {"indices": inputs.indices.long()},
        {"topk_length": None},
        {"topk_length": inputs.topk_length.long()},
        {"attn_sink": None},
        {"d_v": 15},
        {"softmax_scale": 0.25},
    ]
    for change in [*kinds, *kinds]:
        torch.ops.mla.sparse_attn(*replace(inputs, **change).args)
    assert len(backends._plans) == len(kinds)


@pytest.mark.usefixtures("no_plans")
def test_explain_plans_the_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(EagerBackend, "plan", lambda self, side, *rest: planned.append((side, rest[-1])))
    inputs = make_inputs(Case(d_total=24, d_v=16)).requires_grad(kv=False)
    mla_ops.explain(inputs.q, inputs.kv, inputs.indices, d_v=16)
    assert planned == [("forward", Wanted(True, False)), ("backward", Wanted(True, False))]


def test_explain_of_symbolic_sizes_is_a_decision_without_a_launch() -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    inputs = make_inputs(Case(d_total=24, d_v=16))
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (tensor.dim() - 1)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(sizes))

    decision = mla_ops.explain(fake(inputs.q), fake(inputs.kv), fake(inputs.indices), d_v=16)
    assert decision.require_backend().name == "eager"
    assert decision.launch == ()


@pytest.mark.parametrize("sizes", [{"heads": 0}, {"seq_q": 0}], ids=str)
def test_nothing_to_compute_is_described_in_one_line(sizes: dict[str, int]) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    hints = Hints(1, sizes.get("seq_q", 4096), 4096)
    launches = select(replace(WIDE, heads=sizes.get("heads", 64)), H100, hints=hints).launch
    assert launches == ("no queries or no heads: nothing is launched",)


def test_a_launch_that_fails_leaves_its_kernel_cold(monkeypatch: pytest.MonkeyPatch, no_plans: None) -> None:
    pytest.importorskip("triton", reason="triton is not installed")

    def no_kernels() -> Any:
        raise RuntimeError("no memory for the kernel")

    monkeypatch.setattr(launching, "_records", {})
    monkeypatch.setattr(portable, "_forward_kernels", no_kernels)
    call = SparseAttnCall(*make_inputs(Case(d_total=24, d_v=16)).args)
    for run in (run_forward, run_max_logits):
        with pytest.raises(RuntimeError, match="no memory"):
            run(call, traits=H100)
    assert launching.warm_kernels() == []


@pytest.mark.parametrize(
    ("traits", "name"),
    [
        (DeviceTraits("cuda", 75, 65536, 40, 4 << 20, "T4"), "sm75"),
        (DeviceTraits("cuda", vendor="amd", name="MI300X"), "amd"),
    ],
    ids=["old", "amd"],
)
def test_kernels_that_no_set_has_for_a_device_are_refused_by_all(traits: DeviceTraits, name: str) -> None:
    with pytest.raises(mla_ops.UnsupportedProblemError, match=f"portable kernels: the device is {name}"):
        choose("forward", NAM28, Hints(1, 8, 8), traits)


def test_a_layout_that_has_strides_is_no_strided_tensor() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without mkldnn, whose tensors have strides and another layout")
    q = torch.randn(2)[:, None, None].expand(2, 4, 32)  # of the strides that torch gives an mkldnn tensor
    kv, indices = torch.randn(8, 1, 32), torch.zeros(2, 1, 3, dtype=torch.int32)
    torch.ops.mla.sparse_attn(q, kv, indices, 16, 0.5)
    with pytest.raises(mla_ops.InvalidInputError, match=r"q must be a dense \(strided\) tensor"):
        torch.ops.mla.sparse_attn(q.contiguous().to_mkldnn(), kv, indices, 16, 0.5)


# Tensors


def test_warm_up_indices_have_the_strides_and_the_alignment_of_the_real_ones() -> None:
    base = torch.arange(40, dtype=torch.int32)
    for like in (
        base.view(2, 4, 1, 5),
        base[:5].expand(2, 4, 1, 5),
        base[1:31].view(2, 3, 1, 5),
        base.view(2, 4, 5)[:, :, None, ::2],
        base[:0].view(2, 0, 1, 5),
    ):
        filled = filled_alike(like, -1)
        assert (filled.shape, filled.stride(), filled.dtype) == (like.shape, like.stride(), like.dtype)
        assert filled.data_ptr() % 16 == like.data_ptr() % 16
        assert (filled == -1).all()


def test_rows_that_begin_off_16_bytes_are_copied_wherever_their_storage_says_they_begin() -> None:
    rows = torch.arange(65, dtype=torch.float16)
    odd = torch.from_dlpack(rows[1:]).view(8, 1, 8)
    assert odd.storage_offset() == 0
    assert odd.data_ptr() % 16 == 2
    aligned = with_aligned_rows(odd)
    assert aligned.data_ptr() % 16 == 0
    assert torch.equal(aligned, odd)
    assert with_aligned_rows(aligned) is aligned

"""The Inductor lowering without a GPU: what it guards, when it steps aside, its switch, caches and choices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_ops import lowering, settings
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, ConfigKey, FwdConfig
from mla_ops.ops.sparse_attn.configs.lookup import (
    backward_candidates,
    backward_configs,
    forward_candidates,
    forward_config,
)
from mla_ops.ops.sparse_attn.configs.tuned import TunedRow, write_rows
from mla_ops.testing import Case, Inputs, make_inputs

triton = pytest.importorskip("triton", reason="triton is not installed")
from fake_gpu import H100_TRAITS, LoweringBackend  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="Inductor can't re-emit kernels defined under TRITON_INTERPRET=1"
    ),
]

ROOT = Path(__file__).parents[2]
# Different sizes: equal ones would share a symbol, and a later call that tells them apart would recompile.
DISTINCT = Case(batch=2, seq_q=5, heads=6, d_total=24, seq_kv=31, kv_group=3, topk=7, d_v=16)


def core(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.mla.sparse_attn(q, kv, indices, d_v, 0.5)


def train(compiled: Callable, inputs: Inputs, mark: Callable[[Inputs], None] = lambda inputs: None) -> None:
    """Run a step and hold it against eager: `LoweringBackend` runs the graph it lowered."""
    results = []
    for function in (compiled, core):
        leaves = inputs.requires_grad()
        if function is compiled:
            mark(leaves)
        out, lse = function(*leaves.args[:4])
        results.append([out, lse, *torch.autograd.grad([out, lse], [leaves.q, leaves.kv], [inputs.dout, inputs.dlse])])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def compile_lowered(**options: Any) -> tuple[Callable, LoweringBackend]:
    backend = LoweringBackend()
    return torch.compile(core, fullgraph=True, backend=backend, **options), backend


def no_recompile() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


# Guards


def test_one_graph_serves_all_lengths_and_each_width_gets_its_kernel() -> None:
    compiled, backend = compile_lowered(dynamic=True)
    train(compiled, make_inputs(DISTINCT))
    with no_recompile():
        for change in ({"topk": 40}, {"seq_q": 9}, {"seq_kv": 70}, {"batch": 11}):
            train(compiled, make_inputs(replace(DISTINCT, **change)))
    assert backend.frames == 1
    for frames, change in enumerate(({"heads": 9}, {"d_total": 32}, {"d_v": 12}), start=2):
        train(compiled, make_inputs(replace(DISTINCT, **change)))
        assert backend.frames == frames
    assert backend.is_inlined()


@pytest.mark.parametrize("need", ["q", "kv"])
@pytest.mark.parametrize("result", [0, 1], ids=["out", "lse"])
def test_a_loss_of_one_result_and_one_gradient_is_inlined(need: str, result: int) -> None:
    def loss(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return core(q, kv, indices, DISTINCT.d_v)[result].sum()

    inputs = make_inputs(DISTINCT).requires_grad(q=need == "q", kv=need == "kv")
    backend = LoweringBackend()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    gradients = [
        torch.autograd.grad(function(*inputs.args[:3]), getattr(inputs, need))[0] for function in (compiled, loss)
    ]
    assert torch.equal(*gradients)
    assert backend.is_inlined()
    launch = backend.launches[-1]
    assert (launch["dq_ptr"] is None, launch["dkv_ptr"] is None) == (need == "kv", need == "q")
    assert (launch["dout_ptr"] is None, launch["dlse_ptr"] is None) == (result == 1, result == 0)


@pytest.mark.parametrize("size", ["batch", "seq_q", "heads"])
def test_nothing_to_compute_is_nothing_to_launch(size: str) -> None:
    compiled, backend = compile_lowered()
    train(compiled, make_inputs(replace(DISTINCT, topk=200, **{size: 0}), invalid=False))
    assert backend.launches == []
    assert not any(name.startswith("mla.") for operations in backend.operations for name in operations)


def test_lengths_marked_dynamic_stay_symbolic_with_the_kernel_inlined() -> None:
    compiled, backend = compile_lowered()

    def mark(leaves: Inputs) -> None:
        for tensor, dims in ((leaves.q, (0, 1)), (leaves.kv, (0, 1)), (leaves.indices, (0, 1, 3))):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)

    train(compiled, make_inputs(DISTINCT), mark)
    with no_recompile():
        train(compiled, make_inputs(replace(DISTINCT, batch=4, seq_q=9, seq_kv=70, topk=40)), mark)
    assert backend.is_inlined()


def test_widths_marked_dynamic_keep_one_graph_and_the_operator(said: Callable[[str], bool]) -> None:
    compiled, backend = compile_lowered(dynamic=True)

    def mark(leaves: Inputs) -> None:
        torch._dynamo.mark_dynamic(leaves.q, 3)
        torch._dynamo.mark_dynamic(leaves.kv, 3)

    train(compiled, make_inputs(DISTINCT), mark)
    with no_recompile():
        for d_total, d_v in ((576, 512), (128, 64)):
            train(compiled, make_inputs(replace(DISTINCT, d_total=d_total, d_v=d_v)), mark)
    assert not backend.is_inlined()
    assert said("stays an extern call: d_total is marked dynamic")


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["atomics", "in order"])
def test_a_backward_in_key_order_is_left_to_the_operator(
    is_deterministic: bool, request: pytest.FixtureRequest, said: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_deterministic:
        request.getfixturevalue("deterministic")
    monkeypatch.setattr("mla_ops.lowering.sparse_attn.rows_per_launch", lambda *_: 132)
    compiled, _ = compile_lowered()
    train(compiled, make_inputs(DISTINCT))
    assert said("mla.sparse_attn.default is inlined")
    left = "mla.sparse_attn_bwd.default stays an extern call: dkv does not fit the cache"
    assert said(left) != is_deterministic


@pytest.mark.parametrize(("longest", "is_wide"), [(2**24, False), (2**30, True)])
def test_a_declared_range_decides_about_wide_offsets_without_a_guard(longest: int, is_wide: bool) -> None:
    # 24 channels: 2**24 rows end below element 2**31, 2**30 rows do not. A guard would violate the declared range.
    compiled, backend = compile_lowered()
    inputs = make_inputs(replace(DISTINCT, kv_group=1))
    torch._dynamo.mark_dynamic(inputs.kv, 1, min=2, max=longest)
    compiled(*inputs.args[:4])
    assert backend.is_inlined()
    assert [launch["USE_INT64_OFFSETS"] for launch in backend.launches] == [is_wide]


def test_a_shape_that_no_kernel_takes_recompiles_to_the_operator(said: Callable[[str], bool]) -> None:
    compiled, backend = compile_lowered(dynamic=True)
    train(compiled, make_inputs(DISTINCT))
    assert backend.operations[-1].count("UserDefinedTritonKernel") == 1
    train(compiled, make_inputs(replace(DISTINCT, d_total=1100)))
    assert "mla.sparse_attn_bwd.default" in backend.operations[-1]
    assert said("d_total is 1100, needs at most 1024")


WIDE = Case(d_total=576, d_v=512, topk=200, heads=64, batch=1, seq_q=70, seq_kv=256)


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["atomics", "in order"])
def test_where_eager_runs_gluon_kernels_the_operators_stay(
    is_deterministic: bool, request: pytest.FixtureRequest, said: Callable[[str], bool]
) -> None:
    if is_deterministic:
        request.getfixturevalue("deterministic")
    compiled, backend = compile_lowered()
    train(compiled, make_inputs(WIDE, torch.bfloat16))
    assert not backend.is_inlined()
    assert len(backend.operations) == 2
    assert said("twice as fast as the plain kernel and written in Gluon")
    torch._dynamo.reset()
    compiled, backend = compile_lowered()
    train(compiled, make_inputs(replace(WIDE, seq_q=8), torch.bfloat16))  # few queries: split over programs
    assert backend.is_inlined()


def test_a_package_takes_the_plain_kernels_where_eager_runs_gluon_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_ops.lowering import inductor_compat

    monkeypatch.setattr(inductor_compat, "is_ahead_of_time", lambda: True)
    compiled, backend = compile_lowered()
    train(compiled, make_inputs(WIDE, torch.bfloat16))
    assert backend.is_inlined()


def test_sizes_that_depend_on_data_keep_the_operator(said: Callable[[str], bool]) -> None:
    backend = LoweringBackend()

    def function(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        kept = kv[:, kv[0, :, 0, 0].nonzero().squeeze(1)]
        return torch.ops.mla.sparse_attn(q, kept, indices, 16, 0.5)[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(function, fullgraph=True, backend=backend)(*make_inputs(Case(d_total=24, d_v=16)).args[:3])
    assert said("seq_kv depends on data")


def test_a_named_backend_without_kernels_keeps_the_operator(said: Callable[[str], bool]) -> None:
    backend = LoweringBackend()
    function = torch.compile(
        lambda *args: torch.ops.mla.sparse_attn(*args, backend="eager"), fullgraph=True, backend=backend
    )
    function(*make_inputs(DISTINCT).args)
    assert not backend.is_inlined()
    assert said("only the triton backend is inlined")


def test_a_backward_that_is_compiled_later_has_the_settings_of_its_forward(tmp_path: Path) -> None:
    fwd = FwdConfig(block_h=16, block_k=16, max_chunk=16, num_warps=1, num_stages=3)
    bwd = BwdConfig(block_h=16, block_k=16, max_chunk=16, num_warps=1, num_stages=3)
    row = TunedRow(90, DISTINCT.d_total, DISTINCT.d_v, DISTINCT.heads // DISTINCT.kv_group, 4, fwd, (bwd,))
    write_rows(tmp_path / "rows.json", {"device": "by hand"}, [row])
    compiled, backend = compile_lowered()
    leaves = make_inputs(DISTINCT).requires_grad()
    with settings.override(tuned_rows=str(tmp_path / "rows.json")):
        out, _ = compiled(*leaves.args[:4])
    out.sum().backward()
    assert [launch["BLOCK_K"] for launch in backend.launches] == [16, 16]
    assert [launch["BLOCK_DV"] for launch in backend.launches] == [16, 16]


def test_the_cpu_keeps_the_operator(said: Callable[[str], bool]) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):  # a cached graph is not lowered again
        torch.compile(core, fullgraph=True)(*make_inputs(DISTINCT).args[:4])
    assert said("stays an extern call: only the triton backend is inlined")
    assert said("device is cpu, needs CUDA")


def test_bad_arguments_fail_at_trace_time_with_the_contracts_words() -> None:
    compiled, backend = compile_lowered()
    inputs = make_inputs(DISTINCT)
    with pytest.raises(Exception, match="d_v must be"):
        compiled(*inputs.args[:3], DISTINCT.d_total + 1)
    assert backend.operations == []


# The switch


def test_the_switch_is_idempotent_and_restores_what_was() -> None:
    assert lowering.is_enabled()
    with lowering.disable():
        assert not lowering.is_enabled()
        with lowering.enable():
            assert lowering.is_enabled()
        with lowering.disable():
            assert not lowering.is_enabled()
        assert not lowering.is_enabled()
    assert lowering.is_enabled()
    lowering.disable()
    lowering.disable()
    assert not lowering.is_enabled()
    lowering.enable()
    lowering.enable()
    assert lowering.is_enabled()


def test_graphs_compiled_while_disabled_call_the_operator(said: Callable[[str], bool]) -> None:
    compiled, backend = compile_lowered()
    with lowering.disable():
        train(compiled, make_inputs(DISTINCT))
    assert not backend.is_inlined()
    assert said("mla_ops.lowering is disabled")
    torch._dynamo.reset()
    compiled, backend = compile_lowered()
    train(compiled, make_inputs(DISTINCT))
    assert backend.is_inlined()


def test_enabling_installs_at_once_for_programs_that_are_not_traced_any_more(switched: dict[str, Any]) -> None:
    # What is packaged after torch.export.load: its operators are in the graph, and no fake of ours runs again.
    assert switched["lowered"] == [True, True]


def run_python(program: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(cwd), str(ROOT / "tests/support")])
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def switched() -> dict[str, Any]:
    """What the switch does in a process that has traced nothing."""
    program = """
import json, threading, torch, torch.compiler.config as config, mla_ops
from mla_ops import lowering
from mla_ops.registration.cache_key import fingerprint
tags = []
def note_tag():
    thread = threading.Thread(target=lambda: tags.append(config.cache_key_tag))
    thread.start(); thread.join()
note_tag()
lowering.disable()
note_tag()
lowering.enable()
import torch._inductor.lowering as inductor
operators = (torch.ops.mla.sparse_attn.default, torch.ops.mla.sparse_attn_bwd.default)
lowered = [operator in inductor.lowerings for operator in operators]
print(json.dumps({"tags": tags, "fingerprint": fingerprint(), "lowered": lowered}))
"""
    return json.loads(run_python(program).stdout)


COMPILE_ON_CPU = """
import torch, mla_ops
from mla_ops.testing import Case, make_inputs
inputs = make_inputs(Case(d_total=24, d_v=16))
function = lambda q, kv, indices: torch.ops.mla.sparse_attn(q, kv, indices, 16, 0.5)[0]
result = torch.compile(function, fullgraph=True)(*inputs.args[:3])
assert torch.equal(result, function(*inputs.args[:3]))
"""


def test_an_untested_torch_gets_the_operator_and_one_warning() -> None:
    program = """
import torch, warnings
torch.__version__ = "2.99.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
""" + "\n".join(f"    {line}" for line in (COMPILE_ON_CPU + "torch._dynamo.reset()" + COMPILE_ON_CPU).splitlines())
    program += """
texts = [str(w.message) for w in caught if "mla_ops" in str(w.message)]
assert len(texts) == 1, texts
import sys
assert "mla_ops.lowering.sparse_attn" not in sys.modules
print(texts[0])
"""
    assert "tested with torch >= 2.11, < 2.15 and this is 2.99.0" in run_python(program).stdout


def test_torch_logs_shows_what_the_lowering_decides(cold_and_warm: list[subprocess.CompletedProcess[str]]) -> None:
    assert "mla.sparse_attn.default stays an extern call" in cold_and_warm[0].stderr


# Caches


def test_the_cache_tag_says_whether_kernels_are_inlined() -> None:
    from torch.compiler import config

    from mla_ops.registration.cache_key import fingerprint

    assert config.cache_key_tag.endswith(fingerprint())
    with lowering.disable():
        assert config.cache_key_tag.endswith(fingerprint() + "-extern")
        assert config.cache_key_tag.count("mla_ops=") == 1
    assert config.cache_key_tag.endswith(fingerprint())


def test_the_cache_tag_is_seen_by_threads_that_did_not_import(switched: dict[str, Any]) -> None:
    # A thread of autograd's compiles the backward of CUDA tensors, and settings belong to threads since torch 2.13.
    assert switched["tags"] == [switched["fingerprint"], switched["fingerprint"] + "-extern"]


def test_a_tag_set_later_is_kept_and_completed_by_the_next_trace() -> None:
    from torch.compiler import config

    from mla_ops.registration.cache_key import fingerprint

    with config.patch(cache_key_tag="mine"):
        torch.compile(core, fullgraph=True, backend="aot_eager")(*make_inputs(DISTINCT).args[:4])
        assert config.cache_key_tag == f"mine;{fingerprint()}"


@pytest.fixture(scope="module")
def cold_and_warm(tmp_path_factory: pytest.TempPathFactory) -> list[subprocess.CompletedProcess[str]]:
    """A graph compiled in three processes with one cache: cold with the log shown, warm, and after a kernel changed."""
    folder = tmp_path_factory.mktemp("cached")
    tree = folder / "tree"
    for name in ("mla_ops", "registration", "lowering"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"""
{COMPILE_ON_CPU}
import mla_ops.registration, mla_ops.lowering
assert all(m.__file__.startswith({str(tree)!r}) for m in (mla_ops, mla_ops.registration, mla_ops.lowering))
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""

    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0"}
    runs = [run_python(program, tree, **cache, TORCH_LOGS="mla_ops"), run_python(program, tree, **cache)]
    kernel = tree / "mla_ops/ops/sparse_attn/kernels/forward.py"
    kernel.write_text(kernel.read_text() + "\n# changed\n")
    return [*runs, run_python(program, tree, **cache)]


def test_a_changed_kernel_is_not_served_from_the_cache(cold_and_warm: list[subprocess.CompletedProcess[str]]) -> None:
    assert [run.stdout.strip() for run in cold_and_warm] == ["0 0", "1 1", "0 0"]


# Choices


PROBLEMS = [
    ConfigKey(90, 232448, 28, 128, 64, 2),
    ConfigKey(90, 232448, 128, 576, 512, 2),
    ConfigKey(80, 166912, 12, 144, 80, 4),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_are_few_different_and_begin_with_the_tables_choice(problem: ConfigKey) -> None:
    for candidates, choice in ((forward_candidates, forward_config), (backward_candidates, backward_configs)):
        found = candidates(problem, count=3)
        assert found[0] == choice(problem)
        assert 1 < len(found) <= 3
        assert len(set(found)) == len(found)


def test_max_autotune_inlines_the_fastest_candidate(
    monkeypatch: pytest.MonkeyPatch, said: Callable[[str], bool]
) -> None:
    from mla_ops.lowering import sparse_attn_choices as choices

    # What is timed needs a GPU; which of the timed is inlined does not.
    timed: list[Any] = []
    monkeypatch.setattr(choices, "random_call", lambda *problem: None)
    monkeypatch.setattr(choices, "plan_forward", lambda call, traits, *, choice: choice.config)
    monkeypatch.setattr(choices, "launch_forward", lambda call, config: timed.append(config))
    times = iter([3.0, 2.0, 1.0, 4.0])

    def do_bench(run: Callable, return_mode: str) -> float:
        run()
        return next(times)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    backend = LoweringBackend()
    compiled = torch.compile(core, fullgraph=True, backend=backend)
    with torch._inductor.config.patch(max_autotune=True):
        compiled(*make_inputs(Case(d_total=128, d_v=64, heads=32), torch.bfloat16).args[:4])
    assert len(timed) == choices.SHORT_LIST
    (launch,) = backend.launches
    assert (launch["BLOCK_H"], launch["BLOCK_K"]) == (timed[2].block_h, timed[2].block_k)
    assert said(f"{timed[2]}, num_splits=")


def test_the_default_mode_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(triton.testing, "do_bench")
    compiled, backend = compile_lowered()
    compiled(*make_inputs(Case(d_total=128, d_v=64, heads=32), torch.bfloat16).args[:4])
    (launch,) = backend.launches
    config = forward_config(ConfigKey(90, H100_TRAITS.smem_bytes, 32, 128, 64, 2))
    assert (launch["BLOCK_H"], launch["BLOCK_K"]) == (config.block_h, config.block_k)


def test_timed_inputs_have_the_sizes_at_hand_and_only_valid_indices() -> None:
    from mla_ops.lowering.sparse_attn_choices import random_call
    from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem

    problem = SparseAttnProblem(d_total=24, d_v=16, topk=7, heads=6, kv_group=3, dtype=torch.bfloat16)
    call = random_call(problem, Hints(batch=2, seq_q=5, seq_kv=31), torch.device("cpu"), 0.5)
    q, kv, indices, *constants = call
    assert constants == [16, 0.5, None, None]
    assert (q.shape, kv.shape, indices.shape) == ((2, 5, 6, 24), (2, 31, 3, 24), (2, 5, 3, 7))
    assert q.dtype == kv.dtype == torch.bfloat16
    assert 0 <= indices.min() < indices.max() < 31


# What real training puts around the operator


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
def test_checkpoint_policies_decide_about_the_operator(saved: bool) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_ours = op is torch.ops.mla.sparse_attn.default
        return CheckpointPolicy.MUST_SAVE if is_ours and saved else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int) -> torch.Tensor:
        return torch.ops.mla.sparse_attn(q * 2, kv, indices, d_v, 0.5)[0].sin()

    def function(*args: Any) -> torch.Tensor:
        return checkpoint(
            block, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
        )

    backend = LoweringBackend()
    leaves = make_inputs(DISTINCT).requires_grad()
    torch.compile(function, fullgraph=True, backend=backend)(*leaves.args[:4]).sum().backward()
    forward, backward = (operations.count("UserDefinedTritonKernel") for operations in backend.operations)
    assert (forward, backward) == (1, 1 if saved else 2)
    assert backend.is_inlined()


def layers(count: int) -> torch.nn.ModuleList:
    from mla_ops.cli.model import Layer, ModelConfig

    torch.manual_seed(0)
    return torch.nn.ModuleList(Layer(ModelConfig()) for _ in range(count))


def test_a_whole_layer_trains_in_one_graph_with_its_optimizer() -> None:
    losses = []
    for backend in (None, LoweringBackend()):
        (layer,) = layers(1)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        forward, step = layer, optimizer.step
        if backend is not None:
            forward = torch.compile(layer, fullgraph=True, backend=backend)
            step = torch.compile(optimizer.step, backend="aot_eager")  # torch breaks its own graph at the step's door
        x = torch.randn(2, 48, 128, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            y, _, index_loss = forward(x)
            loss = y.square().mean() + index_loss
            loss.backward()
            step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    assert backend.frames == 1
    assert backend.is_inlined("mla.sparse_attn")
    torch.testing.assert_close(losses[3:], losses[:3])
    assert losses[2] < losses[0]


def test_repeated_layers_share_one_graph() -> None:
    backend = LoweringBackend()
    repeated = layers(3)
    for layer in repeated:
        layer.compile(fullgraph=True, backend=backend)
    x = torch.randn(2, 48, 128, requires_grad=True)  # as what an earlier layer hands over
    for layer in repeated:
        x, *_ = layer(x)
    x.sum().backward()
    assert backend.frames == 1
    assert backend.is_inlined("mla.sparse_attn")


def test_autocast_inlines_kernels_of_its_dtype() -> None:
    backend = LoweringBackend()
    compiled = torch.compile(core, fullgraph=True, backend=backend)
    inputs = make_inputs(DISTINCT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = compiled(*inputs.args[:4])
    (launch,) = backend.launches
    assert out.dtype == launch["q_ptr"].get_dtype() == launch["kv_ptr"].get_dtype() == torch.bfloat16

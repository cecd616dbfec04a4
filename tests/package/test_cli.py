"""The command line as a user meets it: its words and exit statuses, and a real (short) training run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from mla_ops.cli.model import LanguageModel, ModelConfig

ROOT = Path(__file__).parents[2]
Result = subprocess.CompletedProcess[str]
Command = Callable[..., Result]


def mla_ops(*args: str) -> Result:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "mla_ops", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a CUDA device where there is none")
@pytest.mark.parametrize("command", ["demo", "explain --d-total 8 --d-v 5 --topk 4 --heads 2"])
def test_a_device_that_is_not_there_is_refused_in_a_line(command: str, mla_ops_here: Command) -> None:
    result = mla_ops_here(*command.split(), "--device", "cuda")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("mla-ops: UnsupportedProblemError: device must be one that torch sees, got cuda")
    assert result.stderr.count("\n") == 1


def check_demo(folder: Path, result: Result, compiler: str, steps: int) -> None:
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "report.json").read_text())
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert report["compile_backend"] == compiler
    assert (report["graphs"], report["graph_breaks"], report["recompiles"]) == (1, 0, 0)
    assert report["sequence_lengths"] == [128, 256]
    compiled, eager = report["runs"]["compiled"], report["runs"]["eager"]
    for run in (compiled, eager):
        assert len(run["losses"]) == len(run["index_losses"]) == steps
        assert 5.3 < run["losses"][0] < 6.0  # a uniform guess over 256 bytes costs 5.55 nats
        assert run["losses"][-1] < run["losses"][0] - 0.5
    assert compiled["losses"][0] == pytest.approx(eager["losses"][0], abs=1e-4)
    assert report["sample"].startswith("import os")
    for part in ("graphs: 1, graph breaks: 0", "tokens/s", "final loss", "sampled text", "wrote"):
        assert part in result.stdout
    assert f"{steps}/{steps}" in result.stderr  # the progress bar


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_demo_through_inductor(tmp_path: Path, mla_ops_here: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    # One layer instead of two: most of the test's time is the C++ compiler's.
    monkeypatch.setattr("mla_ops.cli.demo.ModelConfig", partial(ModelConfig, num_layers=1))
    result = mla_ops_here("demo", "--steps", "6", "--out", str(tmp_path), "--device", "cpu")
    check_demo(tmp_path, result, "inductor", 6)


@pytest.mark.usefixtures("fresh_dynamo")
def test_demo_without_a_compiler_says_so(
    tmp_path: Path, mla_ops_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    result = mla_ops_here("demo", "--steps", "6", "--out", str(tmp_path), "--device", "cpu")
    check_demo(tmp_path, result, "aot_eager", 6)
    assert "no C++ compiler found" in result.stdout


def test_demo_without_its_extra_names_the_pip_line(
    tmp_path: Path, mla_ops_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import of it fails
    result = mla_ops_here("demo", "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "needs tqdm, which is not installed; pip install 'mla_ops[demo]'" in result.stderr
    assert not (tmp_path / "out").exists()


SIZES = ("--d-total", "128", "--d-v", "64", "--topk", "256", "--heads", "28", "--device", "cpu")


def test_explain_prints_the_decision(mla_ops_here: Command) -> None:
    result = mla_ops_here("explain", *SIZES)
    assert result.returncode == 0
    assert result.stdout.startswith("backend 'eager' (backend=\"auto\") for mla::sparse_attn on cpu\n")
    assert "d_total=128 d_v=64 heads=28 kv_group=1 topk=256 bf16" in result.stdout


def test_doctor_says_what_is_usable_and_why_not(mla_ops_here: Command) -> None:
    result = mla_ops_here("doctor", "--json")
    report = json.loads(result.stdout)
    assert report["versions"]["torch"] == torch.__version__
    cpu = report["devices"][0]
    assert cpu["device"] == "cpu"
    for probe in cpu["probes"]:
        assert probe["auto"] == "eager"
        assert probe["backends"]["eager"] == []
        assert "device is cpu, needs CUDA; move the tensors to a GPU" in probe["backends"]["triton"]
    text = mla_ops_here("doctor").stdout
    assert f"torch         {torch.__version__}" in text
    assert "    triton: device is cpu, needs CUDA" in text


def test_doctor_without_triton_names_it(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["triton"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else real(name, *rest)
from mla_ops.device import DeviceTraits
from mla_ops.cli import doctor
doctor.traits_of = lambda device: DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, name="H100")
raise SystemExit(doctor.run_doctor(as_json=False))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr
    assert "triton: triton is not installed, needs triton>=3.6; pip install triton" in result.stdout
    assert "auto: no backend" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((*SIZES, "--d-v", "129"), "--d-v must be at most --d-total (128), got 129"),
        ((*SIZES, "--kv-group", "3"), "--heads must be a multiple of --kv-group, got 28 and 3"),
        ((*SIZES, "--backend", "cuda"), "backend must be one of 'auto'"),
        ((*SIZES, "--topk", "0"), "must be at least 1, got 0"),
    ],
)
def test_bad_arguments_end_in_one_line(args: tuple[str, ...], message: str, mla_ops_here: Command) -> None:
    result = mla_ops_here("explain", *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_prints_and_ends_as_the_function_does(mla_ops_here: Command) -> None:
    arguments = ("explain", *SIZES, "--d-v", "129")
    process, function = mla_ops(*arguments), mla_ops_here(*arguments)
    assert (process.returncode, process.stdout, process.stderr) == (2, "", function.stderr)


# The demo's model


def test_model_is_causal_and_trains_every_parameter() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig())
    tokens = torch.randint(0, 256, (2, 65))
    loss, index_loss = model.losses(tokens)
    (loss + index_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_index_loss_reaches_the_indexer_only() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig())
    tokens = torch.randint(0, 256, (2, 65))
    for loss, expect_indexer in zip(model.losses(tokens), (False, True), strict=True):
        model.zero_grad(set_to_none=True)
        loss.backward()
        for name, parameter in model.named_parameters():
            touched = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert touched == (("indexer" in name) == expect_indexer), name


def test_index_loss_is_zero_when_the_indexer_agrees() -> None:
    torch.manual_seed(0)
    config = ModelConfig(topk=8)
    attention = LanguageModel(config).layers[0].attn
    q, kv = torch.randn(1, 20, 4, 128), torch.randn(1, 20, 1, 128)
    indices = torch.randint(0, 20, (1, 20, 1, 8), dtype=torch.int32)
    _, lse = torch.ops.mla.sparse_attn(q, kv, indices, 64, attention.mla.meta.softmax_scale)
    rows = kv[0, :, 0][indices[0, :, 0].long()][None]
    logits = attention.mla.meta.softmax_scale * torch.einsum("bshd,bskd->bshk", q, rows)
    agreeing = logits.softmax(-1).mean(2).log()
    assert attention.index_loss(q, kv, indices, lse, agreeing).abs() < 1e-5
    assert attention.index_loss(q, kv, indices, lse, agreeing.roll(1, dims=-1)) > 0.01

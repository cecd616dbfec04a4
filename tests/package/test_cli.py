"""The command line as a user meets it: its words and exit statuses, and a real (short) training run."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from mla_ops import __version__, settings
from mla_ops.cli import demo as demo_module
from mla_ops.cli import main as main_module
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


@pytest.mark.parametrize("place", ["a-file", "a-file/below", "folder"])
def test_demo_refuses_a_place_it_cannot_write_before_it_trains(place: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("kept")
    (tmp_path / "folder/report.json").mkdir(parents=True)
    result = mla_ops("demo", "--out", str(tmp_path / place))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("mla-ops: InvalidInputError: --out must be where report.json can be written, got ")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "a-file").read_text() == "kept"


@pytest.fixture
def untrained_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo without its minutes: the runs' losses are made up, the sample is what a terminal would obey."""

    def train(name: str, text: object, config: object, device: object, steps: int, *rest: object) -> tuple:
        rate = None if steps == 1 else 1000.0
        run = demo_module.Run(name, losses=[5.5] * steps, index_losses=[0.1] * steps, tokens_per_second=rate)
        return run, None

    monkeypatch.setattr(demo_module, "_train", train)
    monkeypatch.setattr(demo_module, "_count_graphs", lambda: (1, 0))
    monkeypatch.setattr(demo_module, "_validate", lambda *_: 2.0)
    monkeypatch.setattr(demo_module, "_sample", lambda *_: "import os\n\x1b[2J\t\x9bé\ufffd")


@pytest.mark.usefixtures("untrained_demo")
def test_demo_prints_its_table_before_it_writes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(demo_module, "_plot", fail)
    assert main_module.main(["demo", "--steps", "4", "--device", "cpu", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "compiled         5.500       5.500       1,000" in said.out
    assert "wrote" not in said.out
    assert said.err == "mla-ops: OSError: no space left\n"


@pytest.mark.usefixtures("untrained_demo")
def test_demo_shows_control_characters_and_sends_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["demo", "--steps", "4", "--device", "cpu", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b[2J\\t\\x9bé\ufffd\n" in said
    assert all(c.isprintable() or c == "\n" for c in said)
    assert json.loads((tmp_path / "report.json").read_text())["sample"] == "import os\n\x1b[2J\t\x9bé\ufffd"


@pytest.mark.usefixtures("untrained_demo")
@pytest.mark.parametrize(
    ("steps", "lengths", "text"), [(1, [128], "length 128"), (2, [128, 256], "lengths 128 and 256")]
)
def test_demo_names_the_lengths_that_ran(
    steps: int, lengths: list[int], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_module.main(["demo", "--steps", str(steps), "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["sequence_lengths"] == lengths
    assert [
        batch.shape[1] - 1 for batch in demo_module._batches(torch.zeros(999, dtype=torch.uint8), steps, 0)
    ] == lengths
    assert f"recompiles over sequence {text}: 0\n" in capsys.readouterr().out


def test_an_interrupted_demo_ends_in_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mla_ops", "demo", "--steps", "100000", "--device", "cpu", "--out", str(tmp_path)],
        env={**os.environ, "CXX": "/nonexistent/c++", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("text:"):
        assert process.poll() is None
    time.sleep(2.0)  # into the first step, which compiles
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.endswith("mla-ops: interrupted\n")
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["demo", "doctor", "explain", "bench", "tune"])
def test_every_command_ends_an_interrupt_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, f"_{command}", interrupt)
    sizes = ["--d-total", "8", "--d-v", "5", "--topk", "4", "--heads", "2"] if command in ("explain", "tune") else []
    assert main_module.main([command, *sizes]) == 130
    assert capsys.readouterr() == ("", "mla-ops: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_ends_a_command_without_a_word(unbuffered: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mla_ops", "doctor"],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=120) == 141


def test_what_the_terminals_encoding_lacks_is_escaped() -> None:
    program = r"""
from mla_ops.cli import main
main._doctor = lambda arguments: print("caf\xe9 \u2588 \ufffd") or 0
raise SystemExit(main.main(["doctor"]))
"""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=120, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"caf\xe9 \\u2588 \\ufffd\n", b"")


def options() -> Iterator[tuple[str, argparse.Action]]:
    (commands,) = [a for a in main_module._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for command, parser in commands.choices.items():
        for action in parser._actions:
            yield f"{command} {action.option_strings[-1]}", action


@pytest.mark.parametrize(("name", "option"), [pytest.param(*option, id=option[0]) for option in options()])
def test_every_option_has_a_help_text(name: str, option: argparse.Action) -> None:
    assert option.help


def test_version() -> None:
    result = mla_ops("--version")
    assert (result.returncode, result.stdout) == (0, f"mla-ops {__version__}\n")


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


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MLA_OPS_EAGER_WORKSPACE_MB", "abc", "MLA_OPS_EAGER_WORKSPACE_MB must be an integer >= 1, got 'abc'"),
        ("MLA_OPS_EAGER_WORKSPACE_MB", "0", "eager_workspace_mb must be an integer >= 1, got 0"),
        ("MLA_OPS_TUNED_ROWS", "/nowhere/rows.json", "tuned_rows must name a file that mla-ops tune wrote, got '/nowh"),
        ("MLA_OPS_TUNED_ROWS", __file__, "tuned_rows must name a file that mla-ops tune wrote, got"),
    ],
)
def test_doctor_says_which_setting_is_wrong(
    variable: str, value: str, message: str, mla_ops_here: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(settings, "_from_environment", settings._from_environment.__wrapped__)  # read it again
    result = mla_ops_here("doctor")
    assert (result.returncode, result.stderr) == (1, "")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("settings ")]
    assert line.removeprefix("settings").strip().startswith(message)
    assert "auto: eager" in result.stdout
    report = json.loads(mla_ops_here("doctor", "--json").stdout)
    assert report["settings_problem"].startswith(message)


def test_a_wrong_setting_is_refused_by_its_first_use_and_not_at_import() -> None:
    program = """
import torch, mla_ops
print("imported")
q, kv, indices = torch.randn(4, 2, 8), torch.randn(4, 1, 8), torch.zeros(4, 1, 2, dtype=torch.int32)
for _ in range(2):
    try:
        mla_ops.sparse_attn(q, kv, indices, d_v=4, softmax_scale=1.0)
    except mla_ops.errors.InvalidSettingError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "MLA_OPS_EAGER_WORKSPACE_MB": "abc"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "imported",
        *["MLA_OPS_EAGER_WORKSPACE_MB must be an integer >= 1, got 'abc'"] * 2,
    ]


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
        ((*SIZES, "--heads", "abc"), "argument --heads: must be an integer of at least 1, got 'abc'"),
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


def test_rows_fewer_than_topk_are_all_selected() -> None:
    torch.manual_seed(0)
    config = ModelConfig()
    model = LanguageModel(config)
    tokens = torch.randint(0, 256, (2, 2 * config.topk))
    with torch.no_grad():
        whole, short = model(tokens)[0], model(tokens[:, : config.topk - 1])[0]
    torch.testing.assert_close(short, whole[:, : config.topk - 1])
    loss, index_loss = model.losses(tokens[:, :6])
    (loss + index_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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

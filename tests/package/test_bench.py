"""What `mla-ops bench` and `tune` rest on, without a GPU: formulations that agree, plots, candidates that fit."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_ops.bench import bench, peers, tune
from mla_ops.bench.plots import plot_sweeps
from mla_ops.bench.provenance import write
from mla_ops.bench.shapes import SHAPES, SOFTMAX_SCALE, SWEEPS, Shape
from mla_ops.bench.tune import backward_candidates, forward_candidates
from mla_ops.cli.main import _parser
from mla_ops.device import DeviceTraits
from mla_ops.errors import InvalidInputError, InvalidSettingError
from mla_ops.ops.sparse_attn.configs.launch import bwd_smem_bytes, fwd_smem_bytes
from mla_ops.ops.sparse_attn.configs.lookup import key_of
from mla_ops.ops.sparse_attn.reference import sparse_attn_reference

ROOT = Path(__file__).parents[2]
H100 = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, name="NVIDIA H100 80GB HBM3")
SIZES = "--d-total 128 --d-v 64 --heads 28 --topk 256"


@pytest.mark.parametrize("peer", [peers.ours, peers.gather, peers.masked_sdpa, peers.flex])
def test_compared_formulations_compute_the_same(peer: peers.Attention) -> None:
    q, kv = torch.randn(2, 128, 4, 32), torch.randn(2, 128, 1, 32)
    indices = torch.rand(2, 128, 1, 128).argsort(-1)[..., :24].int()  # distinct: a mask can't say "twice"
    want, _ = sparse_attn_reference(q, kv, indices, 16, SOFTMAX_SCALE)
    torch.testing.assert_close(peer(q, kv, indices, 16), want, rtol=1e-4, atol=1e-5)


def test_flash_kernels_are_offered_only_what_they_accept(tmp_path: Path) -> None:
    both = ["FlashMLA", "FlashAttention-3"]
    assert list(peers.flash_peers(SHAPES["DS"], both)) == both
    assert list(peers.flash_peers(replace(SHAPES["DS"], d_total=512), both)) == ["FlashMLA"]
    assert not peers.flash_peers(SHAPES["NAM28"], both)
    with pytest.raises(InvalidInputError, match=r"--flash-libraries must hold _flashmla_C\.abi3\.so or"):
        peers.flash_libraries(tmp_path)


def test_floor_is_the_larger_of_products_and_bytes() -> None:
    matmul = 772e12
    assert SHAPES["DS"].floor_seconds("fwd", matmul) == pytest.approx(3.03e-3, rel=0.01)  # tensor cores
    assert SHAPES["NAM8"].floor_seconds("fwd", matmul) == pytest.approx(0.165e-3, rel=0.01)  # gather
    assert SHAPES["NAM28"].floor_seconds("bwd", matmul) == pytest.approx(0.82e-3, rel=0.01)  # gather and atomics
    both = SHAPES["MID"].floor_seconds("fwd", matmul) + SHAPES["MID"].floor_seconds("bwd", matmul)
    assert SHAPES["MID"].floor_seconds("fwd_bwd", matmul) == both


def test_sweeps_are_drawn_from_the_results_file_alone(tmp_path: Path) -> None:
    records = [
        {"shape": f"{sweep}={value}", **asdict(shape), "impl": "mla_ops", "direction": direction, "ms": 1.0,
         "tflops": 100.0 + value, "floor_ratio": 0.0}
        for sweep in ("heads", "topk") for value, shape in SWEEPS[sweep][1].items() for direction in ("fwd", "bwd")
    ]  # fmt: skip
    path = write(tmp_path, "sweeps", torch.device("cpu"), records, commit="abc", matmul_flops_per_s=772e12)
    header = json.loads(path.read_text())["header"]
    assert header["commit"] == "abc"
    assert header["torch"] == torch.__version__
    image = plot_sweeps(path)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_what_is_timed_is_checked_with_all_queries_on_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(B=1, Sq=3, Skv=2048, H=2, d_total=576, d_v=512, topk=2048)  # one query fits the gather
    q, kv, dout = (torch.randn(1, n, h, d).bfloat16() for n, h, d in ((3, 2, 576), (2048, 1, 576), (3, 2, 512)))
    arguments = shape, q, kv, torch.rand(1, 3, 1, 2048).argsort(-1).int(), dout
    assert all(error < 1e-2 for error in bench._check(*arguments).values())
    queries = []

    def wrong_in_dkv(q: torch.Tensor, kv: torch.Tensor, *rest: Any) -> torch.Tensor:
        queries.append(q.shape[1])
        return peers.ours(q, kv + 0.02 * (kv - kv.detach()), *rest)

    monkeypatch.setattr(bench, "ours", wrong_in_dkv)
    with pytest.raises(AssertionError, match="dkv is off by"):
        bench._check(*arguments)
    assert queries == [3]


def test_candidates_start_with_the_table_and_fit_the_device() -> None:
    shape = Shape(B=1, Sq=64, Skv=512, H=28, d_total=128, d_v=64, topk=256)
    key = key_of(shape.problem(), H100)
    forwards, backwards = list(forward_candidates(shape, H100)), list(backward_candidates(shape, H100))
    assert len(forwards) == len(set(forwards)) > 10
    assert len(backwards) == len(set(backwards)) > 10
    assert all(fwd_smem_bytes(config, key) <= H100.smem_bytes for config in forwards)
    assert all(bwd_smem_bytes(config, key) <= H100.smem_bytes for config in backwards)


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench", "mla-ops bench needs a CUDA device, none was found"),
        ("tune --d-total 128 --d-v 64 --heads 28 --topk 256", "mla-ops tune measures on a CUDA device, none was found"),
        ("tune --d-total 64 --d-v 128 --heads 28 --topk 256", "--d-v must be at most --d-total (64), got 128"),
        ("bench --shapes NAM9", "unknown NAM9; expected some of NAM8, NAM28"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: str, message: str, mla_ops_here: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    result = mla_ops_here(*arguments.split())
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("command", "out", "error", "message"),
    [
        ("bench", "a-file", InvalidInputError, "--out must be where results.json can be written, got "),
        (
            f"tune {SIZES}",
            "a-file/below.json",
            InvalidInputError,
            "--out must be where below.json can be written, got ",
        ),
        (f"tune {SIZES}", "", InvalidInputError, "Is a directory"),
        (f"tune {SIZES}", "a-file", InvalidSettingError, "must name a file that mla-ops tune wrote, got "),
    ],
)
def test_where_results_cannot_go_is_refused_before_the_work(
    command: str, out: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        pytest.fail("the work began")

    (tmp_path / "a-file").write_text("kept")
    monkeypatch.setattr(bench, "_matmul_flops_per_s", work)
    monkeypatch.setattr(tune, "_compile_all", work)
    monkeypatch.setattr(tune, "traits_of", lambda device: H100)
    for module in (bench, tune):
        monkeypatch.setattr(module, "pick_device", lambda name: torch.device("cuda"))
    arguments = _parser().parse_args([*command.split(), "--out", str(tmp_path / out)])
    with pytest.raises(error, match=message):
        arguments.run(arguments)
    assert (tmp_path / "a-file").read_text() == "kept"


def test_an_interrupt_is_not_told_by_the_processes_that_compile(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
from mla_ops.bench import tune

def compile_one(task):
    os.kill(os.getpid(), signal.SIGINT)
    return None

if __name__ == "__main__":
    tune._compile = compile_one
    print(len(tune._compile_all(None, ["a", "b"], 1)))
"""
    (tmp_path / "program.py").write_text(program)  # a file, because spawned processes read it again
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert (result.returncode, result.stdout) == (0, "2\n"), result.stderr


@pytest.mark.gpu
def test_tune_leaves_what_runs_specialised(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the warp-specialised kernels are for compute capability 9.0")
    path = tmp_path / "rows.json"
    sizes = "--d-total 576 --d-v 512 --heads 64 --topk 256 --seq-q 128 --seq-kv 512"
    command = [sys.executable, "-m", "mla_ops", "tune", *sizes.split(), "--out", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "nothing to tune" in result.stdout
    assert not path.exists()


@pytest.mark.gpu
def test_tune_writes_rows_that_are_used(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    sizes = "--d-total 80 --d-v 64 --heads 4 --topk 64 --seq-q 64 --seq-kv 256"
    command = [sys.executable, "-m", "mla_ops", "tune", *sizes.split(), "--out", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["d_total"], row["d_v"], row["heads"]) == (80, 64, 4)
    code = f"""
import torch, mla_ops
from mla_ops.testing import Case, assert_matches_oracle, make_inputs
inputs = make_inputs(Case(d_total=80, d_v=64, heads=4, topk=64, seq_kv=256), torch.bfloat16, "cuda")
out, lse = mla_ops.sparse_attn(inputs.q, inputs.kv, inputs.indices, **inputs.kwargs)
assert_matches_oracle({{"out": out, "lse": lse}}, inputs)
from mla_ops.launching import warm_kernels
assert [kernel[-1].block_k for kernel in warm_kernels()] == [{row["fwd"]["block_k"]}], warm_kernels()
"""
    environment = {**os.environ, "MLA_OPS_TUNED_ROWS": str(path)}
    used = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr


def test_training_step_benchmark_runs_at_toy_sizes() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/training_step.py")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    records = [ast.literal_eval(line) for line in result.stdout.splitlines()]
    assert [record["variant"] for record in records] == ["mla_ops", "torch_selection", "rest", "dense"]
    differences = {record["variant"]: record.get("loss_difference") for record in records}
    assert differences["rest"] is None
    assert all(0 < differences[name] < 0.01 for name in ("torch_selection", "dense"))
    # The plain loss selects by scores in bf16, and rounds them before the softmax.
    ours, plain = (records[number]["index_losses"] for number in (0, 1))
    assert ours == pytest.approx(plain, rel=0.15)


def test_training_step_benchmark_can_be_limited() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/training_step.py"), "--variants", "mla_ops"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    outputs = [
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=100, env=environment, check=True)
        for more in (["--long"], ["--batches", "4"])
    ]
    (record,) = (ast.literal_eval(line) for line in outputs[0].stdout.splitlines())
    assert record["variant"] == "mla_ops"
    assert not outputs[1].stdout  # the toy size has a batch of 2

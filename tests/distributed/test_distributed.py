"""The operator on torch.distributed: sharded by DTensor, with sharded keys, and inside FSDP2 and tensor parallelism.

Each world of gloo processes is started once and runs all its checks (`distributed_checks.py`); every check is a test
here. What needs no second process is tested directly.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from distributed_checks import CHECKS

from mla_ops.distributed import KeyLoad, merge_partials, owned_rows
from mla_ops.testing import Case, assert_matches_oracle, make_inputs

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


@cache
def outcomes(size: int) -> dict[str, str | None]:
    """Start a world of `size` ranks, and return what failed in each check, or None."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "tests/support/distributed_checks.py"), str(size), folder]
        world = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT, start_new_session=True)
        try:
            _, error = world.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(world.pid, signal.SIGKILL)  # the ranks too
            error = f"not done after {TIMEOUT_SECONDS} s"
        texts = "\n".join(log.read_text() for log in sorted(Path(folder).glob("*.log")))
        assert world.wait() == 0, error + texts
        return json.loads(Path(folder, "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(size, name) for size, checks in CHECKS.items() for name in checks])
def test_ranks(size: int, name: str) -> None:
    failure = outcomes(size)[name]
    assert failure is None, failure


def run_benchmark(
    *arguments: object, program: Path = ROOT / "benchmarks/distributed.py"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "patterns", "ran"),
    [
        (4, ["tp/DS/*/eager", "mesh/*/compiled", "cp/NAM28/*/eager"], ["tp/DS", "mesh/DS", "cp/NAM28"]),
        (8, ["[cm]*/DS/65536/eager", "tp/NAM28/*/eager"], ["cp/DS", "mesh/DS", "cp-causal/DS", "cp-spread/DS"]),
    ],
)
def test_benchmark_runs_at_toy_sizes_on_any_number_of_ranks(
    ranks: int, patterns: list[str], ran: list[str], tmp_path: Path
) -> None:
    result = run_benchmark("--ranks", ranks, "--out", tmp_path, "--commit", "abc", "--cases", *patterns)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob(f"*-distributed-x{ranks}.json")
    written = json.loads(path.read_text())
    assert (written["ranks"], written["not_started"], written["header"]["commit"]) == (ranks, [], "abc")
    records = [record for record in written["records"] if "left_out" not in record]
    left_out = {record["case"]: record["left_out"] for record in written["records"] if "left_out" in record}
    assert left_out == ({"tp/NAM28/65536/eager": "4 heads are not cut evenly over 8 ranks"} if ranks == 8 else {})
    got = [(record["case"].rsplit("/", 2)[0], record["direction"]) for record in records]
    assert sorted(got) == sorted((case, direction) for case in ran for direction in ("fwd", "fwd_bwd"))
    for record in records:
        received = record["bytes_received"]
        assert received["counted"] == received["predicted"], record["case"]
        assert (received["counted"] == 0) == (record["impl"] == "tp" and record["direction"] == "fwd")
        assert record["efficiency"] == pytest.approx(record["one_rank_ms"] / (ranks * record["ms"]), rel=0.05, abs=2e-3)
        assert 0 < record["host_share"] <= 1
    imbalance = {record["impl"]: record["imbalance"] for record in records}
    assert {imbalance[way] for way in ("tp", "mesh") if way in imbalance} == {1.0}
    if "cp-causal" in imbalance:
        assert 1 < imbalance["cp-spread"] < imbalance["cp-causal"] < ranks


@pytest.mark.slow
def test_benchmark_starts_no_case_late(tmp_path: Path) -> None:
    result = run_benchmark("--seconds", 0, "--out", tmp_path, "--keys", 131072, "--cases", "tp/DS/*")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    (path,) = tmp_path.glob("*-distributed-x2.json")
    written = json.loads(path.read_text())
    assert written["records"] == []
    assert written["not_started"] == ["tp/DS/131072/compiled", "tp/DS/131072/eager"]


@pytest.mark.slow
def test_benchmark_goes_on_after_a_case_that_fails_or_is_wrong(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import distributed

check = distributed.check

def broken_check(world, way, whole):
    if "keys.weight" in whole:
        raise RuntimeError("no memory")
    whole["dkv"] = whole["dkv"] * 1.02
    return check(world, way, whole)

distributed.check = broken_check

if __name__ == "__main__":
    distributed.main()
"""
    (tmp_path / "program.py").write_text(program)  # a file, because the ranks read it again
    cases = ["mesh/DS/65536/eager", "tp/NAM28/65536/eager"]
    result = run_benchmark("--out", tmp_path, "--cases", *cases, program=tmp_path / "program.py")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"wrong or failed: {', '.join(cases)}", result.stderr
    (path,) = tmp_path.glob("*.json")
    failed, wrong = json.loads(path.read_text())["records"]
    assert (failed["case"], failed["failed"]) == (cases[0], "RuntimeError: no memory")
    assert (wrong["case"], wrong["error"]["dkv"]) == (cases[1], pytest.approx(0.02, rel=0.1))
    assert "ms" not in wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "--ranks must be 2 or more, and one to a GPU ("),
        (["--cases", "pp", "tp/DS"], "no case is called pp or tp/DS; see --list"),
    ],
)
def test_benchmark_refuses_what_it_cannot_run(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("distributed")
    monkeypatch.setattr(sys, "argv", ["distributed.py", *arguments])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "order", ["import torch.distributed.tensor, mla_ops", "import mla_ops, torch.distributed.tensor"]
)
def test_rules_are_installed_whatever_is_imported_first(order: str) -> None:
    program = f"""
{order}
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from mla_ops.testing import Case, make_inputs
store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
inputs = make_inputs(Case(24, 16))
q, kv, indices = (DTensor.from_local(t, mesh, [Replicate()]) for t in (inputs.q, inputs.kv, inputs.indices))
print(type(mla_ops.sparse_attn(q, kv, indices, d_v=16, softmax_scale=0.1).out).__name__)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "DTensor", result.stderr


@pytest.mark.parametrize("sink", [None, 0.5, torch.inf, -torch.inf])
def test_merged_parts_are_the_whole(sink: float | None) -> None:
    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4, kv_group=2), topk_length=True, attn_sink=sink is not None)
    if sink is not None:
        inputs.attn_sink.fill_(sink)
    leaves = inputs.requires_grad()
    slots = torch.arange(inputs.indices.shape[-1])
    parts = [
        torch.ops.mla.sparse_attn(leaves.q, leaves.kv, leaves.indices.where(slots % 3 == part, -1), *leaves.args[3:6])
        for part in range(3)
    ]
    out, lse = merge_partials(*(torch.stack(column) for column in zip(*parts, strict=True)), leaves.attn_sink)
    torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    grads = zip(("dq", "dkv", "dsink"), (t.grad for t in leaves.differentiable), strict=False)
    assert_matches_oracle({"out": out.detach(), "lse": lse.detach(), **dict(grads)}, inputs)


def test_merge_keeps_an_empty_row_free_of_nan() -> None:
    out = torch.zeros(2, 3, 4, 16, requires_grad=True)
    lse = torch.full((2, 3, 4), -torch.inf, requires_grad=True)
    merged = merge_partials(out, lse, torch.zeros(4))
    assert torch.equal(merged.out, torch.zeros(3, 4, 16))
    assert torch.equal(merged.lse, torch.full((3, 4), -torch.inf))
    nan = [torch.full_like(result, torch.nan) for result in merged]
    grads = torch.autograd.grad(list(merged), [out, lse], nan)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("seq_kv", [0, 1, 5, 8, 23])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_own_what_chunk_and_stride_would_give(seq_kv: int, ranks: int) -> None:
    rows = torch.arange(seq_kv)
    runs = [len(run) for run in rows.chunk(ranks)] if seq_kv else []
    runs += [0] * (ranks - len(runs))
    assert [owned_rows(seq_kv, ranks, rank) for rank in range(ranks)] == runs
    strided = [len(rows[rank::ranks]) for rank in range(ranks)]
    assert [owned_rows(seq_kv, ranks, rank, "interleaved") for rank in range(ranks)] == strided


def test_load_prints_its_imbalance() -> None:
    assert str(KeyLoad((30, 10))) == "slots by rank [30, 10], imbalance 1.50"
    assert KeyLoad((0, 0)).imbalance == 1.0

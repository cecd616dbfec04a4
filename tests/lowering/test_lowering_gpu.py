"""The Inductor lowering on a GPU: the kernel is in the compiled code, and it computes what the operator computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mla_ops import lowering
from mla_ops.testing import Case, Inputs, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]

ROOT = Path(__file__).parents[2]
CASES = [
    Case(d_total=128, d_v=64, topk=64, heads=28, seq_q=128, seq_kv=256),
    Case(d_total=576, d_v=512, topk=96, heads=16, seq_q=32, seq_kv=128),
    Case(d_total=72, d_v=64, topk=33, heads=6, kv_group=2, seq_q=9, seq_kv=50),  # rows aligned to 8 elements
    Case(d_total=128, d_v=64, topk=1024, heads=16, seq_q=2, seq_kv=2048),  # split forward
]
RESULTS = ("out", "lse", "dq", "dkv", "dsink")


def core(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.mla.sparse_attn(*args)


def draw(case: Case, seed: int = 0, **options: bool) -> Inputs:
    return make_inputs(case, torch.bfloat16, "cuda", seed=seed, **options)


def step(function: Callable, inputs: Inputs) -> list[torch.Tensor]:
    leaves = inputs.requires_grad()
    out, lse = function(*leaves.args)
    return [out, lse, *torch.autograd.grad([out, lse], leaves.differentiable, [inputs.dout, inputs.dlse])]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for name, a, e in zip(RESULTS, actual, expected, strict=False):
        if name == "dkv" and not torch.are_deterministic_algorithms_enabled():
            torch.testing.assert_close(a, e, rtol=2e-2, atol=2e-2)  # atomics reorder fp32 sums
        elif name == "dsink":
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)  # Inductor sums over rows in an order of its own
        else:
            assert torch.equal(a, e), name


def compiled_code(function: Callable, inputs: Inputs, **options: object) -> tuple[list[torch.Tensor], list[str]]:
    """Compile, train a step, and return its results and the modules that Inductor wrote: forward, backward."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    return run_and_get_code(lambda: step(torch.compile(function, fullgraph=True, **options), inputs))


@pytest.fixture
def no_caches() -> Iterator[None]:
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_code_holds_the_kernels_and_gives_eagers_bits(case: Case, dynamic: bool, no_caches: None) -> None:
    inputs = draw(case, topk_length=True, attn_sink=True)
    results, (forward, backward) = compiled_code(core, inputs, dynamic=dynamic)
    assert "_sparse_attn_fwd_kernel" in forward
    assert "_sparse_attn_bwd_kernel" in backward
    assert "torch.ops.mla" not in forward + backward
    assert_same(results, step(core, inputs))


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_lowering_on_equals_lowering_off(case: Case, no_caches: None) -> None:
    inputs = draw(case)
    inlined, _ = compiled_code(core, inputs)
    with lowering.disable():
        extern, (forward, backward) = compiled_code(core, inputs)
    assert "torch.ops.mla.sparse_attn.default" in forward
    assert "torch.ops.mla.sparse_attn_bwd.default" in backward
    assert_same(inlined, extern)


def test_deterministic_backward_is_inlined_and_repeats_its_bits(deterministic: None, no_caches: None) -> None:
    inputs = draw(CASES[0])
    first, (_, backward) = compiled_code(core, inputs)
    assert "_sum_placed_rows_kernel" in backward
    again, _ = compiled_code(core, inputs)
    assert_same(first, again)
    assert_same(first, step(core, inputs))


def test_one_graph_over_lengths_and_topk() -> None:
    compiled = torch.compile(core, fullgraph=True, dynamic=True)
    # No two sizes are equal: equal ones would be one symbol, and a length that is one with d_total is no length.
    case = replace(CASES[0], batch=3, seq_q=100, topk=48)
    assert_same(step(compiled, draw(case)), step(core, draw(case)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for change in ({"seq_q": 77}, {"seq_kv": 300}, {"topk": 40}, {"batch": 5}):
            inputs = draw(replace(case, **change))
            assert_same(step(compiled, inputs), step(core, inputs))


def test_strided_inputs_give_eagers_bits() -> None:
    inputs = draw(CASES[0])
    wide = torch.randn(2, 128, 32, 192, device="cuda", dtype=torch.bfloat16)

    def function(wide: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return torch.ops.mla.sparse_attn(wide[:, :, 2:30, 64:], kv, indices, 64, 0.1)[0]

    arguments = (wide, inputs.kv, inputs.indices)
    assert torch.equal(torch.compile(function, fullgraph=True)(*arguments), function(*arguments))


def test_max_autotune_gives_the_same_results_and_draws_no_random_numbers(no_caches: None) -> None:
    inputs = draw(CASES[0])
    torch.manual_seed(5)
    expected = torch.rand(3, device="cuda")
    torch.manual_seed(5)
    results, modules = compiled_code(core, inputs, mode="max-autotune-no-cudagraphs")
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    assert not any("torch.ops.mla" in code for code in modules)
    for actual, want in zip(results, step(core, inputs), strict=True):
        torch.testing.assert_close(actual, want, rtol=2e-2, atol=2e-2)  # another block size, another order of sums


def train_the_demos_model(mode: str | None, steps: int) -> list[float]:
    from mla_ops.cli.model import LanguageModel, ModelConfig

    torch.manual_seed(0)
    model = LanguageModel(ModelConfig()).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = model.losses if mode is None else torch.compile(model.losses, fullgraph=True, mode=mode)
    text = torch.randint(97, 123, (4, 129), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    seen = []
    for _ in range(steps):
        loss, index_loss = losses(text)
        seen.append(loss.detach().clone())
        (loss + index_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [float(loss) for loss in seen]


def test_reduce_overhead_trains_the_demos_model_without_breaks_or_partitions(no_caches: None) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_container

    eager = train_the_demos_model(None, 12)
    counters.clear()
    captured = train_the_demos_model("reduce-overhead", 12)
    assert counters["graph_break"] == {}
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_partitions"] == 0  # counts the parts of graphs that were cut in several
    assert get_container(0).tree_manager.new_graph_id().id >= 2  # forward and backward were recorded
    assert captured[-1] < captured[0]
    torch.testing.assert_close(captured, eager, rtol=2e-2, atol=2e-2)


def test_a_changed_kernel_is_not_served_from_the_cache(tmp_path: Path) -> None:
    """Forward and backward: the backward is compiled by a thread of autograd's, which has settings of its own."""
    tree = tmp_path / "tree"
    for folder in ("mla_ops", "registration", "lowering"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = f"""
import torch, mla_ops
assert mla_ops.__file__.startswith({str(tree)!r})
from mla_ops.testing import Case, make_inputs
inputs = make_inputs(Case(d_total=128, d_v=64, seq_q=64, heads=8), torch.bfloat16, "cuda").requires_grad()
function = lambda q, kv, indices: torch.ops.mla.sparse_attn(q, kv, indices, 64, 0.5)[0].float().sum()
torch.compile(function, fullgraph=True)(*inputs.args[:3]).backward()
compiled = inputs.q.grad.clone()
inputs.q.grad = None
function(*inputs.args[:3]).backward()
print(torch.equal(compiled, inputs.q.grad), float(compiled.float().abs().sum()))
"""

    def run() -> list[str]:
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    is_eager, before = run()
    assert is_eager == "True"
    kernel = tree / "mla_ops/ops/sparse_attn/kernels/backward.py"
    source = kernel.read_text()
    changed = source.replace("weights * dlogits * softmax_scale", "weights * dlogits * softmax_scale * 2.0")
    assert changed != source
    kernel.write_text(changed)
    is_eager, after = run()
    assert is_eager == "True"
    assert float(after) == pytest.approx(2 * float(before), rel=1e-2)


@pytest.mark.slow
def test_aoti_package_runs_in_a_process_without_the_library(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/aoti_package.py"), "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "matches eager" in result.stdout

"""The lowering of index selection, index scores and attention mass, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mla_ops

triton = pytest.importorskip("triton", reason="triton is not installed")
from fake_gpu import LoweringBackend, fake_h100, fake_mode, generate_code  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="Inductor can't re-emit kernels defined under TRITON_INTERPRET=1"
    ),
]


def draw(*, batch: int = 2, seq_q: int = 7, seq_kv: int = 40, topk: int = 5) -> list[torch.Tensor]:
    """Return q, kv, lse, q_idx, k_idx, weights of one call, of sizes that all differ, and a list of keys."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(batch, *size, generator=generator)

    q, kv, lse = normal(seq_q, 6, 24), normal(seq_kv, 1, 24), normal(seq_q, 6)
    q_idx, k_idx, weights = normal(seq_q, 3, 16), normal(seq_kv, 1, 16), normal(seq_q, 3)
    indices = torch.randint(-1, seq_kv, (batch, seq_q, 1, topk), generator=generator, dtype=torch.int32)
    return [q, kv, lse, q_idx, k_idx, weights, indices]


def select(q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor, topk: int) -> torch.Tensor:
    return mla_ops.index_topk(q_idx, k_idx, weights, topk)


def loss(*tensors: torch.Tensor) -> torch.Tensor:
    q, kv, lse, q_idx, k_idx, weights, indices = tensors
    return mla_ops.index_loss(q, kv, indices, lse, q_idx, k_idx, weights, softmax_scale=0.5).sum()


def train(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone() for tensor in tensors]
    learned = [leaf.requires_grad_() for leaf in leaves[3:6]]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, learned)]


def no_recompile() -> Any:
    return torch._dynamo.config.patch(error_on_recompile=True)


def test_selection_of_known_sizes_in_one_strip_is_inlined() -> None:
    _, _, _, q_idx, k_idx, weights, _ = draw()
    backend = LoweringBackend()
    compiled = torch.compile(select, fullgraph=True, backend=backend, dynamic=False)
    assert torch.equal(compiled(q_idx, k_idx, weights, 5), select(q_idx, k_idx, weights, 5))
    assert backend.is_inlined()
    assert len(backend.launches) == 2  # scores, then selection


def test_selection_of_symbolic_sizes_is_one_graph_and_the_operator(said: Callable[[str], bool]) -> None:
    backend = LoweringBackend()
    compiled = torch.compile(select, fullgraph=True, backend=backend, dynamic=True)
    for sizes in ({}, {"seq_q": 11}, {"seq_kv": 90}, {"batch": 4}):
        _, _, _, q_idx, k_idx, weights, _ = draw(**sizes)
        assert torch.equal(compiled(q_idx, k_idx, weights, 5), select(q_idx, k_idx, weights, 5))
    assert backend.frames == 1
    assert not backend.is_inlined()
    assert said("symbolic and decides how keys are selected")


@pytest.mark.parametrize(
    ("seq_kv", "reason"),
    [(20_000, "selected streamed"), (8192 * 3, "selected streamed")],
)
def test_long_rows_keep_the_operator(seq_kv: int, reason: str, said: Callable[[str], bool]) -> None:
    _, _, _, q_idx, k_idx, weights, _ = draw(batch=1, seq_q=300, seq_kv=seq_kv)
    backend = LoweringBackend()
    compiled = torch.compile(select, fullgraph=True, backend=backend, dynamic=False)
    compiled(q_idx, k_idx, weights, 5)
    assert not backend.is_inlined()
    assert said(reason)


def test_the_loss_is_inlined_for_all_lengths_forward_and_backward() -> None:
    backend = LoweringBackend()
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for count, sizes in enumerate(({}, {"seq_q": 11}, {"seq_kv": 90}, {"batch": 4}, {"topk": 9})):
        tensors = draw(**sizes)
        expected = train(loss, tensors)
        for actual, wanted in zip(train(compiled, tensors), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
        assert backend.frames == 1, count
    assert backend.is_inlined()
    assert len(backend.launches) == 3  # mass, scores, and their backward


@pytest.mark.usefixtures("deterministic")
def test_a_deterministic_backward_of_symbolic_lengths_keeps_the_operator(said: Callable[[str], bool]) -> None:
    backend = LoweringBackend()
    train(torch.compile(loss, fullgraph=True, backend=backend, dynamic=True), draw())
    assert said("decides how often a deterministic backward launches")


def test_disabled_lowering_keeps_the_operators(said: Callable[[str], bool]) -> None:
    backend = LoweringBackend()
    with mla_ops.lowering.disable():
        train(torch.compile(loss, fullgraph=True, backend=backend), draw())
    assert not backend.is_inlined()
    assert said("mla_ops.lowering is disabled")


@pytest.mark.parametrize("name", ["select", "mass", "scores", "scores_bwd"])
def test_the_kernels_that_inductor_writes_are_modules_that_can_be_imported(name: str) -> None:
    # Inductor writes a kernel's source anew, with the globals that it names: a constant of -inf would be `-inf` there.
    mode = fake_mode()
    with mode:
        q, kv = torch.empty(1, 64, 4, 128, device="cuda"), torch.empty(1, 128, 1, 128, device="cuda")
        q_idx, k_idx = (torch.empty(1, *size, 64, dtype=torch.bfloat16, device="cuda") for size in ((64, 4), (128, 1)))
        lse, weights = (torch.empty(1, 64, 4, device="cuda") for _ in range(2))
        indices = torch.empty(1, 64, 1, 16, dtype=torch.int32, device="cuda")
        scores = torch.empty(1, 64, 1, 16, device="cuda")
    op = torch.ops.mla
    function, args = {
        "select": (lambda *args: op.index_topk(*args, 16), (q_idx, k_idx, weights)),
        "mass": (lambda *args: op.attn_mass(*args, 0.1), (q, kv, indices, lse)),
        "scores": (op.index_scores, (q_idx, k_idx, weights, indices)),
        "scores_bwd": (op.index_scores_bwd, (scores, q_idx, k_idx, weights, indices)),
    }[name]
    code = generate_code(function, args, mode)
    sources = [source for source in re.findall(r"'''(.*?)'''", code, re.S) if "@triton.jit" in source]
    kernel = {"select": "_select_kernel", "mass": "_attn_mass_kernel"}.get(name, f"_index_{name}_kernel")
    assert any(f"def {kernel}" in source for source in sources)
    with fake_h100():
        for source in sources:
            constants = [line for line in source.splitlines() if re.match(r"\w+ = ", line)]
            exec("import triton\nimport triton.language as tl\n" + "\n".join(constants), {})

"""The kernels of the indexer's loss, attention mass and index scores with their backward, against fp64.

Runs on a GPU, or without one under TRITON_INTERPRET=1 (the first test starts that), where CPU tensors stand in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strided_tensors import padded, sliced, transposed

from mla_ops import row_sums
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.launching import as_it_is
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem
from mla_ops.ops.attn_mass.triton import launch as mass_launch
from mla_ops.ops.attn_mass.triton.backend import TritonBackend as MassBackend
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Wanted
from mla_ops.ops.index_scores.triton import backward, forward
from mla_ops.ops.index_scores.triton.backend import TritonBackend as ScoresBackend
from mla_ops.testing.closeness import assert_within_budget
from mla_ops.tiling import TileConfig

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies the bit patterns of bf16.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
H100 = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, l2_bytes=50 << 20)
WAYS = (padded, transposed, lambda tensor: sliced(tensor, -2))

runs_kernels = [] if INTERPRETED else [pytest.mark.gpu]
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of a call of either operator; `width` is that of a row of keys."""

    width: int = 40
    heads: int = 6
    kv_group: int = 2
    topk: int = 20
    seq_q: int = 3
    seq_kv: int = 24
    batch: int | None = 2
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int32
    has_lengths: bool = True
    relu: bool = True

    def __str__(self) -> str:
        return f"{self.heads}x{self.width} in {self.kv_group}, top {self.topk} of {self.seq_kv}"

    def leading(self, *sizes: int) -> tuple[int, ...]:
        return sizes if self.batch is None else (self.batch, *sizes)


CASES = [
    Case(),
    Case(batch=None, kv_group=1, heads=4, width=64, topk=70),
    Case(kv_group=1, heads=28, width=128, seq_q=2, topk=33),
    Case(kv_group=1, heads=64, width=128, seq_q=1, topk=64),
    Case(kv_group=1, heads=70, width=24, topk=17),
    Case(kv_group=3, heads=3, width=100, topk=9),
    Case(kv_group=1, heads=5, width=576, seq_q=2, topk=9, batch=1),
    Case(kv_group=1, heads=2, width=1, topk=5),
    Case(kv_group=2, heads=6, width=144, seq_q=2, topk=70, batch=1),
]
SMALL = CASES[0]
# The interpreter takes every case in one of its dtypes.
MATRIX = [
    pytest.param(replace(case, dtype=dtype), id=f"{case}-{dtype}")
    for number, case in enumerate(CASES)
    for dtype in (DTYPES[number % 2 :][:1] if INTERPRETED else DTYPES)
]


def draw_slots(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return indices with repeats and invalid slots of every kind, and lengths of every kind."""
    indices = torch.randint(0, max(1, case.seq_kv), case.leading(case.seq_q, case.kv_group, case.topk))
    indices = indices.to(DEVICE, case.index_dtype)
    indices[..., 1::5] = -1
    indices[..., 2::7] = case.seq_kv
    indices[..., 3::11] = 2**40 if case.index_dtype == torch.int64 else -(2**31)
    lengths = torch.tensor([case.topk, case.topk // 2, 0, case.topk + 5, -3], device=DEVICE)
    lengths = lengths.repeat(case.leading(case.seq_q)[0] * case.seq_q)[: torch.Size(case.leading(case.seq_q)).numel()]
    return indices, lengths.view(case.leading(case.seq_q)) if case.has_lengths else None


def draw_scores(case: Case, weights_dtype: torch.dtype = torch.float32) -> IndexScoresCall:
    torch.manual_seed(case.heads)
    indices, lengths = draw_slots(case)
    q = torch.randn(case.leading(case.seq_q, case.heads, case.width), device=DEVICE).to(case.dtype)
    k = torch.randn(case.leading(case.seq_kv, case.kv_group, case.width), device=DEVICE).to(case.dtype)
    weights = torch.randn(case.leading(case.seq_q, case.heads), device=DEVICE) * case.heads**-0.5
    return IndexScoresCall(q, k, weights.to(weights_dtype), indices, lengths, case.relu)


def draw_mass(case: Case) -> AttnMassCall:
    call = draw_scores(case)
    lse = torch.randn(call.weights.shape, device=DEVICE) + 3
    lse[..., 1] = -torch.inf
    return AttnMassCall(call.q_idx, call.k_idx, call.indices, lse, case.width**-0.5, call.topk_length)


def valid_slots(indices: torch.Tensor, lengths: torch.Tensor | None, seq_kv: int) -> torch.Tensor:
    valid = (indices >= 0) & (indices < seq_kv)
    if lengths is not None:
        valid &= torch.arange(indices.shape[-1], device=indices.device) < lengths[..., None, None]
    return valid


def products(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return `[batch, seq_q, kv_group, heads per group, topk]` products of what a call has, all with batch."""
    group = k.shape[2]
    rows = k.new_zeros(*indices.shape, k.shape[3])  # an invalid slot names no row
    batch, query, of_group, slot = valid.nonzero(as_tuple=True)
    rows = rows.index_put((batch, query, of_group, slot), k[batch, indices[valid].long(), of_group])
    return torch.einsum("bqghd,bqgkd->bqghk", q.unflatten(2, (group, -1)), rows)


def batched(*tensors: torch.Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor[None] for tensor in tensors]


def expected_mass(call: AttnMassCall, dtype: torch.dtype) -> torch.Tensor:
    q, kv, indices, lse, scale, lengths = call
    if q.dim() == 3:
        q, kv, indices, lse, lengths = batched(q, kv, indices, lse, lengths)
        return expected_mass(AttnMassCall(q, kv, indices, lse, scale, lengths), dtype)[0]
    valid = valid_slots(indices, lengths, kv.shape[1])
    logits = products(q.to(dtype), kv.to(dtype), indices, valid)
    lse = lse.unflatten(2, (kv.shape[2], -1)).unsqueeze(-1)
    wide = torch.promote_types(dtype, torch.float32)
    shares = torch.exp(logits.to(wide) * scale - lse.to(wide)).masked_fill(lse == -torch.inf, 0)
    return shares.sum(3).masked_fill(~valid, 0)


def expected_scores(call: IndexScoresCall, dtype: torch.dtype) -> torch.Tensor:
    """Differentiable in q_idx, k_idx and weights."""
    q, k, weights, indices, lengths, relu = call
    if q.dim() == 3:
        q, k, weights, indices, lengths = batched(q, k, weights, indices, lengths)
        return expected_scores(IndexScoresCall(q, k, weights, indices, lengths, relu), dtype)[0]
    valid = valid_slots(indices, lengths, k.shape[1])
    matches = products(q.to(dtype), k.to(dtype), indices, valid)
    matches = matches.relu() if relu else matches
    weights = weights.to(dtype).unflatten(2, (k.shape[2], -1))
    return torch.einsum("bqghk,bqgh->bqgk", matches, weights).masked_fill(~valid, -torch.inf)


def expected_grads(call: IndexScoresCall, dscores: torch.Tensor, dtype: torch.dtype) -> Grads:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in call[:3]]
    scores = expected_scores(IndexScoresCall(*leaves, *call[3:]), dtype)
    valid = valid_slots(call.indices, call.topk_length, call.k_idx.shape[-3])
    scores.backward(dscores.to(dtype).masked_fill(~valid, 0))
    return tuple(leaf.grad for leaf in leaves)


def traits() -> DeviceTraits:
    return H100 if INTERPRETED else traits_of(torch.device(DEVICE))


def mass_of(call: AttnMassCall, **choices: Any) -> torch.Tensor:
    return mass_launch.launch_mass(call, mass_launch.plan_mass(call, traits(), **choices))


def scores_of(call: IndexScoresCall, **choices: Any) -> torch.Tensor:
    return forward.launch_forward(call, forward.plan_forward(call, traits(), **choices))


def grads_of(call: IndexScoresCall, dscores: torch.Tensor, wanted: Wanted | None = None, **choices: Any) -> Grads:
    wanted = wanted or Wanted()
    plan = backward.plan_backward(call, traits(), wanted, **choices)
    return backward.launch_backward(call, dscores, wanted, plan)


def draw_dscores(call: IndexScoresCall) -> torch.Tensor:
    """Return gradients that are NaN where no slot is valid."""
    valid = valid_slots(call.indices, call.topk_length, call.k_idx.shape[-3])
    return torch.randn(call.indices.shape, device=DEVICE).masked_fill(~valid, torch.nan)


def check_mass(call: AttnMassCall, **choices: Any) -> torch.Tensor:
    mass = mass_of(call, **choices)
    terms = call.q.shape[-1] * call.q.shape[-2]
    assert_within_budget(
        mass, expected_mass(call, torch.float64), expected_mass(call, call.q.dtype), terms=terms, name="mass"
    )
    assert mass.is_contiguous()
    return mass


def check_scores(call: IndexScoresCall, **choices: Any) -> torch.Tensor:
    scores = scores_of(call, **choices)
    terms = call.q_idx.shape[-1] * call.q_idx.shape[-2]
    exact, low = expected_scores(call, torch.float64), expected_scores(call, call.q_idx.dtype)
    assert_within_budget(scores, exact, low, terms=terms, name="scores")
    assert scores.is_contiguous()
    return scores


def check_grads(call: IndexScoresCall, dscores: torch.Tensor, wanted: Wanted | None = None, **choices: Any) -> Grads:
    grads = grads_of(call, dscores, wanted, **choices)
    exact, low = (expected_grads(call, dscores, dtype) for dtype in (torch.float64, call.q_idx.dtype))
    terms = call.q_idx.shape[-1] * call.q_idx.shape[-2] * call.indices.shape[-1]
    wanted = wanted or Wanted()
    for name, tensor, grad, want, plain in zip(wanted._fields, call[:3], grads, exact, low, strict=True):
        if not getattr(wanted, name):
            assert grad.shape == (0,)
            continue
        assert grad.dtype == tensor.dtype
        assert grad.shape == tensor.shape
        assert_within_budget(grad, want, plain, terms=terms, name=name)
    return grads


@contextmanager
def deterministic_algorithms(is_on: bool = True) -> Iterator[None]:
    torch.use_deterministic_algorithms(is_on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    """Fill what the launchers allocate, so that a result nobody wrote is seen."""
    for module in (mass_launch, forward, backward):
        allocate = module.unfilled

        def poisoned(*args: Any, allocate: Any = allocate, **kwargs: Any) -> torch.Tensor:
            return allocate(*args, **kwargs).fill_(torch.nan)

        monkeypatch.setattr(module, "unfilled", poisoned)


@pytest.mark.skipif(INTERPRETED, reason="this process is the interpreter's")
def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


class TestKernels:
    """What runs kernels: on a GPU, or in the interpreter's process."""

    pytestmark = runs_kernels

    @pytest.mark.parametrize("case", MATRIX)
    def test_mass_matches_fp64(self, case: Case) -> None:
        check_mass(draw_mass(case))

    @pytest.mark.parametrize("case", MATRIX)
    def test_scores_and_gradients_match_fp64(self, case: Case) -> None:
        call = draw_scores(case)
        check_scores(call)
        check_grads(call, draw_dscores(call))

    @pytest.mark.parametrize("change", [{"relu": False}, {"index_dtype": torch.int64}, {"has_lengths": False}], ids=str)
    def test_optional_arguments(self, change: dict[str, Any]) -> None:
        case = replace(SMALL, **change)
        check_mass(draw_mass(case))
        call = draw_scores(case)
        check_scores(call)
        check_grads(call, draw_dscores(call))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_weights_have_a_dtype_of_their_own(self, dtype: torch.dtype) -> None:
        call = draw_scores(replace(SMALL, dtype=dtype), weights_dtype=dtype)
        check_scores(call)
        check_grads(call, draw_dscores(call))

    @pytest.mark.parametrize("block_h", [16, 32])
    def test_blocks_of_heads_add_up(self, block_h: int) -> None:
        case = Case(kv_group=2, heads=80, width=40, seq_q=1, topk=20)
        config = TileConfig(block_h, block_k=16, max_chunk=32, num_warps=4, num_stages=2)
        check_mass(draw_mass(case), config=config)
        call = draw_scores(case)
        check_scores(call, config=config)
        check_grads(call, draw_dscores(call), config=config)
        with deterministic_algorithms():
            check_grads(call, draw_dscores(call), config=config)

    @pytest.mark.parametrize("dtype", DTYPES[-1:] if INTERPRETED else DTYPES, ids=str)
    def test_columns_are_streamed(self, dtype: torch.dtype) -> None:
        # A whole piece of a row and the rest of it; as many slabs of the backward.
        case = Case(kv_group=1, heads=20, width=40, seq_q=2, topk=20, batch=1, dtype=dtype)
        config = TileConfig(block_h=16, block_k=16, max_chunk=32, num_warps=4, num_stages=2, columns=32)
        check_mass(draw_mass(case), config=config)
        call = draw_scores(case)
        check_scores(call, config=config)
        for deterministic in (False, True):
            with deterministic_algorithms(deterministic):
                check_grads(call, draw_dscores(call), config=config)

    @pytest.mark.parametrize("way", range(len(WAYS)), ids=["padded", "transposed", "sliced"])
    def test_strides_do_not_matter(self, way: int) -> None:
        strided = WAYS[way]
        mass = draw_mass(SMALL)
        of_strided = mass._replace(q=strided(mass.q), kv=strided(mass.kv), indices=strided(mass.indices))
        lse = mass.lse.mT.contiguous().mT
        assert torch.equal(mass_of(of_strided._replace(lse=lse)), mass_of(mass))
        call = draw_scores(SMALL)
        of_strided = call._replace(
            q_idx=strided(call.q_idx), k_idx=strided(call.k_idx), indices=strided(call.indices),
            weights=call.weights.mT.contiguous().mT,
        )  # fmt: skip
        assert torch.equal(scores_of(of_strided), scores_of(call))
        dscores = draw_dscores(call)
        with deterministic_algorithms():
            for grad, want in zip(grads_of(of_strided, strided(dscores)), grads_of(call, dscores), strict=True):
                assert torch.equal(grad, want)

    def test_offsets_of_64_bits(self) -> None:
        assert torch.equal(mass_of(call := draw_mass(SMALL), use_int64_offsets=True), mass_of(call))
        call = draw_scores(SMALL)
        assert torch.equal(scores_of(call, use_int64_offsets=True), scores_of(call))
        dscores = draw_dscores(call)
        for deterministic in (False, True):
            with deterministic_algorithms(deterministic):
                check_grads(call, dscores, use_int64_offsets=True)

    def test_lengths_of_64_bits_are_clamped_before_they_are_narrowed(self) -> None:
        lengths = torch.tensor([[-(2**40) + 5, 2**40 + 5, 5]] * 2, device=DEVICE)
        check_mass(draw_mass(SMALL)._replace(topk_length=lengths))
        call = draw_scores(SMALL)._replace(topk_length=lengths)
        check_scores(call)
        check_grads(call, draw_dscores(call))

    def test_rows_that_are_not_selected_are_not_read(self) -> None:
        case = replace(SMALL, kv_group=1)
        mass, call = draw_mass(case), draw_scores(case)
        expected = mass_of(mass), scores_of(call), *grads_of(call, dscores := draw_dscores(call))
        valid = valid_slots(call.indices, call.topk_length, case.seq_kv)
        for batch in range(case.batch):
            named = call.indices[batch][valid[batch]].unique()
            others = torch.ones(case.seq_kv, dtype=torch.bool, device=DEVICE).index_fill(0, named.long(), False)
            assert others.any()
            mass.kv[batch, others] = torch.nan
            call.k_idx[batch, others] = torch.nan
            assert (grads_of(call, dscores)[1][batch, others] == 0).all()
        actual = mass_of(mass), scores_of(call), *grads_of(call, dscores)
        for got, want in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, want)  # dk is added in any order

    def test_nan_and_infinities_of_selected_rows_arrive(self) -> None:
        # 5 heads: those of padding add nothing, although infinity times their 0 is NaN.
        case = replace(SMALL, kv_group=1, heads=5, has_lengths=False)
        call = draw_scores(case)
        call.indices[:, :, :, 0], call.indices[:, :, :, 4] = 3, 5
        call.k_idx[:, 3] = torch.nan
        call.k_idx[:, 5, :, 0] = torch.inf
        call.q_idx.abs_()
        call.weights.abs_()
        scores = check_scores(call)
        assert scores[..., 0].isnan().all()
        assert scores[..., 4].isposinf().all()
        check_grads(call, draw_dscores(call))
        mass = draw_mass(case)
        mass.indices[..., 0] = 3
        mass.kv[:, 3] = torch.nan
        assert check_mass(mass)[..., 0].isnan().all()

    def test_heads_without_weight_add_nothing_whatever_is_in_the_rows(self) -> None:
        call = draw_mass(replace(SMALL, has_lengths=False))
        call.kv[:] = torch.nan
        assert (mass_of(call._replace(lse=torch.full_like(call.lse, -torch.inf))) == 0).all()

    def test_the_mass_of_heads_is_the_sum_of_their_masses(self) -> None:
        call = draw_mass(replace(SMALL, kv_group=1))
        halves = [
            mass_of(call._replace(q=q, lse=lse))
            for q, lse in zip(call.q.split(3, dim=-2), call.lse.split(3, dim=-1), strict=True)
        ]
        torch.testing.assert_close(halves[0] + halves[1], mass_of(call))

    def test_the_gradient_of_relu_at_0_is_0(self) -> None:
        call = draw_scores(replace(SMALL, has_lengths=False))
        call.q_idx.zero_()
        dq, dk, dw = grads_of(call, torch.ones(call.indices.shape, device=DEVICE))
        assert not dq.any()
        assert not dk.any()
        assert not dw.any()

    @pytest.mark.parametrize("size", ["topk", "seq_q", "seq_kv"])
    def test_nothing_to_do(self, size: str) -> None:
        case = replace(SMALL, **{size: 0})
        if size == "seq_q":
            case = replace(case, has_lengths=False)
        mass = draw_mass(case)
        assert torch.equal(mass_of(mass), torch.zeros(mass.indices.shape, device=DEVICE))
        call = draw_scores(case)
        assert torch.equal(scores_of(call), torch.full(call.indices.shape, -torch.inf, device=DEVICE))
        for deterministic in (False, True):
            with deterministic_algorithms(deterministic):
                grads = grads_of(call, torch.full(call.indices.shape, torch.nan, device=DEVICE))
            for tensor, grad in zip(call[:3], grads, strict=True):
                assert torch.equal(grad, torch.zeros_like(tensor))

    @pytest.mark.parametrize("flags", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)], ids=str)
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_gradients_that_are_not_wanted_are_empty(self, flags: tuple[int, ...], deterministic: bool) -> None:
        call = draw_scores(SMALL)
        with deterministic_algorithms(deterministic):
            check_grads(call, draw_dscores(call), Wanted(*map(bool, flags)))

    @pytest.mark.parametrize("case", [SMALL, CASES[1], replace(CASES[2], dtype=torch.float16)], ids=str)
    @pytest.mark.parametrize("workspace_bytes", [1, 1 << 30])
    def test_deterministic_gradients_are_the_same_bits_twice(
        self, case: Case, workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(row_sums, "WORKSPACE_BYTES", workspace_bytes)
        call = draw_scores(replace(case, seq_kv=6))  # a program sums a key, and keys are repeated
        dscores = draw_dscores(call)
        with deterministic_algorithms():
            first = check_grads(call, dscores)
            for got, want in zip(grads_of(call, dscores), first, strict=True):
                assert torch.equal(got, want)

    @pytest.mark.parametrize("topk", [20] if INTERPRETED else [20, 1100])
    def test_places_are_in_the_order_of_keys_queries_and_slots(
        self, topk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seq_q, seq_kv = 3, 6
        monkeypatch.setattr(row_sums, "COUNTERS", 2 * seq_kv)  # two queries share a counter, the third has its own
        indices = torch.randint(0, seq_kv, (1, seq_q, 1, topk), device=DEVICE, dtype=torch.int32)
        indices[..., 1::5] = -1
        indices[:, 1, :, :seq_kv] = torch.arange(seq_kv, device=DEVICE)
        indices[:, 1, :, seq_kv:] = -1  # a query without repeats
        places = torch.full_like(indices, -1)
        slab = row_sums.Slab(range(1), range(seq_q))
        row_sums._place_slots(slab, seq_kv, indices, None, places, 1, seq_q, as_it_is, orders_repeats=True)
        assert torch.equal(places[indices >= 0].long().argsort(), indices[indices >= 0].argsort(stable=True))

    def test_backends_plan_and_run(self) -> None:
        mass, backend = draw_mass(SMALL), MassBackend()
        problem = AttnMassProblem.of(mass)
        plan = backend.plan(mass, problem, traits())
        assert torch.equal(backend.run(mass, plan), mass_of(mass))
        assert backend.describe(plan)[0].startswith("mass: TileConfig(")
        assert backend.describe(plan)[0].endswith("; warm")
        call, scores = draw_scores(SMALL), ScoresBackend()
        problem = IndexScoresProblem.of(call, needs_grad=True)
        plan = scores.plan("forward", call, problem, traits(), Wanted())
        assert torch.equal(scores.forward(call, plan), scores_of(call))
        assert scores.describe(plan)[0].endswith("; warm")
        with deterministic_algorithms():
            plan = scores.plan("backward", call, problem, traits(), Wanted())
            dscores = draw_dscores(call)
            for got, want in zip(scores.backward(call, dscores, Wanted(), plan), grads_of(call, dscores), strict=True):
                assert torch.equal(got, want)
            assert "dk summed in the order of the queries" in scores.describe(plan)[0]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_what_the_backends_refuse_they_say(arch: int) -> None:
    device = replace(H100, arch=arch, smem_bytes={80: 166912, 120: 101376}.get(arch, 232448))
    mass, scores = MassBackend(), ScoresBackend()
    bf16 = AttnMassProblem(576, 128, 1, 2048, torch.bfloat16)
    assert mass.unsupported_reasons(bf16, device) == []
    assert mass.unsupported_reasons(replace(bf16, dtype=torch.float32), device) == []
    (reason,) = mass.unsupported_reasons(replace(bf16, dtype=torch.float64), device)
    assert reason == "dtype is torch.float64, needs bf16, fp16 or fp32; cast q and kv"
    assert mass.unsupported_reasons(replace(bf16, d_total=8192), device) == []
    index = IndexScoresProblem(128, 64, 1, 2048, torch.bfloat16, needs_grad=True)
    assert scores.unsupported_reasons(index, device) == []
    assert scores.unsupported_reasons(replace(index, index_head_dim=576), device) == []
    assert scores.unsupported_reasons(replace(index, index_head_dim=8192), device) == []
    (reason,) = scores.unsupported_reasons(replace(index, dtype=torch.float64), device)
    assert reason == "dtype is torch.float64, needs bf16, fp16 or fp32; cast q_idx and k_idx"
    assert scores.unsupported_reasons(index, DeviceTraits("cpu")) == [
        "device is cpu, needs CUDA; move the tensors to a GPU"
    ]

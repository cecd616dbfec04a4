"""The contract of index selection, on every target. The oracle is the reference in fp64.

Numbers above the tests are those of the contract's rules: 1 eligible keys, 2 scores, 3 the choice and its ties,
4 order, 5 NaN and infinities, 6 determinism, 7 exactness, 8 sizes and gradients, 9 workspace.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Target
from strided_tensors import padded, sliced, transposed
from torch.utils._python_dispatch import TorchDispatchMode

import mla_ops
from mla_ops.device import traits_of
from mla_ops.ops.index_topk.backends import select
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.eager import EagerBackend, Tile
from mla_ops.reference import index_scores_dense_reference, index_topk_reference
from mla_ops.testing import IndexCase, IndexInputs, make_index_inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, FP8]
SMALL = IndexCase()
CASES = [
    SMALL,
    IndexCase(batch=None, seq_q=24),
    IndexCase(index_heads=6, index_head_dim=24, kv_group=3, topk=5),
    IndexCase(index_heads=1, index_head_dim=1, seq_kv=300, seq_q=70, topk=100),
    IndexCase(index_heads=64, index_head_dim=128, batch=1, seq_q=33, seq_kv=130, topk=32),
    IndexCase(index_heads=3, index_head_dim=100, seq_q=1, seq_kv=1500, topk=256),
    IndexCase(seq_q=20, seq_kv=7, topk=3),  # the first queries stand before the first key
]


def run(inputs: IndexInputs, target: Target, **options: Any) -> torch.Tensor:
    if inputs.q_idx.dtype == torch.float64 and target == Target("cuda", "auto"):
        pytest.skip('no kernel multiplies fp64, and backend="auto" refuses it on CUDA')
    tensors = (inputs.q_idx, inputs.k_idx, inputs.weights)
    return mla_ops.index_topk(*tensors, inputs.topk, **inputs.kwargs, **options, backend=target.backend)


def check(inputs: IndexInputs, target: Target, **options: Any) -> torch.Tensor:
    """Run a call whose scores are exact, and compare every slot with the reference."""
    actual = run(inputs, target, **options)
    expected = index_topk_reference(*inputs.to(torch.float64).args, **options)
    assert actual.dtype == torch.int32
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)
    return actual


def choose(scores: list[float] | torch.Tensor, topk: int, target: Target) -> list[int]:
    """The choice of one query among keys with these scores, which one channel and one head hand through."""
    scores = torch.as_tensor(scores, dtype=torch.float32, device=target.device)
    one = torch.ones(1, 1, 1, device=target.device)
    inputs = IndexInputs(one, scores[:, None, None], one[0], topk, None, None, None)
    return check(inputs, target, causal=False, relu=False).flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"relu": False}], ids=str)
def test_integer_scores_give_the_reference_choice(
    case: IndexCase, dtype: torch.dtype, options: dict[str, bool], target: Target
) -> None:
    check(make_index_inputs(case, dtype, target.device, exact=True), target, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_in_the_dtype_of_the_queries(dtype: torch.dtype, target: Target) -> None:
    inputs = make_index_inputs(SMALL, dtype, target.device, exact=True)
    check(replace(inputs, weights=inputs.weights.to(dtype)), target)


# 1. Which keys are eligible


@pytest.mark.parametrize("bounds_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_bounds(case: IndexCase, bounds_dtype: torch.dtype, causal: bool, target: Target) -> None:
    inputs = make_index_inputs(case, device=target.device, exact=True, bounds=True, bounds_dtype=bounds_dtype)
    check(inputs, target, causal=causal)
    check(replace(inputs, starts=None), target, causal=causal)
    check(replace(inputs, ends=None), target, causal=causal)


def test_one_bound_serves_all_batch_elements(target: Target) -> None:
    inputs = make_index_inputs(SMALL, device=target.device, exact=True, bounds=True)
    shared = replace(inputs, starts=inputs.starts[0], ends=inputs.ends[0])
    expanded = replace(inputs, starts=inputs.starts[:1].expand(2, -1), ends=inputs.ends[:1].expand(2, -1))
    assert torch.equal(check(shared, target), check(expanded, target))


def test_bounds_are_clamped_and_an_empty_window_has_no_key(target: Target) -> None:
    far = 2**40
    inputs = make_index_inputs(replace(SMALL, topk=30), device=target.device, exact=True)
    starts = torch.tensor([-far, 0, far, 7, 9], device=target.device)
    ends = torch.tensor([far, -far, far, 7, 2], device=target.device)
    actual = check(replace(inputs, starts=starts, ends=ends), target, causal=False)
    assert (actual >= 0).sum(-1).flatten().tolist() == [24, 0, 0, 0, 0] * 2


def test_documents_by_starts(target: Target) -> None:
    lengths = [3, 1, 8, 12]
    first = torch.tensor([sum(lengths[:i]) for i, length in enumerate(lengths) for _ in range(length)])
    inputs = make_index_inputs(IndexCase(seq_q=24, topk=4), device=target.device, exact=True)
    packed = check(replace(inputs, starts=first.to(target.device)), target)
    for start, length in zip([0, 3, 4, 12], lengths, strict=True):
        part = slice(start, start + length)
        one = replace(inputs, q_idx=inputs.q_idx[:, part], k_idx=inputs.k_idx[:, part], weights=inputs.weights[:, part])
        alone = check(one, target)
        assert torch.equal(torch.where(alone < 0, alone, alone + start), packed[:, part])


def test_the_causal_bound_counts_from_the_last_key(target: Target) -> None:
    for seq_q, seq_kv in ((3, 8), (8, 3), (5, 5)):
        case = IndexCase(batch=1, seq_q=seq_q, seq_kv=seq_kv, topk=9)
        counts = (check(make_index_inputs(case, device=target.device, exact=True), target) >= 0).sum(-1)
        assert counts.flatten().tolist() == [max(0, t + 1 + seq_kv - seq_q) for t in range(seq_q)]


# 2, 7. Scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_a_choice_on_random_data_is_wrong_by_no_more_than_rounding(
    dtype: torch.dtype, relu: bool, target: Target
) -> None:
    case = IndexCase(index_heads=8, index_head_dim=64, seq_q=40, seq_kv=2000, topk=100)
    inputs = make_index_inputs(case, dtype, target.device)
    chosen = torch.zeros(2, 40, 1, 2000, dtype=torch.bool, device=target.device)
    chosen.scatter_(-1, run(inputs, target, relu=relu, causal=False).long(), True)
    wide = inputs.to(torch.float64)
    scores = index_scores_dense_reference(*wide.args[:3], relu, inputs.k_scale)
    # One rounding of fp32 for each product summed, for each head summed, and for the casts and scales.
    size = index_scores_dense_reference(*(t.abs() for t in wide.args[:3]), relu, inputs.k_scale)
    error = torch.finfo(torch.float32).eps * (64 + 8 + 4) * size

    def is_within_rounding(choice: torch.Tensor) -> bool:
        worst_chosen = (scores + error).masked_fill(~choice, torch.inf).amin(-1)
        best_left = (scores - error).masked_fill(choice, -torch.inf).amax(-1)
        return bool((worst_chosen >= best_left).all())

    assert is_within_rounding(chosen)
    by_bf16 = torch.zeros_like(chosen).scatter_(-1, scores.bfloat16().topk(100).indices, True)
    assert not is_within_rounding(by_bf16)  # the bound tells them apart


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_fp32_is_multiplied_as_fp32_whatever_torch_may_round(precision: str, target: Target) -> None:
    # The scores differ in the last of 24 bits, which TF32 and bf16 drop. Fewer channels than 64 oneDNN does not round.
    k_idx = torch.zeros(512, 1, 64, device=target.device)
    k_idx[:, 0, 5] = 1.0 + torch.randperm(512, generator=torch.Generator().manual_seed(0)) * 2.0**-23
    one = torch.ones(1, 1, 64, device=target.device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        actual = run(IndexInputs(one, k_idx, one[0, :, :1], 100, None, None, None), target, causal=False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert actual.flatten().tolist() == k_idx[:, 0, 5].topk(100).indices.sort().values.tolist()


def test_scores_are_fp32_for_fp64_inputs_too() -> None:
    # In fp64 key 2 is the best; in fp32 all three tie and the lowest position wins.
    keys = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64)[:, None, None]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    assert mla_ops.index_topk(one, keys, one[0], 1, causal=False).item() == 0
    assert index_topk_reference(one, keys, one[0], 1, causal=False).item() == 2


# 3. Ties


def test_plateaus(target: Target) -> None:
    assert choose([0.0] * 9000, 2048, target) == list(range(2048))
    winners = torch.randperm(8320, generator=torch.Generator().manual_seed(0))[:100]
    scores = torch.zeros(8320)
    scores[winners] = 1.0
    chosen = choose(scores, 2048, target)
    assert set(winners.tolist()) <= set(chosen)
    assert set(chosen) - set(winners.tolist()) == set([i for i in range(8320) if scores[i] == 0][:1948])


def test_positive_and_negative_zero_are_equal(target: Target) -> None:
    assert choose([-0.0, 0.0, -0.0, 0.0, -1.0, -0.0], 3, target) == [0, 1, 2]
    assert choose([-1.0, -0.0, 0.0, -0.0, -1.0], 2, target) == [1, 2]


def test_a_clipped_key_ties_with_others_whatever_the_sign_of_its_weight(target: Target) -> None:
    q = torch.ones(3, 1, 1, device=target.device)
    k = -torch.ones(9, 1, 1, device=target.device)
    weights = torch.tensor([[1.0], [-1.0], [0.0]], device=target.device)
    actual = check(IndexInputs(q, k, weights, 4, None, None, None), target, causal=False)
    assert actual.flatten().tolist() == [0, 1, 2, 3] * 3


def test_zeros_of_scaled_keys_are_equal_whatever_the_sign_of_the_scale(target: Target) -> None:
    inputs = make_index_inputs(replace(SMALL, seq_kv=40), FP8, target.device, exact=True)
    inputs.k_idx.view(torch.uint8).zero_()
    inputs.k_scale[:, ::2].neg_()
    actual = check(inputs, target, causal=False)
    assert (actual == torch.arange(6, device=target.device)).all()


@pytest.mark.parametrize("scale", [1.0, -1.0, -1e5, 3e38, 1e-40], ids=str)
def test_scores_of_one_binade_are_told_apart(scale: float, target: Target) -> None:
    if scale == 1e-40 and target.device == "cuda":
        pytest.skip("kernels may flush subnormal products to zero")
    fractions = torch.randperm(3000, generator=torch.Generator().manual_seed(1)) * 2.0**-23 + 1.0
    choose(fractions * scale, 300, target)


def test_many_scores_at_the_threshold(target: Target) -> None:
    scores = torch.arange(40.0).repeat(100)  # 100 of each
    assert choose(scores, 250, target) == sorted(
        [i for i in range(4000) if scores[i] >= 38] + [i for i in range(4000) if scores[i] == 37][:50]
    )


# 4. Order, and how many


@pytest.mark.parametrize("eligible", [0, 1, 99, 100, 101, 5000])
def test_as_many_valid_slots_as_eligible_keys(eligible: int, target: Target) -> None:
    inputs = make_index_inputs(IndexCase(seq_kv=5000, seq_q=2, topk=100), device=target.device, exact=True)
    starts = torch.full((2,), 17 if eligible < 5000 else 0, device=target.device)
    actual = check(replace(inputs, starts=starts, ends=starts + eligible), target, causal=False)
    assert ((actual >= 0).sum(-1) == min(100, eligible)).all()
    valid = actual[..., : min(100, eligible)]
    assert (valid.diff(dim=-1) > 0).all()
    assert (actual[..., min(100, eligible) :] == -1).all()


@pytest.mark.parametrize("topk", [0, 1, 3, 100, 300, 305])
def test_any_topk(topk: int, target: Target) -> None:
    inputs = make_index_inputs(IndexCase(seq_kv=300, seq_q=300, topk=topk), device=target.device, exact=True)
    assert check(inputs, target).shape == (2, 300, 1, topk)


# 5. NaN and infinities

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("scores", "topk", "expected"),
    [
        ([1.0, NAN, INF, 2.0, NAN], 2, [1, 4]),
        ([1.0, NAN, INF, 2.0, NAN], 3, [1, 2, 4]),
        ([NAN] * 6, 3, [0, 1, 2]),
        ([-NAN, NAN, INF], 1, [0]),
        ([-INF, -INF, 1.0, -INF], 3, [0, 1, 2]),
        ([-INF] * 4, 6, [0, 1, 2, 3, -1, -1]),
        ([INF, 3e38, INF, -INF], 2, [0, 2]),
    ],
    ids=str,
)
def test_nan_is_largest_and_infinities_are_ordinary(
    scores: list[float], topk: int, expected: list[int], target: Target
) -> None:
    assert choose(scores, topk, target) == expected


def test_nan_of_a_clipped_product_is_nan(target: Target) -> None:
    inputs = make_index_inputs(SMALL, device=target.device, exact=True)
    inputs.k_idx[0, 3] = NAN
    actual = run(replace(inputs, topk=1), target, causal=False)
    assert (actual[0] == 3).all()


def test_a_poisoned_key_that_is_not_eligible_taints_nothing(target: Target) -> None:
    inputs = make_index_inputs(SMALL, device=target.device, exact=True)
    starts = torch.full((5,), 4, device=target.device)
    expected = check(replace(inputs, starts=starts), target)
    inputs.k_idx[:, :4] = NAN
    assert torch.equal(run(replace(inputs, starts=starts), target), expected)


# 6. Same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype, target: Target) -> None:
    case = IndexCase(batch=7, seq_q=150, seq_kv=1700, topk=64, index_head_dim=64, kv_group=2)
    inputs = make_index_inputs(case, dtype, target.device)
    # The keys are one vector with its channels in any order, the queries weigh all channels alike: the scores are equal
    # but for the order in which their products are summed, and every last bit decides.
    order = torch.rand(7, 1700, 2, 64, generator=torch.Generator().manual_seed(0)).argsort(-1).to(target.device)
    inputs = replace(inputs, q_idx=torch.ones_like(inputs.q_idx), k_idx=inputs.k_idx[0, 0, 0][order])
    ends = torch.arange(150, device=target.device) + (1700 - 149)
    whole = run(replace(inputs, ends=ends), target, causal=False)
    assert torch.equal(run(replace(inputs, ends=ends), target, causal=False), whole)
    assert torch.equal(run(inputs, target), whole)
    scale = inputs.k_scale
    for b in range(7):
        for rows in (slice(0, 150), slice(20 * b, 20 * b + 1), slice(3, 5 + b), slice(120, 140)):
            part = replace(
                inputs,
                q_idx=inputs.q_idx[b : b + 1, rows],
                k_idx=inputs.k_idx[b : b + 1],
                weights=inputs.weights[b : b + 1, rows],
                ends=ends[rows],
                k_scale=None if scale is None else scale[b : b + 1],
            )
            assert torch.equal(run(part, target, causal=False), whole[b : b + 1, rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_inputs_give_the_same_bits(dtype: torch.dtype, target: Target) -> None:
    inputs = make_index_inputs(replace(SMALL, kv_group=2, seq_kv=200), dtype, target.device, bounds=True)
    twin = replace(
        inputs,
        q_idx=padded(inputs.q_idx),
        k_idx=sliced(transposed(inputs.k_idx), 1),
        weights=transposed(inputs.weights),
        starts=inputs.starts.t().contiguous().t(),
        ends=inputs.ends.repeat_interleave(2, dim=1)[:, ::2],
        k_scale=None if inputs.k_scale is None else padded(inputs.k_scale),
    )
    assert torch.equal(run(twin, target), run(inputs, target))


# 8. Sizes, gradients


@pytest.mark.parametrize("field", ["batch", "seq_q", "seq_kv", "topk", "index_heads", "index_head_dim"])
@pytest.mark.parametrize("causal", [True, False])
def test_zero_sizes(field: str, causal: bool, target: Target) -> None:
    check(make_index_inputs(replace(SMALL, **{field: 0}), device=target.device, exact=True), target, causal=causal)


def test_more_queries_than_a_grid_dimension_holds(target: Target) -> None:
    case = IndexCase(batch=None, seq_q=66_000, seq_kv=9, topk=3, index_heads=1, index_head_dim=4)
    check(make_index_inputs(case, device=target.device, exact=True), target, causal=False)


def test_inputs_that_require_grad_leave_no_trace(target: Target) -> None:
    inputs = make_index_inputs(SMALL, device=target.device)
    expected = run(inputs, target)
    leaves = replace(inputs, **{name: getattr(inputs, name).requires_grad_() for name in ("q_idx", "k_idx", "weights")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = run(leaves, target)
        assert actual.grad_fn is None
        assert not actual.requires_grad
        (leaves.q_idx.sum() + actual.float().sum()).backward()
    assert torch.equal(actual, expected)
    assert (leaves.q_idx.grad == 1).all()
    assert leaves.k_idx.grad is None


def test_tangents_end_here(target: Target) -> None:
    inputs = make_index_inputs(SMALL, device=target.device)
    expected = run(inputs, target)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.q_idx, torch.ones_like(inputs.q_idx))
        assert torch.equal(run(replace(inputs, q_idx=dual), target), expected)

    def chosen(q_idx: torch.Tensor) -> torch.Tensor:
        return q_idx.sum() + run(replace(inputs, q_idx=q_idx), target).float().sum()

    assert (torch.func.grad(chosen)(inputs.q_idx) == 1).all()
    assert torch.func.jvp(chosen, (inputs.q_idx,), (torch.ones_like(inputs.q_idx),))[1] == inputs.q_idx.numel()


def test_inputs_are_not_changed(target: Target) -> None:
    inputs = make_index_inputs(SMALL, device=target.device, bounds=True)
    before = [t.clone() for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    run(inputs, target)
    after = [t for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# 9. Workspace, and nothing that depends on data on the host


@pytest.mark.parametrize(("rows", "block", "compared"), [(1, 1, 1), (3, 4, 8), (7, 5, 10), (64, 24, 24), (2, 16, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_of_any_size_choose_the_same(rows: int, block: int, compared: int, causal: bool) -> None:
    for case in (SMALL, IndexCase(seq_q=24, topk=9, kv_group=2), IndexCase(seq_q=20, seq_kv=7, topk=3)):
        inputs = make_index_inputs(case, exact=True, bounds=True)
        call = IndexTopkCall(*inputs.args, causal=causal)
        tile = Tile(rows, block, compared, min(case.topk, case.seq_kv))
        actual = EagerBackend().run(call, tile)
        assert torch.equal(actual, index_topk_reference(*inputs.args, causal=causal))


def test_tiles_follow_from_widths_and_never_from_queries() -> None:
    cpu = traits_of(torch.device("cpu"))
    tiles = {
        Tile.of(IndexTopkCall(*make_index_inputs(replace(SMALL, batch=b, seq_q=s)).args), cpu)
        for b, s in ((1, 1), (2, 5), (3, 200))
    }
    assert len(tiles) == 1


@pytest.mark.parametrize(("seq_q", "seq_kv", "topk"), [(64, 2**20, 2048), (40, 150_000, 100_000)])
def test_workspace_on_the_cpu(seq_q: int, seq_kv: int, topk: int) -> None:
    program = f"""
import resource, torch, mla_ops
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
q, k, w = torch.randn({seq_q}, 2, 8), torch.randn({seq_kv}, 1, 8), torch.randn({seq_q}, 2)
mla_ops.index_topk(q[:1], k[:9], w[:1], 3)
result = torch.ones({seq_q}, 1, {topk}, dtype=torch.int32)  # as large as what the call returns
before = peak()
del result
mla_ops.index_topk(q, k, w, {topk}, causal=False)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) <= 256


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize(("seq_q", "seq_kv", "topk"), [(256, 2**20, 2048), (64, 150_000, 2048)])
def test_workspace_on_a_gpu(seq_q: int, seq_kv: int, topk: int, backend: str) -> None:
    case = IndexCase(topk=topk, index_heads=2, batch=None, seq_q=seq_q, seq_kv=seq_kv)
    inputs = make_index_inputs(case, torch.bfloat16, "cuda")
    run(inputs, Target("cuda", backend), causal=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run(inputs, Target("cuda", backend), causal=False)
    beside = torch.cuda.max_memory_allocated() - before - result.numel() * result.itemsize
    assert beside <= 256 * 2**20


def test_no_operator_reads_data_or_shapes_from_it(target: Target) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert torch.Tag.data_dependent_output not in func.tags, func  # .item() and its like
            assert torch.Tag.dynamic_output_shape not in func.tags, func
            return func(*args, **(kwargs or {}))

    inputs = make_index_inputs(SMALL, device=target.device, bounds=True)
    call = IndexTopkCall(*inputs.args)
    problem, traits = IndexTopkProblem.of(call), traits_of(inputs.q_idx.device)
    backend = select(problem, traits, target.backend).require_backend()
    plan = backend.plan(call, problem, traits)
    with Watch():
        backend.run(call, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_captured_call_replays_with_other_bounds_and_values(backend: str) -> None:
    target = Target("cuda", backend)
    case = IndexCase(seq_q=64, seq_kv=700, topk=48)
    static = make_index_inputs(case, torch.bfloat16, "cuda", exact=True, bounds=True)
    mla_ops.warmup_index_topk(*static.args[:4], **static.kwargs, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(static, target)
    for seed in (1, 2, 3):
        fresh = make_index_inputs(case, torch.bfloat16, "cuda", exact=True, bounds=True, seed=seed)
        for name, value in vars(static).items():
            if isinstance(value, torch.Tensor):
                value.copy_(getattr(fresh, name))
        graph.replay()
        assert torch.equal(result, index_topk_reference(*fresh.to(torch.float64).args))

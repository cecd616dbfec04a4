"""The kernels of `mla::index_topk` against a stable sort in fp64, on data whose scores are exact, bit for bit.

Runs on a GPU, or without one under TRITON_INTERPRET=1 (see test_index_topk_interpret.py), where CPU tensors stand in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from strided_tensors import padded, sliced, transposed

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.launch import ScoresConfig, SelectConfig, StreamConfig
from mla_ops.ops.index_topk.configs.lookup import MAX_TOPK, chunk_widths
from mla_ops.ops.index_topk.triton import launch
from mla_ops.ops.index_topk.triton.backend import TritonBackend
from mla_ops.ops.index_topk.triton.launch import Strip, cut_strips, describe_topk, launch_topk, plan_topk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies the bit patterns of bf16.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TRAITS = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=4 if INTERPRETED else 132)

pytestmark = [pytest.mark.usefixtures("poisoned_scratch")] + ([] if INTERPRETED else [pytest.mark.gpu])
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no e4m3 products, or takes minutes")

# Ways to choose, small enough that rows of a few hundred keys fill buffers, and take a sample. The interpreter takes
# seconds for each, so it sees shorter rows, fewer kinds of scores and fewer programs.
SELECTIONS: dict[str, tuple[Any, Any]] = {
    "in registers": ("in registers", None),
    "streamed": ("streamed", StreamConfig(chunk=128, buffer=256, sample=256, num_warps=4)),
    "split": ("split", StreamConfig(chunk=128, buffer=512, sample=256, num_warps=4)),
    "split, small buffer": ("split", StreamConfig(chunk=128, buffer=256, sample=256, num_warps=4)),
}
SEQ_KV = 300 if INTERPRETED else 700


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what is not initialised with NaN bits, which win if they are ever taken for a score."""
    allocate = launch.unfilled

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return allocate(*args, **kwargs).fill_(torch.iinfo(torch.int32).max)

    monkeypatch.setattr(launch, "unfilled", poisoned)


def traits() -> DeviceTraits:
    return TRAITS if INTERPRETED else traits_of(torch.device("cuda"))


def choose(call: IndexTopkCall, **chosen: Any) -> torch.Tensor:
    return launch_topk(call, plan_topk(call, IndexTopkProblem.of(call), traits(), **chosen))


def expected(call: IndexTopkCall) -> torch.Tensor:
    """Return the choice of a stable descending sort of scores in fp64."""
    has_batch = call.q_idx.dim() == 4
    q, k, weights = (
        (tensor if has_batch else tensor[None]).double().cpu() for tensor in (call.q_idx, call.k_idx, call.weights)
    )
    batch, seq_q, heads, head_dim = q.shape
    seq_kv, kv_group = k.shape[1:3]
    products = torch.einsum("bsghd,btgd->bsgth", q.view(batch, seq_q, kv_group, heads // kv_group, head_dim), k)
    if call.k_scale is not None:
        scale = (call.k_scale if has_batch else call.k_scale[None]).double().cpu()
        products *= scale.transpose(1, 2)[:, None, :, :, None]
    products = products.relu() if call.relu else products
    scores = (products * weights.view(batch, seq_q, kv_group, 1, heads // kv_group)).sum(-1)  # [B, Sq, G, Skv]
    positions = torch.arange(seq_kv)
    eligible = torch.ones(batch, seq_q, seq_kv, dtype=torch.bool)
    if call.causal:
        eligible &= positions <= (torch.arange(seq_q) + seq_kv - seq_q)[:, None]
    if call.starts is not None:
        eligible &= positions >= call.starts.cpu().expand(batch, seq_q)[..., None]
    if call.ends is not None:
        eligible &= positions < call.ends.cpu().expand(batch, seq_q)[..., None]
    result = torch.full((batch, seq_q, kv_group, call.topk), -1, dtype=torch.int32)
    for b, s, g in torch.cartesian_prod(*map(torch.arange, (batch, seq_q, kv_group))).tolist():
        keys = eligible[b, s].nonzero()[:, 0]
        best = scores[b, s, g, keys].sort(descending=True, stable=True).indices[: call.topk]
        result[b, s, g, : len(best)] = keys[best].sort().values
    return result if has_batch else result[0]


def make_call(
    batch: int = 1, seq_q: int = 2, seq_kv: int = SEQ_KV, heads: int = 2, head_dim: int = 16, kv_group: int = 1,
    topk: int = 60, dtype: torch.dtype = HALF, seed: int = 0, **options: Any,
) -> IndexTopkCall:  # fmt: skip
    """Return a call of small integers: sums are exact whatever their order, and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator)

    q = integers(batch, seq_q, heads, head_dim).to(DEVICE, dtype)
    k = integers(batch, seq_kv, kv_group, head_dim).to(DEVICE, dtype)
    weights = integers(batch, seq_q, heads).to(DEVICE, torch.float32)
    return IndexTopkCall(q, k, weights, topk, **options)


def call_with_scores(scores: torch.Tensor, topk: int, **options: Any) -> IndexTopkCall:
    """Return a call in which every query scores the keys so: a head whose query picks the first channel."""
    k = torch.zeros(1, len(scores), 1, 16, device=DEVICE)
    k[0, :, 0, 0] = scores.to(DEVICE)
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    q[..., 0] = 1
    options = {"relu": False, "causal": False, **options}
    return IndexTopkCall(q, k, torch.ones(1, 1, 1, device=DEVICE), topk, **options)


def check(call: IndexTopkCall, **chosen: Any) -> torch.Tensor:
    actual = choose(call, **chosen)
    assert actual.dtype == torch.int32
    assert actual.is_contiguous()
    assert torch.equal(actual.cpu(), expected(call))
    return actual


def check_selections(call: IndexTopkCall) -> None:
    for way, config in SELECTIONS.values():
        check(call, way=way, selection=config)


def scores_config(way: str, head_dim: int, block_rows: int = 16, **options: Any) -> ScoresConfig:
    width, chunks = (32, -(-head_dim // 32)) if way == "wide" else chunk_widths(head_dim, 2)
    return ScoresConfig(way, block_rows, 32, width, chunks, num_warps=4, num_stages=2, **options)


WAYS = ["passing heads", "passing keys", "head rows", "wide"]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [HALF] if INTERPRETED else [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_scores(way: str, dtype: torch.dtype, causal: bool) -> None:
    call = make_call(seq_q=18, seq_kv=70, heads=6, kv_group=2, topk=69, dtype=dtype, causal=causal)
    config = scores_config(way, 16, key_tiles=2 if way == "passing keys" else 1)
    check(call._replace(relu=causal), scores=config)


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 40), (5, 192), (33, 64), (1, 1)])
@pytest.mark.parametrize("seq_q", [2] if INTERPRETED else [2, 10])
def test_any_number_of_heads_and_any_width(heads: int, head_dim: int, seq_q: int) -> None:
    check(make_call(seq_q=seq_q, seq_kv=50, heads=heads, head_dim=head_dim, topk=9))


@pytest.mark.parametrize("way", ["passing keys", "head rows", "wide"])
def test_odd_widths_in_every_kernel(way: str) -> None:
    check(make_call(seq_q=5, seq_kv=50, heads=3, head_dim=72, topk=9), scores=scores_config(way, 72))


@pytest.mark.parametrize("topk", [1, 100, SEQ_KV + 5])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_topk(selection: str, topk: int) -> None:
    way, config = SELECTIONS[selection]
    if isinstance(config, StreamConfig) and topk + config.chunk > config.buffer:
        config = replace(config, buffer=1024)
    check(make_call(topk=topk), way=way, selection=config)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_few_eligible_keys(selection: str) -> None:
    way, config = SELECTIONS[selection]
    starts = torch.tensor([-(2**40), -(2**40), 3, 9, 0, 201, SEQ_KV - 59, SEQ_KV - 61, 2**40], device=DEVICE)
    ends = torch.tensor([-(2**40), 1, 62, 69, 61, SEQ_KV, 2**40, 2**40, 2**40], device=DEVICE)
    check(make_call(seq_q=len(ends), starts=starts, ends=ends, causal=False), way=way, selection=config)


@pytest.mark.parametrize("dtype", [torch.int64] if INTERPRETED else [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_starts_and_ends(way: str, dtype: torch.dtype) -> None:
    starts = torch.tensor([[0, 17, 5, 40, 120], [3, 130, 99, 0, -4]], dtype=dtype, device=DEVICE)
    ends = starts + torch.tensor([100, 70, 4, 0, 50], dtype=dtype, device=DEVICE)
    call = make_call(batch=2, seq_q=5, seq_kv=120, topk=11, starts=starts, ends=ends, causal=False)
    config = scores_config(way, 16, key_tiles=2 if way == "passing keys" else 1)
    check(call._replace(causal=True), scores=config)
    check(call._replace(starts=transposed(starts), ends=transposed(ends)), scores=config)
    check(call._replace(starts=starts[0], ends=None), scores=config)


@pytest.mark.parametrize(("seq_q", "seq_kv"), [(1, 1), (12, 4), (4, 12)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sequence_lengths(selection: str, seq_q: int, seq_kv: int) -> None:
    way, config = SELECTIONS[selection]
    check(make_call(seq_q=seq_q, seq_kv=seq_kv, topk=6), way=way, selection=config)


def plateau(winners: int, zeros: int) -> torch.Tensor:
    scores = torch.zeros(winners + zeros)
    scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))[:winners]] = 1.0
    return scores


RANDOM = torch.randn(SEQ_KV, generator=torch.Generator().manual_seed(2))
INF = float("inf")
SCORES = {
    "random": RANDOM,
    "zero": torch.zeros(SEQ_KV),
    "plateau": plateau(40, SEQ_KV - 40),
    "plateau below": plateau(40, SEQ_KV - 40) - 5 * (torch.arange(SEQ_KV) % 3 == 0),
    "one binade": 1 + RANDOM.abs() / 8,
    "large negative": -1e5 + RANDOM,
    "rising": torch.arange(SEQ_KV).float(),
    "falling": -torch.arange(SEQ_KV).float(),
    "signs of zero": torch.where(torch.arange(SEQ_KV) % 2 == 0, 0.0, -0.0),
    "infinite": torch.where(RANDOM > 1.8, INF, torch.where(RANDOM < 0, -INF, RANDOM)),
    "minus infinity": torch.full((SEQ_KV,), -INF),
    "largest and smallest": torch.where(RANDOM > 0, 3.4e38, -3.4e38) * RANDOM.abs().clamp(max=1),
    "subnormal": RANDOM.round(decimals=2) * 1e-40,
    "outliers": torch.where(torch.arange(SEQ_KV) % 100 == 7, 1e30, RANDOM),
}
INTERPRETED_KINDS = ["random", "zero", "plateau below", "infinite", "minus infinity"]


@pytest.mark.parametrize("name", INTERPRETED_KINDS if INTERPRETED else SCORES)
def test_scores_of_every_kind(name: str) -> None:
    check_selections(call_with_scores(SCORES[name], topk=60))


def test_nan_is_the_largest() -> None:
    scores = RANDOM.clone()
    scores[5::20] = torch.nan
    scores[6::30] = INF
    check_selections(call_with_scores(scores, topk=20))
    check_selections(call_with_scores(scores, topk=60))
    check(call_with_scores(torch.full((SEQ_KV,), torch.nan), topk=60))


def test_nan_passes_relu() -> None:
    scores = torch.full((SEQ_KV,), -1.0)
    scores[[3, 77]] = torch.nan
    chosen = check(call_with_scores(scores, topk=3, relu=True))
    assert chosen[0, 0, 0].tolist() == [0, 3, 77]


@pytest.mark.parametrize("selection", ["streamed", "split", "split, small buffer"])
def test_a_sample_that_misses_the_large_keys(selection: str) -> None:
    way, config = SELECTIONS[selection]
    scores = RANDOM.clone()
    scores[130:170] += 100  # the sample takes the first 128 keys and the last
    check(call_with_scores(scores, topk=60), way=way, selection=config)
    scores = RANDOM - 100
    scores[:128] += 100
    scores[130:150] += 300
    scores[-128:] += 100
    check(call_with_scores(scores, topk=100), way=way, selection=config)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_long_plateau(selection: str) -> None:
    way, config = SELECTIONS[selection]
    if way == "in registers":
        config = SelectConfig(1024 if INTERPRETED else 16384, num_warps=16)
    check(call_with_scores(plateau(100, 900 if INTERPRETED else 8220), topk=120), way=way, selection=config)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_strided_inputs(dim: int) -> None:
    call = make_call(batch=2, seq_q=2, seq_kv=50, heads=4, kv_group=2, topk=9)
    q, k = sliced(call.q_idx, dim), sliced(call.k_idx, dim)
    check(call._replace(q_idx=q, k_idx=k, weights=sliced(call.weights, dim - 1)))
    check(call._replace(q_idx=padded(call.q_idx), k_idx=transposed(call.k_idx), weights=transposed(call.weights)))


def test_weights_in_the_dtype_of_queries_and_without_a_batch() -> None:
    call = make_call(seq_q=4, heads=12, seq_kv=50, topk=9)
    call = call._replace(weights=call.weights.to(HALF))
    check(call)
    check(IndexTopkCall(call.q_idx[0], call.k_idx[0], call.weights[0], 9))
    ends = torch.tensor([4, 50, 20, 0], device=DEVICE)
    check(IndexTopkCall(call.q_idx[0], call.k_idx[0], call.weights[0], 9, ends=ends, causal=False))


@pytest.mark.parametrize("selection", ["in registers", "streamed", "split"])
def test_strips(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, config = SELECTIONS[selection]
    call = make_call(batch=2, seq_q=3, seq_kv=100, heads=2, topk=20)
    whole = check(call, way=way, selection=config)
    plan = plan_topk(call, IndexTopkProblem.of(call), traits(), way=way, selection=config)
    row_bytes = 4 * plan.scratch_words // plan.strips[0].rows
    for rows, strips in ((1, 6), (3, 2), (6, 1)):
        monkeypatch.setattr(launch, "MAX_WORKSPACE", rows * row_bytes)
        plan = plan_topk(call, IndexTopkProblem.of(call), traits(), way=way, selection=config)
        assert len(plan.strips) == strips
        assert torch.equal(launch_topk(call, plan), whole)


@pytest.mark.parametrize(("planes", "seq_q"), [(1, 1), (3, 5), (6, 100), (2, 129)])
@pytest.mark.parametrize("max_rows", [1, 4, 17, 64, 100, 130, 10_000])
def test_strips_cover_every_row_once(planes: int, seq_q: int, max_rows: int) -> None:
    strips = cut_strips(planes, seq_q, max_rows, 16)
    rows = [
        (plane, query)
        for strip in strips
        for plane in range(strip.first_plane, strip.first_plane + strip.num_planes)
        for query in range(strip.first_query, strip.first_query + strip.num_queries)
    ]
    assert sorted(rows) == [(plane, query) for plane in range(planes) for query in range(seq_q)]
    assert max(strip.rows for strip in strips) <= max_rows


def test_a_row_that_exceeds_the_workspace_is_a_strip() -> None:
    assert cut_strips(1, 2, 0, 16) == (Strip(0, 1, 0, 1), Strip(0, 1, 1, 1))


@pytest.mark.parametrize(
    "sizes",
    [{"topk": 0}, {"seq_q": 0}, {"seq_kv": 0}, {"batch": 0}, {"seq_kv": 0, "seq_q": 0}],
    ids=str,
)
def test_nothing_to_do(sizes: dict[str, int]) -> None:
    call = make_call(**sizes)
    plan = plan_topk(call, IndexTopkProblem.of(call), traits())
    assert plan.strips == ()
    assert "nothing is launched" in describe_topk(plan)[0]
    check(call)


def test_a_batch_gives_the_bits_of_its_elements() -> None:
    generator = torch.Generator().manual_seed(0)
    call = make_call(batch=3, seq_q=3, seq_kv=100, heads=4, topk=20)
    call = call._replace(
        q_idx=torch.randn(call.q_idx.shape, generator=generator).to(DEVICE, HALF),
        weights=torch.randn(call.weights.shape, generator=generator).to(DEVICE),
    )
    chosen = choose(call)
    assert torch.equal(chosen, choose(call))
    for b in range(3):
        part = IndexTopkCall(call.q_idx[b : b + 1], call.k_idx[b : b + 1], call.weights[b : b + 1], 20)
        assert torch.equal(choose(part), chosen[b : b + 1])


def test_the_backend_plans_runs_and_describes() -> None:
    backend, call = TritonBackend(), make_call(seq_q=9, seq_kv=70, topk=5)
    problem = IndexTopkProblem.of(call)
    assert backend.unsupported_reasons(problem, TRAITS) == []
    assert backend.auto_excluded_reason(problem, TRAITS) is None
    plan = backend.plan(call, problem, traits())
    assert plan.is_inlinable
    assert torch.equal(backend.run(call, plan).cpu(), expected(call))
    lines = backend.describe(plan)
    assert "warm" in lines[0]
    assert "in registers" in lines[1]
    assert "1 strip of up to 9 rows" in lines[2]


@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        ({"topk": MAX_TOPK + 1}, TRAITS, f'topk is {MAX_TOPK + 1}, needs at most {MAX_TOPK}; pass backend="eager"'),
        ({"dtype": torch.float64}, TRAITS, "dtype is torch.float64, needs bf16, fp16, fp32 or e4m3"),
        ({"dtype": torch.float8_e4m3fn}, replace(TRAITS, arch=80), "compute capability is 8.0, e4m3 needs 8.9"),
        ({}, DeviceTraits("cpu"), "device is cpu"),
    ],
)
def test_refusals(change: dict[str, Any], device: DeviceTraits, reason: str) -> None:
    problem = replace(IndexTopkProblem(64, 4, 1, 256, torch.bfloat16), **change)
    (refusal,) = TritonBackend().unsupported_reasons(problem, device)
    assert reason in refusal


@on_gpu_only
@pytest.mark.parametrize("heads", [4, 40])
def test_e4m3(heads: int) -> None:
    call = make_call(seq_q=20, seq_kv=300, heads=heads, head_dim=64, dtype=torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(-2, 3, (1, 300, 1), device=DEVICE).float()
    check(call._replace(k_scale=scale))
    check(call._replace(k_scale=scale, relu=False))
    few = call._replace(q_idx=call.q_idx[:, :2], weights=call.weights[:, :2])
    check(few._replace(k_scale=scale))


@on_gpu_only
@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        ({"seq_q": 300, "seq_kv": 3000, "topk": 256}, "in registers"),
        ({"seq_q": 80, "seq_kv": 20_000, "topk": 2048}, "streamed"),
        ({"seq_q": 3, "seq_kv": 50_000, "topk": 2048}, "split"),
        ({"seq_q": 3, "seq_kv": 50_000, "topk": MAX_TOPK}, "split"),
        ({"seq_q": 80, "seq_kv": 30_000, "topk": MAX_TOPK}, "streamed"),
    ],
    ids=str,
)
def test_sizes_of_use(sizes: dict[str, int], way: str) -> None:
    call = make_call(heads=4, head_dim=64, **sizes)
    assert plan_topk(call, IndexTopkProblem.of(call), traits()).selection.way == way
    check(call)


@on_gpu_only
@pytest.mark.parametrize("selection", SELECTIONS)
def test_capture(selection: str) -> None:
    way, config = SELECTIONS[selection]
    call = make_call()
    whole = check(call, way=way, selection=config)
    run: Callable[[], torch.Tensor] = lambda: choose(call, way=way, selection=config)  # noqa: E731
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.fill_(7)
    graph.replay()
    assert torch.equal(captured, whole)

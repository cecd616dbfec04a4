"""The plain PyTorch indexer against scores, choice and loss written the long way, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mla_ops.adapters.seam import PackedSeq
from mla_ops.adapters.torch_layer import Indexer, hadamard, to_e4m3
from mla_ops.api import index_kl, sparse_attn
from mla_ops.errors import InvalidInputError, MLALayoutError, MLAMetadataError, UnsupportedProblemError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

HIDDEN, LATENT, ROWS, TOPK = 40, 24, 96, 8
WIDTHS = {"topk": TOPK, "index_heads": 4, "index_head_dim": 16, "qk_rope_head_dim": 8}
# Attention around the indexer.
HEADS, D_TOTAL, D_V, SCALE = 3, 20, 12, 0.3


def make_indexer(dtype: torch.dtype = torch.float64, **options: Any) -> Indexer:
    torch.manual_seed(0)
    indexer = Indexer(HIDDEN, **{**WIDTHS, **options}).to(dtype)
    with torch.no_grad():
        for parameter in indexer.k_norm.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=dtype), alpha=0.1)
    return indexer


def hidden_states(*lead: int, width: int = HIDDEN, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*lead, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def attention_rows(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `q`, `kv` and `lse` of some attention on the selected rows, with gradients."""
    generator = torch.Generator().manual_seed(3)
    *lead, rows, _, _ = indices.shape
    q, kv = (
        torch.randn(*lead, rows, heads, D_TOTAL, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (HEADS, 1)
    )
    return q, kv, sparse_attn(q, kv, indices, d_v=D_V, softmax_scale=SCALE).lse


def turn_as_deepseek(x: torch.Tensor, positions: torch.Tensor, theta: float, *, interleaved: bool) -> torch.Tensor:
    """The rotary embedding of DeepSeek's own code: `[rows, heads, width]` in complex numbers."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    pairs = x if interleaved else x.unflatten(-1, (2, half)).transpose(-1, -2).flatten(-2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.unflatten(-1, (half, 2)).contiguous()) * turn).flatten(-2)
    return turned if interleaved else torch.cat([turned[..., 0::2], turned[..., 1::2]], dim=-1)


def plain_scores(indexer: Indexer, hidden: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
    """Scores `[rows, rows]` of one sequence `[rows, HIDDEN]`, the long way, with a gradient; causality not applied."""
    heads, width, rope = indexer.index_heads, indexer.index_head_dim, indexer.qk_rope_head_dim
    q = F.linear(hidden if query is None else query, indexer.q_proj.weight).view(-1, heads, width)
    k = indexer.k_norm(F.linear(hidden, indexer.k_proj.weight)).view(-1, 1, width)
    if rope:
        positions, interleaved = torch.arange(len(hidden)), indexer.rope_layout == "interleaved"
        q, k = (
            torch.cat(
                [
                    turn_as_deepseek(x[..., :rope], positions, indexer.rope_theta, interleaved=interleaved),
                    x[..., rope:],
                ],
                dim=-1,
            )
            for x in (q, k)
        )
    products = torch.einsum("shd,td->hst", q, k[:, 0])
    if indexer.relu:
        products = products.relu()
    weights = F.linear(hidden, indexer.weights_proj.weight) * heads**-0.5 * width**-0.5
    return torch.einsum("hst,sh->st", products, weights)


def best_of(scores: torch.Tensor, eligible: torch.Tensor, topk: int = TOPK) -> torch.Tensor:
    """Return `[rows, topk]`: the best eligible keys of each row, ascending, then -1; the lower of two equals wins."""
    chosen = []
    for row, keys in zip(scores.detach(), eligible, strict=True):
        order = row.masked_fill(~keys, -torch.inf).sort(descending=True, stable=True).indices
        best = order[keys[order]][:topk].sort().values
        chosen.append(F.pad(best, (0, topk - len(best)), value=-1))
    return torch.stack(chosen).int()


def past(rows: int) -> torch.Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_size": LATENT},
        {"key_norm": "rms", "rope_theta": 500.0},
        {"key_norm": "none", "relu": False},
        {"rope_layout": "interleaved"},
        {"qk_rope_head_dim": 0, "use_hadamard": True},
        {"use_hadamard": True},
        {"index_heads": 3, "index_head_dim": 9, "qk_rope_head_dim": 6},
    ],
    ids=["deepseek", "latent", "rms", "bare", "interleaved", "no-rope", "hadamard", "odd-widths"],
)
def test_choice_and_loss_are_those_of_the_plain_formulation(options: dict[str, Any]) -> None:
    indexer = make_indexer(**options)
    hidden = hidden_states(2, ROWS)
    query = hidden_states(2, ROWS, width=LATENT) if indexer.query_size else None
    rows = indexer.project(hidden, query=query)
    indices = indexer.select(*rows)
    scores = [plain_scores(indexer, hidden[b], None if query is None else query[b]) for b in range(2)]
    assert indices.dtype == torch.int32
    assert torch.equal(indices[:, :, 0], torch.stack([best_of(s, past(ROWS)) for s in scores]))
    assert torch.equal(indices, indexer(hidden, query=query))

    q, kv, lse = attention_rows(indices)
    loss = indexer.loss(q, kv, indices, lse, *rows, softmax_scale=SCALE)
    assert loss.shape == (2, ROWS, 1)
    grads = torch.autograd.grad(loss.sum(), list(indexer.parameters()))
    is_key = indices[:, :, 0] >= 0
    at = indices[:, :, 0].long().clamp_min(0)
    logits = SCALE * torch.einsum("bshd,bskd->bshk", q, kv[torch.arange(2)[:, None, None], at, 0])
    target = logits.masked_fill(~is_key.unsqueeze(2), -torch.inf).softmax(-1).mean(2).detach()
    log_scores = torch.stack(scores).gather(-1, at).masked_fill(~is_key, -torch.inf).log_softmax(-1)
    plain = torch.where(is_key, target * (target.log() - log_scores), 0.0).sum(-1)
    # The operators' scores, mass and loss are fp32.
    torch.testing.assert_close(loss.squeeze(-1).double(), plain, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(plain.sum(), list(indexer.parameters()))
    for got, want in zip(grads, expected, strict=True):
        assert want.abs().max() > 1e-2
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_the_two_rotary_layouts_choose_differently() -> None:
    """Where everything is selected a wrong layout is invisible, so there are 12 times as many rows as slots."""
    hidden = hidden_states(1, ROWS)
    chosen = [make_indexer(rope_layout=layout)(hidden) for layout in ("half", "interleaved")]
    assert (chosen[0] != chosen[1]).any(-1).float().mean() > 0.5


def test_hadamard_is_a_rotation_and_its_own_inverse() -> None:
    x = hidden_states(5, width=32)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    signs = hadamard(torch.eye(4)) * 2
    assert signs.tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]


def packed_of(*lengths: int, keys: tuple[int, ...] | None = None, room: int = 0) -> PackedSeq:
    """Segments of these lengths, with `room` unused rows after each."""

    def totals(of: tuple[int, ...]) -> torch.Tensor:
        return F.pad(torch.tensor(of).cumsum(0), (1, 0))

    keys = lengths if keys is None else keys
    padded = {
        f"cu_seqlens_{side}_padded": totals(tuple(length + room for length in of))
        for side, of in (("q", lengths), ("kv", keys))
    }
    return PackedSeq(
        cu_seqlens_q=totals(lengths),
        cu_seqlens_kv=totals(keys),
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(keys),
        **(padded if room else {}),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("room", [0, 3], ids=["tight", "gaps"])
def test_packed_sequences_equal_separate_ones(causal: bool, room: int) -> None:
    indexer, lengths = make_indexer(), (20, 1, 33)
    rows = sum(lengths) + 3 * room
    hidden, packed = hidden_states(rows), packed_of(*lengths, room=room)
    index = indexer.project(hidden, packed=packed)
    together = indexer.select(*index, packed=packed, causal=causal)
    loss = indexer.loss(
        *attention_rows(together)[:2], together, attention_rows(together)[2], *index, softmax_scale=SCALE
    )
    assert together.shape == (rows, 1, TOPK)
    assert torch.equal(indexer(hidden, packed=packed, causal=causal), together)
    start = 0
    for length in lengths:
        own = indexer(hidden[None, start : start + length], causal=causal)[0]
        assert torch.equal(together[start : start + length], torch.where(own < 0, -1, own + start))
        gap = slice(start + length, start + length + room)
        assert (together[gap] == -1).all()
        assert not loss[gap].any()
        start += length + room


def test_packed_chunks_end_at_their_segments_last_key() -> None:
    """The second of two chunks of each sequence, met by keys that a cache kept of the first."""
    indexer, lengths, done = make_indexer(), (20, 33), (12, 30)
    hidden = hidden_states(sum(lengths))
    whole = indexer(hidden, packed=packed_of(*lengths))
    q_idx, k_idx, weights = indexer.project(hidden, packed=packed_of(*lengths))
    new = torch.cat([torch.arange(12, 20), torch.arange(20 + 30, 53)])
    packed = packed_of(*(a - b for a, b in zip(lengths, done, strict=True)), keys=lengths)
    assert torch.equal(indexer.select(q_idx[new], k_idx, weights[new], packed=packed), whole[new])


def test_decoding_from_kept_keys_equals_the_whole_sequence() -> None:
    indexer, hidden = make_indexer(), hidden_states(2, ROWS)
    whole = indexer(hidden)
    _, cache, _ = indexer.project(hidden[:, : ROWS - 1])
    q_idx, row, weights = indexer.project(hidden[:, ROWS - 1 :], positions=torch.tensor([ROWS - 1]))
    assert torch.equal(indexer.select(q_idx, torch.cat([cache, row], dim=1), weights), whole[:, ROWS - 1 :])


def test_starts_and_ends_bound_the_choice() -> None:
    """A rank's queries in any order against the keys of all ranks, and a window that is always attended to."""
    indexer, hidden = make_indexer(), hidden_states(1, ROWS)
    q_idx, k_idx, weights = indexer.project(hidden)
    mine = torch.cat([torch.arange(10, 20), torch.arange(70, 80)])
    local = indexer.select(q_idx[:, mine], k_idx, weights[:, mine], ends=mine + 1, causal=False)
    assert torch.equal(local, indexer.select(q_idx, k_idx, weights)[:, mine])
    before_window = torch.arange(ROWS) - 15
    far = indexer.select(q_idx, k_idx, weights, starts=torch.full((ROWS,), 4), ends=before_window)[0, :, 0]
    scores = plain_scores(indexer, hidden[0])
    position = torch.arange(ROWS)
    assert torch.equal(far, best_of(scores, (position >= 4) & (position < before_window[:, None])))


@pytest.mark.parametrize("is_packed", [False, True], ids=["batched", "packed"])
def test_the_dense_loss_is_that_of_a_list_of_all_keys(is_packed: bool) -> None:
    indexer = make_indexer(topk=ROWS)
    hidden, packed = hidden_states(1, ROWS), None
    if is_packed:
        hidden, packed = hidden[0], packed_of(30, 1, ROWS - 31)
    rows = indexer.project(hidden, packed=packed)
    everything = indexer.select(*rows, packed=packed)
    q, kv, lse = attention_rows(everything)
    row_weight = torch.rand(hidden.shape[:-1], generator=torch.Generator().manual_seed(4))
    dense = indexer.dense_loss(q, kv, lse, *rows, row_weight, softmax_scale=SCALE, packed=packed)
    listed = indexer.loss(q, kv, everything, lse, *rows, softmax_scale=SCALE).squeeze(-1)
    expected = (listed * row_weight).sum()
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-5)
    parameters = list(indexer.parameters())
    for got, want in zip(
        *(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (dense, expected)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"use_hadamard": True}], ids=["plain", "hadamard"])
def test_fp8_selects_by_the_quantised_rows_and_learns_from_the_others(options: dict[str, Any]) -> None:
    indexer = make_indexer(torch.float32, use_fp8=True, **options)
    hidden = hidden_states(1, ROWS, dtype=torch.float32)
    q_idx, k_idx, weights = rows = indexer.project(hidden)
    indices = indexer.select(*rows)
    (q, q_scale), (k, k_scale) = to_e4m3(q_idx), to_e4m3(k_idx)
    products = torch.einsum("bshd,btd->bhst", q.double(), k[:, :, 0].double()).relu()
    scores = torch.einsum("bhst,bsh->bst", products, (weights * q_scale).double()) * k_scale.mT
    assert torch.equal(indices[0, :, 0], best_of(scores[0], past(ROWS)))
    assert (indices != make_indexer(torch.float32, **options)(hidden)).any()
    assert torch.equal(make_indexer(torch.float32, **options).select(q_idx, k, weights, k_scale=k_scale), indices)
    q, kv, lse = (tensor.float() for tensor in attention_rows(indices))
    loss = indexer.loss(q, kv, indices, lse, *rows, softmax_scale=SCALE)
    indexer.use_fp8 = False
    assert torch.equal(indexer.loss(q, kv, indices, lse, *rows, softmax_scale=SCALE), loss)


def test_quantised_rows_have_power_of_two_scales_and_lose_an_e4m3_rounding() -> None:
    rows = torch.cat([hidden_states(50, width=16) * 10.0 ** torch.arange(-25, 25)[:, None], torch.zeros(1, 16)])
    rows = torch.cat([rows, torch.full((1, 16), 448.0), torch.full((1, 16), 448.1)]).float()
    quantised, scale = to_e4m3(rows)
    assert quantised.dtype == torch.float8_e4m3fn
    assert (torch.frexp(scale).mantissa == 0.5).all()
    ratio = rows.abs().amax(-1).clamp_min(1e-4).double() / 448
    assert (scale >= ratio).all()
    assert (scale < 2 * ratio).all()
    assert scale[-2:].tolist() == [1.0, 2.0]
    # Four bits of mantissa: half a unit in the last place is 2^-4 of a number, of the smallest ones 2^-10 of the scale.
    bound = torch.maximum(rows.abs() / 16, scale[:, None] * 2**-10)
    assert ((quantised.float() * scale[:, None] - rows).abs() <= bound).all()


@pytest.mark.parametrize("is_packed", [False, True], ids=["batched", "packed"])
def test_one_graph_serves_every_length_and_equals_eager(is_packed: bool) -> None:
    indexer = make_indexer(torch.float32, query_size=LATENT, use_hadamard=True)

    def learn(hidden: torch.Tensor, query: torch.Tensor, packed: PackedSeq | None) -> tuple[torch.Tensor, torch.Tensor]:
        rows = indexer.project(hidden, query=query, packed=packed)
        indices = indexer.select(*rows, packed=packed)
        mass = (indices >= 0) / (indices + 2.0)
        return indices, index_kl(mass, indexer.scores(*rows, indices)).sum()

    # What packing adds is Dynamo's to trace; the backward graph is the same.
    compiled = torch.compile(learn, fullgraph=True, dynamic=True, backend="eager" if is_packed else "aot_eager")
    for batch, rows in ((2, 9), (3, 30), (5, 17)):
        hidden, query = (hidden_states(batch, rows, width=width, dtype=torch.float32) for width in (HIDDEN, LATENT))
        packed = None
        if is_packed:
            hidden, query, packed = hidden.flatten(0, 1), query.flatten(0, 1), packed_of(*[rows] * batch)
        results = []
        for function in (learn, compiled):
            indexer.zero_grad()
            indices, loss = function(hidden, query, packed)
            loss.backward()
            results.append([indices, loss, *(parameter.grad for parameter in indexer.parameters())])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert (counters["stats"]["unique_graphs"], len(counters["graph_break"])) == (1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("use_fp8", [False, True], ids=["fp32", "fp8"])
def test_compiled_indexer_on_a_gpu_equals_the_cpu(use_fp8: bool) -> None:
    indexer = make_indexer(torch.float32, use_hadamard=True, use_fp8=use_fp8)
    hidden = hidden_states(2, ROWS, dtype=torch.float32)
    chosen = indexer(hidden)
    mass = (chosen >= 0) / (chosen + 2.0)

    def learn(hidden: torch.Tensor, listed: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = indexer.project(hidden)
        return indexer.select(*rows), index_kl(mass, indexer.scores(*rows, listed))

    results = []
    for device in ("cpu", "cuda"):
        indexer.to(device)
        indexer.zero_grad()
        function = learn if device == "cpu" else torch.compile(learn, fullgraph=True, dynamic=True)
        indices, loss = function(*(tensor.to(device) for tensor in (hidden, chosen, mass)))
        loss.sum().backward()
        # Clones: a module that moves takes its gradients along, and with them what `cpu()` returned as it was.
        gradients = (parameter.grad.clone().cpu() for parameter in indexer.parameters())
        results.append([indices.cpu(), loss.detach().cpu(), *gradients])
    (cpu_indices, *cpu), (gpu_indices, *gpu) = results
    for ours, expected in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    # Rows are rounded otherwise on a GPU, in FP8 to another number now and then: a key near the threshold may differ.
    assert (gpu_indices == cpu_indices).all(-1).float().mean() > (0.8 if use_fp8 else 0.95)


@pytest.mark.parametrize("detach_input", [True, False])
def test_the_loss_trains_the_indexer_and_what_feeds_it_only_when_asked(detach_input: bool) -> None:
    indexer = make_indexer(detach_input=detach_input, query_size=LATENT)
    hidden, query = hidden_states(1, 20).requires_grad_(), hidden_states(1, 20, width=LATENT).requires_grad_()
    rows = indexer.project(hidden, query=query)
    indices = indexer.select(*rows)
    assert not indices.requires_grad
    q, kv, lse = attention_rows(indices)
    indexer.loss(q, kv, indices, lse, *rows, softmax_scale=SCALE).mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in indexer.parameters())
    assert (q.grad, kv.grad) == (None, None)
    assert [tensor.grad is None for tensor in (hidden, query)] == [detach_input] * 2


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "sparse"])
def test_the_loss_leaves_the_graph_of_the_attention_alone(is_dense: bool) -> None:
    """The indexer's backward may come first, and the attention's graph is still there."""
    indexer = make_indexer()
    rows = indexer.project(hidden_states(1, 20))
    indices = indexer.select(*rows)
    leaf, kv, _ = attention_rows(indices)
    q = leaf * leaf  # whose backward needs what is saved
    out, lse = sparse_attn(q, kv, indices, d_v=D_V, softmax_scale=SCALE)
    if is_dense:
        indexer.dense_loss(q, kv, lse, *rows, torch.ones(1, 20), softmax_scale=SCALE).backward()
    else:
        indexer.loss(q, kv, indices, lse, *rows, softmax_scale=SCALE).sum().backward()
    assert leaf.grad is None
    out.sum().backward()
    assert leaf.grad.abs().max() > 0


def test_autocast_keeps_head_weights_in_fp32() -> None:
    indexer, hidden = make_indexer(torch.float32), hidden_states(1, ROWS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q_idx, k_idx, weights = indexer.project(hidden)
        indices = indexer.select(q_idx, k_idx, weights)
    assert (q_idx.dtype, k_idx.dtype, weights.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = indexer(hidden)
    # A key of the exact choice that bf16 rows rank below another is one near the threshold.
    shared = (indices[..., :, None] == exact[..., None, :]).any(-1) | (indices < 0)
    assert shared.float().mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even and at most index_head_dim, got 7"),
        ({"qk_rope_head_dim": 18}, "qk_rope_head_dim must be even and at most index_head_dim, got 18"),
        (
            {"index_head_dim": 24, "use_hadamard": True},
            "index_head_dim must be a power of two with use_hadamard, got 24",
        ),
        ({"key_norm": "batch"}, "key_norm must be one of 'layer', 'rms', 'none', got 'batch'"),
        ({"rope_layout": "neox"}, "rope_layout must be one of 'half', 'interleaved', got 'neox'"),
        ({"topk": 0, "index_heads": 0}, "topk must be at least 1, got 0; index_heads must be at least 1, got 0"),
    ],
)
def test_impossible_indexers_are_refused_with_all_reasons(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        make_indexer(**change)


def test_calls_that_contradict_themselves_are_refused() -> None:
    indexer, latent = make_indexer(), make_indexer(query_size=LATENT)
    hidden, packed = hidden_states(1, 10), packed_of(4, 6)
    with pytest.raises(MLALayoutError, match=r"query must come exactly when there is a query_size \(None\), got one"):
        indexer(hidden, query=hidden)
    with pytest.raises(MLALayoutError, match=r"query must come exactly when there is a query_size \(24\), got none"):
        latent(hidden)
    with pytest.raises(MLALayoutError, match=r"query must be \[1, 10, 24\], a row for each of hidden, got \[1, "):
        latent(hidden, query=hidden)
    with pytest.raises(MLALayoutError, match=r"hidden must be \[rows, hidden_size\] \(it is packed\), got \[1, "):
        indexer(hidden, packed=packed)
    with pytest.raises(MLALayoutError, match=r"positions must be \[10\] or \[1, 10\]"):
        indexer(hidden, positions=torch.arange(9))
    rows = indexer.project(hidden[0], packed=packed)
    with pytest.raises(MLALayoutError, match="packed says which keys a query may choose"):
        indexer.select(*rows, packed=packed, ends=torch.arange(10))
    with pytest.raises(MLALayoutError, match="cu_seqlens_q ends at 12 but query has 10 rows"):
        indexer.select(*rows, packed=packed_of(4, 8))
    with pytest.raises(InvalidInputError, match="k_idx must have the dtype of q_idx \\(float8_e4m3fn\\), got float64"):
        indexer.select(rows[0], rows[1], rows[2], k_scale=torch.ones(10, 1))


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(UnsupportedProblemError, match="triton: device is cpu"):
        make_indexer(torch.float32, backend="triton")(hidden_states(1, 6, dtype=torch.float32))


def test_the_printed_layer_tells_its_widths_and_options() -> None:
    text = repr(make_indexer(backend="eager", rope_theta=500.0))
    for part in ("topk=8, index_heads=4, index_head_dim=16, qk_rope_head_dim=8, rope_layout='half', rope_theta=500,",):
        assert part in text
    assert "use_hadamard=False, use_fp8=False, relu=True, detach_input=True, backend='eager'" in text


@pytest.mark.parametrize("key_norm", ["layer", "rms", "none"])
def test_device_dtype_and_norm_eps_reach_every_part(key_norm: str) -> None:
    options: dict[str, Any] = {"key_norm": key_norm, "norm_eps": 1e-3, "device": "meta", "dtype": torch.bfloat16}
    indexer = Indexer(HIDDEN, **WIDTHS, **options)
    assert {(p.device.type, p.dtype) for p in indexer.parameters()} == {("meta", torch.bfloat16)}
    assert getattr(indexer.k_norm, "eps", 1e-3) == 1e-3

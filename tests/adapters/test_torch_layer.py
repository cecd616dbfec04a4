"""The plain PyTorch layer against attention written the long way: every head's keys and values, no operator."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mla_ops.adapters.seam import PackedSeq, resolve_layer_meta
from mla_ops.adapters.torch_layer import MLASparseAttention, absorb_q, project_v, rotate
from mla_ops.cli.model import LanguageModel, ModelConfig
from mla_ops.errors import MLALayoutError, MLAMetadataError, UnsupportedProblemError
from mla_ops.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

META = resolve_layer_meta(
    {"heads": 4, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}, form="absorbed"
)
HIDDEN = 40


def make_layer(dtype: torch.dtype = torch.float64, **options: Any) -> MLASparseAttention:
    torch.manual_seed(0)
    meta = options.pop("meta", META)
    layer = MLASparseAttention(HIDDEN, meta, **options).to(dtype)
    with torch.no_grad():
        layer.kv_norm.weight.normal_(1.0, 0.1)
    return layer


def hidden_states(*lead: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*lead, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def causal_indices(*lead: int, topk: int = 5) -> torch.Tensor:
    """Distinct past rows in random order, -1 where there are fewer than `topk`."""
    rows = lead[-1]
    score = torch.rand(*lead, rows, generator=torch.Generator().manual_seed(2))
    future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    best, indices = score.masked_fill(future, -1.0).topk(min(topk, rows), dim=-1)
    return indices.masked_fill(best < 0, -1)


def rotate_as_complex_numbers(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    pairs = torch.complex(*x.double().chunk(2, dim=-1))
    half = pairs.shape[-1]
    angle = positions.double()[:, None, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def expanded_dense(layer: MLASparseAttention, hidden: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The same layer unabsorbed: per-head keys and values, a [rows, rows] mask, torch's own attention. 3-D hidden."""
    meta = layer.meta
    positions = torch.arange(hidden.shape[1])
    q = layer.q_proj(hidden).view(*hidden.shape[:2], meta.heads, meta.k_channels)
    latent, k_rope = layer.kv_proj(hidden).split([meta.kv_lora_rank, meta.qk_rope_head_dim], dim=-1)
    latent = layer.kv_norm(latent)
    k_nope = torch.einsum("btr,hnr->bthn", latent, layer.w_uk)
    value = torch.einsum("btr,hvr->bthv", latent, layer.w_uv)
    q_nope, q_rope = q[..., : meta.qk_nope_head_dim], q[..., meta.qk_nope_head_dim :]
    if meta.qk_rope_head_dim:
        q_rope = rotate_as_complex_numbers(q_rope, positions, layer.rope_theta)
        k_rope = rotate_as_complex_numbers(k_rope.unsqueeze(2), positions, layer.rope_theta)
    else:
        k_rope = k_rope.unsqueeze(2)
    query = torch.cat([q_nope, q_rope], dim=-1)
    key = torch.cat([k_nope, k_rope.expand(-1, -1, meta.heads, -1)], dim=-1)
    selected = torch.zeros(*indices.shape[:2], hidden.shape[1] + 1, dtype=torch.bool)
    selected = selected.scatter(2, indices.remainder(hidden.shape[1] + 1), True)[..., :-1]  # -1 to the extra column
    out = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (query, key, value)), attn_mask=selected.unsqueeze(1), scale=meta.k_channels**-0.5
    )
    return layer.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_lora_rank": 20},
        {"rope_theta": 500.0},
        {"meta": replace(META, qk_rope_head_dim=0, softmax_scale=16**-0.5)},
        {"meta": replace(META, kv_lora_rank=72, v_head_dim=10, heads=3)},
    ],
    ids=["plain", "low-rank-q", "theta", "no-rope", "odd-widths"],
)
def test_layer_equals_its_expanded_dense_formulation(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    indices = causal_indices(2, 12)
    results = []
    for function in (layer, lambda hidden, indices: expanded_dense(layer, hidden, indices)):
        hidden = hidden_states(2, 12).requires_grad_()
        out = function(hidden, indices)
        out.square().sum().backward()
        results.append([out, hidden.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for ours, dense in zip(*results, strict=True):
        assert dense.abs().max() > 1e-3
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("origin", ["global", "segment"])
def test_packed_sequences_equal_separate_runs(origin: str) -> None:
    layer = make_layer()
    hidden = hidden_states(10)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = PackedSeq(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=6, max_seqlen_kv=6)
    separate, indices = [], torch.full((10, 3), -1)
    for start, end in ((0, 4), (4, 10)):
        own = causal_indices(1, end - start, topk=3)[0]
        separate.append(layer(hidden[None, start:end], own[None])[0])
        indices[start:end] = own if origin == "segment" else torch.where(own < 0, -1, own + start)
    together = layer(hidden, indices, packed=packed, origin=origin)
    torch.testing.assert_close(together, torch.cat(separate), rtol=0, atol=1e-12)
    _, lse = layer.attend(*layer.project(hidden, packed=packed), indices, packed=packed, origin=origin)
    assert lse.shape == (10, 4)


def test_decoding_from_kept_rows_equals_the_whole_sequence() -> None:
    layer = make_layer()
    hidden, indices = hidden_states(2, 12), causal_indices(2, 12)
    whole = layer(hidden, indices)
    _, cache = layer.project(hidden[:, :11])
    q, row = layer.project(hidden[:, 11:], positions=torch.tensor([11]))
    out, lse = layer.attend(q, torch.cat([cache, row], dim=1), indices[:, 11:])
    torch.testing.assert_close(out, whole[:, 11:], rtol=0, atol=1e-12)
    assert lse.shape == (2, 1, 4)


def test_positions_per_batch_element_are_honoured() -> None:
    layer = make_layer()
    hidden, indices = hidden_states(1, 6).expand(2, -1, -1), causal_indices(1, 6).expand(2, -1, -1)
    shifted = layer(hidden, indices, positions=torch.stack([torch.arange(6), torch.arange(6) + 100]))
    torch.testing.assert_close(shifted[0], shifted[1], rtol=0, atol=1e-12)  # distances are all that counts
    stretched = layer(hidden, indices, positions=torch.stack([torch.arange(6), torch.arange(6) * 3]))
    assert (stretched[0] - stretched[1]).abs().max() > 1e-3


def test_a_row_without_keys_gets_zero() -> None:
    indices = causal_indices(1, 6)
    indices[0, 2] = -1
    out = make_layer()(hidden_states(1, 6), indices)
    assert not out[0, 2].any()
    assert out[0, 3].any()


@pytest.mark.parametrize("is_packed", [False, True], ids=["batched", "packed"])
def test_one_graph_serves_every_length_and_equals_eager(is_packed: bool) -> None:
    layer = make_layer(torch.float32)
    # What packing adds is Dynamo's to trace; the backward graph is the same.
    backend = "eager" if is_packed else "aot_eager"
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for batch, rows in ((2, 9), (3, 12), (5, 17)):
        indices = causal_indices(batch, rows)
        hidden = hidden_states(batch, rows, dtype=torch.float32)
        options: dict[str, Any] = {}
        if is_packed:
            cu_seqlens = torch.arange(batch + 1) * rows
            packed = PackedSeq(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=rows, max_seqlen_kv=rows)
            hidden, indices = hidden.flatten(0, 1), indices.flatten(0, 1)
            options = {"packed": packed, "origin": "segment"}
        results = []
        for function in (layer, compiled):
            leaf = hidden.clone().requires_grad_()
            out = function(leaf, indices, **options)
            out.square().sum().backward()
            results.append((out, leaf.grad))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_exported_lengths_stay_symbolic() -> None:
    layer = make_layer(torch.float32)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")}
    example = (hidden_states(2, 12, dtype=torch.float32), causal_indices(2, 12))
    program = torch.export.export(layer, example, dynamic_shapes=(sizes, sizes))
    hidden, indices = hidden_states(3, 17, dtype=torch.float32), causal_indices(3, 17)
    torch.testing.assert_close(program.module()(hidden, indices), layer(hidden, indices))


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # RMSNorm under torch's autocast
def test_bf16_errs_no_more_than_the_expanded_formulation_in_bf16(how: str) -> None:
    layer, hidden, indices = make_layer(), hidden_states(2, 12), causal_indices(2, 12)
    exact = layer(hidden, indices)
    low_layer, low_hidden = copy.deepcopy(layer).bfloat16(), hidden.bfloat16()
    low = expanded_dense(low_layer, low_hidden, indices)
    if how == "weights":
        out = low_layer(low_hidden, indices)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer.float()(hidden.float(), indices)
    assert out.dtype == torch.bfloat16
    assert_within_budget(out, exact, low, terms=HIDDEN + META.d_total)


@pytest.mark.gpu
def test_compiled_layer_on_a_gpu_equals_the_cpu() -> None:
    layer = make_layer(torch.float32)
    hidden, indices = hidden_states(2, 12, dtype=torch.float32), causal_indices(2, 12)
    results = []
    for device in ("cpu", "cuda"):
        layer = layer.to(device)
        function = layer if device == "cpu" else torch.compile(layer, fullgraph=True, dynamic=True)
        leaf = hidden.detach().to(device, copy=True).requires_grad_()
        out = function(leaf, indices.to(device))
        out.square().sum().backward()
        results.append((out.cpu(), leaf.grad.cpu()))
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)


def test_a_compiled_bad_index_names_no_key_where_eager_raises() -> None:
    layer = make_layer(torch.float32)
    hidden, indices = hidden_states(1, 6, dtype=torch.float32), causal_indices(1, 6)
    bad = indices.clone()
    bad[0, 5, 0] = 6
    with pytest.raises(MLALayoutError, match=r"indices\[0, 5, 0, 0\] is 6, outside the 6 rows of key"):
        layer(hidden, bad)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    indices[0, 5, 0] = -1
    torch.testing.assert_close(compiled(hidden, bad), layer(hidden, indices))
    layer.check_indices = False
    torch.testing.assert_close(layer(hidden, bad), layer(hidden, indices))


@pytest.mark.parametrize("rope", [0, 8])
def test_absorption_keeps_the_logits_and_the_values(rope: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q_nope, q_rope, latent = (
        torch.randn(3, 4, width, generator=generator, dtype=torch.float64) for width in (16, rope, 48)
    )
    w_uk, w_uv = (torch.randn(4, width, 48, generator=generator, dtype=torch.float64) for width in (16, 24))
    q = absorb_q(q_nope, q_rope, w_uk)
    assert q.shape == (3, 4, 48 + rope)
    keys = torch.stack([latent[:, h] @ w_uk[h].T for h in range(4)], dim=1)
    torch.testing.assert_close((q[..., :48] * latent).sum(-1), (q_nope * keys).sum(-1))
    assert torch.equal(q[..., 48:], q_rope)
    values = torch.stack([latent[:, h] @ w_uv[h].T for h in range(4)], dim=1)
    torch.testing.assert_close(project_v(latent, w_uv), values)


def test_rotation_depends_on_distance_only() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 64).expand(1, 12, 1, 64) for _ in range(2))
    positions = torch.arange(12)
    products = torch.einsum("bshd,bthd->st", rotate(q, positions), rotate(k, positions))
    torch.testing.assert_close(products[3, 1], products[9, 7])
    assert not torch.allclose(products[3, 1], products[3, 2])


def test_bf16_positions_do_not_collapse() -> None:
    x = torch.ones(1, 2, 1, 2, dtype=torch.bfloat16)
    first, second = rotate(x, torch.tensor([256, 257]))[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "expanded"}, "form must be 'absorbed', got 'expanded'"),
        ({"kv_group": 2}, "kv_group must be 1, got 2"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even, got 7"),
    ],
)
def test_other_kinds_of_layer_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        MLASparseAttention(HIDDEN, replace(META, **change))


def test_metadata_of_another_type_is_refused_with_the_way_to_make_it() -> None:
    for meta in ({"heads": 4}, None, 4):
        with pytest.raises(MLAMetadataError, match=r"use resolve_layer_meta\(\.\.\., form='absorbed'\)") as info:
            MLASparseAttention(128, meta)
        assert f"meta must be an MLALayerMeta, got {type(meta).__name__}; " in str(info.value)


@pytest.mark.parametrize("q_lora_rank", [None, 20])
def test_device_dtype_and_norm_eps_reach_every_part(q_lora_rank: int | None) -> None:
    options = {"q_lora_rank": q_lora_rank, "norm_eps": 1e-3}
    layer = MLASparseAttention(HIDDEN, META, device="meta", dtype=torch.bfloat16, **options)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    norms = [module for module in layer.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [1e-3] * (1 if q_lora_rank is None else 2)


def test_a_model_built_on_meta_is_initialised_like_one_built_on_the_cpu() -> None:
    config = ModelConfig()
    with torch.device("meta"):
        model = LanguageModel(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, parameter), expected in zip(
        model.named_parameters(), LanguageModel(config).state_dict().values(), strict=True
    ):
        assert not parameter.isnan().any(), name
        # The fewest elements are 128 of a bias: their deviation is known to 1 in sqrt(2 * 128) = 16.
        torch.testing.assert_close(parameter.std(), expected.std(), rtol=0.25, atol=0.0, msg=name)
    loss, index_loss = model.losses(torch.randint(0, config.vocab_size, (1, 65)))
    assert torch.isfinite(loss + index_loss)


def test_resetting_draws_the_modules_own_weights_only() -> None:
    layer = make_layer()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.reset_parameters()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"w_uk", "w_uv"}
    for weight in (layer.w_uk, layer.w_uv):  # 3072 and 4608 draws
        assert weight.std().item() == pytest.approx(META.kv_lora_rank**-0.5, rel=0.1)


def test_the_printed_layer_tells_its_widths_and_options() -> None:
    text = repr(make_layer(backend="eager", rope_theta=500.0))
    for part in ("heads=4, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24", "theta=500,"):
        assert part in text
    assert f"softmax_scale={24**-0.5:.6g}, " in text
    assert "backend='eager', check_indices=True" in text


@pytest.mark.parametrize("shape", [(), (5,), (1,), (2, 5), (3, 6), (1, 2, 6)], ids=str)
def test_positions_that_are_not_one_for_each_row_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MLALayoutError, match=r"positions must be \[6\] or \[2, 6\], one for each row of hidden, got"):
        make_layer()(hidden_states(2, 6), causal_indices(2, 6), positions=torch.zeros(shape, dtype=torch.int64))


def test_positions_of_packed_rows_have_no_batch() -> None:
    cu_seqlens = torch.tensor([0, 6])
    packed = PackedSeq(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=6, max_seqlen_kv=6)
    positions = torch.arange(6)[None]
    with pytest.raises(MLALayoutError, match=r"positions must be \[6\] \(it is packed\), .* got \[1, 6\]"):
        make_layer()(hidden_states(6), causal_indices(1, 6)[0], positions=positions, packed=packed)


def test_hidden_states_of_the_other_layout_are_refused() -> None:
    layer = make_layer()
    cu_seqlens = torch.tensor([0, 10])
    packed = PackedSeq(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=10, max_seqlen_kv=10)
    with pytest.raises(
        MLALayoutError, match=r"hidden must be \[rows, hidden_size\] \(it is packed\), got \[1, 10, 40\]"
    ):
        layer(hidden_states(1, 10), causal_indices(1, 10), packed=packed)
    with pytest.raises(MLALayoutError, match=r"hidden must be \[batch, rows, hidden_size\], got \[10, 40\]"):
        layer(hidden_states(10), causal_indices(10))


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises(UnsupportedProblemError, match="triton: device is cpu"):
        make_layer(backend="triton")(hidden_states(1, 6), causal_indices(1, 6))

"""Tiny random models of the real transformers package: the operator against their own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_transformers import (
    BATCH,
    CLOSE,
    FORMS,
    MODELS,
    ROWS,
    TINY,
    assert_all_close,
    attention_layer,
    hub,
    left_padding,
    make_model,
    run_padded,
    token_ids,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mla_ops.adapters import transformers as adapter
from mla_ops.adapters.seam import resolve_layer_meta
from mla_ops.errors import MLALayoutError, MLAMetadataError
from mla_ops.testing import assert_within_budget

every_model = pytest.mark.parametrize("name", MODELS)
every_form = pytest.mark.parametrize("form", FORMS)


# The same results


@every_model
@every_form
def test_logits_loss_gradients_and_cached_generation_equal_eager_attention(name: str, form: Any) -> None:
    model = make_model(name)
    expected = run_padded(model)
    with adapter.attach(model, form=form):
        assert_all_close(run_padded(model), expected)
    assert any(parameter.endswith("layers.0.self_attn.kv_b_proj.weight") for parameter in expected)
    assert ("model.layers.0.self_attn.sinks" in expected) == (name == "HYV4")


@pytest.mark.gpu
@every_model
def test_logits_loss_gradients_and_cached_generation_equal_eager_attention_on_cuda(name: str) -> None:
    model = make_model(name).cuda()
    model.set_experts_implementation("eager")  # grouped matrix products on CUDA are bf16's
    expected = run_padded(model, "cuda")
    with adapter.attach(model, backend="triton"):
        assert_all_close(run_padded(model, "cuda"), expected)


@torch.no_grad()
def test_bf16_errs_no_more_than_eager_attention_does() -> None:
    # Every key is selected: near ties between keys fall otherwise in another precision.
    model, ids = make_model(index_topk=ROWS).bfloat16(), token_ids()
    oracle = copy.deepcopy(model).float()(ids).logits.double()
    eager = model(ids).logits
    with adapter.attach(model):
        assert_within_budget(model(ids).logits, oracle, eager, terms=TINY["hidden_size"])


@torch.no_grad()
def test_a_static_cache_with_room_to_spare_equals_eager_attention() -> None:
    model, ids = make_model(), token_ids()

    def decode() -> torch.Tensor:
        cache = hub.StaticCache(config=model.config, max_cache_len=ROWS + 8)
        model(ids[:, :-2], past_key_values=cache)
        return model(ids[:, -2:], past_key_values=cache).logits

    expected = decode()
    with adapter.attach(model):
        torch.testing.assert_close(decode(), expected, **CLOSE)


@torch.no_grad()
def test_sequences_packed_by_position_ids_equal_separate_runs() -> None:
    model, ids = make_model(), token_ids()[:1]
    positions = torch.cat([torch.arange(5), torch.arange(ROWS - 5)]).unsqueeze(0)
    with adapter.attach(model):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        separate = [model(part, use_cache=False).logits for part in ids.split([5, ROWS - 5], dim=1)]
    torch.testing.assert_close(packed, torch.cat(separate, dim=1), **CLOSE)


def test_weights_handed_over_for_one_call_are_the_ones_that_are_read() -> None:
    model, ids = make_model(), token_ids()
    weights = {name: 0.5 * p.detach().requires_grad_() for name, p in model.named_parameters()}
    name = "model.layers.0.self_attn.kv_b_proj.weight"

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits
        return logits.detach(), torch.autograd.grad(logits.square().mean(), weights[name])[0]

    expected = run()
    with adapter.attach(model):
        torch.testing.assert_close(run(), expected, **CLOSE)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@torch.no_grad()
def test_an_attached_model_is_exported_with_the_operator_in_its_graph(strict: bool) -> None:
    model, ids = make_model(), token_ids()
    expected = model(ids, use_cache=False).logits
    with adapter.attach(model):
        program = torch.export.export(_Logits(model), (ids,), strict=strict)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.mla.sparse_attn.default]
    assert len(calls) == TINY["num_hidden_layers"]
    torch.testing.assert_close(program.module()(ids), expected, **CLOSE)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, ids = make_model(), token_ids()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return attention_layer(model).kv_b_proj.weight.grad.clone()

    with adapter.attach(model.train()):
        expected = gradient()
        model.activation_checkpointing_enable()
        torch.testing.assert_close(gradient(), expected, **CLOSE)


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 0.7}]
)
def test_the_seam_derives_the_scale_that_the_model_uses(rope: dict[str, Any]) -> None:
    model = make_model(rope_parameters={"rope_theta": 10000.0, "original_max_position_embeddings": 16, **rope})
    derived = resolve_layer_meta(model.config, form="absorbed").softmax_scale
    assert derived == pytest.approx(attention_layer(model).scaling, rel=1e-14)
    module = resolve_layer_meta(attention_layer(model), form="absorbed")
    assert (module.heads, module.softmax_scale) == (TINY["num_attention_heads"], attention_layer(model).scaling)


def test_the_seam_reads_composite_and_heterogeneous_configurations() -> None:
    composite = make_model("MistralLarge4").config
    assert resolve_layer_meta(composite, form="absorbed").heads == TINY["num_attention_heads"]
    config = hub.DeepseekV32Config(**TINY, per_layer_config={1: {"v_head_dim": 24}})
    assert [resolve_layer_meta(config, form="absorbed", layer=layer).v_head_dim for layer in (0, 1)] == [20, 24]
    with pytest.raises(MLAMetadataError, match="v_head_dim of DeepseekV32Config cannot be read"):
        resolve_layer_meta(config, form="absorbed")


# What is not made


class _Made(TorchDispatchMode):
    """Collects the operator and shape of every tensor that is made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.tensors.add((func._schema.name, tuple(result.shape)))
        return result


@every_model
@torch.no_grad()
def test_neither_a_mask_of_the_selection_nor_expanded_keys_are_made(name: str) -> None:
    model, ids = make_model(name), token_ids()
    heads, new, total = TINY["num_attention_heads"], 3, ROWS
    selection_mask = ("aten::scatter", (BATCH, new, total))
    head_widths = (TINY["qk_nope_head_dim"] + TINY["qk_rope_head_dim"], TINY["v_head_dim"])
    per_head = {(BATCH, heads, total, width) for width in head_widths} | {(BATCH, heads, new, total)}

    def made() -> set[tuple[str, tuple[int, ...]]]:
        cache = hub.DynamicCache(config=model.config)
        model(ids[:, :-new], past_key_values=cache)
        with _Made() as record:
            model(ids[:, -new:], past_key_values=cache)
        return record.tensors

    eager = made()
    assert selection_mask in eager
    assert per_head <= {shape for _, shape in eager}
    with adapter.attach(model):
        attached = made()
    assert selection_mask not in attached
    assert not per_head & {shape for _, shape in attached}


# Masks and indices


def dense_attention(layer: Any, query: Any, latent: Any, k_rot: Any, indices: Any, visible: Any) -> torch.Tensor:
    key, value = layer.expand_kv(latent, k_rot)
    selected = torch.zeros_like(visible).scatter(-1, indices.long(), True)
    logits = (query @ key.transpose(2, 3) * layer.scaling).masked_fill(~(visible & selected).unsqueeze(1), -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


@pytest.fixture
def call() -> dict[str, Any]:
    """The arguments of one attention call of a model with ROWS query rows, and the layer."""
    layer = attention_layer(make_model())
    generator = torch.Generator().manual_seed(2)
    heads, width = TINY["num_attention_heads"], TINY["qk_nope_head_dim"] + TINY["qk_rope_head_dim"]
    return {
        "layer": layer,
        "query": torch.randn(BATCH, heads, ROWS, width, generator=generator),
        "latent": torch.randn(BATCH, 1, ROWS, TINY["kv_lora_rank"], generator=generator),
        "k_rot": torch.randn(BATCH, 1, ROWS, TINY["qk_rope_head_dim"], generator=generator),
        # Distinct rows, future ones among them; row 0 always, so that no query is left without a key.
        "indices": torch.stack(
            [torch.cat([torch.zeros(1), 1 + torch.randperm(ROWS - 1, generator=generator)[:4]]) for _ in range(24)]
        )
        .view(BATCH, ROWS, 5)
        .long(),
        "visible": torch.ones(BATCH, ROWS, ROWS, dtype=torch.bool).tril(),
    }


def attend(model_layer: Any, call: dict[str, Any], mask: torch.Tensor | None, indices: torch.Tensor | None) -> Any:
    attention = hub.AttentionInterface()[adapter.ATTN_IMPLEMENTATION]
    key, value = model_layer.expand_kv(call["latent"], call["k_rot"])
    return attention(
        model_layer, call["query"], key, value, mask, dropout=0.0, scaling=model_layer.scaling, indices=indices
    )


@pytest.fixture
def attached(call: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """The layer of `call` in a model of its own, attached in the form asked for."""
    model = make_model()
    with adapter.attach(model, form=getattr(request, "param", "absorbed")):
        yield attention_layer(model)


@pytest.mark.parametrize("attached", FORMS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("kind", ["bool", "additive", "additive-inf"])
def test_hidden_rows_among_the_indices_are_dropped(kind: str, dtype: Any, call: dict[str, Any], attached: Any) -> None:
    visible = call["visible"]
    mask = visible.unsqueeze(1)
    if kind != "bool":
        hidden = -torch.inf if kind == "additive-inf" else torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
    out, weights = attend(attached, call, mask, call["indices"].to(dtype))
    expected = dense_attention(*(call[k] for k in ("layer", "query", "latent", "k_rot", "indices", "visible")))
    torch.testing.assert_close(out, expected, **CLOSE)
    assert weights is None


@torch.no_grad()
def test_a_four_dimensional_mask_of_the_callers_equals_eager_attention() -> None:
    model, ids = make_model(), token_ids()
    visible = torch.ones(BATCH, 1, ROWS, ROWS, dtype=torch.bool).tril()
    visible[1, :, 6:, :3] = False
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = model(ids, attention_mask=additive).logits
    with adapter.attach(model):
        for mask in (additive, visible):
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected, **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "without attention_mask; both are needed"),
        ({"indices": None}, "without indices; both are needed"),
        ({"mask": torch.full((BATCH, 1, ROWS, ROWS), -0.5)}, "mask adds finite biases"),
        ({"mask": torch.ones(BATCH, 4, ROWS, ROWS, dtype=torch.bool)}, "one for all heads"),
        ({"indices": torch.zeros(BATCH, ROWS, 5)}, "indices must be int32 or int64, got torch.float32"),
    ],
    ids=["no-mask", "no-indices", "finite-bias", "mask-per-head", "float-indices"],
)
def test_masks_and_indices_that_cannot_be_honoured_are_refused(
    change: dict[str, Any], message: str, call: dict[str, Any], attached: Any
) -> None:
    arguments = {"mask": call["visible"].unsqueeze(1), "indices": call["indices"]} | change
    with pytest.raises(MLALayoutError, match=message):
        attend(attached, call, **arguments)


# Compiled


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_training_step_compiles_into_one_graph_for_every_length() -> None:
    model = make_model(num_hidden_layers=1, mlp_layer_types=["dense"])
    weight = attention_layer(model).kv_b_proj.weight
    with adapter.attach(model):
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (ROWS, 17):
            gradients = []
            for run in (compiled, model):
                model.zero_grad()
                run(token_ids(rows), labels=token_ids(rows), use_cache=False).loss.backward()
                gradients.append(weight.grad.clone())
            torch.testing.assert_close(*gradients, **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["DeepseekV32", "GlmMoeDsa", "HYV4"])
@torch.no_grad()
def test_a_padded_forward_compiles_without_a_graph_break(name: str) -> None:
    model, ids, mask = make_model(name), token_ids(), left_padding()
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    with adapter.attach(model):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids, attention_mask=mask).logits[mask.bool()], expected, **CLOSE)


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_transformers_own_loop_over_experts_is_what_breaks_the_graph() -> None:
    model = make_model(num_hidden_layers=1, mlp_layer_types=["sparse"])
    model.set_experts_implementation("eager")
    with adapter.attach(model), pytest.raises(torch._dynamo.exc.UserError, match="for expert_idx in expert_hit"):
        torch.compile(model, fullgraph=True, backend="eager")(token_ids(), use_cache=False)

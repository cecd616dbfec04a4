"""What generation stores in caches of the real transformers package, and that it generates the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_transformers import (
    BATCH,
    CLOSE,
    MODELS,
    ROWS,
    TINY,
    attention_layer,
    hub,
    left_padding,
    make_model,
    token_ids,
)
from torch.utils._python_dispatch import TorchDispatchMode

import mla_ops
from mla_ops.adapters import transformers as adapter
from mla_ops.errors import MLALayoutError, UnsupportedFeatureError

FORMATS = ("dense", "fp8", "fp8_all")
D_V = TINY["kv_lora_rank"]
D_TOTAL = D_V + TINY["qk_rope_head_dim"]
LENGTH = ROWS + 7  # of static caches; no width is as long
NEW = 8


def bf16_model(name: str = "DeepseekV32", **config: Any) -> Any:
    """A model in bf16 that selects every key: a quantised row is no reason to select another."""
    return make_model(name, index_topk=ROWS + NEW, **config).bfloat16()


def dynamic(model: Any) -> Any:
    return hub.DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return hub.StaticCache(config=model.config, max_cache_len=LENGTH)


def run(model: Any, ids: torch.Tensor, cache: Any, **kwargs: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache, **kwargs).logits


def storages(cache: Any) -> dict[int, int]:
    """Address and bytes of every storage that the cache keeps for tokens."""
    tensors = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim() > 1 and t.numel()}


# Bytes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache_format", FORMATS)
@torch.no_grad()
def test_a_token_is_stored_in_as_many_bytes_as_the_handle_says(name: str, cache_format: Any) -> None:
    model = bf16_model(name)
    row = mla_ops.bytes_per_row(cache_format, D_TOTAL, D_V)
    with adapter.attach(model, cache_format=cache_format) as attached:
        for cache, tokens in ((dynamic(model), ROWS), (static(model), LENGTH)):
            run(model, token_ids(), cache)
            assert sum(storages(cache).values()) == BATCH * tokens * sum(attached.cache_bytes)
            assert cache.layers[0].keys.nbytes == BATCH * tokens * row
    assert adapter.cache_bytes(model, cache_format) == attached.cache_bytes


def test_the_rows_of_the_real_model_are_576_channels() -> None:
    config = hub.DeepseekV32Config(num_hidden_layers=1, mlp_layer_types=["dense"])
    with torch.device("meta"):
        model = hub.AutoModel.from_config(config, dtype=torch.bfloat16)
    stored = [adapter.cache_bytes(model, cache_format) for cache_format in ("dense", "fp8", "fp8_all")]
    assert stored == [(2 * 576, 2 * 128), (656, 2 * 128), (608, 2 * 128)]


class _Made(TorchDispatchMode):
    """Collects the shape of every tensor that gets a storage of its own under it."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known = known
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("cache_format", ["dense", "fp8"])
@torch.no_grad()
def test_a_step_with_a_static_cache_copies_no_row_of_the_past(cache_format: Any) -> None:
    model, ids = make_model().bfloat16(), token_ids()
    with adapter.attach(model, cache_format=cache_format):
        cache = static(model)
        run(model, ids[:, :-1], cache)
        with _Made(set(storages(cache))) as made:
            run(model, ids[:, -1:], cache)
    widths = (D_V, D_TOTAL, mla_ops.bytes_per_row("fp8", D_TOTAL, D_V))
    assert not {shape for shape in made.shapes if LENGTH in shape[:-1] and shape[-1] in widths}


# Tokens


def right_padding() -> torch.Tensor:
    return left_padding().flip(1)


GREEDY: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static-beams": {"num_beams": 3, "cache_implementation": "static"},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "static-chunks": {"prefill_chunk_size": 5, "cache_implementation": "static"},
}


def generate(model: Any, mask: torch.Tensor | None, **how: Any) -> torch.Tensor:
    return model.generate(token_ids(), attention_mask=mask, max_new_tokens=NEW, do_sample=False, **how)


@pytest.mark.parametrize("how", GREEDY.values(), ids=GREEDY)
@pytest.mark.parametrize("padding", [left_padding, right_padding])
def test_tokens_equal_those_of_the_model_that_is_not_attached(how: dict[str, Any], padding: Any) -> None:
    model = make_model()
    expected = generate(model, padding(), **how)
    with adapter.attach(model):
        assert torch.equal(generate(model, padding(), **how), expected)


def test_guessed_tokens_that_are_dropped_leave_no_trace() -> None:
    model, ids = make_model(), token_ids(6)[:1].repeat(1, 3)  # a repeated prompt: its own continuation is guessed
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    with adapter.attach(model):
        guessed = model.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(guessed, expected)


@pytest.mark.parametrize("make_cache", [dynamic, static])
@torch.no_grad()
def test_a_cache_is_continued_cropped_and_reordered(make_cache: Any) -> None:
    model, ids = make_model("GlmMoeDsa"), token_ids()

    def logits() -> torch.Tensor:
        cache = make_cache(model)
        run(model, ids[:, :5], cache)
        run(model, ids[:, 5:9], cache)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        return run(model, ids[:, 8:], cache)

    expected = logits()
    with adapter.attach(model):
        torch.testing.assert_close(logits(), expected, **CLOSE)


@torch.no_grad()
def test_sequences_of_a_dynamic_cache_are_repeated_and_selected() -> None:
    model, ids = make_model(), token_ids()

    def logits() -> torch.Tensor:
        cache = dynamic(model)
        run(model, ids[:, :-1], cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        return run(model, ids[[1, 0, 0], -1:], cache)

    expected = logits()
    with adapter.attach(model):
        torch.testing.assert_close(logits(), expected, **CLOSE)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("cache_format", ["dense", "fp8"])
def test_decoding_with_a_static_cache_compiles_into_one_graph(cache_format: Any) -> None:
    model = bf16_model(num_hidden_layers=1, mlp_layer_types=["dense"])
    how = {"cache_implementation": "static"}
    compiled = hub.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiled._compile_all_devices = True
    with adapter.attach(model, cache_format=cache_format):
        expected = generate(model, left_padding(), **how)
        assert torch.equal(generate(model, left_padding(), compile_config=compiled, **how), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# FP8


@pytest.mark.parametrize("cache_format", ["fp8", "fp8_all"])
@torch.no_grad()
def test_stored_bytes_are_those_of_the_operator(cache_format: Any) -> None:
    model, ids = bf16_model(), token_ids()
    caches = {}
    for kind in ("dense", cache_format):
        with adapter.attach(model, cache_format=kind):
            run(model, ids, cache := dynamic(model))
        caches[kind] = cache.layers[0].keys  # rows of the first layer were computed before anything was read
    rows = caches["dense"].reshape(-1, 1, D_TOTAL)
    pages = torch.zeros(BATCH, ROWS, 1, mla_ops.bytes_per_row(cache_format, D_TOTAL, D_V), dtype=torch.uint8)
    mla_ops.append_rows(rows, torch.arange(len(rows)), pages, d_v=D_V, row_format=cache_format)
    assert torch.equal(caches[cache_format].transpose(1, 2), pages)


@pytest.mark.parametrize("cache_format", ["fp8", "fp8_all"])
@torch.no_grad()
def test_attention_reads_what_the_bytes_stand_for(cache_format: Any) -> None:
    model, ids = bf16_model("HYV4"), token_ids()
    with adapter.attach(model, cache_format=cache_format):
        layer = attention_layer(model)
        run(model, ids, cache := dynamic(model))
        stored = cache.layers[0].keys
        numbers = torch.arange(BATCH * ROWS)
        widths = {"d_total": D_TOTAL, "d_v": D_V, "row_format": cache_format}
        read = mla_ops.read_rows(stored.transpose(1, 2), numbers, dtype=torch.bfloat16, **widths)
        query = torch.randn(BATCH, TINY["num_attention_heads"], ROWS, layer.qk_head_dim, dtype=torch.bfloat16)
        mask = torch.ones(BATCH, 1, ROWS, ROWS, dtype=torch.bool).tril()
        mask[1, :, 6:, :3] = False
        indices = torch.arange(ROWS).expand(BATCH, ROWS, ROWS)
        attention = hub.AttentionInterface()[adapter.ATTN_IMPLEMENTATION]
        outs = [
            attention(layer, query, rows, rows, mask, scaling=layer.scaling, indices=indices, s_aux=layer.sinks)[0]
            for rows in (stored, read.view(BATCH, 1, ROWS, D_TOTAL))
        ]
    torch.testing.assert_close(*outs, atol=1e-3, rtol=2**-6)


@pytest.mark.parametrize(("cache_format", "error"), [("fp8", 0.05), ("fp8_all", 0.05)])
@torch.no_grad()
def test_logits_over_quantised_rows_are_as_close_as_documented(cache_format: Any, error: float) -> None:
    model, ids = bf16_model(), token_ids()
    with adapter.attach(model):
        dense = run(model, ids, dynamic(model)).float()
    logits = {}
    for form in ("absorbed", "expanded"):
        with adapter.attach(model, form=form, cache_format=cache_format):
            logits[form] = run(model, ids, dynamic(model)).float()
            assert 0 < (logits[form] - dense).norm() / dense.norm() < error
            # The same bytes are read whether a token is part of the prompt or follows it, under both kinds of cache.
            for make_cache in (dynamic, static):
                cache = make_cache(model)
                steps = [run(model, part, cache).float() for part in ids.split([7, 4, 1], dim=1)]
                assert (torch.cat(steps, dim=1) - logits[form]).norm() / dense.norm() < 0.01


@pytest.mark.parametrize("how", ["beams", "chunks"])
def test_quantised_rows_follow_their_beam(how: str) -> None:
    model = bf16_model()
    with adapter.attach(model, cache_format="fp8"):
        kinds = [generate(model, left_padding(), **GREEDY[kind]) for kind in (how, f"static-{how}")]
    assert kinds[0].shape[1] == ROWS + NEW
    assert torch.equal(*kinds)


# The way back, and refusals


@torch.no_grad()
def test_undone_a_model_stores_what_it_stored_before() -> None:
    model, ids = make_model(), token_ids()

    def stored() -> list[torch.Size]:
        run(model, ids, cache := dynamic(model))
        return [cache.layers[0].keys.shape, cache.layers[0].values.shape]

    before = stored()
    with adapter.attach(model):
        assert stored() == [(BATCH, 1, ROWS, D_TOTAL), (BATCH, 1, ROWS, 0)]
    assert stored() == before


@torch.no_grad()
def test_another_implementation_reads_the_rows_that_are_stored() -> None:
    model, ids = make_model(), token_ids()
    expected = run(model, ids, dynamic(model))[:, -3:]
    with adapter.attach(model):
        cache = dynamic(model)
        run(model, ids[:, :-3], cache)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(run(model, ids[:, -3:], cache), expected, **CLOSE)


@pytest.mark.parametrize(
    ("model", "asked", "message"),
    [
        (bf16_model, "fp8_cache", "cache_format must be one of 'dense', 'fp8', 'fp8_all', got 'fp8_cache'"),
        (make_model, "fp8", r"cache_format='fp8' stands for rows in bf16 or fp16, got a model in torch\.float32; use"),
    ],
)
def test_formats_that_a_model_cannot_have_are_refused_on_attach(model: Any, asked: Any, message: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=message):
        adapter.attach(model(), cache_format=asked)


def test_no_gradient_is_lost_in_bytes() -> None:
    model, ids = bf16_model(), token_ids()
    with adapter.attach(model, cache_format="fp8"):
        with pytest.raises(UnsupportedFeatureError, match=r"cache_format='fp8' stores bytes, which no gradient .*"):
            model(ids, labels=ids)
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert attention_layer(model).kv_b_proj.weight.grad.any()


@torch.no_grad()
def test_caches_that_cannot_hold_rows_are_refused() -> None:
    model, ids = bf16_model(), token_ids()
    foreign = {kind: dynamic(model) for kind in ("no rows", "bytes", "quantised")}
    run(model, ids, foreign["no rows"])
    with adapter.attach(model, cache_format="fp8"):
        run(model, ids, foreign["bytes"])
    foreign["quantised"].layers[0] = hub.cache_utils.Fp8QuantizedLayer()
    foreign["encoder"] = hub.EncoderDecoderCache(dynamic(model), dynamic(model))
    with adapter.attach(model):
        for kind, error, message in (
            ("no rows", MLALayoutError, r"layer 0 holds keys of 48 x torch\.bfloat16 and the rows are 56 x"),
            ("bytes", MLALayoutError, r"layer 0 holds keys of 80 x torch\.uint8 .* another cache_format; start with"),
            ("quantised", UnsupportedFeatureError, "cache layer 0 is a Fp8QuantizedLayer, which quantises .* by rules"),
            ("encoder", UnsupportedFeatureError, "must be a DynamicCache or a StaticCache, got EncoderDecoderCache"),
        ):
            with pytest.raises(error, match=message):
                run(model, ids, foreign[kind])

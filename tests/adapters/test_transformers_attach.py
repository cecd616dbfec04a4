"""Attaching to models of the real transformers package: what changes, the way back, and what is refused."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import CLOSE, FORMS, ROWS, TINY, attention_layer, hub, make_model, token_ids
from torch import nn

from mla_ops.adapters import transformers as adapter
from mla_ops.errors import MissingExtraError, MLAMetadataError, UnsupportedBackendError, UnsupportedFeatureError


def state_of(model: Any) -> list[Any]:
    return [model.config._attn_implementation, *(set(vars(layer.self_attn)) for layer in model.model.layers)]


@torch.no_grad()
def test_undoing_puts_everything_back_and_a_second_time_does_nothing() -> None:
    model, ids = make_model(), token_ids()
    before, expected = state_of(model), model(ids).logits
    undo = adapter.attach(model)
    assert state_of(model) != before
    undo()
    model.set_attn_implementation("sdpa")
    undo()
    assert state_of(model) == ["sdpa", *before[1:]]
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, expected)


def test_an_exception_in_the_with_block_undoes_too() -> None:
    model = make_model()
    before = state_of(model)
    with pytest.raises(KeyError), adapter.attach(model):
        raise KeyError
    assert state_of(model) == before


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_another_implementation_set_while_attached_is_what_runs(form: Any) -> None:
    model, ids = make_model(), token_ids()
    expected = model(ids).logits
    with adapter.attach(model, form=form):
        model.set_attn_implementation("eager")
        assert torch.equal(model(ids).logits, expected)
        model.set_attn_implementation(adapter.ATTN_IMPLEMENTATION)
        assert not torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_copy_of_an_attached_model_outlives_the_original() -> None:
    model, ids = make_model(), token_ids()
    expected = model(ids).logits
    with adapter.attach(model):
        twin = copy.deepcopy(model)
    attention_layer(model).kv_b_proj.weight.zero_()
    torch.testing.assert_close(twin(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_an_attached_model_is_pickled_as_it_is_and_runs_where_nothing_was_attached(form: Any, tmp_path: Path) -> None:
    model, ids = make_model(), token_ids()
    adapter.attach(model, form=form)
    torch.save((model, ids), tmp_path / "model.pt")
    code = (
        "import sys, torch; folder = sys.argv[1]; model, ids = torch.load(f'{folder}/model.pt', weights_only=False); "
        "torch.save(model(ids).logits.detach(), f'{folder}/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits, **CLOSE)


@torch.no_grad()
def test_a_model_can_be_built_under_the_registered_name_and_attached_later() -> None:
    adapter.register()
    adapter.register()
    expected = make_model()(token_ids()).logits
    torch.manual_seed(0)
    config = hub.DeepseekV32Config(**TINY)
    model = hub.AutoModelForCausalLM.from_config(config, attn_implementation=adapter.ATTN_IMPLEMENTATION).eval()
    with pytest.raises(MLAMetadataError, match=r"without being attached; call mla_ops.adapters.transformers.attach"):
        model(token_ids())
    with adapter.attach(model):
        torch.testing.assert_close(model(token_ids()).logits, expected, **CLOSE)
    assert model.config._attn_implementation == adapter.ATTN_IMPLEMENTATION


def test_the_plan_says_who_runs_the_layers() -> None:
    plan = adapter.attach(make_model()).plan
    assert (plan.name, plan.requested) == ("eager", "auto")
    assert set(plan.reasons) == {"triton"}


# Refusals


def with_sliding_layer() -> Any:
    layers = {"layer_types": ["indexed_attention", "sliding_attention"], "sliding_window": 4}
    return hub.Dots3NoteForCausalLM(hub.Dots3NoteTextConfig(**TINY | layers))


def with_two_attachments() -> Any:
    model = make_model()
    adapter.attach(model)
    return model


def with_other_up_projection() -> Any:
    model = make_model()
    nn.utils.parametrizations.weight_norm(attention_layer(model, 1).kv_b_proj)
    return model


def with_biased_up_projection() -> Any:
    model = make_model()
    linear = attention_layer(model).kv_b_proj
    attention_layer(model).kv_b_proj = nn.Linear(linear.in_features, linear.out_features)
    return model


def with_integer_up_projection() -> Any:
    model = make_model()
    linear = attention_layer(model).kv_b_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    return model


def with_offloaded_up_projection() -> Any:
    model = make_model()
    attention_layer(model).kv_b_proj.to("meta")
    return model


def with_selection_as_a_mask() -> Any:
    """A model whose layers turn their selection into a mask under every implementation."""
    change = {"qk_rope_head_dim": 0, "index_kpool": 1, "layer_types": ["linear_attention", "indexed_attention"]}
    return hub.Glm5NextTextModel(hub.Glm5NextTextConfig(**TINY | change))


class Linear(nn.Linear):
    """Like the layer of an adapter library: the name of torch's own, and more than its weight."""


def with_adapted_up_projection() -> Any:
    model = make_model()
    attention_layer(model).kv_b_proj.__class__ = Linear
    return model


def with_hook(register: str) -> Any:
    model = make_model()
    getattr(attention_layer(model).kv_b_proj, register)(lambda *_: None)
    return model


def with_forward_of_its_own() -> Any:
    model = make_model()
    linear = attention_layer(model).kv_b_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), MLAMetadataError, "Linear has no MLA layer: no module with a kv_b_proj"),
        (
            lambda: make_model("DeepseekV3", mlp_layer_types=None),
            MLAMetadataError,
            r"model\.layers\.0\.self_attn of DeepseekV3ForCausalLM is a DeepseekV3Attention without indexer",
        ),
        (lambda: attention_layer(make_model()), MLAMetadataError, "no PreTrainedModel in DeepseekV32Attention holds"),
        (
            with_selection_as_a_mask,
            MLAMetadataError,
            r"layers\.1\.self_attn of Glm5NextTextModel is a Glm5NextTextAttention, whose forward hands no indices",
        ),
        (with_two_attachments, MLAMetadataError, "is attached already; undo that first"),
        (with_sliding_layer, UnsupportedFeatureError, r"layers\.1\.self_attn .* sliding_window=4: a window is no"),
        (lambda: make_model(attention_dropout=0.1).train(), UnsupportedFeatureError, "attention dropout of 0.1"),
        (lambda: make_model(output_attentions=True), UnsupportedFeatureError, "config.output_attentions: attention w"),
        (with_other_up_projection, UnsupportedFeatureError, r"layers\.1\.self_attn .* must be an nn\.Linear without b"),
        (with_adapted_up_projection, UnsupportedFeatureError, r"got test_transformers_attach\.Linear; resolve that"),
        (with_biased_up_projection, UnsupportedFeatureError, "must be an nn.Linear without bias"),
        (with_integer_up_projection, UnsupportedFeatureError, "plain floating-point parameter .* got Parameter .*int8"),
        (with_offloaded_up_projection, UnsupportedFeatureError, "got Parameter .* on meta; resolve that"),
        (lambda: with_hook("register_forward_hook"), UnsupportedFeatureError, "got forward hooks; resolve that"),
        (lambda: with_hook("register_forward_pre_hook"), UnsupportedFeatureError, "got forward pre-hooks; "),
        (lambda: with_hook("register_full_backward_hook"), UnsupportedFeatureError, "got backward hooks; "),
        (with_forward_of_its_own, UnsupportedFeatureError, "beside its weight .* got a forward of its own; "),
    ],
    ids=[
        "no-mla",
        "no-indexer",
        "no-model",
        "no-indices",
        "attached",
        "sliding-window",
        "dropout",
        "attention-weights",
        "parametrized",
        "adapted",
        "bias",
        "quantised",
        "offloaded",
        "hook",
        "pre-hook",
        "backward-hook",
        "forward",
    ],
)
def test_models_that_cannot_be_served_are_refused_on_attach(make: Any, error: type, message: str) -> None:
    model = make()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        adapter.attach(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_what_is_no_module_is_refused() -> None:
    for model, name in (("deepseek-ai/DeepSeek-V3.2", "str"), (make_model().config, "DeepseekV32Config")):
        with pytest.raises(MLAMetadataError, match=f"model must be an nn.Module, got {name}; load it first"):
            adapter.attach(model)


def test_layers_that_inherit_or_wrap_a_forward_with_indices_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    attention = type(attention_layer(model))

    class Traced(attention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    attention_layer(model, 0).__class__ = Traced
    monkeypatch.setattr(attention, "forward", functools.wraps(attention.forward)(lambda *args, **kwargs: None))
    adapter.attach(model)()


def test_every_layers_device_is_asked_for_a_backend() -> None:
    model = make_model()
    attention_layer(model, 1).to("meta")
    with pytest.raises(UnsupportedBackendError, match=r"in layer 1 on meta"):
        adapter.attach(model, form="expanded")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_hooks_that_a_device_map_leaves_on_every_module_are_no_obstacle(form: Any) -> None:
    accelerate = pytest.importorskip("accelerate", reason="device_map needs accelerate, which is not installed")
    model, ids = make_model(), token_ids()
    expected = model(ids).logits
    places = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
    accelerate.dispatch_model(model, dict.fromkeys(places, "cpu"), main_device="cpu", force_hooks=True)
    assert "forward" in vars(attention_layer(model).kv_b_proj)
    with adapter.attach(model, form=form):
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


@torch.no_grad()
def test_an_offloaded_model_runs_expanded_on_the_device_that_its_weights_are_brought_to() -> None:
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate, which is not installed")
    model, ids = make_model(), token_ids()
    expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedFeatureError, match=r"kv_b_proj.weight must be .* on meta; resolve that"):
        adapter.attach(model)
    with adapter.attach(model, form="expanded"):
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_a_backend_that_cannot_run_the_layers_is_refused_on_attach() -> None:
    model = make_model()
    before = state_of(model)
    with pytest.raises(UnsupportedBackendError, match=r"in layer 0 on cpu[\s\S]*triton: device is cpu, needs CUDA"):
        adapter.attach(model, backend="triton")
    assert state_of(model) == before


def test_a_model_that_keeps_its_implementation_is_refused_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    before = state_of(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UnsupportedFeatureError, match="DeepseekV32ForCausalLM does not let its attention impl"):
        adapter.attach(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"output_attentions": True}, "output_attentions: attention weights never exist here"),
        ({"cu_seq_lens_q": torch.tensor([0, ROWS])}, "cu_seq_lens_q: these models separate packed sequences"),
        ({"max_length_k": ROWS, "softcap": 30.0}, "max_length_k: .*; softcap: unknown here"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused(asked: dict[str, Any], message: str) -> None:
    model = make_model()
    with adapter.attach(model), pytest.raises(UnsupportedFeatureError, match=f"DeepseekV32Attention: {message}"):
        model(token_ids(), **asked)


@torch.no_grad()
def test_arguments_that_change_nothing_are_taken() -> None:
    model, ids = make_model(), token_ids()
    harmless = {"output_hidden_states": True, "output_router_logits": True, "num_items_in_batch": 3}
    harmless["cache_position"] = torch.arange(ROWS)
    with adapter.attach(model):
        output = model(ids, output_attentions=False, cu_seq_lens_q=None, use_cache=True, **harmless)
        assert torch.equal(output.logits, model(ids).logits)
    assert len(output.hidden_states) == TINY["num_hidden_layers"] + 1
    assert len(output.router_logits) == 1


def test_dropout_is_refused_when_training_starts_after_attaching() -> None:
    model = make_model(attention_dropout=0.1)
    with adapter.attach(model):
        model(token_ids())
        with pytest.raises(UnsupportedFeatureError, match=r"attention dropout of 0\.1 in training"):
            model.train()(token_ids())


@torch.no_grad()
def test_an_up_projection_replaced_after_attaching_is_noticed_and_runs_expanded() -> None:
    model, ids = make_model(), token_ids()
    with adapter.attach(model):
        nn.utils.parametrizations.weight_norm(attention_layer(model).kv_b_proj)
        with pytest.raises(
            UnsupportedFeatureError, match=r"kv_b_proj must be an nn\.Linear .* attach with form='expand"
        ):
            model(ids)
    expected = model(ids).logits
    with adapter.attach(model, form="expanded"):
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=r"needs transformers, which is not installed; pip install 'mla_ops\[tr"
    ):
        adapter.register()


def test_an_untested_version_is_named_in_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "TESTED_VERSIONS", ("4.0",))
    with pytest.warns(RuntimeWarning, match=rf"tested with transformers 4\.0; {hub.__version__} is installed"):
        adapter.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.register()
        monkeypatch.undo()
        adapter.register()

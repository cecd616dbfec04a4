"""Tiny random models of the real transformers package, for the tests of its adapter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

hub = pytest.importorskip("transformers", reason="the transformers package is not installed")

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "index_topk": 5,
    "index_head_dim": 16,
    "index_n_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Wide enough that a wrong scale or a lost mask moves the logits by tenths.
    "initializer_range": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "DeepseekV32": {},
    "GlmMoeDsa": {"indexer_types": ["full", "shared"]},  # the second layer reuses the first one's selection
    "AXK2": {},
    "HYV4": {},  # attention sinks
    # The text half of a composite model. Layers without rope, of other widths; latent rows and selections shared.
    "MistralLarge4": {
        "num_hidden_layers": 4,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "no_rope_layers": [1, 0, 1, 0],
        "indexer_types": ["full", "shared", "full", "shared"],
        "kv_source_layers": [0, 1, 0, 1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
TINY_VISION = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 16,
}
BATCH, ROWS = 2, 12
PADDING = 4  # on the left of the second sequence
CLOSE = {"atol": 1e-5, "rtol": 0.0}
FORMS = ("absorbed", "expanded")


def make_model(name: str = "DeepseekV32", **config: Any) -> Any:
    torch.manual_seed(0)
    fields = TINY | MODELS.get(name, {}) | config
    if not hasattr(hub, f"{name}Config"):
        pytest.skip(f"transformers {hub.__version__} has no {name}; the extra asks for 5.23 or later")
    if name == "MistralLarge4":
        text = hub.MistralLarge4TextConfig(**fields)
        both = hub.MistralLarge4Config(text_config=text, vision_config=TINY_VISION)
        model = hub.MistralLarge4ForConditionalGeneration(both)
    else:
        model = getattr(hub, f"{name}ForCausalLM")(getattr(hub, f"{name}Config")(**fields))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks") or "softmax_scaling" in parameter_name:
            nn.init.normal_(parameter)
    model.set_attn_implementation("eager")
    return model.eval()


def decoder(model: Any) -> Any:
    """The module that holds the layers."""
    return getattr(model.model, "language_model", model.model)


def attention_layer(model: Any, index: int = 0) -> Any:
    return decoder(model).layers[index].self_attn


def token_ids(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (BATCH, rows), generator=torch.Generator().manual_seed(1))


def left_padding() -> torch.Tensor:
    mask = torch.ones(BATCH, ROWS, dtype=torch.long)
    mask[1, :PADDING] = 0
    return mask


def run_padded(model: Any, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Logits of the real tokens, loss, every gradient, and a greedy continuation with its cache."""
    ids, mask = token_ids().to(device), left_padding().to(device)
    # The first real token is predicted from a padded one, which attends to nothing here and to everything in eager.
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, PADDING] = -100
    model.zero_grad()
    output = model(ids, attention_mask=mask, labels=labels)
    output.loss.backward()
    assert output.logits.isfinite().all()
    results = {"logits": output.logits[mask.bool()].detach(), "loss": output.loss.detach()}
    results |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    results["tokens"] = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return results


def assert_all_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def spread(model: Any, first: str, second: str) -> Any:
    """Put half of the layers on each device, as `device_map` does: hooks bring along what a layer is given."""
    model.to(first)
    layers = decoder(model).layers
    for layer in layers[len(layers) // 2 :]:
        layer.to(second)
        layer.register_forward_pre_hook(partial(_bring_inputs, second), with_kwargs=True)
    for name, module in decoder(model).named_children():
        if name not in ("embed_tokens", "layers", "rotary_emb"):  # what comes after the layers
            module.register_forward_pre_hook(partial(_bring_inputs, first), with_kwargs=True)
    return model


def _bring_inputs(device: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _on(device, args), {name: _on(device, value) for name, value in kwargs.items()}


def _on(device: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_on(device, part) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value

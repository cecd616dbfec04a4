"""Tiny random models of the real transformers package, for the tests of its adapter."""

from __future__ import annotations

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
}
BATCH, ROWS = 2, 12
PADDING = 4  # on the left of the second sequence
CLOSE = {"atol": 1e-5, "rtol": 0.0}
FORMS = ("absorbed", "expanded")


def make_model(name: str = "DeepseekV32", **config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(hub, f"{name}ForCausalLM")(getattr(hub, f"{name}Config")(**TINY | MODELS.get(name, {}) | config))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            nn.init.normal_(parameter)
    model.set_attn_implementation("eager")
    return model.eval()


def attention_layer(model: Any, index: int = 0) -> Any:
    return model.model.layers[index].self_attn


def token_ids(rows: int = ROWS) -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (BATCH, rows), generator=torch.Generator().manual_seed(1))


def left_padding() -> torch.Tensor:
    mask = torch.ones(BATCH, ROWS, dtype=torch.long)
    mask[1, :PADDING] = 0
    return mask

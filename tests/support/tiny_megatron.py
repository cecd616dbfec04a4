"""Tiny real layers of the installed Megatron-Core on a CPU, for the tests of its adapter."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mla_ops.adapters.megatron import SparseMLACoreAttention

pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install 'mla_ops[megatron]'")
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig

VERSION = importlib.metadata.version("megatron-core")
NEEDS_ABSORBED = pytest.mark.skipif(
    VERSION.startswith("0.16"),
    reason=f"megatron-core {VERSION} has no absorbed attention and no kernel hook; `make test-megatron` has both",
)
CURRENT_DEVICE = torch.cuda.current_device  # the real one, for tests on a GPU
ROWS, BATCH, HIDDEN = 10, 2, 64
WIDTHS = {  # the latent rank differs from the nope width, so a scale taken from d_total is seen
    "num_attention_heads": 4,
    "kv_lora_rank": 48,
    "qk_head_dim": 24,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 24,
}


@contextlib.contextmanager
def megatron_on_a_cpu(store: Path, rank: int = 0, ranks: int = 1) -> Iterator[None]:
    """Start Megatron, and mend the places where it asks for a GPU although told to initialise on the CPU."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(multi_latent_attention, "HAVE_TE", False)  # 0.16 takes a MagicMock for Transformer Engine
        # Of Megatron's own dense attention, for its dropout of 0.
        patch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: SimpleNamespace(fork=contextlib.nullcontext))
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with megatron_on_a_cpu(tmp_path_factory.mktemp("gloo") / "store"):
        yield


def make_config(**change: Any) -> MLATransformerConfig:
    fields = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "q_lora_rank": 32,
        "kv_channels": WIDTHS["v_head_dim"],  # which Megatron's dense attention takes for the width of its output
        "rope_type": "rope",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "bias_dropout_fusion": False,
    }
    return MLATransformerConfig(**(fields | WIDTHS | change))


def layer_spec() -> ModuleSpec:
    return get_gpt_layer_local_spec(multi_latent_attention=True)


class DenseAttention(DotProductAttention):
    """Megatron's dense attention, without the arguments that its own MLA layer passes and it does not take."""

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def dense_spec() -> ModuleSpec:
    spec = layer_spec()
    spec.submodules.self_attention.submodules.core_attention = DenseAttention
    return spec


def build(spec: ModuleSpec, config: MLATransformerConfig, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_module(spec, config=config, layer_number=1, **options)


def run(layer: nn.Module, hidden: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output and every gradient of its squares, that of the hidden states under ""."""
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    out = layer(hidden, attention_mask=options.pop("attention_mask", None), **options)[0]
    out.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return out.detach(), grads | {"": hidden.grad}


def assert_same(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    for (out, grads), (expected_out, expected_grads) in [(actual, expected)]:
        torch.testing.assert_close(out, expected_out, rtol=tolerance, atol=tolerance)
        assert grads.keys() == expected_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], rtol=tolerance, atol=tolerance, msg=name)


def hidden_states(rows: int = ROWS, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(rows, batch, HIDDEN, generator=torch.Generator().manual_seed(1))


def packed_params(**change: Any) -> PackedSeqParams:
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32)
    fields = {
        "qkv_format": "thd",
        "cu_seqlens_q": bounds,
        "cu_seqlens_kv": bounds,
        "max_seqlen_q": 6,
        "max_seqlen_kv": 6,
    }
    return PackedSeqParams(**(fields | change))


def every_row_but(hidden_mask: torch.Tensor) -> torch.Tensor:
    """Megatron's mask: True is hidden."""
    return hidden_mask | torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)


def core_attention(config: Any = None, mask_type: Any = AttnMaskType.causal, **options: Any) -> SparseMLACoreAttention:
    widths = {"softmax_scale": 32**-0.5, "k_channels": 32, "v_channels": 24}
    core_options = widths | options
    return SparseMLACoreAttention(config or make_config(), 1, mask_type, "self", **core_options)


class DuplicatedLinear(nn.Linear):
    """What a specification without Transformer Engine lacks: a linear layer that every rank holds."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, **_: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(hidden), None


def dsa_config(**change: Any) -> MLATransformerConfig:
    return make_config(
        experimental_attention_variant="dsa",
        dsa_indexer_n_heads=2,
        dsa_indexer_head_dim=16,
        dsa_indexer_topk=4,
        dsa_indexer_rotate_activation=False,  # a CUDA extension
        **change,
    )


def dsa_spec(config: MLATransformerConfig) -> ModuleSpec:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    provider = LocalSpecProvider()
    provider.linear = lambda: DuplicatedLinear
    spec = get_dsa_module_spec_for_backend(config, backend=provider)
    down = {"linear_q_down_proj": ColumnParallelLinear, "linear_kv_down_proj": ColumnParallelLinear}
    return replace(spec, submodules=replace(spec.submodules, **down))

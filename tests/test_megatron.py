"""The Megatron-Core adapter in real layers of the installed version: 0.16 on Python 3.11, 0.19 on 3.12."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mla_ops
from mla_ops.adapters import megatron as adapter
from mla_ops.adapters.megatron import SparseMLACoreAttention, adapt_spec, capabilities, enable_dsa_backend
from mla_ops.errors import (
    MissingExtraError,
    MLALayoutError,
    MLAMetadataError,
    UnsupportedBackendError,
    UnsupportedFeatureError,
)
from mla_ops.reference import sparse_attn_reference

pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install 'mla_ops[megatron]'")
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
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


# Layers


def test_the_stock_layer_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'k_channels'"):
        build(layer_spec(), make_config())


@pytest.mark.parametrize(
    "change",
    [{}, {"q_lora_rank": None}, {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.7}],
    ids=["rope", "full-rank-query", "yarn"],
)
def test_an_adapted_layer_equals_megatrons_dense_attention(change: dict[str, Any]) -> None:
    config = make_config(**change)
    hidden = hidden_states()
    sparse = run(build(adapt_spec(layer_spec()), config), hidden)
    causal = every_row_but(torch.zeros(ROWS, ROWS, dtype=torch.bool))[None, None]
    assert_same(sparse, run(build(dense_spec(), config), hidden, attention_mask=causal))


def test_megatrons_mask_is_honoured() -> None:
    hidden = hidden_states()
    blocked = torch.zeros(BATCH, 1, ROWS, ROWS, dtype=torch.bool)
    blocked[0, 0, 5:, 2] = blocked[1, 0, 7, :3] = True
    mask = every_row_but(blocked)
    sparse = run(build(adapt_spec(layer_spec()), make_config()), hidden, attention_mask=blocked)
    assert_same(sparse, run(build(dense_spec(), make_config()), hidden, attention_mask=mask))


@pytest.mark.parametrize("rope_type", ["rope", "yarn"])
def test_packed_sequences_equal_separate_runs(rope_type: str) -> None:
    layer = build(adapt_spec(layer_spec()), make_config(rope_type=rope_type))
    hidden = hidden_states(ROWS, 1)
    together, _ = run(layer, hidden, packed_seq_params=packed_params())
    separate = torch.cat([run(layer, part)[0] for part in hidden.split([4, 6])])
    torch.testing.assert_close(together, separate, rtol=2e-5, atol=2e-5)


def test_packed_sequences_with_gaps_equal_separate_runs() -> None:
    layer = build(adapt_spec(layer_spec()), make_config())
    hidden = hidden_states(ROWS, 1)
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    padded = torch.tensor([0, 4, 10], dtype=torch.int32)
    params = packed_params(
        cu_seqlens_q=bounds, cu_seqlens_kv=bounds, cu_seqlens_q_padded=padded, cu_seqlens_kv_padded=padded
    )
    together, _ = run(layer, hidden, packed_seq_params=params)
    separate = [run(layer, part)[0] for part in (hidden[:3], hidden[4:9])]
    torch.testing.assert_close(together[:3], separate[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(together[4:9], separate[1], rtol=2e-5, atol=2e-5)


def test_packed_gradients_are_those_of_separate_runs() -> None:
    layer = build(adapt_spec(layer_spec()), make_config())
    hidden = hidden_states(ROWS, 1).requires_grad_()
    layer(hidden, attention_mask=None, packed_seq_params=packed_params())[0].square().sum().backward()
    together = hidden.grad
    hidden.grad = None
    sum(layer(part, attention_mask=None)[0].square().sum() for part in hidden.split([4, 6])).backward()
    torch.testing.assert_close(together, hidden.grad, rtol=5e-5, atol=5e-5)


def run_packed(ranks: int = 1, rank: int = 0) -> list[Any]:
    """Run the expanded layer, and the absorbed one where there is one, each rank on its share of the rows."""
    change = {"tensor_model_parallel_size": ranks, "sequence_parallel": ranks > 1}
    layers = [(layer_spec().submodules.self_attention, make_config(**change))]
    if capabilities().absorbed:
        config = dsa_config(**change)
        layers.append((dsa_spec(config), config))
    share = hidden_states(ROWS, 1).chunk(ranks)[rank]
    results = []
    for spec, config in layers:
        out, grads = run(build(adapt_spec(spec), config), share, packed_seq_params=packed_params())
        results.append((out, grads[""]))
    return results


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    with megatron_on_a_cpu(folder / "store", rank, ranks):
        torch.save(run_packed(ranks, rank), folder / f"{rank}.pt")


def test_tensor_and_sequence_parallel_ranks_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, args=(2, tmp_path), nprocs=2)
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, *parts in zip(run_packed(), *shares, strict=True):
        for expected, *actual in zip(whole, *parts, strict=True):
            torch.testing.assert_close(torch.cat(actual), expected, rtol=2e-5, atol=2e-5)


def test_recomputing_the_core_attention_changes_nothing() -> None:
    hidden = hidden_states()
    plain = run(build(adapt_spec(layer_spec()), make_config()), hidden)
    with pytest.MonkeyPatch.context() as patch:  # Megatron's checkpoint saves the state of a CUDA generator
        patch.setattr("megatron.core.tensor_parallel.random._get_all_rng_states", lambda: ())
        patch.setattr("megatron.core.tensor_parallel.random._set_all_rng_states", lambda *states: None)
        recomputed = make_config(recompute_granularity="selective", recompute_modules=["core_attn"])
        assert_same(run(build(adapt_spec(layer_spec()), recomputed), hidden), plain)


def test_megatron_constructs_the_core_attention_twice_and_keeps_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    construct = SparseMLACoreAttention.__init__

    def counted(self: SparseMLACoreAttention, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(SparseMLACoreAttention, "__init__", counted)
    layer = build(adapt_spec(layer_spec()), make_config())
    first, second = made
    assert layer.self_attention.core_attention is second
    assert second.meta.softmax_scale == pytest.approx(32**-0.5)
    q, v = torch.randn(3, 1, 4, 32), torch.randn(3, 1, 4, 24)
    with pytest.raises(MLAMetadataError, match="layer 1 never got k_channels, v_channels and softmax_scale"):
        first(q, q, v, None)


def test_the_layer_compiles_around_the_operator() -> None:
    core = core_attention()
    q, k, v = (torch.randn(ROWS, BATCH, 4, width) for width in (32, 32, 24))
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, None), core(q, k, v, None))


# Specifications


def test_adapting_leaves_the_given_specification_alone() -> None:
    spec = layer_spec()
    attention = spec.submodules.self_attention
    adapted = adapt_spec(spec)
    assert spec.submodules.self_attention is attention
    assert attention.module is multi_latent_attention.MLASelfAttention
    assert attention.submodules.core_attention is DotProductAttention
    adapted.submodules.self_attention.params["attn_mask_type"] = None
    assert attention.params["attn_mask_type"] is AttnMaskType.causal
    again = adapt_spec(adapted)
    assert again.submodules.self_attention.module is adapted.submodules.self_attention.module


def test_the_rotary_embedding_of_a_generic_builder_is_dropped() -> None:
    hidden, rotary = hidden_states(), torch.randn(ROWS, 1, 1, 8)
    causal = every_row_but(torch.zeros(ROWS, ROWS, dtype=torch.bool))[None, None]
    with pytest.raises(AssertionError, match="Rotary position embeddings should not be passed into MLA"):
        run(build(dense_spec(), make_config()), hidden, rotary_pos_emb=rotary, attention_mask=causal)
    layer = build(adapt_spec(layer_spec()), make_config())
    assert_same(run(layer, hidden, rotary_pos_emb=rotary), run(layer, hidden))


def test_a_pipeline_offset_reaches_only_a_class_that_takes_it() -> None:
    spec = layer_spec().submodules.self_attention
    is_taken = capabilities().pp_layer_offset
    with contextlib.nullcontext() if is_taken else pytest.raises(TypeError, match="pp_layer_offset"):
        build(dense_spec().submodules.self_attention, make_config(), pp_layer_offset=3)
    attention = build(adapt_spec(spec), make_config(), pp_layer_offset=3)
    assert getattr(attention, "_pp_layer_offset", None) == (3 if is_taken else None)
    spec.params["pp_layer_offset"] = 3  # builders that construct a whole layer have it in the specification instead
    assert build(adapt_spec(spec), make_config()).layer_number == 1


def test_unknown_arguments_raise() -> None:
    spec = layer_spec()
    spec.submodules.self_attention.params["varlen_starts"] = 0
    with pytest.raises(MLAMetadataError, match="MLASelfAttention takes no varlen_starts, found in the params") as info:
        adapt_spec(spec)
    assert info.value.bad == ("varlen_starts",)
    with pytest.raises(TypeError, match="topk"):
        adapt_spec(layer_spec(), topk=4)
    with pytest.raises(TypeError, match="key_positions"):
        core_attention()(*[torch.randn(3, 1, 4, 32)] * 3, None, key_positions=torch.arange(3))


@pytest.mark.parametrize(
    "make_spec",
    [
        lambda: get_gpt_layer_local_spec(),
        lambda: layer_spec().submodules,
        lambda: ModuleSpec(module=nn.Identity),
        lambda: None,
    ],
    ids=["not-mla", "submodules", "no-submodules", "none"],
)
def test_what_is_no_mla_layer_is_refused(make_spec: Any) -> None:
    with pytest.raises(MLAMetadataError, match="spec must be a ModuleSpec of a transformer layer with MLA"):
        adapt_spec(make_spec())


# Packed sequences


@pytest.mark.parametrize(
    ("batch", "change", "message"),
    [
        (2, {}, "a packed batch has no batch dimension, got batch=2"),
        (1, {"qkv_format": None}, "packed_seq_params has qkv_format=None, needs 'thd'"),
        (1, {"qkv_format": "sbhd"}, "packed_seq_params has qkv_format='sbhd', needs 'thd'"),
        (1, {"max_seqlen_q": None, "max_seqlen_kv": None}, "packed sequence has max_seqlen_q=None, needs an int"),
        (1, {"max_seqlen_q": 5}, "max_seqlen_q is 5 but the longest segment has 6 rows"),
        (1, {"cu_seqlens_q": torch.tensor([0, 4, 12])}, "cu_seqlens_q ends at 12 but query has 10 rows"),
        (1, {"cu_seqlens_q": torch.tensor([0, 12, 10])}, "cu_seqlens_q must start at 0 and never fall"),
        (1, {"cu_seqlens_kv": None}, "cu_seqlens_kv must be an int32 or int64 tensor, got NoneType"),
    ],
)
def test_a_broken_packed_sequence_is_refused_before_anything_is_rotated(
    batch: int, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = build(adapt_spec(layer_spec()), make_config())

    def rotate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rotated")

    for name in ("forward", "get_rotary_seq_len"):
        monkeypatch.setattr(rotary_pos_embedding.RotaryEmbedding, name, rotate)
    with pytest.raises(MLALayoutError, match=message):
        layer(hidden_states(ROWS, batch), attention_mask=None, packed_seq_params=packed_params(**change))


# The core attention


def core_attention(config: Any = None, mask_type: Any = AttnMaskType.causal, **options: Any) -> SparseMLACoreAttention:
    widths = {"softmax_scale": 32**-0.5, "k_channels": 32, "v_channels": 24}
    core_options = widths | options
    return SparseMLACoreAttention(config or make_config(), 1, mask_type, "self", **core_options)


def draw(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(rows, BATCH, 4, width, generator=generator, dtype=torch.float64) for width in (32, 32, 24))
    return q, k, v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Plain attention in fp64 with True hidden: [s, b, heads * v]."""
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * 32**-0.5
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(-2)


def test_chosen_rows_are_attended_and_later_ones_dropped() -> None:
    q, k, v = draw()
    chosen = torch.randint(-1, ROWS, (BATCH, ROWS, 4), generator=torch.Generator().manual_seed(3))
    chosen[0, 6] = -1  # a row without keys
    seen = {}

    def index_fn(**given: Any) -> torch.Tensor:
        seen.update(given)
        return chosen

    core = core_attention(index_fn=index_fn)
    x, qr = torch.randn(ROWS, BATCH, HIDDEN), torch.randn(ROWS, BATCH, 32)
    out = core(q, k, v, None, x=x, qr=qr)
    counts = torch.zeros(BATCH, ROWS, ROWS + 1).scatter_add_(2, chosen % (ROWS + 1), torch.ones(chosen.shape))
    counts = counts[..., :-1].tril()
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * 32**-0.5
    weights = counts[:, None] * logits.exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(-2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert not out[6, 0].any()
    assert set(seen) == {"query", "key", "x", "qr", "packed", "layer_number"}
    assert seen["x"] is x
    assert seen["qr"] is qr
    assert seen["layer_number"] == 1


def test_a_layer_hands_its_hidden_states_to_index_fn() -> None:
    seen = []

    def window(*, query: torch.Tensor, x: torch.Tensor | None, qr: torch.Tensor | None, **_: Any) -> torch.Tensor:
        seen.append((x, qr))
        rows = torch.arange(query.shape[0])
        return (rows[:, None] - torch.arange(3)).clamp_min(-1).expand(query.shape[1], -1, -1)

    # 0.16 hands them over for its own sparse attention only.
    change = {"experimental_attention_variant": "dsa"} if VERSION.startswith("0.16") else {}
    hidden = hidden_states()
    layer = build(adapt_spec(layer_spec(), index_fn=window), make_config(**change))
    sparse = run(layer, hidden)
    outside = torch.ones(ROWS, ROWS, dtype=torch.bool).tril(-3)
    mask = every_row_but(outside)[None, None]
    assert_same(sparse, run(build(dense_spec(), make_config()), hidden, attention_mask=mask))
    ((x, qr),) = seen
    assert x.shape == (ROWS, BATCH, HIDDEN)
    assert qr.shape == (ROWS, BATCH, 32)


def test_without_a_mask_every_row_is_read() -> None:
    q, k, v = draw()
    out = core_attention()(q[:1], k, v, None, attn_mask_type=AttnMaskType.no_mask)  # one step of decoding
    torch.testing.assert_close(out, dense(q[:1], k, v, torch.zeros(1, ROWS, dtype=torch.bool)), rtol=0, atol=1e-12)


def test_a_padded_value_comes_back_as_wide_as_it_was_given() -> None:
    q, k, v = (t[:, 0] for t in draw())
    core, params = core_attention(), packed_params()
    narrow = core(q, k, v, None, packed_seq_params=params)
    wide = core(q, k, nn.functional.pad(v, (0, 8)), None, packed_seq_params=params)
    assert (narrow.shape, wide.shape) == ((ROWS, 4 * 24), (ROWS, 4 * 32))
    wide = wide.view(ROWS, 4, 32)
    torch.testing.assert_close(wide[..., :24].flatten(-2), narrow)
    assert not wide[..., 24:].any()


def test_no_tensor_has_an_element_for_each_head_and_pair_of_rows() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return out

    rows, heads = 512, 16
    config = make_config(num_attention_heads=heads)
    q, k, v = (torch.randn(rows, 1, heads, width) for width in (32, 32, 24))
    core = core_attention(config)
    with Largest() as largest:
        core(q, k, v, None)
    assert largest.bytes <= rows * rows * 8  # one int64 list for all heads
    assert largest.bytes < heads * rows * rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask_type": AttnMaskType.padding}, "attn_mask_type must be one of causal, no_mask, got padding"),
        ({"attn_mask_type": AttnMaskType.padding_causal}, "one of causal, no_mask, got padding_causal"),
        ({"attention_mask": torch.zeros(1, 1, ROWS, ROWS)}, "attention_mask must be bool, True where hidden"),
        ({"attention_mask": torch.zeros(1, 4, ROWS, ROWS, dtype=torch.bool)}, "mask must be .* one for all heads"),
        ({"up_v_weight": torch.zeros(4, 24, 48)}, "exactly one of value .* got both"),
        ({"value": None}, "exactly one of value .* got neither"),
        ({"packed_seq_params": packed_params()}, r"layout 'thd' needs query \[t, heads, k_channels\], got 4-D"),
    ],
)
def test_wrong_tensors_are_refused(options: dict[str, Any], message: str) -> None:
    q, k, v = draw()
    arguments = {"value": v, "attention_mask": None} | options
    with pytest.raises(MLALayoutError, match=message):
        core_attention()(q, k, **arguments)


def test_packed_rows_without_their_sequence_are_refused() -> None:
    q, k, v = (t[:, 0] for t in draw())
    with pytest.raises(MLALayoutError, match=r"layout 'sbhd' needs query \[s, b, heads, k_channels\], got 3-D"):
        core_attention()(q, k, v, None)


def test_a_mask_beside_a_packed_sequence_is_refused() -> None:
    q, k, v = (t[:, 0] for t in draw())
    mask = torch.zeros(1, 1, ROWS, ROWS, dtype=torch.bool)
    with pytest.raises(MLALayoutError, match="attention_mask came with a packed sequence"):
        core_attention()(q, k, v, mask, packed_seq_params=packed_params())
    out = core_attention(mask_type=AttnMaskType.padding_causal)(q, k, v, None, packed_seq_params=packed_params())
    torch.testing.assert_close(out, core_attention()(q, k, v, None, packed_seq_params=packed_params()))


def test_a_causal_mask_needs_as_many_queries_as_keys() -> None:
    q, k, v = draw()
    with pytest.raises(MLALayoutError, match="as many query rows as key rows, got 1 and 10"):
        core_attention()(q[:1], k, v, None)


def test_keys_with_heads_are_not_taken_for_latent_rows() -> None:
    absorbed = {"k_channels": 56, "v_channels": 48}
    q = torch.randn(ROWS, BATCH, 4, 56)
    with pytest.raises(MLALayoutError, match="key has 4 heads but the layer's latent rows are shared"):
        core_attention(**absorbed)(q, q, None, None, up_v_weight=torch.zeros(4, 24, 48))


@pytest.mark.parametrize("shape", [(ROWS, 2), (BATCH, ROWS, 4, 2)])
def test_index_fn_returns_one_list_for_all_heads(shape: tuple[int, ...]) -> None:
    core = core_attention(index_fn=lambda **_: torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(MLALayoutError, match=r"index_fn must return \[b, s, K\], one list for all heads"):
        core(*draw(), None)


def test_an_index_outside_its_segment_is_refused_in_eager() -> None:
    q, k, v = (t[:, 0] for t in draw())
    crossing = torch.full((ROWS, 2), -1)
    crossing[5, 0] = 3  # the segment before
    with pytest.raises(MLALayoutError, match="outside its segment's rows"):
        core_attention(index_fn=lambda **_: crossing)(q, k, v, None, packed_seq_params=packed_params())
    unchecked = core_attention(index_fn=lambda **_: crossing, check_indices=False)
    assert not unchecked(q, k, v, None, packed_seq_params=packed_params()).any()


def test_reading_every_row_has_a_documented_bound() -> None:
    q, k, v = draw()
    with pytest.raises(MLAMetadataError, match=r"up to max_dense_rows=9, got 10 rows; pass adapt_spec an index_fn"):
        core_attention(max_dense_rows=9)(q, k, v, None)
    packed = (q[:, 0], k[:, 0], v[:, 0], None)
    core_attention(max_dense_rows=6)(*packed, packed_seq_params=packed_params())  # its longest segment
    with pytest.raises(MLAMetadataError, match="got 6 rows"):
        core_attention(max_dense_rows=5)(*packed, packed_seq_params=packed_params())


def test_dropout_and_biases_are_refused() -> None:
    q, k, v = draw()
    core = core_attention(make_config(attention_dropout=0.1))
    with pytest.raises(UnsupportedFeatureError, match=r"attention_dropout is 0\.1"):
        core(q, k, v, None)
    core.eval()(q, k, v, None)
    with pytest.raises(UnsupportedFeatureError, match="attention_bias was passed"):
        core(q, k, v, None, attention_bias=torch.zeros(1))


def test_configuration_that_would_not_be_honoured_is_refused_all_at_once() -> None:
    config = make_config(window_size=(128, 0), softmax_type="off-by-one", qk_clip=True)
    with pytest.raises(UnsupportedFeatureError) as info:
        core_attention(config)
    for text in ("layer 1, does not support", "softmax_type='off-by-one'", "window_size=(128, 0)", "qk_clip=True"):
        assert text in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_channels": 24}, r"\(k_channels, v_channels\) is \(24, 24\), but .* \(32, 24\) expanded and \(56, 48\)"),
        ({"v_channels": None}, r"\(k_channels, v_channels\) is \(32, None\)"),
    ],
)
def test_widths_that_contradict_the_configuration_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        core_attention(**change)


def test_a_configuration_without_mla_widths_is_missed_in_one_error() -> None:
    config = SimpleNamespace(attention_dropout=0.0, num_attention_heads=4, qk_head_dim=24, qk_pos_emb_head_dim=8)
    with pytest.raises(MLAMetadataError, match=r"\(from SimpleNamespace, layer 1\)") as info:
        core_attention(config)
    assert set(info.value.missing) == {"kv_lora_rank", "v_head_dim"}
    with pytest.raises(MLAMetadataError, match="attention_type must be 'self', got 'cross'"):
        SparseMLACoreAttention(make_config(), 1, AttnMaskType.causal, "cross", k_channels=32, v_channels=24)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["sbhd", "thd"])
def test_on_a_gpu_nothing_waits_for_the_host(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", CURRENT_DEVICE)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32, device="cuda")
    params = packed_params(cu_seqlens_q=bounds, cu_seqlens_kv=bounds) if packed else None
    on_cpu = [t[:, 0] if packed else t for t in draw()]
    expected = core_attention()(*on_cpu, None, packed_seq_params=packed_params() if packed else None)
    q, k, v = (t.float().cuda().requires_grad_() for t in on_cpu)
    core = core_attention(check_indices=False)
    core(q, k, v, None, packed_seq_params=params).sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = core(q, k, v, None, packed_seq_params=params)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


# The installed version


def test_capabilities_describe_the_installed_version() -> None:
    offered = capabilities()
    is_new = not VERSION.startswith("0.16")
    assert offered.version == VERSION
    assert offered.tested
    assert (offered.absorbed, offered.dsa_hook, offered.pp_layer_offset) == (is_new,) * 3
    assert offered.index_policy == ("sentinel" if is_new else "mask")


def test_an_untested_version_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.17.0")
    monkeypatch.setattr(adapter, "TESTED_VERSIONS", ("0.16.1", "0.19", "0.99"))  # a cache entry of its own
    with pytest.warns(RuntimeWarning, match=r"tested with megatron-core 0.16.1, 0.19, 0.99; 0.17.0 is installed"):
        assert not capabilities().tested
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt_spec(layer_spec())


def test_without_megatron_the_pip_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    for ask in (lambda: adapt_spec(None), capabilities, lambda: enable_dsa_backend(None)):
        with pytest.raises(MissingExtraError, match=r"needs megatron-core, .*pip install 'mla_ops\[megatron\]'"):
            ask()


# Behind Megatron's absorbed sparse attention


def draw_absorbed(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(ROWS, BATCH, 3, 88, generator=generator, dtype=dtype)
    key = torch.randn(ROWS, BATCH, 1, 88, generator=generator, dtype=dtype)
    indices = torch.randint(-1, ROWS, (BATCH, ROWS, 5), generator=generator)
    indices[1, 4] = -1
    return query, key, indices


@pytest.mark.parametrize("with_length", [False, True])
def test_the_hook_takes_any_widths_heads_and_topk(with_length: bool) -> None:
    query, key, indices = draw_absorbed()
    length = torch.arange(BATCH * ROWS).view(BATCH, ROWS) % 6 if with_length else None
    out = adapter.run_fused_absorbed_sparse_attention(query, key, indices, 0.1, 72, length)
    q, kv = query.transpose(0, 1), key.transpose(0, 1)
    expected, _ = sparse_attn_reference(q, kv, indices.unsqueeze(2), 72, 0.1, topk_length=length)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0, atol=1e-12)
    assert not out[4, 1].any()


def test_the_hook_raises_where_megatrons_own_decline() -> None:
    query, key, indices = draw_absorbed()
    hook = adapter.run_fused_absorbed_sparse_attention
    with pytest.raises(MLALayoutError, match="key has 3 heads"):
        hook(query, key.expand(-1, -1, 3, -1), indices, 0.1, 72)
    with pytest.raises(MLALayoutError, match=r"d_total >= v_channels \(100\)"):
        hook(query, key, indices, 0.1, 100)
    with pytest.raises(mla_ops.InvalidInputError, match="kv must have the dtype of q"):
        hook(query, key.float(), indices, 0.1, 72)


def test_a_version_without_the_hook_is_refused() -> None:
    if capabilities().dsa_hook:
        pytest.skip(f"megatron-core {VERSION} has the hook, so there is nothing to refuse")
    with pytest.raises(UnsupportedBackendError, match=f"megatron-core {VERSION} has no place for a sparse attention"):
        enable_dsa_backend(make_config())


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


@NEEDS_ABSORBED
@pytest.mark.parametrize("packed", [False, True], ids=["sbhd", "thd"])
def test_the_hook_equals_megatrons_dense_fallback(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dsa_config()
    layer = build(dsa_spec(config), config)
    hidden = hidden_states(ROWS, 1 if packed else BATCH)
    options = {"packed_seq_params": packed_params()} if packed else {}
    fallback = run(layer, hidden, **options)

    seen = []
    hook = adapter.run_fused_absorbed_sparse_attention

    def recorded(*args: Any) -> torch.Tensor:
        seen.append(args[2])
        return hook(*args)

    monkeypatch.setattr(adapter, "run_fused_absorbed_sparse_attention", recorded)
    with enable_dsa_backend(config):
        fused = run(layer, hidden, **options)
    assert_same(fused, fallback, tolerance=1e-6)
    (indices,) = seen
    assert indices.dtype == torch.int64
    assert (indices == -1).any()
    assert (indices.diff() < 0).any()  # unsorted, before the -1 as well
    assert indices.shape == (1 if packed else BATCH, ROWS, 4)


@NEEDS_ABSORBED
def test_undoing_the_hook_restores_the_configuration_and_megatrons_table() -> None:
    from megatron.core.transformer.experimental_attention_variant import dsa_kernels

    before = dict(dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND)
    first, second = dsa_config(), dsa_config()
    undo_first = enable_dsa_backend(first)
    with enable_dsa_backend(second):
        undo_first()
        undo_first()
        assert first.dsa_kernel_backend == "none"
        assert dsa_kernels.use_fused_dsa_kernels(second)  # the table still serves it
    assert second.dsa_kernel_backend == "none"
    assert before == dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND


@NEEDS_ABSORBED
def test_a_configuration_that_would_never_ask_for_a_kernel_is_refused() -> None:
    config = dsa_config()
    config.attention_backend = AttnBackend.unfused
    with pytest.raises(UnsupportedBackendError, match="attention_backend is 'unfused'"):
        enable_dsa_backend(config)


@NEEDS_ABSORBED
@pytest.mark.parametrize("packed", [False, True], ids=["sbhd", "thd"])
def test_absorbed_layers_take_the_same_core_attention(packed: bool) -> None:
    config = dsa_config()
    hidden = hidden_states(ROWS, 1 if packed else BATCH)
    options = {"packed_seq_params": packed_params()} if packed else {}
    absorbed = build(adapt_spec(dsa_spec(config)), config)
    expanded = build(adapt_spec(layer_spec().submodules.self_attention), make_config())
    expanded.load_state_dict(absorbed.state_dict())
    assert_same(run(absorbed, hidden, **options), run(expanded, hidden, **options))

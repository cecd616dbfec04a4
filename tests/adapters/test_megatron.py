"""The Megatron-Core adapter in real layers of the installed version: 0.16 on Python 3.11, 0.19 on 3.12."""

from __future__ import annotations

import contextlib
import importlib.metadata
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mla_ops.adapters import megatron as adapter
from mla_ops.adapters.megatron import SparseMLACoreAttention, adapt_spec, capabilities, enable_dsa_backend
from mla_ops.errors import (
    MissingExtraError,
    MLALayoutError,
    MLAMetadataError,
)

pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install 'mla_ops[megatron]'")
from megatron.core.models.common.embeddings import rotary_pos_embedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from tiny_megatron import (
    BATCH,
    ROWS,
    VERSION,
    assert_same,
    build,
    core_attention,
    dense_spec,
    dsa_config,
    dsa_spec,
    every_row_but,
    hidden_states,
    layer_spec,
    make_config,
    megatron,
    megatron_on_a_cpu,
    packed_params,
    run,
)

__all__ = ["megatron"]  # a fixture of every test here


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
    # "forkserver", because a spawned rank runs Python's finalization, where gloo's threads may abort it.
    torch.multiprocessing.start_processes(run_rank, args=(2, tmp_path), nprocs=2, start_method="forkserver")
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for whole, *parts in zip(run_packed(), *shares, strict=True):
        for expected, *actual in zip(whole, *parts, strict=True):
            torch.testing.assert_close(torch.cat(actual), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("modules", [["core_attn"], ["core_attn", "mla_up_proj"]], ids=["core", "core-up-proj"])
def test_recomputing_changes_nothing(modules: list[str]) -> None:
    hidden = hidden_states()
    plain = run(build(adapt_spec(layer_spec()), make_config()), hidden)
    with pytest.MonkeyPatch.context() as patch:  # Megatron's checkpoint saves the state of a CUDA generator
        patch.setattr("megatron.core.tensor_parallel.random._get_all_rng_states", lambda: ())
        patch.setattr("megatron.core.tensor_parallel.random._set_all_rng_states", lambda *states: None)
        recomputed = make_config(recompute_granularity="selective", recompute_modules=modules)
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


@pytest.mark.parametrize("dynamic", [True, None])
def test_layers_of_other_scales_compile_too(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(ROWS, BATCH, 4, width) for width in (32, 32, 24))
    for scale in (0.2, 0.3):
        core = core_attention(softmax_scale=scale)
        compiled = torch.compile(core, fullgraph=True, dynamic=dynamic, backend="eager")
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


def test_a_block_of_layers_is_adapted_layer_by_layer() -> None:
    config = make_config(num_layers=2)
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    whole = ModuleSpec(module=TransformerBlock, submodules=block)
    for adapted in (adapt_spec(block), adapt_spec(whole).submodules):
        assert adapted.layer_norm is block.layer_norm
        assert len(adapted.layer_specs) == 2
        for layer in adapted.layer_specs:
            assert layer.submodules.self_attention.submodules.core_attention.module is SparseMLACoreAttention
    assert block.layer_specs[0].submodules.self_attention.submodules.core_attention is DotProductAttention
    causal = every_row_but(torch.zeros(ROWS, ROWS, dtype=torch.bool))[None, None]
    (layer, _), hidden = adapt_spec(block).layer_specs, hidden_states()
    assert_same(run(build(layer, config), hidden), run(build(dense_spec(), config), hidden, attention_mask=causal))


def test_a_layer_of_a_block_that_is_not_mla_is_named_by_its_class_and_place() -> None:
    block = get_gpt_decoder_block_spec(make_config(num_layers=2), use_transformer_engine=False)
    dense = get_gpt_layer_local_spec()
    with pytest.raises(MLAMetadataError) as info:
        adapt_spec(replace(block, layer_specs=[block.layer_specs[0], dense]))
    assert str(info.value).endswith(
        "got ModuleSpec of SelfAttention at spec.layer_specs[1].submodules.self_attention; build it with "
        "multi_latent_attention=True"
    )


def test_an_adapted_specification_and_its_layer_are_pickled() -> None:
    spec = adapt_spec(layer_spec())
    twin = pickle.loads(pickle.dumps(spec))
    assert twin.submodules.self_attention.module is spec.submodules.self_attention.module
    assert pickle.loads(pickle.dumps(build(twin, make_config()).self_attention.core_attention)).meta is not None


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
        (
            1,
            {"cu_seqlens_q": torch.tensor([0, 3, 8]), "cu_seqlens_q_padded": torch.tensor([0, 3, 10])},
            r"max_seqlen_q is 6 and max_seqlen_kv is 6, but cu_seqlens_q_padded has 7 .* pass 7, the padded length",
        ),
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

"""The adapter seam, questions 1 and 3: which layer this is, and who will run it."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mla_ops
from mla_ops.adapters.seam import (
    MLALayerMeta,
    resolve_backend,
    resolve_layer_meta,
)
from mla_ops.device import DeviceTraits
from mla_ops.errors import MLAMetadataError, UnknownBackendError, UnsupportedBackendError

HUGGING_FACE = {
    "num_attention_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
MEGATRON = {
    "num_attention_heads": 4,
    "kv_lora_rank": 48,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 24,
}
META = resolve_layer_meta(HUGGING_FACE, form="absorbed")
EXPANDED = replace(META, form="expanded")


# Question 1


@pytest.mark.parametrize("config", [HUGGING_FACE, MEGATRON], ids=["hugging-face", "megatron"])
@pytest.mark.parametrize("wrap", [dict, lambda fields: SimpleNamespace(**fields)], ids=["mapping", "object"])
def test_both_naming_conventions_give_the_same_layer(config: dict[str, int], wrap: Any) -> None:
    absorbed = resolve_layer_meta(wrap(config), form="absorbed", layer=3)
    assert (absorbed.d_total, absorbed.d_v) == (56, 48)
    assert (absorbed.k_channels, absorbed.v_channels) == (24, 24)
    assert absorbed.softmax_scale == pytest.approx(24**-0.5, rel=1e-15)
    expanded = resolve_layer_meta(absorbed, form="expanded")
    assert (expanded.d_total, expanded.d_v) == (48, 24)
    assert (expanded.k_channels, expanded.v_channels) == (24, 24)
    assert (expanded.layer, expanded.source) == (3, absorbed.source)


@pytest.mark.parametrize("config", [HUGGING_FACE, MEGATRON], ids=["hugging-face", "megatron"])
def test_every_missing_field_is_named_in_one_error(config: dict[str, int]) -> None:
    names = [name for name in config if not name.startswith("qk_")]  # without them the convention is unknown
    for count in range(1, len(names) + 1):
        rest = {name: value for name, value in config.items() if name not in names[:count]}
        with pytest.raises(MLAMetadataError) as info:
            resolve_layer_meta(SimpleNamespace(**rest), form="absorbed", layer=3)
        assert info.value.missing == tuple(sorted(names[:count], key=list(config).index))
        assert "(from SimpleNamespace, layer 3): missing " + ", ".join(info.value.missing) in str(info.value)
        for name, value in rest.items():
            assert f"{name}={value}" in str(info.value)


@pytest.mark.parametrize("name", ["qk_head_dim", "qk_pos_emb_head_dim"])
def test_a_half_given_megatron_width_is_missed_under_its_megatron_name(name: str) -> None:
    with pytest.raises(MLAMetadataError) as info:
        resolve_layer_meta({**MEGATRON, name: None}, form="absorbed")
    assert info.value.missing == (name,)
    assert "k_channels = qk_head_dim + qk_pos_emb_head_dim" in str(info.value)


def test_nothing_given_misses_everything() -> None:
    with pytest.raises(MLAMetadataError, match="got none of the rest") as info:
        resolve_layer_meta({}, form="absorbed")
    assert set(info.value.missing) == set(HUGGING_FACE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": 0}, "kv_lora_rank must be an int of at least 1, got 0"),
        ({"qk_rope_head_dim": -1}, "qk_rope_head_dim must be an int of at least 0, got -1"),
        ({"v_head_dim": True}, "v_head_dim must be an int of at least 1, got True"),
        ({"num_attention_heads": "4"}, "heads must be an int of at least 1, got '4'"),
        ({"index_topk": 0}, "topk must be an int of at least 1, got 0"),
        ({"qk_head_dim": 17}, "qk_head_dim=17 contradicts qk_nope_head_dim=16 and qk_rope_head_dim=8"),
        ({"qk_pos_emb_head_dim": 4}, "qk_pos_emb_head_dim=4 contradicts qk_rope_head_dim=8"),
        (
            {"rope_scaling": {"type": "yarn", "factor": "40", "mscale_all_dim": 1.0}},
            "factor of the rope scaling must be a number, got '40'",
        ),
        ({"rotary_scaling_factor": 40, "mscale_all_dim": "1"}, "mscale_all_dim of the rope scaling must be a number"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be a mapping or an object with attributes, got 'yarn'"),
        (
            {"rope_scaling": {"factor": 40, "mscale_all_dim": 0.7}},
            "rope_scaling has mscale_all_dim=0.7 without rope_type; set it",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "mscale_all_dim": 0.7}},
            "the rope scaling has mscale_all_dim=0.7 without factor; set it",
        ),
        ({"mscale_all_dim": 0.7}, "the rope scaling has mscale_all_dim=0.7 without rotary_scaling_factor; set it"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}},
            "rope_parameters has entries of its own for full_attention, sliding_attention; pass softmax_scale",
        ),
        ({"rope_factor": 40, "max_seq_len": 64}, "rope_factor needs original_seq_len, mscale beside it, as a number"),
        (
            {"softmax_scale": 24**-0.5, "rope_parameters": {"type": "yarn", "factor": 40, "mscale_all_dim": 0.7}},
            "the source's own softmax scale is 0.204124",
        ),
        ({"scaling": math.inf}, "softmax_scale must be a finite float, got inf"),
    ],
)
def test_impossible_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAMetadataError) as info:
        resolve_layer_meta({**HUGGING_FACE, **change}, form="absorbed")
    assert message in str(info.value)
    assert len(info.value.bad) == 1


def test_bad_and_missing_fields_come_in_one_error() -> None:
    with pytest.raises(MLAMetadataError) as info:
        resolve_layer_meta({**HUGGING_FACE, "v_head_dim": None, "kv_lora_rank": -4}, form="absorbed")
    assert info.value.missing == ("v_head_dim",)
    assert info.value.bad == ("kv_lora_rank must be an int of at least 1, got -4",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "latent"}, "form must be one of 'absorbed', 'expanded', got 'latent'"),
        ({"softmax_scale": math.nan}, "softmax_scale must be a finite float, got nan"),
        ({"kv_group": 3}, "heads must be a multiple of kv_group, got 4 and 3"),
    ],
)
def test_metadata_built_by_hand_is_checked_too(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        replace(META, **change)


@pytest.mark.parametrize("both", [16, 24], ids=["as-megatron", "as-hugging-face"])
def test_qk_head_dim_beside_qk_nope_head_dim_may_follow_either_convention(both: int) -> None:
    assert resolve_layer_meta({**HUGGING_FACE, "qk_head_dim": both}, form="absorbed").k_channels == 24


@pytest.mark.parametrize(
    ("config", "mscale"),
    [
        (HUGGING_FACE, 1.0),
        ({**HUGGING_FACE, "rope_parameters": {"rope_type": "default", "factor": 40, "mscale_all_dim": 1.0}}, 1.0),
        ({**HUGGING_FACE, "rope_parameters": {"rope_type": "yarn", "factor": 40, "mscale_all_dim": 0.7}}, None),
        ({**HUGGING_FACE, "rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": 0.7}}, None),
        ({**HUGGING_FACE, "rope_parameters": {"rope_type": "yarn", "factor": 40}}, 1.0),
        ({**MEGATRON, "rotary_scaling_factor": 40, "mscale_all_dim": 0.7}, None),
        ({**MEGATRON, "rotary_scaling_factor": 40, "mscale_all_dim": 0.0}, 1.0),
        ({**MEGATRON, "rotary_scaling_factor": 1, "mscale_all_dim": 0.7}, 1.0),
        ({**HUGGING_FACE, "rope_parameters": {}}, 1.0),
        ({**HUGGING_FACE, "rope_factor": 40, "mscale": 0.7, "max_seq_len": 65, "original_seq_len": 64}, None),
        ({**HUGGING_FACE, "rope_factor": 40, "mscale": 0.7, "max_seq_len": 64, "original_seq_len": 64}, 1.0),
    ],
)
def test_scale_is_that_of_the_trained_head_with_its_rope_scaling(config: dict[str, Any], mscale: float | None) -> None:
    mscale = 0.1 * 0.7 * math.log(40) + 1 if mscale is None else mscale
    assert resolve_layer_meta(config, form="absorbed").softmax_scale == pytest.approx(mscale**2 * 24**-0.5, rel=1e-14)
    assert resolve_layer_meta(config, form="absorbed", softmax_scale=0.3).softmax_scale == 0.3


YARN = {"rope_type": "yarn", "factor": 40, "mscale_all_dim": 0.7}
YARN_SCALE = (0.1 * 0.7 * math.log(40) + 1) ** 2 * 24**-0.5


@pytest.mark.parametrize("name", ["scaling", "softmax_scale"])
@pytest.mark.parametrize("heads", ["num_heads", "n_heads"])
def test_an_attention_module_gives_its_own_heads_and_scale(name: str, heads: str) -> None:
    widths = {field: value for field, value in HUGGING_FACE.items() if field != "num_attention_heads"} | {heads: 4}
    module = SimpleNamespace(**widths, **{name: 0.3})
    meta = resolve_layer_meta(module, form="absorbed")
    assert (meta.heads, meta.softmax_scale) == (4, 0.3)
    assert resolve_layer_meta(module, form="absorbed", softmax_scale=0.2).softmax_scale == 0.2


def test_a_modules_scale_is_compared_with_its_configuration() -> None:
    config = SimpleNamespace(rope_parameters=YARN)
    derived = resolve_layer_meta(SimpleNamespace(**HUGGING_FACE, config=config), form="absorbed")
    assert derived.softmax_scale == pytest.approx(YARN_SCALE, rel=1e-14)
    own = SimpleNamespace(**HUGGING_FACE, config=config, scaling=float(torch.tensor(YARN_SCALE)))
    assert resolve_layer_meta(own, form="absorbed").softmax_scale == own.scaling
    own.scaling = 24**-0.5
    with pytest.raises(MLAMetadataError, match=r"own softmax scale is 0\.2041.* give 0\.323.*pass the one"):
        resolve_layer_meta(own, form="absorbed")
    assert resolve_layer_meta(own, form="absorbed", softmax_scale=0.3).softmax_scale == 0.3


def test_what_only_the_derivation_would_need_is_not_asked_of_a_source_with_a_scale() -> None:
    source = SimpleNamespace(**HUGGING_FACE, scaling=0.3, config=SimpleNamespace(rope_parameters="yarn"))
    assert resolve_layer_meta(source, form="absorbed").softmax_scale == 0.3


class Heterogeneous(SimpleNamespace):
    """A configuration whose `v_head_dim` is read layer by layer, as Hugging Face's are."""

    is_heterogeneous = True

    @property
    def v_head_dim(self) -> int:
        raise RuntimeError("'v_head_dim' is a per-layer attribute")


def test_the_text_half_of_a_composite_configuration_is_read() -> None:
    text = SimpleNamespace(**HUGGING_FACE)
    methodical = SimpleNamespace(get_text_config=lambda: text, num_attention_heads=2)
    for composite in (methodical, SimpleNamespace(text_config=text), {"text_config": HUGGING_FACE}):
        assert resolve_layer_meta(composite, form="absorbed").heads == 4

    def ambiguous() -> None:
        raise ValueError("Multiple valid text configs were found")

    with pytest.raises(MLAMetadataError, match="SimpleNamespace: Multiple valid text configs were found"):
        resolve_layer_meta(SimpleNamespace(get_text_config=ambiguous), form="absorbed")


def test_a_configuration_that_differs_from_layer_to_layer_is_read_for_one_layer() -> None:
    fields = {name: value for name, value in HUGGING_FACE.items() if name != "v_head_dim"}
    layers = [SimpleNamespace(**fields, v_head_dim=24), SimpleNamespace(**fields, v_head_dim=32)]
    config = Heterogeneous(**fields, per_layer_config=layers)
    assert resolve_layer_meta(config, form="absorbed", layer=1).v_head_dim == 32
    with pytest.raises(MLAMetadataError, match=r"v_head_dim of Heterogeneous cannot be read .*pass layer="):
        resolve_layer_meta(config, form="absorbed")
    with pytest.raises(MLAMetadataError, match="Heterogeneous: list index out of range"):
        resolve_layer_meta(config, form="absorbed", layer=2)


def test_tensor_parallel_layers_give_their_local_heads() -> None:
    assert resolve_layer_meta(HUGGING_FACE, form="absorbed", heads_local=2).heads == 2
    assert resolve_layer_meta(META, form="absorbed", heads_local=1).heads == 1


# Question 3


def backend(requested: str = "auto", meta: MLALayerMeta = META, **change: Any) -> Any:
    arguments = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "needs_grad": True, "topk": 100} | change
    return resolve_backend(requested, meta, **arguments)


def test_auto_names_its_choice_and_why_not_the_others() -> None:
    plan = backend()
    assert (plan.name, plan.requested) == ("eager", "auto")
    assert plan.reasons["triton"][0].startswith("device is cpu, needs CUDA")
    assert str(plan).startswith("backend 'eager' (requested 'auto')\n  triton: device is cpu")
    assert set(plan.reasons) == {"triton"}
    with pytest.raises(TypeError):
        plan.reasons["triton"] = ()


def test_a_named_backend_that_does_not_fit_raises_with_what_would() -> None:
    with pytest.raises(UnsupportedBackendError) as info:
        backend("triton", replace(META, layer=7))
    lines = str(info.value).splitlines()
    assert lines[0] == (
        "no backend can run mla::sparse_attn in layer 7 on cpu for d_total=56 d_v=48 heads=4 kv_group=1 topk=100 bf16 "
        "kv_format=dense needs_grad=True (requested 'triton')"
    )
    assert lines[1].startswith("  triton: device is cpu, needs CUDA")
    assert lines[2:] == ["  eager: fits (not requested)", "  Choose backend='eager' or backend='auto'."]


def test_auto_raises_where_nothing_fits() -> None:
    with pytest.raises(UnsupportedBackendError) as info:
        backend(kv_format="fp8")
    assert "eager: kv_format is 'fp8'" in str(info.value)
    assert "Choose" not in str(info.value)


def test_auto_keeps_to_what_it_may_choose_and_names_what_a_caller_could(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, name="H100")
    monkeypatch.setattr("mla_ops.adapters.seam.backend_plan.traits_of", lambda device: h100)
    with pytest.raises(UnsupportedBackendError) as info:
        backend(meta=EXPANDED, dtype=torch.float64)  # no fused path, and no quiet detour to the eager one
    lines = str(info.value).splitlines()
    assert "d_total=48 d_v=24 heads=4 kv_group=4" in lines[0]
    assert lines[1].startswith("  triton: dtype")
    assert lines[2].startswith("  eager: ")
    assert "fits" not in lines[2]
    assert lines[3:] == ["  Choose backend='eager'."]
    assert backend("eager", EXPANDED, dtype=torch.float64).name == "eager"


def test_a_refusal_is_caught_as_the_operators_own() -> None:
    with pytest.raises(mla_ops.UnsupportedProblemError):
        backend("triton")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(UnknownBackendError, match="got 'tilelang'"):
        backend("tilelang")
    with pytest.raises(UnknownBackendError, match="got None"):
        backend(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": -3}, "topk must be an int of at least 1, got -3"),
        ({"kv_group": 0}, "kv_group must be an int of at least 1, got 0"),
        ({"kv_group": 3}, "heads must be a multiple of kv_group, got 4 and 3"),
    ],
)
def test_an_impossible_call_has_no_backend(change: dict[str, int], message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        backend(**change)


def test_a_layer_without_topk_cannot_choose() -> None:
    with pytest.raises(MLAMetadataError, match="topk is needed to choose a backend") as info:
        backend(topk=None)
    assert info.value.missing == ("topk",)
    assert backend(meta=replace(META, topk=64), topk=None).name == "eager"

"""Question 1: what is this MLA layer? Its widths under every framework's names, and its softmax scale.

Two vocabularies meet here and must not mix: `k_channels` / `v_channels` are the expanded widths (what a head had before
absorption), `d_total` / `d_v` those of the operator's rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal, get_args

from mla_ops.errors import MLAMetadataError

Form = Literal["absorbed", "expanded"]

# Field -> its names outside, in order of preference; errors say the first. Hugging Face's `qk_head_dim` is nope +
# rope and Megatron's is nope alone, so the pair of query widths is read by one convention as a whole (see
# `_width_names`).
_COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "heads", "num_heads", "n_heads"),  # a field's own name, modules', DeepSeek's code
    "kv_lora_rank": ("kv_lora_rank",),
    "v_head_dim": ("v_head_dim",),
}
_HUGGING_FACE_WIDTHS: dict[str, tuple[str, ...]] = {
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
}
_MEGATRON_WIDTHS: dict[str, tuple[str, ...]] = {
    "qk_nope_head_dim": ("qk_head_dim",),
    "qk_rope_head_dim": ("qk_pos_emb_head_dim",),
}
_TOPK_NAMES = ("topk", "index_topk", "dsa_indexer_topk")
_SCALE_NAMES = ("softmax_scale", "scaling")


@dataclass(frozen=True, slots=True, kw_only=True)
class MLALayerMeta:
    """The facts of one MLA layer that decide shapes and scale. Raises `MLAMetadataError` on impossible values.

    `form` says which tensors the layer hands over: "absorbed" queries and latent rows, or "expanded" per-head keys and
    values, which run as zero-padded queries against rows that hold the value beside the key (exact, `v_head_dim` more
    columns to read).
    """

    heads: int  # query heads on this rank
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int  # 0 without rotary embedding
    v_head_dim: int
    softmax_scale: float  # mscale^2 / sqrt(qk_nope_head_dim + qk_rope_head_dim), never of d_total
    form: Form
    topk: int | None = None
    kv_group: int = 1  # of the absorbed form; the expanded one reads it off the key
    layer: int | None = None
    source: str = ""  # where it came from, for messages

    def __post_init__(self) -> None:
        bad = _bad_fields({field.name: getattr(self, field.name) for field in fields(self)})
        if bad:
            raise MLAMetadataError(
                f"MLA layer metadata{_origin(self.source, self.layer)}: {'; '.join(bad)}", bad=bad, source=self.source
            )

    @property
    def k_channels(self) -> int:
        """Width of an expanded query or key head, what Megatron calls `k_channels`."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def v_channels(self) -> int:
        """Width of an expanded value head, what Megatron calls `v_channels`."""
        return self.v_head_dim

    @property
    def d_total(self) -> int:
        """Width of the operator's rows in this form."""
        if self.form == "absorbed":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return self.v_head_dim + self.k_channels

    @property
    def d_v(self) -> int:
        """Value width of the operator's rows in this form."""
        return self.kv_lora_rank if self.form == "absorbed" else self.v_head_dim


def resolve_layer_meta(
    src: Any,
    *,
    form: Form,
    heads_local: int | None = None,
    softmax_scale: float | None = None,
    layer: int | None = None,
) -> MLALayerMeta:
    """Read a layer's metadata off `src`, whichever names it uses, or say at once everything that is missing or wrong.

    Args:
        src: an `MLALayerMeta`, a mapping, or an object with attributes (a model configuration, an attention module),
            in Hugging Face's names (`qk_nope_head_dim`, `qk_rope_head_dim`, ...) or Megatron's (`qk_head_dim`,
            `qk_pos_emb_head_dim`, ...). A value of None counts as missing. Of a composite configuration the text part
            is read, of one that differs from layer to layer that of `layer`.
        form: which tensors the layer will hand over.
        heads_local: query heads on this rank under tensor parallelism; default: all of them.
        softmax_scale: the layer's own scale if it has one. Default: the source's own (`scaling` of an attention
            module, or `softmax_scale`), else `mscale^2 / sqrt(nope + rope)` with the mscale of its rope scaling
            (`rope_parameters` / `rope_scaling`, also of its `config`; Megatron's `mscale_all_dim`; DeepSeek's
            `rope_factor` and `mscale`, which count beyond `original_seq_len`).
        layer: the layer's number, from 0 in Hugging Face's configurations; for messages, and see `src`.

    Raises:
        MLAMetadataError: fields are missing, impossible, or given under two names that contradict each other; the rope
            scaling is not enough to know the scale, or contradicts the source's own.
    """
    if isinstance(src, MLALayerMeta):
        return replace(
            src,
            form=form,
            heads=src.heads if heads_local is None else heads_local,
            softmax_scale=src.softmax_scale if softmax_scale is None else softmax_scale,
            layer=src.layer if layer is None else layer,
        )
    src = _part_of_layer(src, layer)
    source = type(src).__name__
    names = _COMMON_NAMES | _width_names(src)
    found: dict[str, Any] = {field: _first(src, aliases) for field, aliases in names.items()}
    if heads_local is not None:
        found["heads"] = heads_local
    missing = tuple(names[field][0] for field, value in found.items() if value is None)
    found = {field: value for field, value in found.items() if value is not None}
    found |= {"form": form, "topk": _first(src, _TOPK_NAMES)}
    own_scale = _first(src, _SCALE_NAMES) if softmax_scale is None else softmax_scale
    bad = _bad_fields(found | ({} if own_scale is None else {"softmax_scale": own_scale})) + _contradictions(src)
    if softmax_scale is None:
        mscale, unusable = _mscale(src)
        if own_scale is None:
            bad += unusable
        elif mscale is not None and not (missing or bad or unusable):
            bad += _contradicted_scale(own_scale, _scale(found, mscale))
    if missing or bad:
        raise _incomplete(source, layer, names, found, missing, bad)
    scale = _scale(found, mscale) if own_scale is None else own_scale
    return MLALayerMeta(**found, softmax_scale=scale, layer=layer, source=source)


def _part_of_layer(src: Any, layer: int | None) -> Any:
    """Return the part of a configuration that describes this layer's attention."""
    text_config = _get(src, "get_text_config")
    nested = _get(src, "text_config")
    try:
        if callable(text_config):
            src = text_config()  # itself, where it is not composite
        elif nested is not None and _get(src, "kv_lora_rank") is None:
            src = nested
        if layer is not None and _get(src, "is_heterogeneous"):
            src = src.per_layer_config[layer]
    except (ValueError, IndexError) as error:  # several text parts; no such layer
        raise MLAMetadataError(f"{type(src).__name__}: {error}", source=type(src).__name__) from error
    return src


def _width_names(src: Any) -> dict[str, tuple[str, ...]]:
    is_megatron = _get(src, "qk_nope_head_dim") is None and (
        _get(src, "qk_head_dim") is not None or _get(src, "qk_pos_emb_head_dim") is not None
    )
    return _MEGATRON_WIDTHS if is_megatron else _HUGGING_FACE_WIDTHS


def _bad_fields(values: Mapping[str, Any]) -> tuple[str, ...]:
    bad = []
    for name in ("heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "topk", "kv_group"):
        value = values.get(name, 1)
        if name == "topk" and value is None:
            continue
        least = 0 if name == "qk_rope_head_dim" else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            bad.append(f"{name} must be an int of at least {least}, got {value!r}")
    scale = values.get("softmax_scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        bad.append(f"softmax_scale must be a finite float, got {scale!r}")
    if values["form"] not in get_args(Form):
        bad.append(f"form must be one of {', '.join(map(repr, get_args(Form)))}, got {values['form']!r}")
    if not bad and values.get("heads", 1) % values.get("kv_group", 1):
        bad.append(f"heads must be a multiple of kv_group, got {values['heads']} and {values['kv_group']}")
    return tuple(bad)


def _contradictions(src: Any) -> tuple[str, ...]:
    """A source with `qk_nope_head_dim` may also carry `qk_head_dim`, in either convention, but not a third value."""
    nope, rope, both = (_get(src, name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim"))
    rope_megatron = _get(src, "qk_pos_emb_head_dim")
    bad = []
    if isinstance(nope, int) and isinstance(rope, int) and both not in (None, nope, nope + rope):
        bad.append(
            f"qk_head_dim={both} contradicts qk_nope_head_dim={nope} and qk_rope_head_dim={rope} (it is their sum in "
            "Hugging Face's names, the first in Megatron's); remove the wrong one"
        )
    if isinstance(rope, int) and rope_megatron not in (None, rope):
        bad.append(f"qk_pos_emb_head_dim={rope_megatron} contradicts qk_rope_head_dim={rope}; remove the wrong one")
    return tuple(bad)


def _scale(found: Mapping[str, Any], mscale: float | None) -> float:
    return (1.0 if mscale is None else mscale**2) / math.sqrt(found["qk_nope_head_dim"] + found["qk_rope_head_dim"])


def _contradicted_scale(own: float, derived: float) -> tuple[str, ...]:
    if math.isclose(own, derived, rel_tol=1e-6):  # a few fp32 roundings
        return ()
    return (
        f"the source's own softmax scale is {own}, and its widths and rope scaling give {derived}; pass the one that "
        "is meant as softmax_scale=",
    )


def _mscale(src: Any) -> tuple[float | None, tuple[str, ...]]:
    """Return YaRN's attention factor as the frameworks compute it, and why it can't be known.

    It is 1.0 without scaling, and None where the source says nothing of rope.
    """
    scaling, unusable = _rope_scaling(src)
    unusable += tuple(
        f"{name} of the rope scaling must be a number, got {value!r}"
        for name, value in scaling.items()
        if value is not None and not isinstance(value, Real)
    )
    if unusable or not scaling:
        return None, unusable
    (factor_name, factor), (mscale_name, mscale) = scaling.items()
    if not mscale:
        return 1.0, ()
    if factor is None:
        return None, (
            f"the rope scaling has {mscale_name}={mscale} without {factor_name}; set it, or pass softmax_scale",
        )
    return (1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0), ()


def _rope_scaling(src: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the factor and the mscale of the rope scaling under its own names, None without, and what is wrong.

    Nothing of rope gives an empty dictionary.
    """
    none: dict[str, Any] = {"factor": None, "mscale_all_dim": None}
    names = ("rope_parameters", "rope_scaling")
    owners = (src, _get(src, "config"))  # a module's own configuration
    entries = ((name, _get(owner, name)) for owner in owners for name in names)
    name, entry = next((found for found in entries if found[1] is not None), ("", None))
    if entry is None:
        return _flat_rope_scaling(src)
    if isinstance(entry, (str, Real, list, tuple)):
        return none, (f"{name} must be a mapping or an object with attributes, got {entry!r}",)
    kind, scaling = _first(entry, ("rope_type", "type")), {field: _get(entry, field) for field in none}
    if kind is None and isinstance(entry, Mapping) and any(isinstance(part, Mapping) for part in entry.values()):
        return none, (f"{name} has entries of its own for {', '.join(map(str, entry))}; pass softmax_scale",)
    if kind is None and scaling["mscale_all_dim"]:
        return none, (f"{name} has mscale_all_dim={scaling['mscale_all_dim']!r} without rope_type; set it",)
    return (none if kind in (None, "default") else scaling), ()


def _flat_rope_scaling(src: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Do the same for those who keep it beside the widths: Megatron, and DeepSeek's own code."""
    if _get(src, "rope_factor") is None:
        scaling = {name: _get(src, name) for name in ("rotary_scaling_factor", "mscale_all_dim")}
        return ({} if all(value is None for value in scaling.values()) else scaling), ()
    scaling = {name: _get(src, name) for name in ("rope_factor", "mscale")}
    lengths = {name: _get(src, name) for name in ("max_seq_len", "original_seq_len")}
    needed = lengths | {"mscale": scaling["mscale"]}
    absent = [name for name, value in needed.items() if not isinstance(value, Real)]
    if absent:
        return {}, (f"rope_factor needs {', '.join(absent)} beside it, as a number; or pass softmax_scale",)
    is_longer = lengths["max_seq_len"] > lengths["original_seq_len"]
    return (scaling if is_longer else dict.fromkeys(scaling)), ()


def _incomplete(
    source: str,
    layer: int | None,
    names: Mapping[str, tuple[str, ...]],
    found: Mapping[str, Any],
    missing: tuple[str, ...],
    bad: tuple[str, ...],
) -> MLAMetadataError:
    parts = []
    if missing:
        got = ", ".join(f"{names[field][0]}={found[field]}" for field in names if field in found) or "none of the rest"
        k_channels = " + ".join(names[field][0] for field in ("qk_nope_head_dim", "qk_rope_head_dim"))
        parts.append(
            f"missing {', '.join(missing)}; got {got}. k_channels = {k_channels} and v_channels = v_head_dim cannot be "
            "derived without them: set them on the configuration, or pass an MLALayerMeta"
        )
    parts += bad
    message = f"MLA layer metadata{_origin(source, layer)}: {'; '.join(parts)}"
    return MLAMetadataError(message, missing=missing, bad=bad, source=source)


def _origin(source: str, layer: int | None) -> str:
    parts = [f"from {source}"] * bool(source) + [f"layer {layer}"] * (layer is not None)
    return f" ({', '.join(parts)})" if parts else ""


def _first(src: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := _get(src, name)) is not None), None)


def _get(src: Any, name: str) -> Any:
    if isinstance(src, Mapping):
        return src.get(name)
    try:
        return getattr(src, name, None)
    except Exception as error:  # a configuration may refuse to be asked, where layers differ for instance
        source = type(src).__name__
        raise MLAMetadataError(
            f"{name} of {source} cannot be read ({type(error).__name__}: {error}); if it differs from layer to layer, "
            "pass layer=",
            source=source,
        ) from error

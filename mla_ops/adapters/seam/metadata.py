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

# Field -> its names outside, in order of preference. Hugging Face's `qk_head_dim` is nope + rope and Megatron's is nope
# alone, so the pair of query widths is read by one convention as a whole (see `_width_names`).
_COMMON_NAMES: dict[str, tuple[str, ...]] = {
    "heads": ("heads", "num_attention_heads"),
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
        src: an `MLALayerMeta`, a mapping, or an object with attributes (a model configuration), in Hugging Face's
            names (`qk_nope_head_dim`, `qk_rope_head_dim`, ...) or Megatron's (`qk_head_dim`, `qk_pos_emb_head_dim`,
            ...). A value of None counts as missing.
        form: which tensors the layer will hand over.
        heads_local: query heads on this rank under tensor parallelism; default: all of them.
        softmax_scale: the layer's own scale if it has one. Default: `mscale^2 / sqrt(nope + rope)`, with the mscale of
            the source's rope scaling (`rope_parameters` / `rope_scaling`, or Megatron's `mscale_all_dim`).
        layer: the layer's number, for messages.

    Raises:
        MLAMetadataError: fields are missing, impossible, or given under two names that contradict each other.
    """
    if isinstance(src, MLALayerMeta):
        return replace(
            src,
            form=form,
            heads=src.heads if heads_local is None else heads_local,
            softmax_scale=src.softmax_scale if softmax_scale is None else softmax_scale,
            layer=src.layer if layer is None else layer,
        )
    source = type(src).__name__
    names = _COMMON_NAMES | _width_names(src)
    found: dict[str, Any] = {field: _first(src, aliases) for field, aliases in names.items()}
    if heads_local is not None:
        found["heads"] = heads_local
    missing = tuple(names[field][-1] for field, value in found.items() if value is None)
    found = {field: value for field, value in found.items() if value is not None}
    found |= {"form": form, "topk": _first(src, _TOPK_NAMES)}
    bad = _bad_fields(found | ({} if softmax_scale is None else {"softmax_scale": softmax_scale}))
    bad += _contradictions(src) + (() if softmax_scale is not None else _bad_rope_scaling(src))
    if missing or bad:
        raise _incomplete(source, layer, names, found, missing, bad)
    if softmax_scale is None:
        width = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
        softmax_scale = _mscale(src) ** 2 / math.sqrt(width)
    return MLALayerMeta(**found, softmax_scale=softmax_scale, layer=layer, source=source)


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


def _rope_scaling(src: Any) -> dict[str, Any]:
    """The factor and the mscale of the source's rope scaling, in this order, under its own names; None without."""
    rope = _first(src, ("rope_parameters", "rope_scaling"))
    if rope is None:
        return {name: _get(src, name) for name in ("rotary_scaling_factor", "mscale_all_dim")}
    if _first(rope, ("rope_type", "type")) in (None, "default"):
        return {"factor": None, "mscale_all_dim": None}
    return {name: _get(rope, name) for name in ("factor", "mscale_all_dim")}


def _bad_rope_scaling(src: Any) -> tuple[str, ...]:
    return tuple(
        f"{name} of the rope scaling must be a number, got {value!r}"
        for name, value in _rope_scaling(src).items()
        if value is not None and not isinstance(value, Real)
    )


def _mscale(src: Any) -> float:
    """The attention factor of YaRN, as the frameworks compute it from their own configuration; 1.0 without scaling."""
    factor, mscale = _rope_scaling(src).values()
    if not mscale or factor is None or factor <= 1:
        return 1.0
    return float(0.1 * mscale * math.log(factor) + 1.0)


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
        got = ", ".join(f"{names[field][-1]}={found[field]}" for field in names if field in found) or "none of the rest"
        k_channels = " + ".join(names[field][-1] for field in ("qk_nope_head_dim", "qk_rope_head_dim"))
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
    return src.get(name) if isinstance(src, Mapping) else getattr(src, name, None)

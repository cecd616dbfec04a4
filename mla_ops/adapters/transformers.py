"""Hugging Face transformers: DeepSeek-Sparse-Attention models run on the operator, in the latent space, without a fork.

These models hand the indices of their own indexer to any attention function that is neither "eager" nor "sdpa", so a
registered function is the whole plug. What it gets are expanded heads; `attach` makes the layers hand over the latent
rows instead, and write them into their cache. The layers, their indexers, caches and weights stay the framework's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mla_ops.adapters.extras import Undo, import_extra, warn_if_untested
from mla_ops.adapters.seam import (
    BackendPlan,
    Form,
    MLALayerMeta,
    normalize_call,
    resolve_backend,
    resolve_layer_meta,
)
from mla_ops.adapters.torch_layer import absorb_q, project_v
from mla_ops.adapters.transformers_cache import (
    CacheBytes,
    CacheFormat,
    RowsCache,
    bytes_per_token,
    check_format,
    holds_bytes,
    join,
    split_rows,
)
from mla_ops.api import sparse_attn, sparse_attn_paged
from mla_ops.errors import MLALayoutError, MLAMetadataError, UnsupportedFeatureError
from mla_ops.wrappers import is_dtensor, is_wrapper

ATTN_IMPLEMENTATION = "mla_sparse"
TESTED_VERSIONS = ("5.23", "5.24")
_FEATURE = "mla_ops.adapters.transformers"
_LAYER = "_mla_ops_layer"  # the attribute that `attach` adds to an attention module

# What models pass to every attention function, and why nothing is lost here.
_HARMLESS = {
    "use_cache": "the cache was updated before",
    "cache_position": "the cache was updated before, and the mask was made for its rows",
    "position_ids": "rotary embedding was applied before, and the mask separates the sequences they pack",
    "num_items_in_batch": "the loss's",
    "output_hidden_states": "collected around the layers",
    "output_router_logits": "collected around the routers",
}
_REFUSED = {
    "output_attentions": "attention weights never exist here; use attn_implementation='eager' to look at them",
    "sliding_window": "a window is no selection of keys, and there are no indices for it",
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
        "these models separate packed sequences by their mask, made from position_ids; pass those alone",
    ),
}
_OWN_FORWARD = "a forward of its own"
# What layers call the cache they are given, in transformers 5.24 and before.
_CACHE_NAMES = ("cache", "past_key_values")
# What a module may run beside its weight, none of it when the weight alone is read.
_BESIDE_WEIGHT = (
    ("forward", _OWN_FORWARD),
    ("_forward_hooks", "forward hooks"),
    ("_forward_pre_hooks", "forward pre-hooks"),
    ("_backward_hooks", "backward hooks"),
    ("_backward_pre_hooks", "backward pre-hooks"),
)


@dataclass(frozen=True)
class _AttachedLayer:
    meta: MLALayerMeta
    backend: str
    cache_format: CacheFormat

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.meta, self.backend, self.cache_format)


def _unpickled(meta: MLALayerMeta, backend: str, cache_format: CacheFormat) -> _AttachedLayer:
    register()  # the process that loads an attached model may never have attached one
    return _AttachedLayer(meta, backend, cache_format)


class Attachment(Undo):
    """What `attach` changed, and the way back."""

    def __init__(self, plan: BackendPlan, cache_bytes: CacheBytes, steps: ExitStack) -> None:
        super().__init__(steps)
        # Who runs the first layer on the device and in the dtype it had, and why not the others.
        self.plan = plan
        # What generation stores for a token, over all layers.
        self.cache_bytes = cache_bytes


def register() -> None:
    """Make `attn_implementation="mla_sparse"` known to transformers, with the mask it needs.

    `attach` does it too. By itself it serves models that are constructed or loaded under that name and attached later.
    A second time changes nothing.

    Raises:
        MissingExtraError: transformers cannot be imported.
    """
    hub = _import("transformers")
    warn_if_untested("transformers", TESTED_VERSIONS)
    hub.AttentionInterface.register(ATTN_IMPLEMENTATION, _attention_forward)
    # Boolean, and the causal structure alone: the indexers need it whatever the attention function.
    hub.AttentionMaskInterface.register(ATTN_IMPLEMENTATION, _import("transformers.masking_utils").sdpa_mask)


def attach(
    model: nn.Module, *, form: Form = "absorbed", backend: str = "auto", cache_format: CacheFormat = "dense"
) -> Attachment:
    """Run the attention of a DeepSeek-Sparse-Attention model on the operator. Checks first, then changes.

    Args:
        model: a transformers model whose attention layers have an indexer (DeepseekV32, GlmMoeDsa, AXK2, HYV4,
            MistralLarge4), or a module around one; also one that `fully_shard` has sharded, or whose layers
            `device_map` has spread over devices. Nothing but its attention implementation, its layers' `expand_kv` and
            what they write into a cache changes, all undone by the handle; setting another `attn_implementation` in
            between works as ever.
        form: "absorbed" keeps keys and values latent and reads the weight of `kv_b_proj`. "expanded" takes the keys
            and values that the model makes of them: exact too, for a `kv_b_proj` that is not a plain linear layer
            (quantised, or under LoRA), at the price of every head's keys and values.
        backend: which backend runs the operator; a named one never falls back.
        cache_format: how generation stores latent rows, in any DynamicCache or StaticCache. "dense": as they are,
            `d_total` channels a token. "fp8": all but the rope part in e4m3 with a power-of-two scale for each 128
            channels; "fp8_all": the rope part too. Both are read as they are by `mla::sparse_attn_paged`, without
            gradients. The expanded form leaves dense rows to the framework, which stores them in two tensors.

    Returns:
        The way back, with the plan (`plan`) and what is stored for a token (`cache_bytes`).

    Raises:
        MissingExtraError: transformers cannot be imported.
        MLAMetadataError: `model` is no model, has no such layers, or is attached already.
        UnsupportedFeatureError: its layers or its configuration ask for what the operator does not do.
        UnsupportedBackendError: no backend runs a layer's widths on its device in its dtype, or not the named one.
    """
    if not isinstance(model, nn.Module):
        raise MLAMetadataError(
            f"model must be an nn.Module, got {type(model).__name__}; load it first, with from_pretrained for instance",
            source=type(model).__name__,
        )
    register()
    layers = _indexed_layers(model)
    owner = _owner(model, layers)
    metas = [_meta(layer, form) for layer in layers.values()]
    is_gathered = _is_fully_sharded(model)
    for (name, layer), meta in zip(layers.items(), metas, strict=True):
        if hasattr(layer, _LAYER):
            source = type(model).__name__
            raise MLAMetadataError(f"{name} of {source} is attached already; undo that first", source=source)
        _check_layer(name, layer, meta, is_gathered)
    check_format(cache_format, next(iter(layers.values())).o_proj.weight.dtype)
    needs_grad = any(parameter.requires_grad for parameter in model.parameters())
    plan = _plan(backend, layers.values(), metas, needs_grad)
    stored = bytes_per_token(layers.values(), metas, cache_format)

    with ExitStack() as undo:
        for layer, meta in zip(layers.values(), metas, strict=True):
            setattr(layer, _LAYER, _AttachedLayer(meta, backend, cache_format))
            undo.callback(delattr, layer, _LAYER)
            if form == "absorbed" or cache_format != "dense":
                # No bound method: it would be pickled as the name of a method that the layer's class does not have.
                layer.expand_kv = partial(_expand_kv, layer)
                undo.callback(delattr, layer, "expand_kv")
                undo.callback(layer.register_forward_pre_hook(_write_rows, with_kwargs=True).remove)
        undo.callback(owner.set_attn_implementation, owner.config._attn_implementation)
        owner.set_attn_implementation(ATTN_IMPLEMENTATION)
        if owner.config._attn_implementation != ATTN_IMPLEMENTATION:  # for some models transformers only logs that
            raise UnsupportedFeatureError(f"{type(owner).__name__} does not let its attention implementation be set")
        return Attachment(plan, stored, undo.pop_all())


def cache_bytes(model: nn.Module, cache_format: CacheFormat = "dense") -> CacheBytes:
    """Say what generation with this model stores for a token, without attaching it; a model on the meta device will do.

    Args:
        model: as for `attach`.
        cache_format: as for `attach`.

    Raises:
        MLAMetadataError: `model` has no layers that `attach` would take.
        UnsupportedFeatureError: there is no such format, or not for the model's dtype.
    """
    layers = _indexed_layers(model).values()
    check_format(cache_format, next(iter(layers)).o_proj.weight.dtype)
    return bytes_per_token(layers, [_meta(layer, "absorbed") for layer in layers], cache_format)


def _import(module: str) -> Any:
    return import_extra(module, feature=_FEATURE, package="transformers", extra="transformers")


def _plan(backend: str, layers: Iterable[Any], metas: Iterable[MLALayerMeta], needs_grad: bool) -> BackendPlan:
    """Return the plan of the first layer; each layer gets one, because widths and devices differ between layers."""
    plans: dict[Any, BackendPlan] = {}
    for layer, meta in zip(layers, metas, strict=True):
        weight, topk = layer.o_proj.weight, layer.config.index_topk
        # A problem is asked for once, whatever the number of its layers.
        device = _device(layer)
        problem = (replace(meta, layer=None), topk, device, weight.dtype)
        if problem not in plans:
            plans[problem] = resolve_backend(
                backend, meta, device=device, dtype=weight.dtype, needs_grad=needs_grad, topk=topk
            )
    return next(iter(plans.values()))


def _device(layer: Any) -> torch.device:
    """Where the layer runs: not where its weight is, if accelerate loads an offloaded one for each call."""
    hook = vars(layer.o_proj).get("_hf_hook")
    device: torch.device = layer.o_proj.weight.device
    return torch.device(hook.execution_device) if device.type == "meta" and hook is not None else device


def _indexed_layers(model: nn.Module) -> dict[str, Any]:
    """Return the model's MLA layers by name; all of them select keys, or the model is refused."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "kv_b_proj")}
    model_name = type(model).__name__
    if not layers:
        raise MLAMetadataError(f"{model_name} has no MLA layer: no module with a kv_b_proj", source=model_name)
    for name, layer in layers.items():
        missing = tuple(part for part in ("indexer", "expand_kv") if not hasattr(layer, part))
        if missing:
            raise MLAMetadataError(
                f"{name} of {model_name} is a {type(layer).__name__} without {' and '.join(missing)}: it selects no "
                "keys, so there are no indices to attend to; keep its dense attention",
                missing=missing,
                source=model_name,
            )
        if not _hands_over_indices(type(layer)):
            raise MLAMetadataError(
                f"{name} of {model_name} is a {type(layer).__name__}, whose forward hands no indices to its attention "
                "function: it turns them into a mask first; keep its eager or sdpa attention",
                missing=("indices",),
                source=model_name,
            )
    return layers


def _hands_over_indices(layer: type) -> bool:
    """Whether a forward of this class, or of one it derives from, has the keyword `indices`.

    Nothing that a layer declares says so. Python keeps a call's keywords among the function's constants, one by one or
    in a tuple.
    """
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in layer.__mro__ if "forward" in vars(cls)]
    constants = [const for forward in forwards if inspect.isfunction(forward) for const in forward.__code__.co_consts]
    return any("indices" in (constant if isinstance(constant, tuple) else (constant,)) for constant in constants)


def _owner(model: nn.Module, layers: dict[str, Any]) -> Any:
    """Return the outermost pretrained model that shares its layers' configuration: it sets their implementation."""
    config = next(iter(layers.values())).config
    base = _import("transformers").PreTrainedModel
    owner = next((sub for sub in model.modules() if isinstance(sub, base) and sub.config is config), None)
    if owner is None:
        raise MLAMetadataError(f"no PreTrainedModel in {type(model).__name__} holds the layers' configuration")
    return owner


def _meta(layer: Any, form: Form) -> MLALayerMeta:
    # Off the layer, not its configuration, which need not be the same for all layers.
    return resolve_layer_meta(
        layer, form=form, heads_local=layer.num_heads, softmax_scale=layer.scaling, layer=layer.layer_idx
    )


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been here: a weight that is a shard now is whole whenever the layer runs.

    By name, because asking must not import torch.distributed.
    """
    return any(cls.__name__ == "FSDPModule" for module in model.modules() for cls in type(module).__mro__)


def _check_layer(name: str, layer: Any, meta: MLALayerMeta, is_gathered: bool) -> None:
    problems = []
    if getattr(layer, "sliding_window", None) is not None:
        problems.append(f"sliding_window={layer.sliding_window}: {_REFUSED['sliding_window']}")
    if layer.config.output_attentions:
        problems.append(f"config.output_attentions: {_REFUSED['output_attentions']}")
    if layer.training and layer.attention_dropout:
        problems.append(_dropout(layer.attention_dropout))
    if meta.form == "absorbed":
        problems += _not_absorbable(layer, meta, is_gathered)
    if problems:
        raise UnsupportedFeatureError(f"{name} ({type(layer).__name__}): {'; '.join(problems)}")


def _dropout(probability: float) -> str:
    return f"attention dropout of {probability} in training: the operator has none; set attention_dropout to 0"


def _not_absorbable(layer: Any, meta: MLALayerMeta, is_gathered: bool = False) -> list[str]:
    """Say why the weight of `kv_b_proj` alone is not the up-projection: its `forward` does something else.

    With `is_gathered` a DTensor is taken too, for the whole weight that it will be when the layer runs.
    """
    linear = layer.kv_b_proj
    other = "resolve that, or attach with form='expanded'"
    biased = getattr(linear, "bias", None) is not None
    if type(linear) is not nn.Linear or biased:
        got = f"{type(linear).__module__}.{type(linear).__qualname__}" + " with one" * biased
        return [f"kv_b_proj must be an nn.Linear without bias to be absorbed, got {got}; {other}"]
    weight = linear.weight
    shape = (meta.heads * (meta.qk_nope_head_dim + meta.v_head_dim), meta.kv_lora_rank)
    # Under functional_call, FSDP1 or an export the weight is a tensor and no parameter.
    is_plain = is_gathered if is_dtensor(weight) else not is_wrapper(type(weight))
    if not is_plain or weight.shape != shape or weight.is_meta or not weight.is_floating_point():
        got = f"{type(weight).__name__} {list(weight.shape)} {weight.dtype} on {weight.device}"
        return [
            f"kv_b_proj.weight must be a plain floating-point parameter {list(shape)}, got {got}; {other} "
            "(a model for FSDP1 is attached before it is wrapped)"
        ]
    added = [what for attribute, what in _BESIDE_WEIGHT if vars(linear).get(attribute)]
    if _only_moves_inputs(linear):
        added.remove(_OWN_FORWARD)
    if added:
        return [f"kv_b_proj must compute nothing beside its weight to be absorbed, got {', '.join(added)}; {other}"]
    return []


def _only_moves_inputs(linear: nn.Linear) -> bool:
    """Whether the module's replaced `forward` is that of accelerate, which brings inputs to the weight's device.

    Under a `device_map` every module has one. It matters where it also loads an offloaded weight.
    """
    hook: Any = vars(linear).get("_hf_hook")
    if type(hook).__name__ != "AlignDevicesHook" or hook.offload:
        return False
    own = vars(linear).get("_old_forward")
    is_its_own = getattr(vars(linear).get("forward"), "__wrapped__", None) is own
    return is_its_own and getattr(own, "__func__", None) is nn.Linear.forward


def _write_rows(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the layer write rows into its cache; a forward pre-hook."""
    attached: _AttachedLayer = getattr(layer, _LAYER)
    for name in _CACHE_NAMES:
        if kwargs.get(name) is not None:
            kwargs = kwargs | {name: RowsCache(kwargs[name], attached.meta.kv_lora_rank, attached.cache_format)}
    return args, kwargs


def _expand_kv(layer: Any, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for `expand_kv`: hand on the rows `[B, 1, T, kv_lora_rank + rope]` instead of every head's.

    Args:
        layer: the attention layer.
        latent: `[B, 1, T, kv_lora_rank]`, or what a `RowsCache` returned: rows or their bytes.
        rope: `[B, 1, T, qk_rope_head_dim]`, or without channels.
    """
    attached: _AttachedLayer = getattr(layer, _LAYER)
    if attached.meta.form == "expanded" or layer.config._attn_implementation != ATTN_IMPLEMENTATION:
        parts = split_rows(latent, rope, attached.meta, attached.cache_format)
        expanded: tuple[torch.Tensor, torch.Tensor] = type(layer).expand_kv(layer, *parts)
        return expanded
    rows = join(latent, rope)
    return rows, rows


def _attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    indices: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend; the signature is transformers'.

    Args:
        module: the attention layer.
        query: `[B, H, S, nope + rope]`.
        key: `[B, 1, T, kv_lora_rank + rope]` absorbed, or bytes of such rows; `[B, H, T, nope + rope]` expanded.
        value: `[B, H, T, v_head_dim]` expanded; not read in the absorbed form, where the key holds it.
        attention_mask: `[B, 1, S, T]`, bool or additive: the causal structure, not the selection.
        scaling: multiplies the logits.
        dropout: must be 0.
        indices: `[B, S, topk]`; future and padded rows among them are masked out.
        s_aux: `[H]`, attention sinks.
        kwargs: what else the model passes to any attention function; see `_HARMLESS` and `_REFUSED`.

    Returns:
        `[B, S, H, v_head_dim]`, and no attention weights.
    """
    attached = getattr(module, _LAYER, None)
    if attached is None:
        raise MLAMetadataError(
            f"{type(module).__name__} runs under attn_implementation={ATTN_IMPLEMENTATION!r} without being attached; "
            f"call {_FEATURE}.attach(model)"
        )
    meta = attached.meta
    _check_request(module, dropout, kwargs)
    if indices is None or attention_mask is None:
        missing = " and ".join(n for n, t in (("indices", indices), ("attention_mask", attention_mask)) if t is None)
        raise MLALayoutError(
            f"{type(module).__name__} called its attention function without {missing}; both are needed"
        )

    q, keys = query.transpose(1, 2), key.transpose(1, 2)
    values = w_uv = pages = None
    if meta.form == "absorbed":
        if problems := _not_absorbable(module, meta):
            raise UnsupportedFeatureError(f"{type(module).__name__}: {'; '.join(problems)}")
        w_uk, w_uv = _up_projections(module, meta)
        q_nope, q_rope = q.split([meta.qk_nope_head_dim, meta.qk_rope_head_dim], dim=-1)
        q = absorb_q(q_nope, q_rope, w_uk)
        if holds_bytes(keys):
            # Bytes are the operator's to check; what is asked of a key here is the shape of its rows.
            pages, keys = keys, keys[..., :1].expand(*keys.shape[:-1], meta.d_total)
    else:
        values = value.transpose(1, 2)
    call = normalize_call(
        q,
        keys,
        values,
        indices,
        meta=meta,
        layout="bshd",
        invalid="mask",
        mask=attention_mask,
        # The indexer's own choice is in range, so nothing is read on the host; only a caller's additive mask can hold
        # what indices cannot say.
        check=attention_mask.dtype != torch.bool,
    )
    asked: dict[str, Any] = {
        "d_v": call.d_v,
        "softmax_scale": scaling,
        "attn_sink": None if s_aux is None else s_aux.float(),
        "backend": attached.backend,
    }
    if pages is None:
        out, _ = sparse_attn(call.q, call.kv, call.indices, **asked)
    else:
        # A sequence of the batch is a page of its own, so positions in it stay what the indexer chose.
        table = torch.arange(pages.shape[0], device=pages.device, dtype=torch.int32).unsqueeze(1)
        out, _ = sparse_attn_paged(
            call.q, pages, call.indices, row_format=attached.cache_format, block_table=table, **asked
        )
    out = call.restore(out)
    return (out if w_uv is None else project_v(out, w_uv)), None


def _check_request(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    problems = [_dropout(dropout)] if dropout else []
    for name, value in kwargs.items():
        if value is None or name in _HARMLESS or (name == "output_attentions" and not value):
            continue
        reason = _REFUSED.get(name, "unknown here, and an argument that nobody reads would be dropped in silence")
        problems.append(f"{name}: {reason}")
    if problems:
        raise UnsupportedFeatureError(f"{type(module).__name__}: {'; '.join(problems)}")


def _up_projections(module: Any, meta: MLALayerMeta) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W_UK `[heads, nope, kv_lora_rank]` and W_UV `[heads, v_head_dim, kv_lora_rank]`, views of one weight."""
    per_head = module.kv_b_proj.weight.unflatten(0, (meta.heads, -1))
    w_uk, w_uv = per_head.split([meta.qk_nope_head_dim, meta.v_head_dim], dim=1)
    return w_uk, w_uv

"""Megatron-Core: sparse MLA inside its layers, and behind its DeepSeek sparse attention.

Three ways in, none of which forks or patches Megatron at import:

- `adapt_spec` puts `SparseMLACoreAttention` into a layer's specification;
- `enable_dsa_backend` runs the operator where Megatron's absorbed sparse attention asks for a fused kernel;
- `capabilities` says which of them the installed version has room for.

Communication stays Megatron's: context parallelism is refused, and indexers are its own or the caller's.
"""

from __future__ import annotations

import copyreg
import importlib.util
import inspect
from abc import ABCMeta
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from mla_ops.adapters.extras import Undo, import_extra, warn_if_untested
from mla_ops.adapters.megatron.core_attention import (
    IndexFn,
    SparseMLACoreAttention,
    check_table,
    packed_seq,
)
from mla_ops.adapters.seam import InvalidSlots, MLALayerMeta, normalize_call, plan_positions
from mla_ops.api import sparse_attn
from mla_ops.errors import MLALayoutError, MLAMetadataError, UnsupportedBackendError

__all__ = [
    "IndexFn",
    "MegatronCapabilities",
    "SparseMLACoreAttention",
    "adapt_spec",
    "capabilities",
    "enable_dsa_backend",
    "run_fused_absorbed_sparse_attention",
]

TESTED_VERSIONS = ("0.16.1", "0.19")

_DSA = "megatron.core.transformer.experimental_attention_variant"
_TABLE = "_BACKEND_MODULE_NAME_BY_BACKEND"  # in its dsa_kernels; private, so `capabilities` looks for it
_BACKEND_NAME = "mla_ops"
_enabled: list[_Enabled] = []  # what `enable_dsa_backend` did and nobody has undone, in this order


@dataclass(eq=False)
class _Enabled:
    config: Any
    previous: str  # its `dsa_kernel_backend` without this


@dataclass(frozen=True, slots=True)
class MegatronCapabilities:
    """What the installed Megatron-Core has, as far as this adapter is concerned."""

    version: str
    tested: bool
    absorbed: bool  # AbsorbedMLASelfAttention: latent rows reach the core attention
    dsa_hook: bool  # `enable_dsa_backend` has something to hook into
    pp_layer_offset: bool  # its MLA layers take the pipeline offset; where not, `adapt_spec` drops it
    # How its own sparse attention marks unusable slots: "mask" when its indices name later rows too.
    index_policy: InvalidSlots


def capabilities() -> MegatronCapabilities:
    """Say what the installed Megatron-Core offers; warns, once a process, about an untested version.

    Raises:
        MissingExtraError: there is none, or it cannot be imported.
    """
    attention = _import("megatron.core.transformer.multi_latent_attention").MLASelfAttention
    version = warn_if_untested("megatron-core", TESTED_VERSIONS)
    has_hook = _has(f"{_DSA}.dsa_kernels") and hasattr(_import(f"{_DSA}.dsa_kernels"), _TABLE)
    return MegatronCapabilities(
        version=version,
        tested=any(f"{version}.".startswith(f"{tested}.") for tested in TESTED_VERSIONS),
        absorbed=_has(f"{_DSA}.absorbed_mla"),
        dsa_hook=has_hook,
        pp_layer_offset=_takes(attention, "pp_layer_offset"),
        index_policy="sentinel" if has_hook else "mask",
    )


def adapt_spec(
    spec: Any,
    *,
    index_fn: IndexFn | None = None,
    max_dense_rows: int = 4096,
    backend: str = "auto",
    check_indices: bool = True,
) -> Any:
    """Return a copy of the specification of MLA layers that attend sparsely through the operator.

    A layer built from it takes the place of the stock one, with its parameters and checkpoints. It also drops the
    `rotary_pos_emb` that generic builders hand every layer (MLA makes its own), takes a `pp_layer_offset` whether or
    not its class does, and refuses broken packed sequences before anything is rotated.

    Args:
        spec: a `ModuleSpec` of a transformer layer, of its MLA self-attention, or a block of such layers
            (`TransformerBlockSubmodules`, or a `ModuleSpec` of one), from any of Megatron's spec functions; not
            changed.
        index_fn: which keys each query reads; None is every earlier one. One serves all layers built from the copy.
        max_dense_rows: the longest sequence for which `index_fn` may be None.
        backend: which backend runs the operator; a named one never falls back.
        check_indices: in eager, raise on what `index_fn` and the packed sequence get wrong; it reads them on the host.

    Raises:
        MLAMetadataError: `spec` is not that of MLA layers, or has parameters their attention does not take.
        MissingExtraError: Megatron-Core cannot be imported.
    """
    module_spec = _import("megatron.core.transformer.spec_utils").ModuleSpec
    warn_if_untested("megatron-core", TESTED_VERSIONS)
    params = {
        "index_fn": index_fn,
        "max_dense_rows": max_dense_rows,
        "backend": backend,
        "check_indices": check_indices,
    }
    return _adapt(spec, module_spec(module=SparseMLACoreAttention, params=params), "")


def _adapt(spec: Any, core: Any, where: str) -> Any:
    """Return a copy of `spec`, found at `where` in the caller's, that has `core` in each of its attentions."""
    if getattr(spec, "layer_specs", None) is not None:
        layers = [_adapt(layer, core, f"{where}.layer_specs[{i}]") for i, layer in enumerate(spec.layer_specs)]
        return replace(spec, layer_specs=layers)
    parts: Any = getattr(spec, "submodules", None)
    if getattr(parts, "layer_specs", None) is not None:
        return replace(spec, submodules=_adapt(parts, core, f"{where}.submodules"))
    if hasattr(parts, "self_attention"):
        attention = _adapt(parts.self_attention, core, f"{where}.submodules.self_attention")
        return replace(spec, submodules=replace(parts, self_attention=attention))
    return _adapt_attention(spec, core, where)


def _adapt_attention(spec: Any, core: Any, where: str) -> Any:
    parts: Any = getattr(spec, "submodules", None)
    if not hasattr(parts, "linear_kv_down_proj") or not isinstance(spec.module, type):
        module = getattr(spec, "module", None)
        of = f" of {getattr(module, '__name__', module)}" if module is not None else ""
        raise MLAMetadataError(
            "spec must be a ModuleSpec of a transformer layer with MLA self-attention, of that attention, or a block "
            f"of such layers, got {type(spec).__name__}{of}{f' at spec{where}' * bool(where)}; build it with "
            "multi_latent_attention=True"
        )
    bad = [name for name in spec.params if name != "pp_layer_offset" and not _takes(spec.module, name)]
    if bad:
        raise MLAMetadataError(
            f"{spec.module.__name__} takes no {', '.join(bad)}, found in the params of its spec; remove them",
            bad=tuple(bad),
        )
    return replace(
        spec,
        module=_adapted(spec.module),
        params=dict(spec.params),
        submodules=replace(parts, core_attention=core),
    )


class _Adapted(nn.Module):
    """What an adapted attention does before Megatron's own; mixed in ahead of its class."""

    takes_pp_layer_offset: bool

    def __init__(self, *args: Any, pp_layer_offset: int | None = None, **kwargs: Any) -> None:
        if self.takes_pp_layer_offset:
            kwargs["pp_layer_offset"] = pp_layer_offset
        super().__init__(*args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        rotary_pos_emb: object = None,
        packed_seq_params: Any = None,
        **others: Any,
    ) -> Any:
        """Run the layer without `rotary_pos_emb`, which MLA makes itself; `hidden_states` is `[s, b, hidden_size]`."""
        packed = packed_seq(packed_seq_params)
        if packed is not None:
            core: Any = self.core_attention
            config = core.config
            shards = config.tensor_model_parallel_size if config.sequence_parallel else 1
            plan_positions(
                core.meta,
                "thd",
                hidden_states.shape[0] * shards,
                packed,
                batch=hidden_states.shape[1],
                check=core.check_indices,
            )
            if core.check_indices:
                check_table(packed)
        return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **others)


class _AdaptedType(ABCMeta):
    """The class of the classes that `_adapted` makes, so that pickle makes them again: no module has them by name."""


def _reduce(made: _AdaptedType) -> tuple[Any, ...]:
    return _adapted, (made.__bases__[1],)


copyreg.pickle(_AdaptedType, _reduce)


@cache
def _adapted(attention: type[nn.Module]) -> type[nn.Module]:
    if issubclass(attention, _Adapted):
        return attention
    namespace = {"takes_pp_layer_offset": _takes(attention, "pp_layer_offset"), "__module__": __name__}
    made = _AdaptedType(f"Adapted{attention.__name__}", (_Adapted, attention), namespace)
    return cast("type[nn.Module]", made)


def enable_dsa_backend(config: Any) -> Undo:
    """Run the operator where Megatron's absorbed sparse attention asks for a fused kernel, for any widths.

    Megatron's own kernels decline everything but 576/512 in bf16 with `topk % 64 == 0`, and it then falls to a dense
    path in silence. This one never declines: what no backend runs, raises. The indexer and its loss stay Megatron's.

    Megatron offers no public place for this, so a private table gets an entry; do it after the configuration is
    constructed, which would refuse the name, and before the model runs. Layers whose attention is not absorbed never
    ask for a kernel: give those `adapt_spec`.

    Args:
        config: the `MLATransformerConfig` that the layers share; its `dsa_kernel_backend` changes until undone.

    Returns:
        The handle to undo it, also a context manager.

    Raises:
        UnsupportedBackendError: this version has no such place, or `config` tells Megatron not to ask.
        MLAMetadataError: `config` is no such configuration.
        MissingExtraError: Megatron-Core cannot be imported.
    """
    offered = capabilities()
    if not offered.dsa_hook:
        raise UnsupportedBackendError(
            f"megatron-core {offered.version} has no place for a sparse attention kernel (0.19 does, on Python 3.12): "
            "its sparse attention is dense with a mask; use adapt_spec with an index_fn"
        )
    if not hasattr(config, "dsa_kernel_backend"):
        raise MLAMetadataError(f"config must be the MLATransformerConfig of the layers, got {type(config).__name__}")
    if getattr(config.attention_backend, "name", config.attention_backend) == "unfused":
        raise UnsupportedBackendError(
            "attention_backend is 'unfused', with which Megatron runs its dense path and asks for no kernel; set it to "
            "AttnBackend.auto"
        )
    table = getattr(_import(f"{_DSA}.dsa_kernels"), _TABLE)
    enabled = _Enabled(config, config.dsa_kernel_backend)
    _enabled.append(enabled)
    table[_BACKEND_NAME] = __name__
    config.dsa_kernel_backend = _BACKEND_NAME
    undo = ExitStack()
    undo.callback(_disable, enabled, table)
    return Undo(undo)


def _disable(enabled: _Enabled, table: dict[str, str]) -> None:
    later = [other for other in _enabled[_enabled.index(enabled) + 1 :] if other.config is enabled.config]
    if later:  # what it found was this one's doing
        later[0].previous = enabled.previous
    else:
        enabled.config.dsa_kernel_backend = enabled.previous
    _enabled.remove(enabled)
    if not _enabled:  # the table serves all configurations
        del table[_BACKEND_NAME]


def run_fused_absorbed_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    topk_indices: torch.Tensor,
    softmax_scale: float,
    v_channels: int,
    topk_length: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to latent rows: the function Megatron looks up by this name in a kernel module.

    Args:
        query: `[s, b, heads, d_total]`, absorbed; packed rows come as `[t, 1, heads, d_total]`.
        key: `[t, b, 1, d_total]`, latent rows.
        topk_indices: `[b, s, topk]`, integers in any order; whatever names no row of `key` is no key.
        softmax_scale: multiplies the logits.
        v_channels: width of the value, `kv_lora_rank`.
        topk_length: `[b, s]`; only the first slots of a row count.

    Returns:
        `[s, b, heads, v_channels]`; 0 for a query without keys.

    Raises:
        MLALayoutError: the tensors disagree.
        UnsupportedProblemError: no backend runs it; lists every one's reasons.
    """
    if query.dim() != 4 or not v_channels <= query.shape[-1]:
        raise MLALayoutError(
            f"query must be [s, b, heads, d_total] with d_total >= v_channels ({v_channels}), got {list(query.shape)}"
        )
    meta = MLALayerMeta(
        heads=query.shape[2],
        kv_lora_rank=v_channels,
        qk_rope_head_dim=query.shape[3] - v_channels,
        qk_nope_head_dim=1,  # neither is read in the absorbed form, and the hook is not told
        v_head_dim=1,
        softmax_scale=softmax_scale,
        form="absorbed",
    )
    call = normalize_call(
        query,
        key,
        None,
        topk_indices,
        meta=meta,
        layout="sbhd",
        invalid="sentinel" if topk_length is None else "length",
        topk_length=topk_length,
        check=False,  # they come from Megatron's indexer; reading them on the host would stall every layer
    )
    out, _ = sparse_attn(call.q, call.kv, call.indices, d_v=call.d_v, softmax_scale=call.softmax_scale)
    return call.restore(out)


def _import(module: str) -> ModuleType:
    return import_extra(module, feature="mla_ops.adapters.megatron", package="megatron-core", extra="megatron")


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would lie in
        return False


def _takes(cls: type, argument: str) -> bool:
    parameters = inspect.signature(cls).parameters
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())

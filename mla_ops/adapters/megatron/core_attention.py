"""The core attention that Megatron-Core's MLA layers call, in its words; needs no Megatron to be imported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from mla_ops.adapters.seam import Layout, MLALayerMeta, PackedSeq, SparseCall, normalize_call, resolve_layer_meta
from mla_ops.adapters.torch_layer import project_v
from mla_ops.api import sparse_attn
from mla_ops.device import is_readable
from mla_ops.errors import MLALayoutError, MLAMetadataError, UnsupportedFeatureError


class IndexFn(Protocol):
    """Chooses the keys that each query reads, the same for all heads."""

    def __call__(
        self,
        *,
        query: torch.Tensor,
        key: torch.Tensor,
        x: torch.Tensor | None,
        qr: torch.Tensor | None,
        packed: PackedSeq | None,
        layer_number: int,
    ) -> torch.Tensor:
        """Return int32 or int64 positions of keys, in any order, -1 for no key.

        Args:
            query: `[s, b, heads, width]`, packed `[t, heads, width]`, as `SparseMLACoreAttention.forward` gets it.
            key: the same.
            x: the layer's hidden states, or None where Megatron hands none over.
            qr: its compressed queries, or None.
            packed: the segments of a packed batch.
            layer_number: Megatron's, from 1.

        Returns:
            `[b, s, K]`, or `[t, K]` counting all packed rows.
        """


# Configuration that changes what attention computes, the value under which it does not, and why any other is refused.
_REFUSED = (
    ("context_parallel_size", 1, "the keys of other ranks are not here"),
    ("softmax_type", "vanilla", "no sink is added to the denominator"),
    ("window_size", None, "a window is expressed by index_fn"),
    ("qk_clip", False, "the largest logits are not kept"),
    ("log_max_attention_logit", False, "the largest logits are not kept"),
    ("fp8_dot_product_attention", False, "the operator reads bf16, fp16 and fp32"),
    ("fp8_multi_head_attention", False, "the operator reads bf16, fp16 and fp32"),
)


class SparseMLACoreAttention(nn.Module):
    """Sparse attention in the place of `core_attention` in Megatron's MLA layers, stock or absorbed.

    Without parameters of its own. Megatron constructs it twice for each stock layer, the first time without widths;
    that instance is dropped, and refuses to run.

    Args:
        config: Megatron's `MLATransformerConfig`.
        layer_number: Megatron's, from 1; named in errors and handed to `index_fn`.
        attn_mask_type: used where `forward` gets none: causal, no_mask, or padding_causal with packed sequences.
        attention_type: "self".
        attention_dropout: overrides the configuration's; must be 0 while training.
        softmax_scale: the layer's; `mscale^2 / sqrt(qk_head_dim + qk_pos_emb_head_dim)`.
        k_channels: width of a query as this layer hands it over, expanded or absorbed.
        v_channels: the same for the value.
        cp_comm_type: not used, because context parallelism is refused.
        pg_collection: not used.
        index_fn: which keys each query reads. Under a causal mask later rows than the query's own are dropped from its
            answer. None: every query reads every row of its sequence that the mask allows, which is exact and takes
            an index for each pair of rows, hence `max_dense_rows`.
        max_dense_rows: the longest sequence for which `index_fn` may be None.
        backend: which backend runs the operator; a named one never falls back.
        check_indices: in eager, raise on what `index_fn` and the packed sequence get wrong; it reads them on the host.

    Raises:
        MLAMetadataError: the configuration lacks widths or contradicts those given.
        UnsupportedFeatureError: the configuration asks for what is not offered; names all of it.
    """

    consumes_absorbed_v_up_projection = True  # Megatron asks: the values' up-projection happens here

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        index_fn: IndexFn | None = None,
        max_dense_rows: int = 4096,
        backend: str = "auto",
        check_indices: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.index_fn = index_fn
        self.max_dense_rows = max_dense_rows
        self.backend = backend
        self.check_indices = check_indices
        self.requires_dsa_inputs = index_fn is not None  # Megatron asks: whether to hand over `x` and `qr`
        # The layer in either form. Made here: a compiler that takes the scale for a variable could not check it again.
        self.meta: MLALayerMeta | None = None
        self._absorbed_meta: MLALayerMeta | None = None
        if k_channels is not None or v_channels is not None:
            self.meta = _resolve(config, layer_number, attention_type, softmax_scale, (k_channels, v_channels))
            self._absorbed_meta = replace(self.meta, form="absorbed")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        x: torch.Tensor | None = None,
        qr: torch.Tensor | None = None,
        up_v_weight: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, in either of the forms in which Megatron's MLA layers hand over their tensors.

        Args:
            query: `[s, b, heads, k_channels]`, or `[t, heads, k_channels]` packed, rotated.
            key: the same, expanded; `[s, b, 1, k_channels]` latent rows, absorbed.
            value: `[s, b, heads, v_channels]`, perhaps zero-padded to `k_channels`; None in the absorbed form.
            attention_mask: bool, True is hidden (Megatron's convention), `[1 or b, 1, s, s]`; not with packed rows.
            attn_mask_type: Megatron's enumeration; default: the constructor's.
            attention_bias: refused.
            packed_seq_params: Megatron's `PackedSeqParams`, in the "thd" format.
            x: hidden states, for `index_fn`.
            qr: compressed queries, for `index_fn`.
            up_v_weight: `[heads, v_head_dim, kv_lora_rank]`, exactly in the absorbed form.
            position_ids: not used; query and key are rotated.

        Returns:
            `[s, b, heads * v]`, packed `[t, heads * v]`, with v the width of `value`, or `v_head_dim` if absorbed.

        Raises:
            MLALayoutError: the tensors, the mask or the packed sequence disagree; before any work.
            MLAMetadataError: the layer was never given its widths, or needs an `index_fn`.
            UnsupportedFeatureError: dropout or a bias was asked for.
        """
        packed = packed_seq(packed_seq_params)
        meta = self._meta_of(value, up_v_weight)
        self._refuse(attention_bias, attention_mask, packed)
        is_causal = _is_causal(self.attn_mask_type if attn_mask_type is None else attn_mask_type, packed)
        layout: Layout = "sbhd" if packed is None else "thd"
        visible = None if attention_mask is None else ~attention_mask

        def call_with(key: torch.Tensor, value: torch.Tensor | None, indices: torch.Tensor) -> SparseCall:
            return normalize_call(
                query,
                key,
                value,
                indices,
                meta=meta,
                layout=layout,
                packed=packed,
                invalid="sentinel" if visible is None else "mask",
                mask=visible,
                check=self.check_indices,
            )

        # The rows first, with nothing selected: it refuses wrong tensors before the indices cost anything.
        lead = query.shape[:1] if packed is not None else (query.shape[1], query.shape[0])
        call = call_with(key, value, torch.empty(*lead, 0, dtype=torch.int32, device=query.device))
        if is_causal and query.shape[0] != key.shape[0]:
            raise MLALayoutError(
                f"a causal mask needs as many query rows as key rows, got {query.shape[0]} and {key.shape[0]}; for "
                "decoding pass AttnMaskType.no_mask"
            )
        if is_causal and packed is not None and self.check_indices:
            _check_same_segments(packed)
        indices = self._select(query, key, x, qr, packed, is_causal)
        # All heads read the same rows, so one head's slots are made canonical and the others see them as a view: with
        # every earlier row selected, a copy for each head would be the [heads, s, s] that nothing here may hold.
        slots = call_with(key[..., :1, :], None if value is None else value[..., :1, :], indices).indices
        out, _ = sparse_attn(
            call.q,
            call.kv,
            slots.expand(-1, -1, call.kv.shape[2], -1),
            d_v=call.d_v,
            softmax_scale=call.softmax_scale,
            backend=self.backend,
        )
        heads = call.restore(out)
        if up_v_weight is not None:
            heads = project_v(heads, up_v_weight.to(heads.dtype))
        return heads.flatten(-2)

    def _meta_of(self, value: torch.Tensor | None, up_v_weight: torch.Tensor | None) -> MLALayerMeta:
        if self.meta is None or self._absorbed_meta is None:
            raise MLAMetadataError(
                f"layer {self.layer_number} never got k_channels, v_channels and softmax_scale: Megatron's MLA layers "
                "pass them when they construct their core attention a second time; use it in one of those",
                missing=("k_channels", "v_channels", "softmax_scale"),
            )
        if (value is None) != (up_v_weight is not None):
            raise MLALayoutError(
                "exactly one of value (expanded heads) and up_v_weight (absorbed rows) must be given, got "
                f"{'neither' if value is None else 'both'}"
            )
        return self._absorbed_meta if value is None else self.meta

    def _refuse(
        self, attention_bias: torch.Tensor | None, attention_mask: torch.Tensor | None, packed: PackedSeq | None
    ) -> None:
        if attention_bias is not None:
            raise UnsupportedFeatureError("attention_bias was passed, and nothing here adds to the logits; pass None")
        if self.training and self.attention_dropout:
            raise UnsupportedFeatureError(
                f"attention_dropout is {self.attention_dropout}, and nothing here drops weights; set it to 0.0"
            )
        if attention_mask is None:
            return
        if packed is not None:
            raise MLALayoutError("attention_mask came with a packed sequence, whose segments already say it; pass None")
        if attention_mask.dtype != torch.bool:
            raise MLALayoutError(f"attention_mask must be bool, True where hidden, got {attention_mask.dtype}")

    def _select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        x: torch.Tensor | None,
        qr: torch.Tensor | None,
        packed: PackedSeq | None,
        is_causal: bool,
    ) -> torch.Tensor:
        """Return `[b, s, K]` (packed `[t, K]`) positions of keys, -1 where there is none or a causal mask hides it."""
        if self.index_fn is None:
            indices = self._every_row(query, key, packed)
        else:
            indices = self.index_fn(query=query, key=key, x=x, qr=qr, packed=packed, layer_number=self.layer_number)
            if indices.dim() != query.dim() - 1:
                raise MLALayoutError(
                    f"index_fn must return {'[b, s, K]' if packed is None else '[t, K]'}, one list for all heads, got "
                    f"{list(indices.shape)}"
                )
        if is_causal:
            own_row = torch.arange(query.shape[0], device=query.device)[:, None]
            # Rows that do not exist are kept, for the check of the indices to report.
            indices = torch.where((indices > own_row) & (indices < key.shape[0]), -1, indices)
        return indices

    def _every_row(self, query: torch.Tensor, key: torch.Tensor, packed: PackedSeq | None) -> torch.Tensor:
        longest = key.shape[0] if packed is None else packed.max_seqlen_kv
        if longest > self.max_dense_rows:
            raise MLAMetadataError(
                f"layer {self.layer_number} has no index_fn, so every query would read all earlier rows of its "
                f"sequence; that takes an index for each pair of rows and is done up to max_dense_rows="
                f"{self.max_dense_rows}, got {longest} rows; pass adapt_spec an index_fn",
                missing=("index_fn",),
            )
        row = torch.arange(longest, dtype=torch.int32, device=query.device)
        if packed is None:
            return row.expand(query.shape[1], query.shape[0], -1)
        start, length = packed.start_and_length("kv")
        segment = packed.segment_of_row(query.shape[0])
        return torch.where(row < length[segment, None], start[segment, None] + row, -1)


def packed_seq(params: Any) -> PackedSeq | None:
    """Translate Megatron's `PackedSeqParams`; None stays None.

    Raises:
        MLALayoutError: its format is not "thd", or its lengths are missing or impossible.
    """
    if params is None:
        return None
    if params.qkv_format != "thd":
        raise MLALayoutError(
            f"packed_seq_params has qkv_format={params.qkv_format!r}, needs 'thd': Megatron drops the batch dimension "
            "of whatever comes with packed_seq_params and then rotates it as if it were there; say 'thd', or pass none"
        )
    return PackedSeq(
        cu_seqlens_q=params.cu_seqlens_q,
        cu_seqlens_kv=params.cu_seqlens_kv,
        max_seqlen_q=params.max_seqlen_q,
        max_seqlen_kv=params.max_seqlen_kv,
        cu_seqlens_q_padded=params.cu_seqlens_q_padded,
        cu_seqlens_kv_padded=params.cu_seqlens_kv_padded,
    )


def check_table(packed: PackedSeq) -> None:
    """Raise `MLALayoutError` if Megatron's rotary table is too short for the rows it rotates, those of gaps included.

    It spans the longer maximum, and is cut for each segment's room. Reads values, so not while compiling or capturing.
    """
    if not is_readable(packed.cu_seqlens_q):
        return
    for name in ("cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        bounds = getattr(packed, name)
        longest = 0 if bounds is None else int(bounds.diff().max())
        if longest > max(packed.max_seqlen_q, packed.max_seqlen_kv):
            raise MLALayoutError(
                f"max_seqlen_q is {packed.max_seqlen_q} and max_seqlen_kv is {packed.max_seqlen_kv}, but {name} has "
                f"{longest} rows for a segment and Megatron rotates its gap too; pass {longest}, the padded length"
            )


def _resolve(
    config: Any,
    layer_number: int,
    attention_type: str,
    softmax_scale: float | None,
    widths: tuple[int | None, int | None],
) -> MLALayerMeta:
    meta = resolve_layer_meta(config, form="expanded", softmax_scale=softmax_scale, layer=layer_number)
    meta = replace(meta, heads=meta.heads // getattr(config, "tensor_model_parallel_size", 1))
    refused = [
        f"{name}={getattr(config, name)!r} ({why}; set it to {wanted!r})"
        for name, wanted, why in _REFUSED
        if getattr(config, name, wanted) != wanted
    ]
    if refused:
        raise UnsupportedFeatureError(
            f"SparseMLACoreAttention, layer {layer_number}, does not support {', '.join(refused)}"
        )
    bad = []
    if attention_type != "self":
        bad.append(f"attention_type must be 'self', got {attention_type!r}")
    absorbed = replace(meta, form="absorbed")
    expected = [(meta.k_channels, meta.v_channels), (absorbed.d_total, absorbed.d_v)]
    if widths not in expected:
        bad.append(
            f"(k_channels, v_channels) is {widths}, but the configuration's widths give {expected[0]} expanded and "
            f"{expected[1]} absorbed"
        )
    if bad:
        raise MLAMetadataError(
            f"SparseMLACoreAttention, layer {layer_number}: {'; '.join(bad)}", bad=tuple(bad), source=meta.source
        )
    return meta


def _check_same_segments(packed: PackedSeq) -> None:
    """Raise `MLALayoutError` unless queries and keys are laid out alike; reads values, so not while compiling."""
    if not is_readable(packed.cu_seqlens_q):
        return
    (start_q, length_q), (start_kv, length_kv) = packed.start_and_length("q"), packed.start_and_length("kv")
    if not (torch.equal(start_q, start_kv) and torch.equal(length_q, length_kv)):
        raise MLALayoutError(
            "a causal mask needs the same segments of query and key, got those of query from rows "
            f"{start_q.tolist()} with lengths {length_q.tolist()} and those of key from {start_kv.tolist()} with "
            f"{length_kv.tolist()}; pass AttnMaskType.no_mask and an index_fn that names earlier rows only"
        )


def _is_causal(attn_mask_type: Any, packed: PackedSeq | None) -> bool:
    name: object = getattr(attn_mask_type, "name", attn_mask_type)
    allowed = ("causal", "no_mask") if packed is None else ("causal", "no_mask", "padding_causal")
    if name not in allowed:
        raise MLALayoutError(
            f"attn_mask_type must be one of {', '.join(allowed)}{' with packed sequences' * (packed is not None)}, got "
            f"{name}; anything else is expressed by index_fn"
        )
    return name != "no_mask"

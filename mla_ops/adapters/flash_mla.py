"""Drop-ins for the sparse-MLA functions of FlashMLA and TileLang: their arguments and conventions, any widths.

What each convention is and where it differs from `mla_ops.sparse_attn` stands in docs/flash_mla.md. None of these
functions needs, imports or patches its original.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

import mla_ops
from mla_ops.errors import InvalidInputError, UnsupportedFeatureError
from mla_ops.row_formats import ROW_FORMATS


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    indexer_topk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute sparse attention as `flash_mla.flash_mla_sparse_fwd` does, for any widths, head counts and topk.

    Two operators run, because FlashMLA always returns the largest logits: a caller that drops them saves a pass over
    the logits with `mla_ops.sparse_attn`. `out` and `lse` are differentiable, which FlashMLA's are not.

    Args:
        q: `[s_q, h_q, d_qk]`, bf16, fp16 or fp32; there is no batch dimension, as in FlashMLA.
        kv: `[s_kv, h_kv, d_qk]`, dtype of `q`.
        indices: `[s_q, h_kv, topk]`, int32 or int64; outside `[0, s_kv)` is no key.
        sm_scale: multiplies the logits.
        d_v: value width. FlashMLA's only value is the default.
        attn_sink: `[h_q]`, fp32; scales the output by `exp(lse) / (exp(lse) + exp(attn_sink))`, nothing else.
        topk_length: `[s_q]`, int32 or int64.
        indexer_topk: must be 0. FlashMLA's fourth result, the lse of the first `indexer_topk` slots, is
            `mla_ops.sparse_attn(q, kv, indices[..., :indexer_topk], ...).lse`.

    Returns:
        `(out, max_logits, lse)`: `[s_q, h_q, d_v]` in `q.dtype`, `[s_q, h_q]` and `[s_q, h_q]` in fp32. `lse` is a
        natural logarithm. A query without a valid slot gets `out = 0`, `max_logits = -inf` and `lse = +inf`.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn`; also for a batch dimension and for
            `indexer_topk`.
    """
    if isinstance(q, torch.Tensor) and q.dim() != 3:
        raise InvalidInputError(
            f"q must be [s_q, h_q, d_qk], got shape {list(q.shape)}; mla_ops.sparse_attn takes a batch dimension"
        )
    if indexer_topk != 0:
        raise InvalidInputError(
            f"indexer_topk must be 0, got {indexer_topk!r}; for that lse call "
            "mla_ops.sparse_attn(q, kv, indices[..., :indexer_topk], ...)"
        )
    out, lse = mla_ops.sparse_attn(
        q, kv, indices, d_v=d_v, softmax_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink
    )
    max_logits = mla_ops.sparse_attn_max_logits(
        q, kv, indices, d_v=d_v, softmax_scale=sm_scale, topk_length=topk_length
    )
    return out, max_logits, lse.masked_fill(lse == -torch.inf, torch.inf)


@dataclass(frozen=True)
class _DecodeSizes:
    """What FlashMLA compares between the calls that share a `FlashMLASchedMeta`, under its names."""

    b: int
    s_q: int
    h_q: int
    page_block_size: int
    h_k: int
    is_fp8_kvcache: bool
    topk: int
    extra_page_block_size: int | None
    extra_topk: int | None


class FlashMLASchedMeta:
    """What `get_mla_metadata` returns: the sizes of the first call that it came with, and no plan.

    FlashMLA keeps a schedule here that depends on the values of `topk_length`; a captured call that replays with other
    lengths then runs by a stale one. Nothing here depends on values, so nothing can be stale.
    """

    def __init__(self) -> None:
        self._sizes: _DecodeSizes | None = None

    def check(self, sizes: _DecodeSizes) -> None:
        """Keep the sizes of the first call; raise `InvalidInputError` where those of a later one differ."""
        if self._sizes is None:
            self._sizes = sizes
        if sizes == self._sizes:
            return
        names = [field.name for field in fields(sizes)]
        differ = [
            f"{name} was {getattr(self._sizes, name)} and is {getattr(sizes, name)}"
            for name in names
            if getattr(self._sizes, name) != getattr(sizes, name)
        ]
        raise InvalidInputError(
            f"tile_scheduler_metadata must come with calls of the same sizes: {', '.join(differ)}; take a new one from "
            "get_mla_metadata()"
        )


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """Return an empty `FlashMLASchedMeta` and None, as `flash_mla.get_mla_metadata` does; arguments are ignored."""
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
    *,
    row_format: str | None = None,
    extra_row_format: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode with sparse attention as `flash_mla.flash_mla_with_kvcache` does, for any widths, heads, topk and pages.

    Dense decoding (`indices=None`) is another operator and refused. Not differentiable.

    Args:
        q: `[b, s_q, h_q, d_qk]`, bf16 or fp16.
        k_cache: `[num_blocks, page_block_size, h_k, row]`: bytes as uint8, int8 or e4m3, or channels in `q.dtype`.
        block_table: ignored beside `indices`, as in FlashMLA; None will do.
        cache_seqlens: ignored beside `indices`; None will do.
        head_dim_v: value width.
        tile_scheduler_metadata: from `get_mla_metadata`; calls that share one have the same sizes.
        num_splits: must be None.
        softmax_scale: multiplies the logits. FlashMLA's default, `d_qk ** -0.5`, is wrong for absorbed rows: pass
            `(qk_nope_head_dim + qk_rope_head_dim) ** -0.5`.
        causal: must be False: indices say which keys a query sees.
        is_fp8_kvcache: whether the rows of the cache are quantised.
        indices: `[b, s_q, topk]`, int32 or int64 row numbers, `page * page_block_size + offset`. Anything that names no
            row is no key, where FlashMLA knows -1 only.
        attn_sink: `[h_q]`, fp32; scales the output only.
        extra_k_cache: a second cache, with a page size of its own; one softmax runs over both.
        extra_indices_in_kvcache: `[b, s_q, extra_topk]`, its row numbers.
        topk_length: `[b]`, int32 or int64, leading slots that count.
        extra_topk_length: `[b]`, those of the second cache.
        row_format: how a row is stored, where widths and bytes leave a choice (528 bytes at 512/512 may be "fp8" or
            "mxfp8"); None infers it.
        extra_row_format: that of the second cache.

    Returns:
        `(out, lse)`: `[b, s_q, h_q, head_dim_v]` in `q.dtype` and `[b, h_q, s_q]` in fp32, a natural logarithm over
        both caches, sink excluded. A query without a key gets `out = 0`, `lse = +inf`.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn_paged`; also where metadata, formats or the
            extra arguments disagree.
        UnsupportedFeatureError: dense decoding, or `causal=True`.
    """
    if indices is None:
        raise UnsupportedFeatureError(
            "dense decoding (indices=None) is not what this operator computes; pass indices [b, s_q, topk], or keep "
            "flash_mla.flash_mla_with_kvcache for these layers"
        )
    if causal:
        raise UnsupportedFeatureError("causal must be False beside indices, which say which keys a query sees")
    if num_splits is not None:
        raise InvalidInputError(f"num_splits must be None, got {type(num_splits).__name__}")
    if not isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        raise InvalidInputError(
            "tile_scheduler_metadata must be what mla_ops.adapters.flash_mla.get_mla_metadata() returns first, got "
            f"{type(tile_scheduler_metadata).__name__}"
        )
    if (extra_k_cache is None) != (extra_indices_in_kvcache is None):
        raise InvalidInputError("extra_k_cache and extra_indices_in_kvcache must come together")
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        if tensor.dim() != 4:
            raise InvalidInputError(f"{name} must have 4 dimensions, got shape {list(tensor.shape)}")
    b, s_q, h_q, d_qk = q.shape
    tile_scheduler_metadata.check(
        _DecodeSizes(
            *(b, s_q, h_q, k_cache.shape[1], k_cache.shape[2], is_fp8_kvcache, indices.shape[-1]),
            extra_page_block_size=None if extra_k_cache is None else extra_k_cache.shape[1],
            extra_topk=None if extra_indices_in_kvcache is None else extra_indices_in_kvcache.shape[-1],
        )
    )

    def attend(
        name: str,
        cache: torch.Tensor,
        rows: torch.Tensor,
        length: torch.Tensor | None,
        format_name: str | None,
        sink: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_ops.sparse_attn_paged(
            q,
            cache,
            rows.unsqueeze(2),
            d_v=head_dim_v,
            softmax_scale=d_qk**-0.5 if softmax_scale is None else softmax_scale,
            row_format=_format_of(name, cache, d_qk, head_dim_v, is_fp8_kvcache, format_name),
            topk_length=None if length is None else length.unsqueeze(1).expand(b, s_q),
            attn_sink=sink,
        )

    if extra_k_cache is None or extra_indices_in_kvcache is None:
        out, lse = attend("k_cache", k_cache, indices, topk_length, row_format, attn_sink)
    else:
        # The sink joins once, where both parts meet.
        parts = (
            attend("k_cache", k_cache, indices, topk_length, row_format, None),
            attend("extra_k_cache", extra_k_cache, extra_indices_in_kvcache, extra_topk_length, extra_row_format, None),
        )
        out, lse = mla_ops.merge_partials([out for out, _ in parts], [lse for _, lse in parts], attn_sink=attn_sink)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2)


def _format_of(name: str, cache: torch.Tensor, d_qk: int, d_v: int, is_fp8: bool, row_format: str | None) -> str:
    """Return the name of the row format of a cache: the one that was said, or the only one whose rows have its size."""
    row = cache.shape[-1]
    if (cache.dtype.itemsize == 1) != is_fp8:
        raise InvalidInputError(
            f"is_fp8_kvcache must be {not is_fp8} for a {name} of {cache.dtype}, got {is_fp8}; quantised rows come as "
            "uint8, int8 or float8_e4m3fn, others in the dtype of q"
        )
    if row_format is not None:
        return row_format
    if not is_fp8:
        return "dense"
    # A scale for the whole cache has no argument in FlashMLA's signature.
    formats = [f for f in ROW_FORMATS.values() if f.scales_at in ("row", "page_end")]
    sizes = {f.name: f.layout(d_qk, d_v).row_bytes for f in formats}
    fitting = [f for f in formats if sizes[f.name] == row]
    # Names that say the same of these widths, as "fp8" and "fp8_all" do where there is no tail.
    if len({(f.scale, f.tile, f.layout(d_qk, d_v)) for f in fitting}) == 1:
        return fitting[0].name
    if fitting:
        names = " and ".join(repr(f.name) for f in fitting)
        raise InvalidInputError(
            f"rows of {row} bytes at widths {d_qk}/{d_v} of {name} may be {names}; say which by row_format="
        )
    known = ", ".join(f"{size} ({name!r})" for name, size in sizes.items())
    raise InvalidInputError(f"{name} must have rows of one of these bytes at widths {d_qk}/{d_v}: {known}; got {row}")


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, d_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute sparse attention with the arguments of `SparseMLA.apply` in TileLang's examples and in Megatron-Core.

    Differentiable in `q` and `kv`, through `out` and through `lse` (where the originals drop the gradient of `lse`).
    Causality is the caller's: TileLang's kernel skips keys behind the query's own position by itself, this one attends
    to every index in range.

    Args:
        q: `[batch, seq_q, heads, d_total]`, or without `batch`.
        kv: `[batch, seq_kv, kv_group, d_total]`, dtype of `q`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64; outside `[0, seq_kv)` is no key.
        scaling: multiplies the logits.
        d_v: value width; the originals take 512 for granted.

    Returns:
        `(out, lse)`: `[batch, seq_q, heads, d_v]` in `q.dtype`, and `[batch, seq_q, heads]` in fp32, in base 2 as the
        originals return it: `log2(sum(exp(logits)))`. A query without a valid slot gets `out = 0`, `lse = -inf`.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn`.
    """
    out, lse = mla_ops.sparse_attn(q, kv, indices, d_v=d_v, softmax_scale=scaling)
    return out, lse * math.log2(math.e)

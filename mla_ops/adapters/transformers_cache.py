"""What generation stores a token: latent rows, once, in any cache of Hugging Face transformers.

The framework's cache layers store what they are given as keys and values. Here the keys are latent rows
`[B, 1, T, d_total]`, or their bytes, and the values have no channels: growing, static buffers, beams, cropping and
offloading stay the framework's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch

from mla_ops.adapters.seam import MLALayerMeta
from mla_ops.api import append_rows, bytes_per_row, read_rows
from mla_ops.errors import MLALayoutError, UnsupportedFeatureError

CacheFormat = Literal["dense", "fp8", "fp8_all"]
_BYTES = torch.uint8


class CacheBytes(NamedTuple):
    """Bytes that generation stores for one token of one sequence, over all layers; their sum is all of it."""

    rows: int  # latent rows
    index_keys: int  # the indexers' own keys, which stay as the framework stores them


class RowsCache:
    """Stands in for the cache in one call of one attention layer: what is written through it are rows.

    Whatever else the layer asks of its cache, the cache itself answers.
    """

    def __init__(self, cache: Any, d_v: int, cache_format: CacheFormat) -> None:
        self._cache = cache
        self._d_v = d_v
        self._format = cache_format

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, latent: torch.Tensor, rope: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a row for each new token; the framework's signature.

        Args:
            latent: `[B, 1, S, kv_lora_rank]`.
            rope: `[B, 1, S, qk_rope_head_dim]`.
            layer_idx: whose rows.
            args: the framework's.
            kwargs: the framework's.

        Returns:
            All rows `[B, 1, T, d_total]` (or bytes `[B, 1, T, row]`) and, in the place of a rope part, a tensor without
            channels in the dtype that the rows stand for; see `join` and `split_rows`.

        Raises:
            UnsupportedFeatureError: this cache cannot store rows, or a gradient would have to pass through bytes.
            MLALayoutError: it holds something else already.
        """
        rows = join(latent, rope)
        if self._format != "dense":
            rows = quantise(rows, self._d_v, self._format)
        _check_cache(self._cache, layer_idx, rows)
        stored, _ = self._cache.update(rows, rows[..., :0], layer_idx, *args, **kwargs)
        return stored, latent[..., :0]


def _check_cache(cache: Any, layer_idx: int, rows: torch.Tensor) -> None:
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedFeatureError(
            f"cache must be a DynamicCache or a StaticCache, got {type(cache).__name__}: rows of latents cannot be "
            "stored in it"
        )
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    if hasattr(layer, "_quantize"):
        raise UnsupportedFeatureError(
            f"cache layer {layer_idx} is a {type(layer).__name__}, which quantises what it stores by rules of its own; "
            "use a DynamicCache or StaticCache, and attach with cache_format='fp8' for rows of fewer bytes"
        )
    held = getattr(layer, "keys", None)
    if held is not None and held.numel() > 0 and (held.shape[-1], held.dtype) != (rows.shape[-1], rows.dtype):
        raise MLALayoutError(
            f"cache layer {layer_idx} holds keys of {held.shape[-1]} x {held.dtype} and the rows are "
            f"{rows.shape[-1]} x {rows.dtype}: it was filled by a model that is not attached, or attached with another "
            "cache_format; start with a new cache"
        )


def join(latent: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Return latent and rope parts as rows; what came from a `RowsCache` is rows, or their bytes, already."""
    return latent if rope.shape[-1] == 0 else torch.cat([latent, rope], dim=-1)


def holds_bytes(rows: torch.Tensor) -> bool:
    """Whether these are bytes of rows rather than their channels."""
    return rows.dtype == _BYTES


def quantise(rows: torch.Tensor, d_v: int, cache_format: CacheFormat) -> torch.Tensor:
    """Return the bytes `[B, 1, S, row]` of rows `[B, 1, S, d_total]`, with scales that are powers of two."""
    if torch.is_grad_enabled() and rows.requires_grad:
        raise UnsupportedFeatureError(
            f"cache_format={cache_format!r} stores bytes, which no gradient passes through: generate under "
            "torch.no_grad(), and train with use_cache=False or attach with cache_format='dense'"
        )
    d_total = rows.shape[-1]
    # Zeros, so that equal rows are equal bytes: what pads a row is never written.
    stored = rows.new_zeros((*rows.shape[:-1], bytes_per_row(cache_format, d_total, d_v)), dtype=_BYTES)
    pages = stored.view(1, -1, 1, stored.shape[-1])
    numbers = torch.arange(pages.shape[1], device=rows.device)
    append_rows(rows.reshape(-1, 1, d_total), numbers, pages, d_v=d_v, row_format=cache_format)
    return stored


def split_rows(
    rows: torch.Tensor, rope: torch.Tensor, meta: MLALayerMeta, cache_format: CacheFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latent and rope parts that a layer's own `expand_kv` takes, whatever the cache holds."""
    d_total, d_v = _widths(meta)
    if holds_bytes(rows):
        pages = rows.transpose(1, 2)
        numbers = torch.arange(pages.shape[0] * pages.shape[1], device=rows.device)
        read = read_rows(pages, numbers, d_total=d_total, d_v=d_v, row_format=cache_format, dtype=rope.dtype)
        rows = read.view(*rows.shape[:-1], d_total)
    if rows.shape[-1] == d_v:  # no cache, or no rope
        return rows, rope
    return rows[..., :d_v], rows[..., d_v:]


def check_format(cache_format: str, dtype: torch.dtype) -> None:
    """Refuse a format that no cache has, or whose bytes cannot stand for rows of `dtype`."""
    if cache_format not in get_args(CacheFormat):
        raise UnsupportedFeatureError(
            f"cache_format must be one of {', '.join(map(repr, get_args(CacheFormat)))}, got {cache_format!r}"
        )
    if cache_format != "dense" and dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedFeatureError(
            f"cache_format={cache_format!r} stands for rows in bf16 or fp16, got a model in {dtype}; use "
            "model.bfloat16(), or cache_format='dense'"
        )


def bytes_per_token(layers: Iterable[Any], metas: Iterable[MLALayerMeta], cache_format: CacheFormat) -> CacheBytes:
    """Return what the caches of these attention layers hold for one token."""
    rows = index_keys = 0
    for layer, meta in zip(layers, metas, strict=True):
        dtype = layer.o_proj.weight.dtype
        if not getattr(layer, "is_kv_shared_layer", False):  # such a layer reads the rows of an earlier one
            rows += bytes_per_row(cache_format, *_widths(meta), dtype)
        if layer.indexer is not None:
            index_keys += layer.config.index_head_dim * dtype.itemsize
    return CacheBytes(rows, index_keys)


def _widths(meta: MLALayerMeta) -> tuple[int, int]:
    """Return d_total and d_v of latent rows; the layer's own are those of its form."""
    return meta.kv_lora_rank + meta.qk_rope_head_dim, meta.kv_lora_rank

"""What is asked of `mla::sparse_attn_paged`: a call as one value, and what of it decides who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla_ops.row_formats import RowLayout, row_format


class SparseAttnPagedCall(NamedTuple):
    """The arguments of `mla::sparse_attn_paged` in the order of its schema, up to `cache_scale`.

    A row number is `page * page_size + offset`; see `mla_ops.sparse_attn_paged`.
    """

    q: torch.Tensor  # [batch, seq_q, heads, d_total], or without batch, like indices and topk_length
    pages: torch.Tensor  # [num_pages, page_size, kv_group, row]: bytes, or for "dense" channels in q.dtype
    indices: torch.Tensor  # [batch, seq_q, kv_group, topk]: row numbers; with block_table positions in the request
    d_v: int
    softmax_scale: float
    row_format: str
    block_table: torch.Tensor | None = None  # [batch, pages_per_request]
    seq_lens: torch.Tensor | None = None  # [batch], only with block_table
    topk_length: torch.Tensor | None = None  # [batch, seq_q]
    attn_sink: torch.Tensor | None = None  # [heads], fp32
    cache_scale: torch.Tensor | None = None  # [1] or [kv_group], fp32: for formats with one scale for the cache

    @property
    def layout(self) -> RowLayout:
        """Which bytes of a row are what."""
        return row_format(self.row_format).layout(self.q.shape[-1], self.d_v, self.q.dtype.itemsize)

    @property
    def rows(self) -> int:
        """Queries of all batch elements; a row of the grid is one (batch, query) pair."""
        shape = self.q.shape
        return shape[0] if len(shape) == 3 else shape[0] * shape[1]


@dataclass(frozen=True)
class SparseAttnPagedProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    d_total: int  # width of one absorbed query / latent KV row
    d_v: int  # leading channels of the row that are the value; the output width
    topk: int  # selected slots per query and KV group
    heads: int  # of all KV groups
    kv_group: int  # KV heads; 1 in MLA
    dtype: torch.dtype  # of q
    row_format: str
    has_block_table: bool

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV row."""
        return self.heads // self.kv_group

    @classmethod
    def of(cls, call: SparseAttnPagedCall) -> SparseAttnPagedProblem:
        """Read the problem off a checked call."""
        *_, heads, d_total = call.q.shape
        kv_group, topk = call.indices.shape[-2:]
        return cls(
            *(d_total, call.d_v, topk, heads, kv_group, call.q.dtype, call.row_format), call.block_table is not None
        )

    def __str__(self) -> str:
        return (
            f"d_total={self.d_total} d_v={self.d_v} heads={self.heads} kv_group={self.kv_group} topk={self.topk} "
            f"{str(self.dtype).removeprefix('torch.')} row_format={self.row_format} "
            f"block_table={'yes' if self.has_block_table else 'no'}"
        )

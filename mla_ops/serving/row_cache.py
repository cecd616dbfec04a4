"""A pool of pages as a module: one buffer, the calls that write and read it, and nobody's allocator."""

from __future__ import annotations

import torch
from torch import nn

from mla_ops.api import SparseAttnOutput, append_rows, bytes_per_row, read_rows, sparse_attn_paged
from mla_ops.errors import InvalidInputError
from mla_ops.row_formats import row_format as format_named


class RowCache(nn.Module):
    """The latent rows of one layer, in pages of `page_size` rows, stored in a row format.

    Which page belongs to whom is the business of a server, or of `PagedCache`; this module writes the rows that it is
    told to and reads those that indices name. A row number is `page * page_size + offset`; one outside the pool writes
    nothing and is no key. The pool is a buffer, because `mode="reduce-overhead"` captures no graph that changes one of
    its inputs. In one graph call `append` once: for two of them with an `attend` between, torch may copy the pool.

    Args:
        num_pages: pages of the pool.
        page_size: rows of a page, any number.
        d_total: width of a row.
        d_v: leading channels of it that are the value.
        row_format: how a row is stored, one of `mla_ops.row_formats.ROW_FORMATS`.
        kv_group: KV heads, 1 in MLA.
        dtype: of the rows that come and of the queries, and of a row as stored where the format is "dense".
        device: where the pool lies.
        scale_rule: how scales are chosen, "pow2" (FlashMLA's) or "amax" (vLLM's); see `mla_ops.append_rows`.
        cache_scale: `[1]` or `[kv_group]` fp32, for a format with one scale for the whole cache.

    Raises:
        InvalidInputError: a size cannot be, there is no such format, or it has no rows of these widths.
    """

    storage: torch.Tensor  # [num_pages, bytes of a page], for "dense" channels of `dtype`
    cache_scale: torch.Tensor | None

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        d_total: int,
        d_v: int,
        row_format: str = "fp8",
        *,
        kv_group: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        scale_rule: str = "pow2",
        cache_scale: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        sizes = {"page_size": page_size, "d_total": d_total, "d_v": d_v, "kv_group": kv_group}
        if bad := [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]:
            raise InvalidInputError(f"RowCache: {'; '.join(bad)}")
        self.num_pages, self.page_size, self.kv_group = num_pages, page_size, kv_group
        self.d_total, self.d_v = d_total, d_v
        self.row_format, self.scale_rule, self.dtype = row_format, scale_rule, dtype
        self._row_bytes = bytes_per_row(row_format, d_total, d_v, dtype)
        layout = format_named(row_format).layout(d_total, d_v, dtype.itemsize)
        page_bytes = layout.page_bytes(page_size * kv_group)
        is_dense = row_format == "dense"
        storage = torch.zeros(
            *(num_pages, page_bytes // dtype.itemsize if is_dense else page_bytes),
            dtype=dtype if is_dense else torch.uint8,
            device=device,
        )
        # No part of a checkpoint: rows belong to the requests of a moment.
        self.register_buffer("storage", storage, persistent=False)
        self.register_buffer("cache_scale", cache_scale, persistent=False)

    def extra_repr(self) -> str:
        """Return what the module holds."""
        return (
            f"num_pages={self.num_pages}, page_size={self.page_size}, d_total={self.d_total}, d_v={self.d_v}, "
            f"row_format={self.row_format!r}, kv_group={self.kv_group}, bytes_per_token={self.bytes_per_token}"
        )

    @property
    def pages(self) -> torch.Tensor:
        """The pool as the operators take it, `[num_pages, page_size, kv_group, row]`: a view of the buffer."""
        row = self._row_bytes // self.storage.dtype.itemsize
        shape = (self.num_pages, self.page_size, self.kv_group, row)
        return self.storage[:, : self.page_size * self.kv_group * row].view(shape)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's rows, scales included."""
        return self.kv_group * self._row_bytes

    def append(self, latent: torch.Tensor, rows: torch.Tensor, tail: torch.Tensor | None = None) -> None:
        """Write rows into the pool.

        Args:
            latent: `[..., kv_group, d_total]`, or with `tail` `[..., kv_group, d_v]`; bf16 or fp16.
            rows: `[...]`, int32 or int64 row numbers; one outside the pool writes nothing.
            tail: `[..., kv_group, d_total - d_v]`, dtype of `latent`.

        Raises:
            InvalidInputError, UnsupportedProblemError: as `mla_ops.append_rows`.
        """
        append_rows(
            latent.flatten(0, -3),
            rows.flatten(),
            self.pages,
            d_v=self.d_v,
            row_format=self.row_format,
            tail=None if tail is None else tail.flatten(0, -3),
            scale_rule=self.scale_rule,
            cache_scale=self.cache_scale,
        )

    def attend(
        self,
        q: torch.Tensor,
        indices: torch.Tensor,
        *,
        softmax_scale: float,
        block_table: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        topk_length: torch.Tensor | None = None,
        attn_sink: torch.Tensor | None = None,
    ) -> SparseAttnOutput:
        """Attend each query to the rows that its indices name; not differentiable.

        Args:
            q: `[batch, seq_q, heads, d_total]`, bf16 or fp16, absorbed queries.
            indices: `[batch, seq_q, kv_group, topk]`, int32 or int64: row numbers, with `block_table` positions in the
                request. What is outside the pool, or the request, is no key.
            softmax_scale: multiplies the logits.
            block_table: `[batch, pages_per_request]`, the page of each stretch of `page_size` positions.
            seq_lens: `[batch]`, only with `block_table`: positions from it on are no keys.
            topk_length: `[batch, seq_q]`, leading slots that count.
            attn_sink: `[heads]` fp32, joins the denominator only.

        Returns:
            `out` `[batch, seq_q, heads, d_v]` and `lse` `[batch, seq_q, heads]`, as `mla_ops.sparse_attn` returns them.

        Raises:
            InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn_paged`.
        """
        return sparse_attn_paged(
            q,
            self.pages,
            indices,
            d_v=self.d_v,
            softmax_scale=softmax_scale,
            row_format=self.row_format,
            block_table=block_table,
            seq_lens=seq_lens,
            topk_length=topk_length,
            attn_sink=attn_sink,
            cache_scale=self.cache_scale,
        )

    def rows(self, block_table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the row number of positions in requests, `[batch, ...]` int64; -1 where there is none.

        Args:
            block_table: `[batch, pages_per_request]`, int32 or int64; an entry outside the pool is no page.
            positions: `[batch, ...]`, int32 or int64; those outside the table have no row.
        """
        table, positions = block_table.long(), positions.long()
        stretch = positions.div(self.page_size, rounding_mode="floor")
        has_entry = (positions >= 0) & (stretch < table.shape[1])
        if not table.shape[1]:
            return torch.full_like(positions, -1)
        page = table.gather(1, stretch.where(has_entry, 0).flatten(1)).view_as(positions)
        has_row = has_entry & (page >= 0) & (page < self.num_pages)
        return (page * self.page_size + positions % self.page_size).where(has_row, -1)

    def read(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return rows as numbers, `[n, kv_group, d_total]` in `dtype` (default: that of the cache).

        Args:
            rows: `[n]`, int32 or int64 row numbers; one outside the pool gives zeros.
            dtype: of the result.

        Raises:
            InvalidInputError, UnsupportedProblemError: as `mla_ops.read_rows`.
        """
        return read_rows(
            self.pages,
            rows,
            d_total=self.d_total,
            d_v=self.d_v,
            row_format=self.row_format,
            dtype=self.dtype if dtype is None else dtype,
            cache_scale=self.cache_scale,
        )

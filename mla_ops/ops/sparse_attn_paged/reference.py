"""The definition of the operator: the pool as numbers in fp64, row numbers from the table, then the dense definition.

Written to be read and to be right, not to be fast. No product path imports this module.
"""

from __future__ import annotations

import torch

from mla_ops.ops.read_rows.reference import read_rows_reference
from mla_ops.ops.sparse_attn.reference import sparse_attn_reference


def sparse_attn_paged_reference(
    q: torch.Tensor,
    pages: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    row_format: str,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(out, lse)` as `mla_ops.sparse_attn_paged` documents them, in fp64; `q` has the dtype of its call."""
    num_pages, page_size = pages.shape[:2]
    every_row = torch.arange(num_pages * page_size, device=q.device)
    kv = read_rows_reference(pages, every_row, q.shape[-1], d_v, row_format, q.dtype, cache_scale)

    rows = indices.long()
    if block_table is not None:
        # A column of -1 behind the table is the page of every position that the request does not have.
        table = torch.nn.functional.pad(block_table.long(), (0, 1), value=-1)
        end = torch.full_like(table[:, 0], block_table.shape[1] * page_size)
        if seq_lens is not None:
            end = torch.minimum(end, seq_lens.long())
        has_row = (rows >= 0) & (rows < end.view(-1, 1, 1, 1))
        column = torch.where(has_row, rows // page_size, block_table.shape[1])
        page = table.gather(1, column.flatten(1)).view_as(rows)
        has_row &= (page >= 0) & (page < num_pages)
        rows = torch.where(has_row, page * page_size + rows % page_size, -1)

    # All batch elements share the pool: their queries are those of one sequence.
    def joined(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(0, 1) if q.dim() == 4 else tensor

    lengths = None if topk_length is None else joined(topk_length)
    out, lse = sparse_attn_reference(joined(q.double()), kv, joined(rows), d_v, softmax_scale, lengths, attn_sink)
    return out.view(*q.shape[:-1], d_v), lse.view(q.shape[:-1])

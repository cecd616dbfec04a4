"""Where the rows of a pool stand, as kernels are told it, and a pool of dense rows as the `kv` of a dense call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla_ops.launching import INT32_OFFSETS
from mla_ops.ops.sparse_attn.call import SparseAttnCall
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.row_tiling import PoolStrides


class Pool(NamedTuple):
    """Distances inside a pool, in units of `unit` bytes: a kernel that multiplies them by it knows how rows align."""

    unit: int  # 16 for rows of bytes, else the largest power of two up to 16 that divides every distance
    page: int  # from one page to the next
    row: int  # from the data of a row to that of the next in its page
    group: int  # from one KV group to the next
    page_scales: int  # from the start of a page to the scales of its first row, where they stand at its end; else 0
    page_rows: int  # rows of one stride that a page takes, padding included; 0 where there is no such number
    has_one_stride: bool  # row number n starts at n * row: neither padded pages nor scales at their end
    is_far: bool  # a byte of the pool lies beyond 32 bits

    @classmethod
    def of(cls, call: SparseAttnPagedCall) -> Pool:
        """Read the distances off the strides of `call.pages`."""
        layout = call.layout
        num_pages, page_size, kv_group, _ = call.pages.shape
        strides = PoolStrides.of(call.pages, layout)
        unit, page, row, group, _ = strides
        page_rows = page_size if num_pages <= 1 else page // row if row and page % row == 0 else 0
        page_rows = 0 if layout.scale_bytes or page_rows < page_size else page_rows
        return cls(
            *strides,
            page_rows=page_rows,
            has_one_stride=page_rows == page_size,
            is_far=(num_pages * page + kv_group * group) * unit >= INT32_OFFSETS,
        )


class Hints(NamedTuple):
    """What of a call beside its problem decides who runs it, and never whether anybody does."""

    rows: int  # (batch, query) pairs
    pool: Pool

    @classmethod
    def of(cls, call: SparseAttnPagedCall) -> Hints:
        """Read the hints off a checked call."""
        return cls(call.rows, Pool.of(call))


def as_dense_call(call: SparseAttnPagedCall) -> SparseAttnCall:
    """Return a call on dense rows, by row number where pages take `Pool.page_rows` rows, as one on `kv`.

    All batch elements share the pool.
    """
    num_pages, page_size, kv_group, width = call.pages.shape
    _, row, group, inner = call.pages.stride()
    # The last page ends with its last row: behind it there may be no memory.
    num_rows = (num_pages - 1) * Pool.of(call).page_rows + page_size if num_pages else 0
    shape: tuple[int, ...] = (num_rows, kv_group, width)
    stride: tuple[int, ...] = (row, group, inner)
    if call.q.dim() == 4:
        shape, stride = (call.q.shape[0], *shape), (0, *stride)
    kv = torch.as_strided(call.pages, shape, stride)
    return SparseAttnCall(call.q, kv, call.indices, call.d_v, call.softmax_scale, call.topk_length, call.attn_sink)

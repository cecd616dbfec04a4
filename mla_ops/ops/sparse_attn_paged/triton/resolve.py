"""The launcher that turns positions into row numbers, for kernels that are told rows by number."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_ops.launching import outer_strides, unfilled
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall

# Slots that a program looks up.
BLOCK_SLOTS = 512


class ResolvePlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    grid: tuple[int, int]
    strides: tuple[int, int, int]  # of indices
    sizes: tuple[int, int, int, int, int, int]  # seq_q to topk
    kv_group: int
    shape: tuple[int, ...]  # of the row numbers
    dtype: torch.dtype

    @classmethod
    def of(cls, call: SparseAttnPagedCall, page_rows: int) -> ResolvePlan:
        """Plan the look-up of what `call` selects in a pool whose pages take `page_rows` rows each."""
        num_pages, page_size = call.pages.shape[:2]
        kv_group, topk = call.indices.shape[-2:]
        table_pages = num_pages if call.block_table is None else call.block_table.shape[-1]
        return cls(
            grid=(call.rows * kv_group, -(-topk // BLOCK_SLOTS)),
            strides=outer_strides(call.indices.stride()),
            sizes=(call.q.shape[-3], table_pages * page_size, num_pages, page_size, page_rows, topk),
            kv_group=kv_group,
            shape=(*call.indices.shape,),
            dtype=torch.int32 if num_pages * page_rows < 2**31 else torch.int64,
        )

    def as_resolved(self, call: SparseAttnPagedCall) -> SparseAttnPagedCall:
        """Return what `resolve` returns for `call`, without data: all that a plan needs."""
        rows = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return call._replace(indices=rows, block_table=None, seq_lens=None)


def resolve(call: SparseAttnPagedCall, plan: ResolvePlan) -> SparseAttnPagedCall:
    """Return `call` by row number, in a pool whose pages take the rows that `plan` says."""
    table = call.block_table
    rows = unfilled(plan.shape, plan.dtype, call.q, is_traced=False)
    if rows.numel():
        _kernel()[plan.grid](
            call.indices, *plan.strides, table, 0 if table is None else table.stride(0), call.seq_lens,
            rows, *plan.sizes, plan.kv_group, BLOCK_SLOTS, num_warps=4,
        )  # fmt: skip
    return call._replace(indices=rows, block_table=None, seq_lens=None)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.sparse_attn_paged.kernels.resolve import _resolve_rows_kernel

    return _resolve_rows_kernel

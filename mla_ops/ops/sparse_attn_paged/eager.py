"""The eager backend: chunks of rows gathered from the pool and decoded, then the eager attention. For the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mla_ops import settings
from mla_ops.device import DeviceTraits
from mla_ops.gathering import Lists, compute_dtype
from mla_ops.ops.sparse_attn.eager import attend
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.pages import PagePool
from mla_ops.row_formats import row_format


class EagerBackend:
    """Runs anywhere torch runs; picked by `backend="auto"` on the CPU only."""

    name = "eager"

    def unsupported_reasons(self, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> list[str]:
        """See `Declares.unsupported_reasons`."""
        return []

    def auto_excluded_reason(self, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> str | None:
        """See `Declares.auto_excluded_reason`."""
        if traits.type == "cpu":
            return None
        return f'excluded from backend="auto" on {traits.type}; pass backend="eager" to accept chunked gathers'

    def plan(self, call: SparseAttnPagedCall, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> None:
        """See `Backend.plan`; chunks follow from the sizes at hand."""

    def describe(self, plan: None) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return (f"rows are decoded in chunks of {settings.current().eager_workspace_mb} MiB; nothing to warm",)

    def run(self, call: SparseAttnPagedCall, plan: None) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.run`."""
        return attend(call.q, _PagedRows.of(call), call.d_v, call.softmax_scale, call.attn_sink)


@dataclass(frozen=True)
class _PagedRows(Lists):
    """Lists of row numbers, or of positions that a table turns into row numbers; a key is a row of one KV group."""

    pool: PagePool
    d_total: int
    tail_dtype: torch.dtype
    block_table: torch.Tensor | None  # [batch, pages_per_request]
    seq_lens: torch.Tensor | None  # [batch]

    @classmethod
    def of(cls, call: SparseAttnPagedCall) -> _PagedRows:
        q, indices = call.q, call.indices
        seq_q, kv_group, topk = indices.shape[-3:]
        return cls(
            indices=indices.reshape(indices.shape[:-1].numel(), topk),
            topk_length=None if call.topk_length is None else call.topk_length.reshape(-1),
            compute_dtype=compute_dtype(q.dtype),
            seq_q=seq_q,
            kv_group=kv_group,
            pool=PagePool(call.pages, row_format(call.row_format), call.layout, call.cache_scale),
            d_total=q.shape[-1],
            tail_dtype=q.dtype,
            block_table=call.block_table,
            seq_lens=call.seq_lens,
        )

    @property
    def num_keys(self) -> int:
        """See `Lists.num_keys`."""
        has_pages = self.block_table is None or self.block_table.shape[1] > 0
        return self.pool.num_rows * self.kv_group if has_pages else 0

    @property
    def width(self) -> int:
        """See `Lists.width`."""
        return self.d_total

    def named(self, indices: torch.Tensor, token: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """See `Lists.named`."""
        rows = indices if self.block_table is None else self._rows_of(indices, token // self.seq_q)
        return torch.where(self.pool.holds(rows), rows * self.kv_group + group.unsqueeze(1), -1)

    def gather(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        """See `Lists.gather`."""
        self.pool.read_into(out, keys // self.kv_group, keys % self.kv_group, self.tail_dtype)

    def _rows_of(self, positions: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return the row numbers of positions `[rows, topk]` in requests `batch` `[rows]`, -1 where there is none."""
        assert self.block_table is not None
        num_pages, page_size = self.pool.pages.shape[:2]
        end = self.block_table.shape[1] * page_size
        has_entry = (positions >= 0) & (positions < end)
        if self.seq_lens is not None:
            has_entry &= positions < self.seq_lens[batch].unsqueeze(1)
        column = torch.where(has_entry, positions // page_size, 0)
        page = self.block_table[batch.unsqueeze(1), column].long()
        has_row = has_entry & (page >= 0) & (page < num_pages)
        return torch.where(has_row, page * page_size + positions % page_size, -1)

"""The eager backend: rows are read and multiplied by their scales by plain torch operators."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem
from mla_ops.pages import PagePool
from mla_ops.row_formats import row_format


class EagerBackend:
    """Runs anywhere torch runs; picked on the CPU only."""

    name = "eager"

    def unsupported_reasons(self, problem: ReadRowsProblem, traits: DeviceTraits) -> list[str]:
        """See `Declares.unsupported_reasons`."""
        return []

    def auto_excluded_reason(self, problem: ReadRowsProblem, traits: DeviceTraits) -> str | None:
        """See `Declares.auto_excluded_reason`."""
        return None if traits.type == "cpu" else f"excluded on {traits.type}, where it takes a dozen passes over memory"

    def plan(self, call: ReadRowsCall, problem: ReadRowsProblem, traits: DeviceTraits) -> None:
        """See `Backend.plan`; there is nothing to decide."""

    def describe(self, plan: None) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return ("rows are read all at once; nothing to warm",)

    def run(self, call: ReadRowsCall, plan: None) -> torch.Tensor:
        """See `Backend.run`."""
        pool = PagePool(call.pages, row_format(call.row_format), call.layout, call.cache_scale)
        kv_group = call.pages.shape[2]
        # fp32 holds every number of a dense row of 16 bits, and every product rounded once.
        wide = torch.promote_types(call.dtype, torch.float32)
        numbers = call.pages.new_zeros((len(call.rows), kv_group, call.d_total), dtype=wide)
        if pool.num_rows and numbers.numel():
            rows = call.rows.long()
            is_row = pool.holds(rows)
            # What names no row reads one that another place of the list names; the first row only if there is none.
            anchor = rows.where(is_row, -1).amax().clamp_min(0)
            groups = torch.arange(kv_group, device=rows.device)
            pool.read_into(numbers, rows.where(is_row, anchor).unsqueeze(1), groups, call.dtype)
            numbers.masked_fill_(~is_row.view(-1, 1, 1), 0.0)
        return numbers.to(call.dtype)

"""The eager backend: rows are quantised and stored by plain torch operators. The CPU's implementation."""

from __future__ import annotations

import torch

from mla_ops.device import DeviceTraits
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.pages import PagePool
from mla_ops.row_formats import row_format


class EagerBackend:
    """Runs on the CPU. On CUDA it would read row numbers on the host, to leave out those that write nothing."""

    name = "eager"

    def unsupported_reasons(self, problem: AppendRowsProblem, traits: DeviceTraits) -> list[str]:
        """See `Declares.unsupported_reasons`."""
        return [] if traits.type == "cpu" else [f"device is {traits.type}, needs cpu: it reads row numbers on the host"]

    def auto_excluded_reason(self, problem: AppendRowsProblem, traits: DeviceTraits) -> str | None:
        """See `Declares.auto_excluded_reason`."""
        return None

    def plan(self, call: AppendRowsCall, problem: AppendRowsProblem, traits: DeviceTraits) -> None:
        """See `Backend.plan`; there is nothing to decide."""

    def describe(self, plan: None) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return ("rows are quantised all at once; nothing to warm",)

    def run(self, call: AppendRowsCall, plan: None) -> None:
        """See `Backend.run`."""
        numbers = call.latent if call.tail is None else torch.cat([call.latent, call.tail], dim=-1)
        pool = PagePool(call.pages, row_format(call.row_format), call.layout, call.cache_scale)
        pool.write(call.rows, numbers, call.scale_rule)

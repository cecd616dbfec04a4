"""What is asked of `mla::append_rows`: a call as one value, and what of it decides who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla_ops.row_formats import RowLayout, row_format


class AppendRowsCall(NamedTuple):
    """The arguments of `mla::append_rows` in the order of its schema; see `mla_ops.append_rows`."""

    latent: torch.Tensor  # [n, kv_group, d_v] with a tail, [n, kv_group, d_total] without
    tail: torch.Tensor | None  # [n, kv_group, d_tail], dtype of latent
    rows: torch.Tensor  # [n], row numbers; one outside the pool writes nothing
    pages: torch.Tensor  # [num_pages, page_size, kv_group, row], written
    d_v: int
    row_format: str
    scale_rule: str = "pow2"  # or "amax"
    cache_scale: torch.Tensor | None = None  # [1] or [kv_group], fp32

    @property
    def d_total(self) -> int:
        """Width of a row."""
        return self.latent.shape[-1] + (0 if self.tail is None else self.tail.shape[-1])

    @property
    def layout(self) -> RowLayout:
        """Which bytes of a row are what."""
        return row_format(self.row_format).layout(self.d_total, self.d_v, self.latent.dtype.itemsize)


@dataclass(frozen=True)
class AppendRowsProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    d_total: int
    d_v: int
    kv_group: int
    dtype: torch.dtype  # of latent and tail
    row_format: str
    scale_rule: str

    @classmethod
    def of(cls, call: AppendRowsCall) -> AppendRowsProblem:
        """Read the problem off a checked call."""
        return cls(
            *(call.d_total, call.d_v, call.latent.shape[-2], call.latent.dtype, call.row_format, call.scale_rule)
        )

    def __str__(self) -> str:
        return (
            f"d_total={self.d_total} d_v={self.d_v} kv_group={self.kv_group} "
            f"{str(self.dtype).removeprefix('torch.')} row_format={self.row_format} scale_rule={self.scale_rule}"
        )

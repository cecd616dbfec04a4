"""What is asked of `mla::read_rows`: a call as one value, and what of it decides who runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla_ops.row_formats import RowLayout, row_format


class ReadRowsCall(NamedTuple):
    """The arguments of `mla::read_rows` in the order of its schema; see `mla_ops.read_rows`."""

    pages: torch.Tensor  # [num_pages, page_size, kv_group, row]
    rows: torch.Tensor  # [n], row numbers; one outside the pool reads as zeros
    d_total: int
    d_v: int
    row_format: str
    dtype: torch.dtype  # of the result; a 16-bit tail is stored in it
    cache_scale: torch.Tensor | None = None  # [1] or [kv_group], fp32

    @property
    def layout(self) -> RowLayout:
        """Which bytes of a row are what."""
        return row_format(self.row_format).layout(self.d_total, self.d_v, self.pages.dtype.itemsize)


@dataclass(frozen=True)
class ReadRowsProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    d_total: int
    d_v: int
    kv_group: int
    dtype: torch.dtype  # of the result
    row_format: str

    @classmethod
    def of(cls, call: ReadRowsCall) -> ReadRowsProblem:
        """Read the problem off a checked call."""
        return cls(call.d_total, call.d_v, call.pages.shape[-2], call.dtype, call.row_format)

    def __str__(self) -> str:
        return (
            f"d_total={self.d_total} d_v={self.d_v} kv_group={self.kv_group} "
            f"{str(self.dtype).removeprefix('torch.')} row_format={self.row_format}"
        )

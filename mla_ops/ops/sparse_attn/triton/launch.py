"""What kernel sets and launchers hand one another: where a backward writes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Into(NamedTuple):
    """What a launch of the backward writes, None for what it does not compute, and for which queries.

    With `places` the rows of dkv are stored in `dkv` at the places of their slots; without, they are added to the rows
    of their keys.
    """

    dq: torch.Tensor | None  # of q's shape
    dkv: torch.Tensor | None  # fp32, of kv's shape; with places, rows of slots
    dsink: torch.Tensor | None  # fp32 [..., heads]: every query's share
    places: torch.Tensor | None  # int32, of the shape of the indices
    first_row: int  # of the (batch, query) pairs
    num_rows: int

"""What kernel sets and launchers hand one another: how a kernel is launched, and where a backward writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Applied to a kernel before it is launched: `as_it_is` in eager, `torch.library.wrap_triton` in a trace.
Wrap = Callable[[Any], Any]


def as_it_is(kernel: Any) -> Any:
    """Return the kernel; a launcher that is given anything else is being traced."""
    return kernel


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

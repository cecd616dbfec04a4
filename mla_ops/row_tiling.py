"""Where the rows of a pool stand, and how a row is cut into pieces: what launchers tell the kernels of stored rows."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch

from mla_ops.row_formats import ROW_ALIGN, RowFormat, RowLayout

# Channels that a piece of a row without tiles is made of.
UNSCALED_TILE = 128


class PoolStrides(NamedTuple):
    """Distances in a pool, in units of `unit` bytes: a kernel that multiplies by it knows how rows are aligned."""

    unit: int  # the largest power of two up to 16 that divides every distance
    page: int
    row: int
    group: int
    page_scales: int  # from a page to the scales of its first row, where they stand at its end; else 0

    @classmethod
    def of(cls, pages: torch.Tensor, layout: RowLayout) -> PoolStrides:
        """Read the distances off `pages` `[num_pages, page_size, kv_group, row]`."""
        _, page_size, kv_group, _ = pages.shape
        page, row, group = (stride * pages.element_size() for stride in pages.stride()[:3])
        scales = 0
        if layout.scale_bytes:
            row, scales = layout.data_bytes, page_size * layout.data_bytes
        # The stride of a size of 1 may be any number.
        group = 0 if kv_group == 1 else group
        unit = gcd(ROW_ALIGN, page, row, group, scales)
        return cls(unit, page // unit, row // unit, group // unit, scales // unit)


class RowPieces(NamedTuple):
    """A row in pieces, of which Triton wants powers of two: two of whole tiles, then two of channels that are copied.

    The second piece of each may reach past the end: 5 tiles are 4 + 1, 7 are 4 + 4, 576 channels are 512 + 64.
    """

    tile: int  # channels of a tile
    first_tiles: int
    second_tiles: int
    first_copied: int
    second_copied: int

    @classmethod
    def of(cls, form: RowFormat, layout: RowLayout, d_total: int) -> RowPieces:
        """Cut a row of `d_total` channels."""
        tile = form.tile or UNSCALED_TILE
        return cls(tile, *_two_powers(-(-layout.d_payload // tile)), *_two_powers(d_total - layout.d_payload))


def _two_powers(size: int) -> tuple[int, int]:
    """Return the largest power of two up to `size`, and the smallest that holds the rest; 0 where nothing is left."""
    first = 1 << size.bit_length() - 1 if size else 0
    rest = size - first
    return first, 1 << (rest - 1).bit_length() if rest else 0

"""How a latent KV row is stored in a pool of pages: which bytes are what, for any widths.

A row is payload (e4m3 channels), scales, tail (16-bit channels), in this order; each part starts at a multiple of 16
bytes and a row is a multiple of 16 bytes. At 576/512 that gives exactly the 656 bytes of FlashMLA and vLLM
(`fp8_ds_mla`). Formats whose scales stand at the end of a page have two strides: rows first, then scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mla_ops.errors import InvalidInputError

# Bytes that every part of a row, and a row itself, is a multiple of: the size of an asynchronous copy.
ROW_ALIGN = 16
# Channels in 16 bits at the end of a row of `model1`.
MODEL1_TAIL = 64
# Bytes of a channel of the tail: bf16 or fp16.
TAIL_ITEMSIZE = 2

ScalesAt = Literal["nowhere", "row", "page_end", "cache"]


class RowLayout(NamedTuple):
    """A row format at given widths; all sizes in bytes but the first three. Widths may be symbols, sizes then are."""

    d_payload: int  # leading channels that are e4m3
    d_tail16: int  # channels behind them, in 16 bits (all channels of a dense row are none of both)
    num_scales: int  # of a row
    scale_offset: int  # of the first scale: from the start of the row, or of the row's scales at the end of the page
    tail_offset: int
    data_bytes: int  # from one row to the next inside a page
    scale_bytes: int  # from the scales of one row to those of the next, where they stand at the end of the page
    row_bytes: int  # what a row takes of a page, data and scales: the last size of `pages`
    page_multiple: int  # a page is rounded up to a multiple of it; 1: not at all

    def page_bytes(self, page_size: int) -> int:
        """Return the bytes of a page of `page_size` rows, with what it is rounded up by."""
        return _round_up(page_size * self.row_bytes, self.page_multiple)


@dataclass(frozen=True)
class RowFormat:
    """How rows are stored, for any widths; `name` is what operators take."""

    name: str
    payload: Literal["none", "value", "all", "all_but_tail"]  # which leading channels are e4m3
    scale: Literal["none", "fp32", "ue8m0"]  # type of a scale
    scales_at: ScalesAt
    tile: int  # channels that share a scale; 0 where a row has none

    def layout(self, d_total: int, d_v: int, itemsize: int = TAIL_ITEMSIZE) -> RowLayout:
        """Return where the parts of a row stand.

        Args:
            d_total: width of a row.
            d_v: leading channels of it that are the value.
            itemsize: bytes of a channel of a dense row; no other format asks.
        """
        if self.payload == "none":
            row = d_total * itemsize
            return RowLayout(0, 0, 0, 0, 0, row, 0, row, 1)
        d_payload = {"value": d_v, "all": d_total, "all_but_tail": d_total - MODEL1_TAIL}[self.payload]
        tail = (d_total - d_payload) * TAIL_ITEMSIZE
        num_scales = (d_payload + self.tile - 1) // self.tile if self.tile else 0
        if self.scales_at == "page_end":
            # Rows of data without rounding, then the bytes of the scales, a multiple of 8 a row: 576 + 8, 512 + 16.
            data, scales = d_payload + tail, _round_up(num_scales, 8)
            return RowLayout(
                *(d_payload, d_total - d_payload, num_scales),
                *(0, d_payload, data, scales, data + scales, 576 if self.payload == "all_but_tail" else 512),
            )
        scale_offset = _round_up(d_payload, ROW_ALIGN)
        tail_offset = scale_offset + _round_up(4 * num_scales, ROW_ALIGN)
        row = tail_offset + _round_up(tail, ROW_ALIGN)
        return RowLayout(
            d_payload, d_total - d_payload, num_scales, scale_offset, tail_offset, row, 0, row, page_multiple=1
        )


ROW_FORMATS: dict[str, RowFormat] = {
    format.name: format
    for format in (
        RowFormat("dense", "none", "none", "nowhere", 0),
        RowFormat("fp8", "value", "fp32", "row", 128),
        RowFormat("fp8_all", "all", "fp32", "row", 128),
        RowFormat("fp8_cache", "all", "none", "cache", 0),
        RowFormat("model1", "all_but_tail", "ue8m0", "page_end", 64),
        RowFormat("mxfp8", "all", "ue8m0", "page_end", 32),
    )
}


def row_format(name: str) -> RowFormat:
    """Return the format of that name.

    Raises:
        InvalidInputError: there is none.
    """
    found = ROW_FORMATS.get(name)
    if found is None:
        raise InvalidInputError(f"row_format must be one of {', '.join(map(repr, ROW_FORMATS))}, got {name!r}")
    return found


def _round_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple

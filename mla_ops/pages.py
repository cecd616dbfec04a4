"""A pool of pages: the rules of one, and its rows as numbers and back, in plain torch.

A pool is `pages` `[num_pages, page_size, kv_group, row]`; a row number is `page * page_size + offset`. What the bytes
of a row mean is `mla_ops.row_formats`' business, which row a query wants is an operator's. The value of a row is
payload x scale in exact arithmetic, then the tail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad

from mla_ops.checks import check_rank, dtype_of, name_of, require, require_size, shape_of
from mla_ops.errors import InvalidInputError
from mla_ops.row_formats import MODEL1_TAIL, ROW_ALIGN, RowFormat, RowLayout

BYTE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)
# What a 16-bit tail, and the queries that meet it, may be.
TAIL_DTYPES = (torch.bfloat16, torch.float16)
SCALE_RULES = ("pow2", "amax")
ScaleRule = Literal["pow2", "amax"]

# The largest finite e4m3 number, and the code that is written for NaN.
MAX_E4M3 = 448.0
# Floors of a scale before it is rounded up to a power of two (FlashMLA's), of a maximum (vLLM's V4, whose scales are
# one byte), and of a scale that is any number (vLLM's; the smallest normal fp32).
MIN_POW2_SCALE = 1e-4
MIN_UE8M0_MAXIMUM = 1e-4
MIN_SCALE = 2.0**-126
UE8M0_BIAS = 127
UE8M0_NAN = 255
# fp32: bits below the exponent.
MANTISSA_BITS = 23


def check_widths(form: RowFormat, d_total: int, d_v: int) -> None:
    """Check the widths of a row, which may be symbols, and that the format has a row of them."""
    require(d_v >= 1, lambda: f"d_v must be at least 1, got {d_v}")
    require(d_v <= d_total, lambda: f"d_v must be at most d_total ({d_total}, the width of a row), got {d_v}")
    if form.payload == "all_but_tail":
        require(
            d_total > MODEL1_TAIL,
            lambda: f"d_total must be more than {MODEL1_TAIL} for row_format {form.name!r}, got {d_total}",
        )
    if form.scales_at == "page_end":
        data = form.layout(d_total, d_v).data_bytes
        require(
            data % ROW_ALIGN == 0,
            lambda: (
                f"d_total={d_total} makes rows of {data} bytes for row_format {form.name!r}, they must be a multiple "
                f'of {ROW_ALIGN}; use another width, or "fp8" or "fp8_all", which pad'
            ),
        )


def check_pages(
    pages: torch.Tensor, form: RowFormat, layout: RowLayout, dtype: torch.dtype, d_total: int, d_v: int
) -> None:
    """Check a pool against its format at given widths, which may be symbols.

    Args:
        pages: the pool, strided.
        form: the format of its rows.
        layout: what the format makes of these widths.
        dtype: of the channels of a dense row.
        d_total: width of a row, for messages.
        d_v: leading channels of it that are the value, for messages.

    Raises:
        InvalidInputError: dtype, shape, bytes of a row, strides or the storage offset are not those of such a pool.
    """
    if form.payload == "none":
        if pages.dtype != dtype:
            fix = 'name the format of quantised rows in row_format, such as "fp8"'
            if pages.dtype.is_floating_point and pages.dtype.itemsize > 1:
                fix = f"use pages.to(torch.{name_of(dtype)}), once"
            raise InvalidInputError(
                f'pages must be {name_of(dtype)} for row_format "dense", got {dtype_of(pages)}; {fix}'
            )
    elif pages.dtype not in BYTE_DTYPES:
        raise InvalidInputError(
            f"pages must be uint8, int8 or float8_e4m3fn for row_format {form.name!r}, got {dtype_of(pages)}; "
            f"{_fix_of(pages.dtype)}"
        )
    check_rank("pages", pages, 4, "[num_pages, page_size, kv_group, row]")
    itemsize = pages.element_size()
    got, want = pages.shape[-1] * itemsize, layout.row_bytes
    require(
        got == want,
        lambda: (
            f"a row of pages must have {want} bytes for row_format {form.name!r} at d_total={d_total}, d_v={d_v} "
            f"({_parts_of(layout)}), got {got}: pages {shape_of(pages)}; check the widths and the format"
        ),
    )
    require(pages.shape[1] >= 1, lambda: f"page_size must be at least 1, got pages {shape_of(pages)}")
    require(pages.shape[2] >= 1, lambda: f"kv_group must be at least 1, got pages {shape_of(pages)}")
    page, row, group, inner = pages.stride()
    require(inner == 1, lambda: f"the last stride of pages must be 1, got {inner}; use pages.contiguous(), once")
    if form.payload == "none":
        return
    for name, size in (("page", page), ("row", row), ("group", group), ("storage offset", pages.storage_offset())):
        if name in ("row", "group") and form.scales_at == "page_end":
            continue
        what = name if name == "storage offset" else f"{name} stride"
        require(
            size % ROW_ALIGN == 0,
            lambda what=what, size=size: (  # type: ignore[misc]
                f"the {what} of pages must be a multiple of {ROW_ALIGN} bytes, got {size}; allocate pages so"
            ),
        )
    if form.scales_at == "page_end":
        _check_page_end(pages, form, layout)


def _check_page_end(pages: torch.Tensor, form: RowFormat, layout: RowLayout) -> None:
    """Check what a format asks whose scales stand behind the rows of a page: one group, and pages in one piece."""
    _, page_size, kv_group, _ = pages.shape
    page, row, _, _ = pages.stride()
    require(kv_group == 1, lambda: f"kv_group must be 1 for row_format {form.name!r}, got pages {shape_of(pages)}")
    require(
        row == layout.row_bytes,
        lambda: (
            f"the rows of a page must follow each other for row_format {form.name!r}, whose scales stand at the end of "
            f"the page: the row stride must be {layout.row_bytes}, got {row}"
        ),
    )
    want = layout.page_bytes(page_size)
    require(
        page >= want,
        lambda: (
            f"a page of {page_size} rows takes {want} bytes for row_format {form.name!r}, which rounds it up to a "
            f"multiple of {layout.page_multiple}; the page stride of pages is {page}: allocate "
            "[num_pages, page bytes] and view the front of each page"
        ),
    )


def check_cache_scale(cache_scale: torch.Tensor | None, form: RowFormat, pages: torch.Tensor) -> None:
    """Check that there is a scale for the whole cache where the format has one, and only there."""
    if form.scales_at != "cache":
        if cache_scale is not None:
            raise InvalidInputError(
                f"cache_scale belongs to row_format 'fp8_cache', got one with {form.name!r}; leave it out"
            )
        return
    if cache_scale is None:
        raise InvalidInputError(
            f"cache_scale must be a tensor [1] or [kv_group] for row_format {form.name!r}, got None; a cache that was "
            "written without scales has torch.ones(1)"
        )
    if cache_scale.dtype != torch.float32:
        raise InvalidInputError(f"cache_scale must be float32, got {dtype_of(cache_scale)}; use cache_scale.float()")
    check_rank("cache_scale", cache_scale, 1, "[1] or [groups]")
    if cache_scale.shape[0] != 1:
        require_size("cache_scale", cache_scale, 0, pages.shape[2], "1 or kv_group of pages")


def _fix_of(dtype: torch.dtype) -> str:
    """Say what to do about pages of a dtype that is none of bytes."""
    if "fnuz" in name_of(dtype):
        return "its codes mean other numbers (240 is the largest): requantise to float8_e4m3fn"
    if "float8" in name_of(dtype):
        return (
            "it stores other numbers: requantise to float8_e4m3fn, or, if these are bytes, use pages.view(torch.uint8)"
        )
    if dtype.is_floating_point:
        return 'rows of plain channels have row_format "dense"'
    return "use pages.view(torch.uint8)"


def _parts_of(layout: RowLayout) -> str:
    if not layout.d_payload:
        return "plain channels"
    parts = f"{layout.d_payload} channels in e4m3, {layout.num_scales} scales, {layout.d_tail16} channels in 16 bits"
    return f"{parts}, each part rounded up"


class Rows(NamedTuple):
    """Rows of numbers as they are stored, part by part."""

    codes: torch.Tensor  # [..., d_payload] uint8, e4m3
    scales: torch.Tensor  # [..., num_scales] fp32, or uint8: ue8m0
    tail: torch.Tensor  # [..., d_tail16]


@dataclass(frozen=True)
class PagePool:
    """A pool that has passed `check_pages`, with its format: rows go in and come out by row number."""

    pages: torch.Tensor
    form: RowFormat
    layout: RowLayout
    cache_scale: torch.Tensor | None  # [1] or [kv_group]

    @property
    def num_rows(self) -> int:
        """Rows of all pages."""
        return self.pages.shape[0] * self.pages.shape[1]

    def holds(self, rows: torch.Tensor) -> torch.Tensor:
        """Return which row numbers are of a row in the pool."""
        return (rows >= 0) & (rows < self.num_rows)

    def read_into(self, out: torch.Tensor, rows: torch.Tensor, groups: torch.Tensor, tail_dtype: torch.dtype) -> None:
        """Write rows of the pool into `out` `[..., d_total]`, as numbers, rounded once to its dtype.

        Args:
            out: fp64 has the exact products, fp32 the products rounded once.
            rows: int64 row numbers, every one of them in the pool; broadcast with `groups`.
            groups: int64 KV groups.
            tail_dtype: of the 16-bit channels.
        """
        place = (rows // self.pages.shape[1], rows % self.pages.shape[1], groups)
        if self.form.payload == "none":
            out.copy_(self.pages[place])
            return
        d_payload, num_scales = self.layout.d_payload, self.layout.num_scales
        data, ends = (part.view(torch.int64)[place].view(torch.uint8) for part in self._parts())
        scales = ends[..., self.layout.scale_offset :]
        if self.form.scale == "fp32":
            scales = scales[..., : 4 * num_scales].view(torch.float32)
        elif self.form.scale == "ue8m0":
            scales = powers_of_two(scales[..., :num_scales])
        else:
            assert self.cache_scale is not None
            scales = self.cache_scale.expand(self.pages.shape[2])[groups].unsqueeze(-1)
        payload = out[..., :d_payload]
        payload.copy_(data[..., :d_payload].view(torch.float8_e4m3fn))
        payload.mul_(_per_channel(scales.to(out.dtype), self.form.tile, d_payload))
        tail = data[..., self.layout.tail_offset : self.layout.tail_offset + 2 * self.layout.d_tail16]
        out[..., d_payload:] = tail.view(tail_dtype)

    def write(self, rows: torch.Tensor, numbers: torch.Tensor, rule: str) -> None:
        """Store `numbers` `[n, kv_group, d_total]` as rows `[n]`; a row outside the pool is skipped.

        Of equal row numbers the last one is written, whole. Nothing else in the pool changes, padding of rows included.
        """
        rows = rows.long()
        in_order, order = rows.sort(stable=True)
        is_last = torch.ones_like(in_order, dtype=torch.bool)
        is_last[:-1] = in_order[1:] != in_order[:-1]
        chosen = order[is_last & self.holds(in_order)]
        rows, numbers = rows[chosen].unsqueeze(1), numbers[chosen]
        groups = torch.arange(self.pages.shape[2], device=rows.device)
        place = (rows // self.pages.shape[1], rows % self.pages.shape[1], groups)
        if self.form.payload == "none":
            self.pages[place] = numbers
            return
        stored = encoded(numbers, self.form, self.layout, rule, self.cache_scale)
        data, ends = self._parts()
        for part, offset, values in (
            (data, 0, stored.codes),
            (ends, self.layout.scale_offset, stored.scales),
            (data, self.layout.tail_offset, stored.tail),
        ):
            values = values.contiguous().view(torch.uint8)
            part[..., offset : offset + values.shape[-1]][place] = values

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, as bytes, what holds the data of each row and what holds its scales: views with a row per row."""
        pages, layout = self.pages.view(torch.uint8), self.layout
        if not layout.scale_bytes:
            return pages, pages
        num_pages, page_size, _, _ = pages.shape
        offset, page = pages.storage_offset(), pages.stride(0)

        def part(start: int, size: int) -> torch.Tensor:
            return pages.as_strided((num_pages, page_size, 1, size), (page, size, size, 1), offset + start)

        return part(0, layout.data_bytes), part(page_size * layout.data_bytes, layout.scale_bytes)


def encoded(
    numbers: torch.Tensor, form: RowFormat, layout: RowLayout, rule: str, cache_scale: torch.Tensor | None
) -> Rows:
    """Quantise `[..., kv_group, d_total]` by a writer's rule, byte for byte that writer's for finite numbers.

    Codes are the quotients rounded to nearest even, at most 448. A tile with NaN or infinity becomes NaN whole: scale
    and codes. With one scale for the cache that holds for each channel.
    """
    payload, tail = numbers[..., : layout.d_payload].float(), numbers[..., layout.d_payload :]
    if cache_scale is not None:
        quotients = payload / cache_scale.view(-1, 1)
        quotients.masked_fill_(~payload.isfinite(), torch.nan)
        return Rows(_codes(quotients), payload[..., :0], tail)
    missing = layout.num_scales * form.tile - layout.d_payload
    tiles = pad(payload, (0, missing)).unflatten(-1, (layout.num_scales, form.tile))
    maxima = tiles.abs().amax(-1)
    # A tensor: by a number, CUDA's division multiplies with its reciprocal, which is another scale in some tiles.
    largest = torch.full_like(maxima, MAX_E4M3)
    if form.scale == "ue8m0":
        scales = _rounded_up(maxima.clamp_min(MIN_UE8M0_MAXIMUM) / largest)
    elif rule == "pow2":
        scales = _rounded_up((maxima / largest).clamp_min(MIN_POW2_SCALE))
    else:
        scales = (maxima / largest).clamp_min(MIN_SCALE)
    scales.masked_fill_(~maxima.isfinite(), torch.nan)
    codes = _codes(tiles / scales.unsqueeze(-1)).flatten(-2)[..., : layout.d_payload]
    if form.scale == "ue8m0":
        exponents = (scales.view(torch.int32) >> MANTISSA_BITS).masked_fill_(scales.isnan(), UE8M0_NAN)
        return Rows(codes, exponents.to(torch.uint8), tail)
    return Rows(codes, scales, tail)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return the fp32 numbers that ue8m0 bytes stand for: 2^(byte - 127), NaN for 255."""
    bits = exponents.to(torch.int32) << MANTISSA_BITS
    bits.masked_fill_(exponents == 0, 1 << (MANTISSA_BITS - 1))  # 2^-127 is subnormal
    return bits.view(torch.float32).masked_fill(exponents == UE8M0_NAN, torch.nan)


def _rounded_up(scales: torch.Tensor) -> torch.Tensor:
    """Return the smallest powers of two that are not below normal fp32 numbers, taken from their bits."""
    below_one = (1 << MANTISSA_BITS) - 1
    return (scales.view(torch.int32) + below_one & ~below_one).view(torch.float32)


def _codes(quotients: torch.Tensor) -> torch.Tensor:
    """Return the e4m3 codes of numbers, one and the same for every NaN."""
    saturated = quotients.clamp(-MAX_E4M3, MAX_E4M3).masked_fill_(quotients.isnan(), torch.nan)
    return saturated.to(torch.float8_e4m3fn).view(torch.uint8)


def _per_channel(scales: torch.Tensor, tile: int, channels: int) -> torch.Tensor:
    """Return the scale of every channel; without tiles all channels have the one there is."""
    return scales.repeat_interleave(tile, -1)[..., :channels] if tile else scales

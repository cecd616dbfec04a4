"""The definition of the operator, written to be read and to be right, not to be fast: one row after the other.

It shares no line with what users run but the table of the formats. No product path imports this module.
"""

from __future__ import annotations

import torch

from mla_ops.row_formats import row_format as format_named


def read_rows_reference(
    pages: torch.Tensor,
    rows: torch.Tensor,
    d_total: int,
    d_v: int,
    row_format: str,
    dtype: torch.dtype,
    cache_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `[n, kv_group, d_total]` as `mla_ops.read_rows` documents it, in fp64: products of scales are exact.

    `dtype` is that of the 16-bit tail.
    """
    form = format_named(row_format)
    layout = form.layout(d_total, d_v, pages.dtype.itemsize)
    num_pages, page_size, kv_group, _ = pages.shape
    numbers = torch.zeros(len(rows), kv_group, d_total, dtype=torch.float64, device=pages.device)
    for i, row in enumerate(rows.tolist()):
        if not 0 <= row < num_pages * page_size:
            continue
        page, offset = divmod(row, page_size)
        if form.payload == "none":
            numbers[i] = pages[page, offset]
            continue
        for group in range(kv_group):
            if form.scales_at == "page_end":
                whole = pages[page].view(torch.uint8).flatten()
                data = whole[offset * layout.data_bytes :][: layout.data_bytes]
                scale_bytes = whole[page_size * layout.data_bytes + offset * layout.scale_bytes :]
                exponents = scale_bytes[: layout.num_scales].double()
                scales = torch.exp2(exponents - 127).masked_fill(exponents == 255, torch.nan)
            else:
                data = pages[page, offset, group].view(torch.uint8)
                if cache_scale is not None:
                    scales = cache_scale.expand(kv_group)[group].double().view(1)
                else:
                    scale_bytes = data[layout.scale_offset :][: 4 * layout.num_scales]
                    scales = scale_bytes.clone().view(torch.float32).double()
            codes = data[: layout.d_payload].view(torch.float8_e4m3fn).double()
            channel = torch.arange(layout.d_payload, device=pages.device)
            numbers[i, group, : layout.d_payload] = codes * scales[channel // form.tile if form.tile else 0 * channel]
            tail = data[layout.tail_offset :][: 2 * layout.d_tail16]
            numbers[i, group, layout.d_payload :] = tail.clone().view(dtype)
    return numbers

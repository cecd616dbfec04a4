"""The input rules of `mla::read_rows`: the same words in eager and at trace time; no tensor data is read."""

from __future__ import annotations

import torch

from mla_ops.checks import (
    check_index_dtype,
    check_int,
    check_rank,
    check_storage,
    check_string,
    check_tensor_types,
    name_of,
    require,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.read_rows.call import ReadRowsCall
from mla_ops.pages import TAIL_DTYPES, check_cache_scale, check_pages, check_widths
from mla_ops.row_formats import row_format


def check_argument_types(
    pages: object,
    rows: object,
    d_total: object,
    d_v: object,
    row_format: object,
    dtype: object,
    cache_scale: object,
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    check_tensor_types({"pages": pages, "rows": rows}, {"cache_scale": cache_scale})
    check_int("d_total", d_total)
    check_int("d_v", d_v)
    check_string("row_format", row_format)
    if not isinstance(dtype, torch.dtype):
        raise InvalidInputError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")


def check_inputs(call: ReadRowsCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::read_rows`; shapes in `mla_ops.read_rows`."""
    pages, rows, d_total, d_v, name, dtype, cache_scale = call
    form = row_format(name)
    check_storage(pages=pages, rows=rows, cache_scale=cache_scale)
    check_rank("rows", rows, 1, "[n]")
    check_index_dtype("rows", rows)
    check_widths(form, d_total, d_v)
    layout = form.layout(d_total, d_v, dtype.itemsize)
    if form.payload != "none" and dtype not in TAIL_DTYPES:
        if dtype != torch.float32:
            raise InvalidInputError(
                f"dtype must be bfloat16, float16 or float32 for row_format {name!r}, got {name_of(dtype)}"
            )
        require(
            layout.d_tail16 == 0,
            lambda: (
                f"dtype must be that in which the {layout.d_tail16} channels of the tail are stored, bfloat16 or "
                f"float16, for row_format {name!r} at d_total={d_total}, d_v={d_v}, got float32; cast the result"
            ),
        )
    check_pages(pages, form, layout, dtype, d_total, d_v)
    check_cache_scale(cache_scale, form, pages)

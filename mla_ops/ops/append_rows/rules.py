"""The input rules of `mla::append_rows`: the same words in eager and at trace time; no tensor data is read."""

from __future__ import annotations

from mla_ops.checks import (
    FLOAT_DTYPES,
    check_index_dtype,
    check_int,
    check_rank,
    check_storage,
    check_string,
    check_tensor_types,
    dtype_of,
    require_size,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.append_rows.call import AppendRowsCall
from mla_ops.pages import SCALE_RULES, TAIL_DTYPES, check_cache_scale, check_pages, check_widths
from mla_ops.row_formats import row_format


def check_argument_types(
    latent: object,
    tail: object,
    rows: object,
    pages: object,
    d_v: object,
    row_format: object,
    scale_rule: object,
    cache_scale: object,
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    check_tensor_types({"latent": latent, "rows": rows, "pages": pages}, {"tail": tail, "cache_scale": cache_scale})
    check_int("d_v", d_v)
    check_string("row_format", row_format)
    check_string("scale_rule", scale_rule)


def check_inputs(call: AppendRowsCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::append_rows`; shapes in `mla_ops.append_rows`."""
    latent, tail, rows, pages, d_v, name, scale_rule, cache_scale = call
    form = row_format(name)
    if scale_rule not in SCALE_RULES:
        raise InvalidInputError(f"scale_rule must be one of {', '.join(map(repr, SCALE_RULES))}, got {scale_rule!r}")
    if form.scale == "ue8m0" and scale_rule != "pow2":
        raise InvalidInputError(
            f"scale_rule must be 'pow2' for row_format {name!r}, whose scales are powers of two, got {scale_rule!r}"
        )
    check_storage(latent=latent, tail=tail, rows=rows, pages=pages, cache_scale=cache_scale)
    check_rank("latent", latent, 3, "[n, kv_group, d_v]" if tail is not None else "[n, kv_group, d_total]")
    dtypes = FLOAT_DTYPES if form.payload == "none" else TAIL_DTYPES
    if latent.dtype not in dtypes:
        raise InvalidInputError(
            f"latent must be {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} for row_format "
            f"{name!r}, got {dtype_of(latent)}; use latent.to(torch.bfloat16)"
        )
    check_rank("rows", rows, 1, "[n]")
    check_index_dtype("rows", rows)
    if tail is not None:
        check_rank("tail", tail, 3, "[n, kv_group, d_tail]")
        if tail.dtype != latent.dtype:
            raise InvalidInputError(
                f"tail must have the dtype of latent ({dtype_of(latent)}), got {dtype_of(tail)}; use "
                "tail.to(latent.dtype)"
            )
        require_size("latent", latent, -1, d_v, "d_v, beside a tail")
    check_widths(form, call.d_total, d_v)
    check_pages(pages, form, call.layout, latent.dtype, call.d_total, d_v)
    check_cache_scale(cache_scale, form, pages)
    require_size("rows", rows, 0, latent.shape[0], "n of latent")
    require_size("latent", latent, 1, pages.shape[2], "kv_group of pages")
    if tail is not None:
        require_size("tail", tail, 0, latent.shape[0], "n of latent")
        require_size("tail", tail, 1, pages.shape[2], "kv_group of pages")

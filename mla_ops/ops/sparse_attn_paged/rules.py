"""The input rules of `mla::sparse_attn_paged`: the same words in eager and at trace time; no tensor data is read."""

from __future__ import annotations

import math

import torch

from mla_ops.checks import (
    FLOAT_DTYPES,
    check_backend_type,
    check_index_dtype,
    check_int,
    check_lists,
    check_rank,
    check_scale,
    check_storage,
    check_string,
    check_tensor_types,
    dtype_of,
    name_of,
    require,
    require_size,
    shape_of,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.pages import TAIL_DTYPES, check_cache_scale, check_pages, check_widths
from mla_ops.row_formats import row_format


def check_argument_types(
    q: object,
    pages: object,
    indices: object,
    d_v: object,
    softmax_scale: object,
    row_format: object,
    block_table: object,
    seq_lens: object,
    topk_length: object,
    attn_sink: object,
    cache_scale: object,
    backend: object,
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    optional = {
        "block_table": block_table,
        "seq_lens": seq_lens,
        "topk_length": topk_length,
        "attn_sink": attn_sink,
        "cache_scale": cache_scale,
    }
    check_tensor_types({"q": q, "pages": pages, "indices": indices}, optional)
    check_int("d_v", d_v)
    check_scale("softmax_scale", softmax_scale)
    check_string("row_format", row_format)
    check_backend_type(backend)


def check_inputs(call: SparseAttnPagedCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::sparse_attn_paged`; shapes in its front door."""
    q, pages, d_v, name = call.q, call.pages, call.d_v, call.row_format
    form = row_format(name)
    check_storage(
        q=q, pages=pages, block_table=call.block_table, seq_lens=call.seq_lens, attn_sink=call.attn_sink,
        cache_scale=call.cache_scale,
    )  # fmt: skip
    if q.dim() not in (3, 4):
        raise InvalidInputError(
            f"q must be [batch, seq_q, heads, d_total] or [seq_q, heads, d_total], got {shape_of(q)}"
        )
    dtypes = FLOAT_DTYPES if form.payload == "none" else TAIL_DTYPES
    if q.dtype not in dtypes:
        raise InvalidInputError(
            f"q must be {' or '.join(map(name_of, dtypes))} for row_format {name!r}, got {dtype_of(q)}; use "
            "q.to(torch.bfloat16), or whatever 16-bit dtype the rows were written from"
        )
    *batch, _, heads, d_total = q.shape
    check_widths(form, d_total, d_v)
    check_pages(pages, form, call.layout, q.dtype, d_total, d_v)
    check_cache_scale(call.cache_scale, form, pages)
    kv_group = pages.shape[2]
    require(
        heads % kv_group == 0,
        lambda: f"heads must be a multiple of kv_group, got heads={heads} (q) and kv_group={kv_group} (pages)",
    )
    check_lists("q", q, "pages", pages, call.indices, call.topk_length)
    _check_table(call, batch)
    if call.attn_sink is not None:
        check_rank("attn_sink", call.attn_sink, 1, "[heads]")
        if call.attn_sink.dtype != torch.float32:
            raise InvalidInputError(f"attn_sink must be float32, got {dtype_of(call.attn_sink)}; use attn_sink.float()")
        require_size("attn_sink", call.attn_sink, 0, heads, "heads of q")
    if not math.isfinite(call.softmax_scale):
        raise InvalidInputError(f"softmax_scale must be finite, got {call.softmax_scale}")


def _check_table(call: SparseAttnPagedCall, batch: list[int]) -> None:
    """Check block_table and seq_lens; `batch` holds the batch of q, if q has one."""
    if call.block_table is None:
        if call.seq_lens is not None:
            raise InvalidInputError(
                "seq_lens bounds positions in a request, which block_table finds; without block_table indices are row "
                "numbers: leave seq_lens out, or pass block_table"
            )
        return
    if not batch:
        raise InvalidInputError(
            f"block_table has a row for each batch element, q must be [batch, seq_q, heads, d_total], got "
            f"{shape_of(call.q)}; use unsqueeze(0) on q, indices and topk_length"
        )
    check_rank("block_table", call.block_table, 2, "[batch, pages_per_request]")
    check_index_dtype("block_table", call.block_table)
    require_size("block_table", call.block_table, 0, batch[0], "the batch of q")
    if call.seq_lens is not None:
        check_rank("seq_lens", call.seq_lens, 1, "[batch]")
        check_index_dtype("seq_lens", call.seq_lens)
        require_size("seq_lens", call.seq_lens, 0, batch[0], "the batch of q")

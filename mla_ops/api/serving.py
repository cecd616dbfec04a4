"""The Python front doors of serving from pools of pages; their docstrings are the documentation of record."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from mla_ops.api.attention import SparseAttnOutput
from mla_ops.checks import (
    check_int,
    check_rank,
    check_storage,
    check_tensor_types,
    dtype_of,
    shape_of,
)
from mla_ops.errors import InvalidInputError, UnsupportedShardingError
from mla_ops.launching import filled_alike
from mla_ops.ops.append_rows import rules as append_rows_rules
from mla_ops.ops.read_rows import rules as read_rows_rules
from mla_ops.ops.sparse_attn_paged import backends
from mla_ops.ops.sparse_attn_paged.backends import Decision
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.ops.sparse_attn_paged.rules import check_argument_types, check_inputs
from mla_ops.pages import check_widths
from mla_ops.registration import APPEND_ROWS, READ_ROWS, SPARSE_ATTN_PAGED, cast_paged_by_autocast
from mla_ops.row_formats import row_format as format_named
from mla_ops.wrappers import is_dtensor


def sparse_attn_paged(
    q: torch.Tensor,
    pages: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float,
    row_format: str,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> SparseAttnOutput:
    """Attend each query to rows of a pool of pages, quantised or not: `sparse_attn` for a server's cache.

    The same operator as `torch.ops.mla.sparse_attn_paged`, with Python types checked. Not differentiable. A row number
    is `page * page_size + offset`; `page_size` is any number. The value of a row is payload times scale in exact
    arithmetic, then the tail; no scale is taken for a power of two. The host reads no data and there is no plan to
    make ahead: a captured call replays with other tables, lengths, indices and rows.

    Under autocast `q` is cast only where dense pages have the dtype of autocast; `pages` are never cast, and beside
    rows of bytes `q` keeps its dtype, which says how their 16-bit channels are read. Under vmap queries fold into one
    call; the pool is shared by all elements.

    Which slots are keys: slot `k` counts if it lies inside `topk_length` and its index is in `[0, num_pages *
    page_size)`. With `block_table` its position must lie in `[0, min(seq_lens[b], pages_per_request * page_size))` and
    the table's entry in `[0, num_pages)`. Everything else (-1, INT32_MAX, a row of the table that is -1 as in a padded
    batch) is no key and is never read, and rows that no slot names may hold anything, NaN scales included. A selected
    row with NaN in a code or a scale gives NaN. Results are the same bits for row numbers and for a table that names
    the same rows, and for padded pages.

    Args:
        q: `[batch, seq_q, heads, d_total]` or `[seq_q, heads, d_total]`, absorbed queries; bf16 or fp16, with "dense"
            fp32 and fp64 too (fp64 on the eager backend).
        pages: `[num_pages, page_size, kv_group, row]`. `row` is `bytes_per_row(...)` bytes as uint8, int8 or
            float8_e4m3fn, for "dense" `d_total` channels in `q.dtype`. `heads` is a multiple of `kv_group`. The last
            stride is 1; page, row and group strides of bytes are multiples of 16, so pages may be padded. "model1" and
            "mxfp8" keep the scales of a page behind its rows: one group, rows without padding, and a page stride of at
            least the rows rounded up to 576 ("model1") or 512 bytes.
        indices: `[batch, seq_q, kv_group, topk]`, without batch where `q` has none; int32 or int64. Row numbers, or
            with `block_table` positions in the request. A repeated index counts as often as it appears.
        d_v: leading channels of a row that are its value, `1 <= d_v <= d_total`.
        softmax_scale: multiplies the logits; any finite value, a constant in compiled code.
        row_format: how a row is stored: "dense"; "fp8", e4m3 with an fp32 scale for each 128 channels of the value, the
            tail in 16 bits (656 bytes at 576/512, as FlashMLA and vLLM have them); "fp8_all", the tail in e4m3 too;
            "fp8_cache", all channels in e4m3 with one scale for the cache; "model1" and "mxfp8", with power-of-two
            scales of one byte for each 64 or 32 channels.
        block_table: `[batch, pages_per_request]`, int32 or int64: the page of each stretch of `page_size` positions.
        seq_lens: `[batch]`, int32 or int64, only with `block_table`: positions from it on are no keys.
        topk_length: `[batch, seq_q]`, int32 or int64; only the first `topk_length` slots of a row count.
        attn_sink: `[heads]`, fp32 logit that joins the softmax denominator only.
        cache_scale: `[1]` or `[kv_group]`, fp32, for "fp8_cache" and only there.
        backend: "auto", or a name that `mla_ops.explain_sparse_attn_paged` lists; a named backend never falls back.

    Returns:
        `out` `[batch, seq_q, heads, d_v]` in `q.dtype`, contiguous, and `lse` `[batch, seq_q, heads]` in fp32, natural,
        sink excluded. A query without a key gets `out = 0`, `lse = -inf`: `(out, lse)` over a part of the rows is a
        partial result that `merge_partials` takes as it is.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before any work. While `torch.compile` traces, these
            errors reach the caller as torch's own `TorchRuntimeError` (a `RuntimeError`) with the words inside.
        QuantizedInputError: an argument is a quantised wrapper tensor; one of the above.
        NotDifferentiableError: an argument requires grad and gradients are enabled.
        UnknownBackendError: `backend` is no known name.
        UnsupportedProblemError: no backend runs it, or not the named one; the message lists each one's reasons.
        UnsupportedShardingError: an argument is a DTensor.

    Reference: DeepSeek-V3.2 technical report, DeepSeek Sparse Attention; `mla_ops.reference` is the definition.
    """
    check_argument_types(
        *(q, pages, indices, d_v, softmax_scale, row_format),
        *(block_table, seq_lens, topk_length, attn_sink, cache_scale, backend),
    )
    _refuse_dtensor("sparse_attn_paged", q)
    return SparseAttnOutput(
        *SPARSE_ATTN_PAGED(
            *(q, pages, indices, d_v, softmax_scale, row_format),
            *(block_table, seq_lens, topk_length, attn_sink, cache_scale, backend),
        )
    )


def append_rows(
    latent: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    *,
    d_v: int,
    row_format: str,
    tail: torch.Tensor | None = None,
    scale_rule: str = "pow2",
    cache_scale: torch.Tensor | None = None,
) -> None:
    """Quantise latent rows and write them into a pool of pages: row `rows[i]` from `latent[i]`.

    The operator `torch.ops.mla.append_rows`, with Python types checked and `tail` as a keyword. Not differentiable. A
    row number outside the pool writes nothing, which is how a padded batch says so. Of equal row numbers in one call
    one is written, whole: the last, but on a GPU with more than 1024 rows any of them. Nothing else in the pool
    changes, bytes that pad a row or a page included. With more than 1024 rows a GPU borrows 4 bytes for each row of the
    pool.

    In compiled code a write copies no pool, but write into a pool once per graph where you can: compilers of torch have
    copied all of it for a second write with a read between. Under `mode="reduce-overhead"` the pool must be a buffer or
    a parameter: a graph that changes one of its inputs is not captured. vmap is refused; flatten it into `n`.

    Args:
        latent: `[n, kv_group, d_total]`, or with `tail` `[n, kv_group, d_v]`; bf16 or fp16, for "dense" the dtype of
            `pages`.
        rows: `[n]`, int32 or int64: row numbers, `page * page_size + offset`.
        pages: `[num_pages, page_size, kv_group, row]`, written; see `sparse_attn_paged`.
        d_v: leading channels of a row that are its value.
        row_format: how a row is stored; see `sparse_attn_paged`.
        tail: `[n, kv_group, d_total - d_v]`, dtype of `latent`: spares joining the two.
        scale_rule: "pow2", the power of two not below `max(amax / 448, 1e-4)`, FlashMLA's rule, which every reader
            reads right; or "amax", `max(amax / 448, 2^-126)`, vLLM's, any fp32 number. Scales of one byte are powers of
            two not below `max(amax, 1e-4) / 448`, vLLM's rule for them, under "pow2" only. "dense" and "fp8_cache"
            choose no scale.
        cache_scale: `[1]` or `[kv_group]`, fp32, for "fp8_cache" and only there.

    Codes are the IEEE quotients by the scale, rounded to nearest even and at most 448. Finite rows are stored byte for
    byte as those writers store them. A tile with NaN or infinity gets a NaN scale and NaN codes, where theirs would
    hide it; in "fp8_cache" the code of that channel is NaN.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before anything is written.
        QuantizedInputError: an argument is a quantised wrapper tensor; one of the above.
        NotDifferentiableError: an argument requires grad and gradients are enabled: nothing is detached in silence.
        UnsupportedProblemError: no backend runs it; the message lists each one's reasons.
        UnsupportedShardingError: an argument is a DTensor.
    """
    append_rows_rules.check_argument_types(latent, tail, rows, pages, d_v, row_format, scale_rule, cache_scale)
    _refuse_dtensor("append_rows", latent)
    APPEND_ROWS(latent, tail, rows, pages, d_v, row_format, scale_rule, cache_scale)


def read_rows(
    pages: torch.Tensor,
    rows: torch.Tensor,
    *,
    d_total: int,
    d_v: int,
    row_format: str,
    dtype: torch.dtype,
    cache_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return rows of a pool of pages as numbers: payload times scale in fp32, rounded once to `dtype`, then the tail.

    The same operator as `torch.ops.mla.read_rows`, with Python types checked. Not differentiable. For prefill over a
    quantised prefix, to move rows between formats, and to look at a cache.

    Args:
        pages: `[num_pages, page_size, kv_group, row]`; see `sparse_attn_paged`.
        rows: `[n]`, int32 or int64 row numbers; one outside the pool gives a row of zeros.
        d_total: width of a row.
        d_v: leading channels of a row that are its value.
        row_format: how a row is stored; see `sparse_attn_paged`.
        dtype: of the result: bf16 or fp16, in which the tail is stored; fp32 too where a row has no 16-bit tail; for
            "dense" the dtype of `pages`.
        cache_scale: `[1]` or `[kv_group]`, fp32, for "fp8_cache" and only there.

    Returns:
        `[n, kv_group, d_total]` in `dtype`, contiguous. NaN where a code or its scale is.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before any work.
        QuantizedInputError: an argument is a quantised wrapper tensor; one of the above.
        NotDifferentiableError: an argument requires grad and gradients are enabled.
        UnsupportedProblemError: no backend runs it; the message lists each one's reasons.
        UnsupportedShardingError: an argument is a DTensor.
    """
    read_rows_rules.check_argument_types(pages, rows, d_total, d_v, row_format, dtype, cache_scale)
    _refuse_dtensor("read_rows", pages)
    numbers: torch.Tensor = READ_ROWS(pages, rows, d_total, d_v, row_format, dtype, cache_scale)
    return numbers


def merge_partials(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], attn_sink: torch.Tensor | None = None
) -> SparseAttnOutput:
    """Merge results over disjoint sets of keys (shards of a cache, two pools) into the result over all of them.

    Plain torch operators: `torch.compile` makes one kernel of them, and the host reads no data. Differentiable in every
    argument. A part without keys, `lse = -inf`, counts for nothing, whatever its `out` holds.

    Args:
        outs: one `[..., heads, d_v]` of each part, all of one dtype, computed without a sink.
        lses: one `[..., heads]` of each part, fp32 (fp64 beside fp64), natural logarithm, sink excluded. Other
            conventions must be converted before: FlashMLA's `+inf` of an empty row by `lse.masked_fill(lse == inf,
            -inf)`, or the merged row is NaN; base 2 by `lse * math.log(2)`.
        attn_sink: `[heads]`, fp32. The sink of the whole belongs here and to no part: the `lse` of a part lacks it,
            so that its `out` would be weighted wrongly, and given to every rank it would count once for each.

    Returns:
        `out` `[..., heads, d_v]` in the dtype of `outs`, and `lse` `[..., heads]`, sink excluded. Where every part is
        empty they are 0 and `-inf`, with zero gradients. A merge of merges is the merge of all.

    Raises:
        InvalidInputError: there are no parts, lists of different lengths, or parts that differ in shape, dtype, device.
    """
    _check_partials(outs, lses, attn_sink)
    compute = torch.promote_types(outs[0].dtype, torch.float32)
    is_empty = [lse == -torch.inf for lse in lses]
    all_empty = functools.reduce(torch.logical_and, is_empty)
    # Finite where all parts are empty, so that neither exp(-inf + inf) nor a gradient below becomes NaN.
    finite = [lse.masked_fill(all_empty, 0.0) for lse in lses]
    peak = functools.reduce(torch.maximum, finite).detach()
    weights = [torch.exp(lse - peak) for lse in finite]
    total = functools.reduce(torch.add, weights)
    lse = total.log() + peak
    # Divided by the sum, not by exp(lse): a large lse has lost the digits that are left of the sum.
    share = 1.0 / total
    if attn_sink is not None:
        # exp(lse) / (exp(lse) + exp(sink)), finite for infinite sinks.
        share = share * torch.sigmoid(lse - attn_sink)
    out = torch.zeros((), dtype=compute, device=lse.device)
    for part, weight, empty in zip(outs, weights, is_empty, strict=True):
        out = out + part.to(compute).masked_fill(empty.unsqueeze(-1), 0.0) * (weight * share).unsqueeze(-1)
    # Zeros already; masked, so that a NaN in their gradient reaches no sink.
    out = out.to(outs[0].dtype).masked_fill(all_empty.unsqueeze(-1), 0.0)
    return SparseAttnOutput(out, lse.masked_fill(all_empty, -torch.inf))


def bytes_per_row(row_format: str, d_total: int, d_v: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Return the bytes that a row of a KV group takes of a pool, scales and padding included: the last size of `pages`.

    Args:
        row_format: how a row is stored; see `sparse_attn_paged`.
        d_total: width of a row.
        d_v: leading channels of it that are the value.
        dtype: of the channels of a "dense" row; no other format asks.

    Raises:
        InvalidInputError: there is no such format, or it has no rows of these widths.
    """
    form = format_named(row_format)
    check_int("d_total", d_total)
    check_int("d_v", d_v)
    check_widths(form, d_total, d_v)
    return form.layout(d_total, d_v, dtype.itemsize).row_bytes


def explain_sparse_attn_paged(
    q: torch.Tensor,
    pages: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    row_format: str,
    softmax_scale: float = 1.0,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> Decision:
    """Say which backend would run `mla_ops.sparse_attn_paged` on these tensors, and what every other one lacks.

    Takes the arguments of `sparse_attn_paged`, whose values do not matter, and runs nothing. Print the result, or read
    its `backend` and `verdicts`; a refusal is `backend=None`, not an error.

    Raises:
        InvalidInputError: the arguments break the operator's contract.
        UnknownBackendError: `backend` is not a known name.
    """
    optional = (block_table, seq_lens, topk_length, attn_sink, cache_scale)
    check_argument_types(q, pages, indices, d_v, softmax_scale, row_format, *optional, backend)
    q = cast_paged_by_autocast(q, pages)
    call = SparseAttnPagedCall(q, pages, indices, d_v, softmax_scale, row_format, *optional)
    check_inputs(call)
    return backends.explain(call, backend)


def warmup_sparse_attn_paged(
    q: torch.Tensor,
    pages: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float,
    row_format: str,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Compile and load every kernel of `mla_ops.sparse_attn_paged` for a problem, so that a capture may follow.

    Takes the arguments of `sparse_attn_paged`: example tensors with the shapes, dtypes and strides to come; their
    values do not matter, and no row is read. Run it under the autocast to come.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.sparse_attn_paged` would for these
            tensors; InvalidInputError during a capture too.
    """
    optional = (block_table, seq_lens, topk_length, attn_sink, cache_scale)
    check_argument_types(q, pages, indices, d_v, softmax_scale, row_format, *optional, backend)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInputError(
            "warmup_sparse_attn_paged must run before a CUDA-graph capture, the current stream is capturing; move it"
        )
    with torch.no_grad():
        no_key = filled_alike(indices, -1)
        SPARSE_ATTN_PAGED(q, pages, no_key, d_v, softmax_scale, row_format, *optional, backend)


def _refuse_dtensor(name: str, tensor: torch.Tensor) -> None:
    if is_dtensor(tensor):
        raise UnsupportedShardingError(
            f"{name} takes plain tensors, got DTensors: a pool belongs to its rank; use .to_local(), and "
            "merge_partials for results over shards of a cache"
        )


def _check_partials(outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], attn_sink: torch.Tensor | None) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise InvalidInputError(
            f"outs and lses must have one tensor of each part, at least one, got {len(outs)} and {len(lses)}"
        )
    for name, tensors in (("outs", outs), ("lses", lses)):
        check_tensor_types({f"{name}[{i}]": t for i, t in enumerate(tensors)}, {"attn_sink": attn_sink})
    check_storage(
        **{f"{name}[{i}]": t for name, parts in (("outs", outs), ("lses", lses)) for i, t in enumerate(parts)}
    )
    check_storage(**{"outs[0]": outs[0], "attn_sink": attn_sink})
    first = outs[0]
    if not first.dtype.is_floating_point or first.dim() < 2:
        raise InvalidInputError(f"outs[0] must be [..., heads, d_v] of floats, got {dtype_of(first)} {shape_of(first)}")
    lse_dtype = torch.promote_types(first.dtype, torch.float32)
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.dtype != first.dtype:
            raise InvalidInputError(f"outs[{i}] must have the dtype of outs[0], {dtype_of(first)}, got {dtype_of(out)}")
        if lse.dtype not in (torch.float32, lse_dtype):
            raise InvalidInputError(f"lses[{i}] must be float32, got {dtype_of(lse)}; use .float()")
        check_rank(f"outs[{i}]", out, first.dim(), "those of outs[0]")
        check_rank(f"lses[{i}]", lse, first.dim() - 1, "[..., heads]")
        # Compared here and not by `require`, whose message Dynamo can't trace: this is no operator with a fake.
        if out.shape != first.shape:
            raise InvalidInputError(f"outs[{i}] must have the shape of outs[0], {shape_of(first)}, got {shape_of(out)}")
        if lse.shape != first.shape[:-1]:
            raise InvalidInputError(f"lses[{i}] must be outs[0] without d_v, {shape_of(first)}, got {shape_of(lse)}")
    if attn_sink is not None:
        check_rank("attn_sink", attn_sink, 1, "[heads]")
        if attn_sink.dtype != torch.float32:
            raise InvalidInputError(f"attn_sink must be float32, got {dtype_of(attn_sink)}; use attn_sink.float()")
        if attn_sink.shape[0] != first.shape[-2]:
            raise InvalidInputError(f"attn_sink must be [heads], got {shape_of(attn_sink)} for {shape_of(first)}")

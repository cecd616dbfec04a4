"""The Python front doors of sparse attention; their docstrings are the documentation of record."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils import _pytree

from mla_ops.checks import check_tensor_types
from mla_ops.errors import InvalidInputError
from mla_ops.launching import filled_alike
from mla_ops.ops.sparse_attn import backends
from mla_ops.ops.sparse_attn.backends import Decision, check_backend_name
from mla_ops.ops.sparse_attn.call import SparseAttnCall, Wanted
from mla_ops.ops.sparse_attn.rules import check_argument_types, check_constants, check_inputs, check_logical_dtypes
from mla_ops.registration import (
    SPARSE_ATTN,
    SPARSE_ATTN_BWD,
    SPARSE_ATTN_MAX_LOGITS,
    SPARSE_ATTN_SCALED,
    cast_by_autocast,
    open_wrapper,
)
from mla_ops.wrappers import dequantized, holds_wrapper, is_dtensor


class SparseAttnOutput(NamedTuple):
    """What `sparse_attn` returns."""

    out: torch.Tensor  # [batch, seq_q, heads, d_v], q.dtype, contiguous
    lse: torch.Tensor  # [batch, seq_q, heads], fp32, natural log, sink excluded


# An exported program that returns it can be saved. Private, like the absence of a public way for named tuples.
_pytree._register_namedtuple(SparseAttnOutput, serialized_type_name="mla_ops.SparseAttnOutput")


def sparse_attn(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
    quantized: str = "error",
) -> SparseAttnOutput:
    """Attend each query to the KV rows its indices name: token-level sparse MLA in absorbed form.

    The same operator as `torch.ops.mla.sparse_attn`, with Python types checked. Differentiable once in `q`, `kv` and
    `attn_sink`, through `out` and through `lse`, by `backward` as by `torch.func.grad`. Under autocast `q` and `kv` are
    cast, but for fp64. Every tensor may drop its leading `batch` dimension (all of them
    together), and may have any strides. All of them may be DTensors, sharded on batch, query rows or heads.

    Args:
        q: `[batch, seq_q, heads, d_total]`, absorbed queries; bf16, fp16 or fp32 (fp64 on the eager backend).
        kv: `[batch, seq_kv, kv_group, d_total]`, dtype of `q`. The whole row is the key, columns `[:d_v]` are the
            value. `heads` is a multiple of `kv_group` (1 in MLA); head `h` reads group `h // (heads // kv_group)`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64 positions in `seq_kv`, per batch element. Anything
            outside `[0, seq_kv)` means "no key" and is never read; a repeated index counts as often as it appears.
            Causality, windows and document boundaries are expressed here, by the caller.
        d_v: value width, `1 <= d_v <= d_total`.
        softmax_scale: multiplies the logits; any finite value, a constant in compiled code. There is no default:
            absorbed rows are wider than the trained head, so `d_total ** -0.5` is wrong. MLA's scale comes from
            `qk_nope_head_dim + qk_rope_head_dim`.
        topk_length: `[batch, seq_q]`, int32 or int64; only the first `topk_length` slots of a row count. Values are
            clamped to `[0, topk]`.
        attn_sink: `[heads]`, fp32 logit that joins the softmax denominator only. `-inf` has no effect, `+inf` makes
            the output exactly 0.
        backend: "auto", or a name from `mla_ops.backend_names()`; a named backend never falls back.
        quantized: what to do with a `q` or `kv` that is a quantised wrapper tensor (Transformer Engine, torchao):
            "error" raises, "dequantize" calls the wrapper's own method first, "fused" hands its e4m3 payload and fp32
            scales (one, or one per row) to the kernels: no dequantised copy is made, autograd saves the payload, and
            gradients are those of the dequantised tensors. On a GPU for bf16; see docs/quantized.md.

    Returns:
        `out` `[batch, seq_q, heads, d_v]` in `q.dtype`, contiguous, and `lse` `[batch, seq_q, heads]` in fp32, the
        natural log-sum-exp of the scaled logits of the valid slots, sink excluded. A query without a valid slot gets
        `out = 0`, `lse = -inf` and zero gradients. Logits and sums accumulate in fp32 (fp64 for fp64 inputs). A query
        whose every valid slot overflows to a logit of `-inf` gets the same `out` and `lse`, where the formula has NaN;
        its gradients are not defined.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before any work. While `torch.compile` traces, these
            errors reach the caller as torch's own `TorchRuntimeError` (a `RuntimeError`) with the words inside.
        QuantizedInputError: an argument is a quantised wrapper tensor; one of the above.
        UnknownBackendError: `backend` is no known name.
        UnsupportedProblemError: no backend runs it, or not the named one; the message lists each one's reasons.
        UnsupportedShardingError: DTensors are placed as no sharding rule serves.
        DoubleBackwardError: a gradient of a gradient was asked for (torch refuses it itself in a compiled forward).
        ForwardModeError: a forward-mode derivative was asked for.

    Reference: DeepSeek-V3.2 technical report, DeepSeek Sparse Attention; `mla_ops.reference` is the definition.
    """
    if quantized != "error":
        if quantized == "fused" and (holds_wrapper(q) or holds_wrapper(kv)):
            return _fused(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
        q, kv = dequantized(q, quantized), dequantized(kv, quantized)
    check_argument_types(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
    if is_dtensor(q) and not torch.compiler.is_compiling():
        # DTensor's dispatcher would run these rules in the fake and wrap what they raise in a RuntimeError.
        check_backend_name(backend)
        q, kv = cast_by_autocast(q, kv)
        check_inputs(SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink))
    return SparseAttnOutput(*SPARSE_ATTN(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend))


def _fused(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    backend: str,
) -> SparseAttnOutput:
    """Run sparse attention on wrappers, of which the operator reads the parts."""
    plain = {name: tensor for name, tensor in (("q", q), ("kv", kv)) if not holds_wrapper(tensor)}
    check_tensor_types({**plain, "indices": indices}, {"topk_length": topk_length, "attn_sink": attn_sink})
    check_constants(d_v, softmax_scale, backend)
    if not torch.is_autocast_enabled(indices.device.type):
        check_logical_dtypes(q, kv)
    dtype, q_scale, kv_scale = q.dtype, None, None
    # NOTE [Wrappers are opened by the autograd kernel]; what takes no gradient is opened here, except by Dynamo.
    if not torch.compiler.is_compiling():
        with_grad = torch.is_grad_enabled()
        if not (with_grad and q.requires_grad):
            q, q_scale = open_wrapper("q", q)
        if not (with_grad and kv.requires_grad):
            kv, kv_scale = open_wrapper("kv", kv)
    arguments = (indices, d_v, softmax_scale, dtype, topk_length, attn_sink, backend)
    return SparseAttnOutput(*SPARSE_ATTN_SCALED(q, q_scale, kv, kv_scale, *arguments))


def sparse_attn_max_logits(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the largest scaled logit that each query and head meets in `sparse_attn`; QK-clip needs no more.

    The same operator as `torch.ops.mla.sparse_attn_max_logits`. It gathers the rows and multiplies them with the query
    as the forward does and stops there. Not differentiable: the result never requires a gradient. `warmup` leaves its
    kernel out: where a CUDA-graph capture must not wait for a compiler, call it once before.

    Args:
        q: as in `sparse_attn`, as are all arguments.
        kv: `[batch, seq_kv, kv_group, d_total]`, dtype of `q`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64.
        d_v: does not change the result. The call runs wherever `sparse_attn` with this `d_v` runs.
        softmax_scale: multiplies the logits before the maximum: a negative scale picks the smallest product.
        topk_length: `[batch, seq_q]`, int32 or int64: the valid prefix of every row of `indices`.
        backend: "auto", or a name from `mla_ops.backend_names()`.

    Returns:
        `[batch, seq_q, heads]` in fp32, the shape of `lse`: the maximum over the valid slots, any `attn_sink` excluded.
        `-inf` for a query without a valid slot; NaN where the logit of a valid slot is NaN.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError, UnsupportedShardingError: as `sparse_attn`
            would.
    """
    check_argument_types(q, kv, indices, d_v, softmax_scale, topk_length, None, backend)
    if is_dtensor(q) and not torch.compiler.is_compiling():  # as in `sparse_attn`
        check_backend_name(backend)
        q, kv = cast_by_autocast(q, kv)
        check_inputs(SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length))
    max_logits: torch.Tensor = SPARSE_ATTN_MAX_LOGITS(q, kv, indices, d_v, softmax_scale, topk_length, backend)
    return max_logits


def explain(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float = 1.0,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> Decision:
    """Say which backend would run `mla_ops.sparse_attn` on these tensors, and what every other one lacks.

    Takes the arguments of `sparse_attn` (their values do not matter, `softmax_scale` not at all) and runs nothing.
    Under autocast it speaks of the dtype that autocast would cast to. Print the result, or read its `backend` and
    `verdicts`; a refusal is `backend=None`, not an error.

    Raises:
        InvalidInputError: the arguments break the operator's contract.
        UnknownBackendError: `backend` is not a known name.
    """
    check_argument_types(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
    q, kv = cast_by_autocast(q, kv)
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    check_inputs(call)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, kv, attn_sink))
    return backends.explain(call, backend, Wanted(q.requires_grad, kv.requires_grad) if needs_grad else None)


def warmup(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    needs_grad: bool = True,
) -> None:
    """Compile and load every kernel specialisation of a problem, so that a CUDA-graph capture may follow at once.

    Takes example tensors with the shapes, dtypes and strides to come; their values do not matter and are not read.
    Run it under the `torch.use_deterministic_algorithms` setting and the autocast to come. On a device without kernels
    to compile (the CPU) it checks the arguments and costs a forward and three backwards.

    Args:
        q: as in `mla_ops.sparse_attn`, as are all arguments up to `attn_sink`.
        kv: `[batch, seq_kv, kv_group, d_total]`, of the length to come only where the length decides the launch.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64; an expanded view if calls to come have one.
        d_v: value width.
        softmax_scale: a kernel is compiled for its sign.
        topk_length: `[batch, seq_q]` or None, whether calls to come have one.
        attn_sink: `[heads]` or None, whether calls to come have one.
        needs_grad: also warm the backward, for a loss on `out`, on `lse` and on both. Gradients are prepared for those
            of `q` and `kv` that require one, for both if neither does.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn` would for these tensors.
    """
    check_argument_types(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, "auto")
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInputError("warmup must run before a CUDA-graph capture, the current stream is capturing; move it")
    q, kv = cast_by_autocast(q, kv)
    with torch.no_grad():
        no_key = filled_alike(indices, -1)  # nothing is gathered
        arguments = (d_v, softmax_scale, topk_length, attn_sink)
        out, lse = SPARSE_ATTN(q, kv, no_key, *arguments)
        if not needs_grad:
            return
        either = q.requires_grad or kv.requires_grad
        needs = (q.requires_grad or not either, kv.requires_grad or not either)
        for dout, dlse in ((out, None), (None, lse), (out, lse)):
            SPARSE_ATTN_BWD(dout, dlse, q, kv, no_key, out, lse, *arguments, *needs)

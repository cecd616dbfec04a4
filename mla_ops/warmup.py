"""Make kernels ready before they are needed: nobody waits for a compiler inside a capture or a first request."""

from __future__ import annotations

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.registration import SPARSE_ATTN, SPARSE_ATTN_BWD
from mla_ops.validation import check_argument_types


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
    Run it under the `torch.use_deterministic_algorithms` setting to come. On a device without kernels to compile (the
    CPU) it checks the arguments and costs a forward and three backwards.

    Args:
        q: as in `mla_ops.sparse_attn`, as are all arguments up to `attn_sink`.
        kv: see there.
        indices: see there.
        d_v: see there.
        softmax_scale: see there.
        topk_length: see there.
        attn_sink: see there.
        needs_grad: also warm the backward, for a loss on `out`, on `lse` and on both. Gradients are prepared for those
            of `q` and `kv` that require one, for both if neither does.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn` would for these tensors.
    """
    check_argument_types(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, "auto")
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInputError("warmup must run before a CUDA-graph capture, the current stream is capturing; move it")
    with torch.no_grad():
        no_key = torch.full_like(indices, -1)  # of the strides of `indices`; nothing is gathered
        arguments = (d_v, softmax_scale, topk_length, attn_sink)
        out, lse = SPARSE_ATTN(q, kv, no_key, *arguments)
        if not needs_grad:
            return
        either = q.requires_grad or kv.requires_grad
        needs = (q.requires_grad or not either, kv.requires_grad or not either)
        for dout, dlse in ((out, None), (None, lse), (out, lse)):
            SPARSE_ATTN_BWD(dout, dlse, q, kv, no_key, out, lse, *arguments, *needs)

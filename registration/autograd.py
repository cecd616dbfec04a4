"""Autograd: the forward's formula is one call of the backward operator, and the backward operator has none.

The formula only calls operators, never a kernel, so it stays traceable and AOT autograd sees both graphs.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.errors import DoubleBackwardError
from mla_ops.registration.schema import SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS
from mla_ops.wrappers import is_dtensor

# Positions of the differentiable arguments in the schema of mla::sparse_attn.
_Q, _KV, _ATTN_SINK = 0, 1, 6
_NUM_ARGUMENTS = 8


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend = inputs
    ctx.save_for_backward(q, kv, indices, *output, topk_length, attn_sink)
    ctx.d_v = d_v  # a SymInt while tracing
    ctx.softmax_scale = softmax_scale
    ctx.backend = backend
    ctx.set_materialize_grads(False)  # an unused output costs nothing: its gradient arrives as None


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grads: list[torch.Tensor | None] = [None] * _NUM_ARGUMENTS
    if dout is None and dlse is None:
        return tuple(grads)
    q, kv, indices, out, lse, topk_length, attn_sink = ctx.saved_tensors
    if dout is None and is_dtensor(q):
        # DTensor in torch 2.11 reads the mesh off the first argument, and fails on None.
        dout = torch.zeros_like(out)
    need_dq, need_dkv = ctx.needs_input_grad[_Q], ctx.needs_input_grad[_KV]
    dq, dkv, dsink = SPARSE_ATTN_BWD(
        dout,
        dlse,
        q,
        kv,
        indices,
        out,
        lse,
        ctx.d_v,
        ctx.softmax_scale,
        topk_length,
        attn_sink,
        need_dq,
        need_dkv,
        ctx.backend,
    )
    if need_dq:
        grads[_Q] = dq
    if need_dkv:
        grads[_KV] = dkv
    # The dispatcher strips trailing defaults, so without a sink the tuple may end before its position.
    if attn_sink is not None and ctx.needs_input_grad[_ATTN_SINK]:
        grads[_ATTN_SINK] = dsink
    return tuple(grads)


def _refuse_double_backward(ctx: Any, *grads: torch.Tensor | None) -> None:
    # Without a formula here torch only warns and returns zeros as the second derivative.
    raise DoubleBackwardError(
        "mla::sparse_attn is differentiable once, a gradient of its gradient was asked for; drop create_graph=True, "
        "or compute with mla_ops.reference.sparse_attn_reference"
    )


def _max_logits_without_grad(*args: Any) -> Any:
    # Not differentiable, and said so: without a kernel at this key torch warns, and only when a backward passes.
    with torch._C._AutoDispatchBelowAutograd():
        return SPARSE_ATTN_MAX_LOGITS(*args)


def register(library: torch.library.Library) -> None:
    """Attach the formulas to the operators of `library`."""
    torch.library.register_autograd("mla::sparse_attn", _backward, setup_context=_setup_context, lib=library)
    torch.library.register_autograd("mla::sparse_attn_bwd", _refuse_double_backward, lib=library)
    library.impl("sparse_attn_max_logits", _max_logits_without_grad, "Autograd")

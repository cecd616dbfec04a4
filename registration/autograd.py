"""Autograd: the forward's formula is one call of the backward operator, and the backward operator has none.

The formula only calls operators, never a kernel, so it stays traceable and AOT autograd sees both graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from mla_ops.errors import DoubleBackwardError, ForwardModeError
from mla_ops.registration.schema import SPARSE_ATTN, SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS
from mla_ops.wrappers import is_dtensor


class _SparseAttn(torch.autograd.Function):
    """The forward and its formula.

    Not made by `torch.library.register_autograd`, whose kernel reads the schema in every call: it took 20 of the 57 us
    that a call with gradients needed on the host. This one calls what comes after autograd in the same way.
    """

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _below_autograd(SPARSE_ATTN, keys, *arguments)
        q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend = arguments
        ctx.save_for_backward(q, kv, indices, out, lse, topk_length, attn_sink)
        ctx.d_v = d_v  # a SymInt while tracing
        ctx.softmax_scale = softmax_scale
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # an unused output costs nothing: its gradient arrives as None
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _, need_dq, need_dkv, _, _, _, _, need_dsink, _ = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, kv, indices, out, lse, topk_length, attn_sink = ctx.saved_tensors
        if dout is None and is_dtensor(q):
            # DTensor in torch 2.11 reads the mesh off the first argument, and fails on None.
            dout = torch.zeros_like(out)
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
        dq, dkv, dsink = (dq if need_dq else None), (dkv if need_dkv else None), (dsink if need_dsink else None)
        return None, dq, dkv, None, None, None, None, dsink, None


def _sparse_attn(
    keys: torch._C.DispatchKeySet,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> Any:
    _refuse_forward_mode(q, kv, attn_sink)
    arguments = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
    if torch.is_grad_enabled() and (
        q.requires_grad or kv.requires_grad or (attn_sink is not None and attn_sink.requires_grad)
    ):
        return _SparseAttn.apply(keys, *arguments)  # type: ignore[no-untyped-call]
    return _below_autograd(SPARSE_ATTN, keys, *arguments)


def _below_autograd(op: torch._ops.OpOverload, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """Run what comes after autograd in a call of `op` with these dispatch keys."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _refuse_forward_mode(*tensors: torch.Tensor | None) -> None:
    # Without this the tangents end here, and torch takes the derivative for zero.
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ForwardModeError(
                "mla::sparse_attn is differentiable in reverse mode, an argument with a forward-mode tangent arrived; "
                "use backward() or torch.autograd.grad, or compute with mla_ops.reference.sparse_attn_reference"
            )


def _refuse_double_backward(ctx: Any, *grads: torch.Tensor | None) -> None:
    # Without a formula here torch only warns and returns zeros as the second derivative.
    raise DoubleBackwardError(
        "mla::sparse_attn is differentiable once, a gradient of its gradient was asked for; drop create_graph=True, "
        "or compute with mla_ops.reference.sparse_attn_reference"
    )


def _max_logits_without_grad(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    # Not differentiable, and said so: without a kernel at this key torch warns, and only when a backward passes.
    _refuse_forward_mode(*arguments[:2])  # q and kv
    return _below_autograd(SPARSE_ATTN_MAX_LOGITS, keys, *arguments)


def register(library: torch.library.Library) -> None:
    """Attach the formulas to the operators of `library`."""
    library.impl("sparse_attn", _sparse_attn, "Autograd", with_keyset=True)
    torch.library.register_autograd("mla::sparse_attn_bwd", _refuse_double_backward, lib=library)
    library.impl("sparse_attn_max_logits", _max_logits_without_grad, "Autograd", with_keyset=True)

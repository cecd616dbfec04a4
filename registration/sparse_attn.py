"""`mla::sparse_attn`, its backward and its maximum of the logits, as torch sees them: schema, fake, kernel, autograd.

The forward's formula is one call of the backward operator, and the backward operator's formula is a refusal. A formula
only calls operators, never a kernel, so it stays traceable and AOT autograd sees both graphs.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_ops import settings
from mla_ops.ops.sparse_attn.backends import check_backend_name, plan_of
from mla_ops.ops.sparse_attn.call import Gradients, Results, SparseAttnCall, Wanted
from mla_ops.ops.sparse_attn.rules import check_bwd_inputs, check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import (
    BELOW_AUTOGRAD,
    Formula,
    below_autograd,
    last_derivative,
    next_level,
    record,
    refuse_forward_mode,
    without_grad,
)
from mla_ops.registration.library import LIBRARY, define
from mla_ops.wrappers import is_dtensor

SPARSE_ATTN = define(
    "sparse_attn(Tensor q, Tensor kv, Tensor indices, SymInt d_v, float softmax_scale, "
    'Tensor? topk_length=None, Tensor? attn_sink=None, str backend="auto") -> (Tensor out, Tensor lse)'
)
SPARSE_ATTN_BWD = define(
    "sparse_attn_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor kv, Tensor indices, Tensor out, Tensor lse, "
    "SymInt d_v, float softmax_scale, Tensor? topk_length=None, Tensor? attn_sink=None, "
    'bool need_dq=True, bool need_dkv=True, str backend="auto") -> (Tensor dq, Tensor dkv, Tensor dsink)'
)
# d_v does not change the result; with it the call is launched, or refused, as the forward beside it.
SPARSE_ATTN_MAX_LOGITS = define(
    "sparse_attn_max_logits(Tensor q, Tensor kv, Tensor indices, SymInt d_v, float softmax_scale, "
    'Tensor? topk_length=None, str backend="auto") -> Tensor'
)

# Fakes: result shapes, dtypes and strides from symbolic sizes, plus the contract's checks. Nothing in them branches on
# a symbolic size, and no kernel limit appears in them: both would specialise a graph.


def sparse_attn_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fake of `mla::sparse_attn`."""
    tracing.prepare()
    check_backend_name(backend)
    check_inputs(SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink))
    return q.new_empty((*q.shape[:-1], d_v)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def sparse_attn_bwd_fake(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake of `mla::sparse_attn_bwd`; a gradient that is not needed is an empty `[0]` tensor."""
    tracing.prepare()
    check_backend_name(backend)
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    check_inputs(call)
    check_bwd_inputs(call, Results(out, lse), Gradients(dout, dlse))
    dq = q.new_empty(q.shape if need_dq else 0)
    dkv = kv.new_empty(kv.shape if need_dkv else 0)
    dsink = q.new_empty(0 if attn_sink is None else attn_sink.shape, dtype=torch.float32)
    return dq, dkv, dsink


def sparse_attn_max_logits_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Fake of `mla::sparse_attn_max_logits`."""
    tracing.prepare()
    check_backend_name(backend)
    check_inputs(SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length))
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


# Kernels: plan, run. One function serves every device; the plan knows the rest.


def sparse_attn_impl(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn` for every device."""
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    plan = plan_of("forward", call, backend, needs_grad=BELOW_AUTOGRAD.needs_grad)
    return plan.backend.forward(call, plan.launch)


def sparse_attn_bwd_impl(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn_bwd` for every device."""
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    results, gradients, wanted = Results(out, lse), Gradients(dout, dlse), Wanted(need_dq, need_dkv)
    plan = plan_of("backward", call, backend, results=results, gradients=gradients, wanted=wanted)
    return plan.backend.backward(call, results, gradients, wanted, plan.launch)


def sparse_attn_max_logits_impl(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel of `mla::sparse_attn_max_logits` for every device."""
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length)
    plan = plan_of("max_logits", call, backend)
    return plan.backend.max_logits(call, plan.launch)


class _SparseAttn(Formula):
    """The forward and its formula.

    Not made by `torch.library.register_autograd`, whose kernel reads the schema in every call: it took 20 of the 57 us
    that a call with gradients needed on the host. This one calls what comes after autograd in the same way.
    """

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        BELOW_AUTOGRAD.needs_grad = True
        try:
            out, lse = next_level(SPARSE_ATTN, keys, *arguments)
        finally:
            BELOW_AUTOGRAD.needs_grad = False
        q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend = arguments
        ctx.save_for_backward(q, kv, indices, out, lse, topk_length, attn_sink)
        ctx.d_v = d_v  # a SymInt while tracing
        ctx.softmax_scale = softmax_scale
        ctx.backend = backend
        ctx.settings = settings.current()
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
        # On CUDA a thread of autograd's runs this, which knows nothing of an override in the thread of the forward.
        with settings.use(ctx.settings):
            dq, dkv, dsink = SPARSE_ATTN_BWD(
                *(dout, dlse, q, kv, indices, out, lse, ctx.d_v, ctx.softmax_scale, topk_length, attn_sink),
                *(need_dq, need_dkv, ctx.backend),
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
    refuse_forward_mode(SPARSE_ATTN, q, kv, attn_sink)
    arguments = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
    if torch.is_grad_enabled() and (
        q.requires_grad or kv.requires_grad or (attn_sink is not None and attn_sink.requires_grad)
    ):
        return record(_SparseAttn, keys, arguments)
    return below_autograd(SPARSE_ATTN, keys, *arguments)


def register() -> None:
    """Attach fakes, kernels and formulas to the operators.

    Kernels go under the key that every device and layout falls back to, not CPU and CUDA alone: a sparse or foreign
    tensor must meet our checks and dispatch's reasons, not the dispatcher's list of keys.
    """
    torch.library.register_fake("mla::sparse_attn", sparse_attn_fake, lib=LIBRARY)
    torch.library.register_fake("mla::sparse_attn_bwd", sparse_attn_bwd_fake, lib=LIBRARY)
    torch.library.register_fake("mla::sparse_attn_max_logits", sparse_attn_max_logits_fake, lib=LIBRARY)
    LIBRARY.impl("sparse_attn", sparse_attn_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("sparse_attn_bwd", sparse_attn_bwd_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("sparse_attn_max_logits", sparse_attn_max_logits_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("sparse_attn", _sparse_attn, "Autograd", with_keyset=True)
    LIBRARY.impl("sparse_attn_bwd", last_derivative(SPARSE_ATTN_BWD, SPARSE_ATTN), "Autograd", with_keyset=True)
    LIBRARY.impl("sparse_attn_max_logits", without_grad(SPARSE_ATTN_MAX_LOGITS), "Autograd", with_keyset=True)

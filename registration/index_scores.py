"""`mla::index_scores` and its backward, as torch sees them: schema, fake, kernel, autograd.

The forward's formula is one call of the backward operator, and the backward operator's formula is a refusal.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_ops import settings
from mla_ops.ops.index_scores.backends import check_backend_name, plan_of
from mla_ops.ops.index_scores.call import IndexScoresCall, Wanted
from mla_ops.ops.index_scores.rules import check_bwd_inputs, check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import (
    BELOW_AUTOGRAD,
    Formula,
    below_autograd,
    last_derivative,
    next_level,
    record,
    refuse_forward_mode,
)
from mla_ops.registration.library import LIBRARY, define

INDEX_SCORES = define(
    "index_scores(Tensor q_idx, Tensor k_idx, Tensor weights, Tensor indices, Tensor? topk_length=None, "
    'bool relu=True, str backend="auto") -> Tensor scores'
)
INDEX_SCORES_BWD = define(
    "index_scores_bwd(Tensor dscores, Tensor q_idx, Tensor k_idx, Tensor weights, Tensor indices, "
    "Tensor? topk_length=None, bool relu=True, bool need_dq=True, bool need_dk=True, bool need_dw=True, "
    'str backend="auto") -> (Tensor dq, Tensor dk, Tensor dw)'
)


def index_scores_fake(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Fake of `mla::index_scores`: the shape of its result, and the contract's checks."""
    tracing.prepare()
    check_backend_name(backend)
    check_inputs(IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu))
    return q_idx.new_empty(indices.shape, dtype=torch.float32)


def index_scores_bwd_fake(
    dscores: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dw: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake of `mla::index_scores_bwd`; a gradient that is not needed is an empty `[0]` tensor."""
    tracing.prepare()
    check_backend_name(backend)
    call = IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu)
    check_inputs(call)
    check_bwd_inputs(call, dscores)
    dq = q_idx.new_empty(q_idx.shape if need_dq else 0)
    dk = k_idx.new_empty(k_idx.shape if need_dk else 0)
    dw = weights.new_empty(weights.shape if need_dw else 0)
    return dq, dk, dw


def index_scores_impl(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel of `mla::index_scores` for every device."""
    call = IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu)
    plan = plan_of("forward", call, backend, needs_grad=BELOW_AUTOGRAD.needs_grad)
    return plan.backend.forward(call, plan.launch)


def index_scores_bwd_impl(
    dscores: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dw: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel of `mla::index_scores_bwd` for every device."""
    call = IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu)
    wanted = Wanted(need_dq, need_dk, need_dw)
    plan = plan_of("backward", call, backend, dscores=dscores, wanted=wanted)
    return plan.backend.backward(call, dscores, wanted, plan.launch)


class _IndexScores(Formula):
    """The forward and its formula."""

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> torch.Tensor:
        BELOW_AUTOGRAD.needs_grad = True
        try:
            scores: torch.Tensor = next_level(INDEX_SCORES, keys, *arguments)
        finally:
            BELOW_AUTOGRAD.needs_grad = False
        q_idx, k_idx, weights, indices, topk_length, relu, backend = arguments
        ctx.save_for_backward(q_idx, k_idx, weights, indices, topk_length)
        ctx.relu = relu
        ctx.backend = backend
        ctx.settings = settings.current()
        return scores

    @staticmethod
    def backward(ctx: Any, dscores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, *needs, _, _, _, _ = ctx.needs_input_grad
        # On CUDA a thread of autograd's runs this, which knows nothing of an override in the thread of the forward.
        with settings.use(ctx.settings):
            grads = INDEX_SCORES_BWD(dscores, *ctx.saved_tensors, ctx.relu, *needs, ctx.backend)
        dq, dk, dw = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return None, dq, dk, dw, None, None, None, None


def _index_scores(
    keys: torch._C.DispatchKeySet,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> Any:
    refuse_forward_mode(INDEX_SCORES, q_idx, k_idx, weights)
    arguments = (q_idx, k_idx, weights, indices, topk_length, relu, backend)
    if torch.is_grad_enabled() and (q_idx.requires_grad or k_idx.requires_grad or weights.requires_grad):
        return record(_IndexScores, keys, arguments)
    return below_autograd(INDEX_SCORES, keys, *arguments)


def register() -> None:
    """Attach fakes, kernels and formulas to the operators."""
    torch.library.register_fake("mla::index_scores", index_scores_fake, lib=LIBRARY)
    torch.library.register_fake("mla::index_scores_bwd", index_scores_bwd_fake, lib=LIBRARY)
    LIBRARY.impl("index_scores", index_scores_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("index_scores_bwd", index_scores_bwd_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("index_scores", _index_scores, "Autograd", with_keyset=True)
    LIBRARY.impl("index_scores_bwd", last_derivative(INDEX_SCORES_BWD, INDEX_SCORES), "Autograd", with_keyset=True)

"""`mla::index_loss_dense`, as torch sees it: schema, fake, kernel, autograd, autocast, vmap, FLOP counts.

The operator returns its gradients beside the loss, because one pass over all pairs gives both. They are results that
nobody differentiates; the formula multiplies them with what arrives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.ops.index_loss_dense.call import IndexLossDenseCall
from mla_ops.ops.index_loss_dense.eager import index_loss_dense
from mla_ops.ops.index_loss_dense.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import (
    Formula,
    below_autograd,
    last_derivative,
    next_level,
    record,
    refuse_forward_mode,
)
from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.library import LIBRARY, define
from mla_ops.registration.transforms import (
    AUTOCAST_DEVICES,
    cast_by_autocast,
    cast_index_inputs_by_autocast,
    preserving_kernel,
    vmap_by_loop,
)

INDEX_LOSS_DENSE = define(
    "index_loss_dense(Tensor q, Tensor k, Tensor lse, Tensor q_idx, Tensor k_idx, Tensor weights, Tensor row_weight, "
    "float softmax_scale, Tensor? starts=None, Tensor? ends=None, bool causal=True, bool relu=True, "
    "bool need_grad=True) -> (Tensor loss, Tensor dq, Tensor dk, Tensor dw)"
)
# The gradients of the forward, times what arrives. It takes the index tensors too: through them a second derivative,
# which does not exist, is asked for.
INDEX_LOSS_DENSE_BWD = define(
    "index_loss_dense_bwd(Tensor dloss, Tensor dq, Tensor dk, Tensor dw, Tensor q_idx, Tensor k_idx, Tensor weights) "
    "-> (Tensor, Tensor, Tensor)"
)


def index_loss_dense_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    row_weight: torch.Tensor,
    softmax_scale: float,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    need_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake of `mla::index_loss_dense`; gradients that are not needed are empty `[0]` tensors."""
    tracing.prepare()
    check_inputs(
        IndexLossDenseCall(
            q, k, lse, q_idx, k_idx, weights, row_weight, softmax_scale, starts, ends, causal=causal, relu=relu
        )
    )
    dq, dk, dw = (t.new_empty(t.shape if need_grad else 0) for t in (q_idx, k_idx, weights))
    return q.new_empty((), dtype=torch.float32), dq, dk, dw


def index_loss_dense_impl(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    row_weight: torch.Tensor,
    softmax_scale: float,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    need_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel of `mla::index_loss_dense` for every device."""
    call = IndexLossDenseCall(
        q, k, lse, q_idx, k_idx, weights, row_weight, softmax_scale, starts, ends, causal=causal, relu=relu
    )
    check_inputs(call)
    return index_loss_dense(call, need_grad)


def index_loss_dense_bwd_impl(
    dloss: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dw: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel of `mla::index_loss_dense_bwd` for every device, and its fake."""
    return dq * dloss, dk * dloss, dw * dloss


class _IndexLossDense(Formula):
    """The forward and its formula."""

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[torch.Tensor, ...]:
        loss, dq, dk, dw = next_level(INDEX_LOSS_DENSE, keys, *arguments)
        ctx.save_for_backward(dq, dk, dw, *arguments[3:6])
        ctx.mark_non_differentiable(dq, dk, dw)
        ctx.need_grad = arguments[-1]
        return loss, dq, dk, dw

    @staticmethod
    def backward(ctx: Any, dloss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if not ctx.need_grad:
            raise InvalidInputError("need_grad must be True for a backward, got False; gradients were not computed")
        grads = INDEX_LOSS_DENSE_BWD(dloss, *ctx.saved_tensors)
        needed = ctx.needs_input_grad[4:7]
        dq, dk, dw = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return None, None, None, None, dq, dk, dw, *[None] * 7


def _index_loss_dense(
    keys: torch._C.DispatchKeySet,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    row_weight: torch.Tensor,
    softmax_scale: float,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    need_grad: bool = True,
) -> Any:
    refuse_forward_mode(INDEX_LOSS_DENSE, q, k, lse, q_idx, k_idx, weights, row_weight)
    # No gradient passes to them, so their graph is none of the formula's: a backward of the loss alone would free it.
    q, k, lse = q.detach(), k.detach(), lse.detach()
    arguments = (q, k, lse, q_idx, k_idx, weights, row_weight, softmax_scale, starts, ends, causal, relu, need_grad)
    if torch.is_grad_enabled() and (q_idx.requires_grad or k_idx.requires_grad or weights.requires_grad):
        return record(_IndexLossDense, keys, arguments)
    return below_autograd(INDEX_LOSS_DENSE, keys, *arguments)


def _casting_kernel(device_type: str) -> Any:
    def cast_and_call(
        q: torch.Tensor,
        k: torch.Tensor,
        lse: torch.Tensor,
        q_idx: torch.Tensor,
        k_idx: torch.Tensor,
        weights: torch.Tensor,
        *args: Any,
    ) -> Any:
        q, k = cast_by_autocast(q, k)
        q_idx, k_idx, weights = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
        with torch.autocast(device_type, enabled=False):
            return INDEX_LOSS_DENSE(q, k, lse, q_idx, k_idx, weights, *args)

    return cast_and_call


def _vmap_index_loss_dense(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return vmap_by_loop(INDEX_LOSS_DENSE, index_loss_dense_fake, info, in_dims, args)


def _vmap_index_loss_dense_bwd(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return vmap_by_loop(INDEX_LOSS_DENSE_BWD, index_loss_dense_bwd_impl, info, in_dims, args)


def index_loss_dense_flops(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    lse_shape: Sequence[int],
    q_idx_shape: Sequence[int],
    k_idx_shape: Sequence[int],
    weights_shape: Sequence[int],
    row_weight_shape: Sequence[int],
    softmax_scale: float,
    starts_shape: Sequence[int] | None = None,
    ends_shape: Sequence[int] | None = None,
    causal: bool = True,
    relu: bool = True,
    need_grad: bool = True,
    *args: Any,
    **kwargs: Any,
) -> int:
    """FLOPs of attention's products and of the indexer's, with two more of the latter for each gradient.

    Bounds are data, and the causal one halves nothing, as in torch's own formula of attention.
    """
    index_products = 4 if need_grad else 1  # scores; scores again, dq, dk
    return 2 * k_shape[-3] * (math.prod(q_shape) + index_products * math.prod(q_idx_shape))


def register() -> None:
    """Attach fakes, kernels, formulas and transforms to the operators."""
    torch.library.register_fake("mla::index_loss_dense", index_loss_dense_fake, lib=LIBRARY)
    torch.library.register_fake("mla::index_loss_dense_bwd", index_loss_dense_bwd_impl, lib=LIBRARY)
    LIBRARY.impl("index_loss_dense", index_loss_dense_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("index_loss_dense_bwd", index_loss_dense_bwd_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("index_loss_dense", _index_loss_dense, "Autograd", with_keyset=True)
    refusal = last_derivative(INDEX_LOSS_DENSE_BWD, INDEX_LOSS_DENSE)
    LIBRARY.impl("index_loss_dense_bwd", refusal, "Autograd", with_keyset=True)
    for device_type in AUTOCAST_DEVICES:
        key = f"Autocast{device_type.upper()}"
        LIBRARY.impl("index_loss_dense", _casting_kernel(device_type), key)
        LIBRARY.impl("index_loss_dense_bwd", preserving_kernel(INDEX_LOSS_DENSE_BWD, device_type), key)
    torch.library.register_vmap("mla::index_loss_dense", _vmap_index_loss_dense, lib=LIBRARY)
    torch.library.register_vmap("mla::index_loss_dense_bwd", _vmap_index_loss_dense_bwd, lib=LIBRARY)
    register_flop_formulas({torch.ops.mla.index_loss_dense: index_loss_dense_flops})

"""What the autograd kernels of every operator are made of: formulas of one level, and refusals of what has none.

NOTE [The dispatcher calls an autograd kernel once for each level]
Under torch.func.grad, vjp, vmap and their nestings the dispatcher runs an autograd kernel once for every level that
differentiates, with that level's tensors, and what the kernel calls below autograd is the next level. So a formula here
belongs to one level, as the formulas of torch's own operators do. `torch.autograd.Function.apply` would go through all
levels by itself, a second time; what it is derived from does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from mla_ops.errors import DoubleBackwardError, ForwardModeError, NotDifferentiableError


class BelowAutograd(threading.local):
    """Whether a kernel of this thread runs for autograd, so that a backward will follow; no call itself says so."""

    needs_grad = False


BELOW_AUTOGRAD = BelowAutograd()


class Formula(_SingleLevelFunction):
    """A formula of one level (NOTE [The dispatcher calls an autograd kernel once for each level])."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def record(formula: type[Formula], keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> Any:
    """Run the operator of `formula` and put `formula` into the graph of the level that calls."""
    if not torch._C._are_functorch_transforms_active():
        return formula.apply(keys, *arguments)  # type: ignore[attr-defined]
    with enable_single_level_autograd_function():
        return formula.apply(keys, *arguments)  # type: ignore[attr-defined]


def next_level(op: torch._ops.OpOverload, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """Run `op` below autograd from within a function, which torch runs with gradients off for all levels at once."""
    if not torch._C._are_functorch_transforms_active():
        return below_autograd(op, keys, *arguments)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return below_autograd(op, keys, *arguments)


def below_autograd(op: torch._ops.OpOverload, keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """Run what comes after autograd in a call of `op` with these dispatch keys."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def refuse_forward_mode(op: torch._ops.OpOverload, *arguments: Any) -> None:
    """Raise `ForwardModeError` where an argument has a tangent: it would end here, and torch take it for zero."""
    if _have_a_tangent(arguments):
        name = op.name()
        raise ForwardModeError(
            f"{name} has no forward-mode derivative, an argument with a tangent arrived; use reverse mode "
            f"(backward() or torch.autograd.grad), or compute with mla_ops.reference.{_reference_of(name)}"
        )


def _have_a_tangent(arguments: tuple[Any, ...]) -> bool:
    return forward_ad._current_level >= 0 and any(
        isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None
        for argument in arguments
    )


def _reference_of(name: str) -> str:
    """Return the function that defines an operator; that of payloads is the one of what they stand for."""
    return f"{name[5:].removesuffix('_scaled')}_reference"


def last_derivative(op: torch._ops.OpOverload, of: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return the autograd kernel of `op`, the backward of `of`: it is differentiable no further, and says so.

    Without a formula torch would only warn, and return zeros.
    """
    name = of.name()

    class Refusal(Formula):
        @staticmethod
        def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[torch.Tensor, ...]:
            gradients: tuple[torch.Tensor, ...] = next_level(op, keys, *arguments)
            return gradients

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor | None) -> None:
            raise DoubleBackwardError(
                f"{name} is differentiable once, a gradient of its gradient was asked for; drop create_graph=True, or "
                f"compute with mla_ops.reference.{_reference_of(name)}"
            )

    def call(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        refuse_forward_mode(of, *arguments)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            return record(Refusal, keys, arguments)
        return below_autograd(op, keys, *arguments)

    return call


def without_grad(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return the autograd kernel of an operator that is not differentiable, and says so.

    Without a kernel at this key torch warns, and only when a backward passes.
    """

    def call(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        refuse_forward_mode(op, *arguments)
        return below_autograd(op, keys, *arguments)

    return call


def refusing_grad(op: torch._ops.OpOverload, fix: str) -> Callable[..., Any]:
    """Return the autograd kernel of an operator that refuses arguments which ask for a gradient; `fix` says what else.

    Unlike `without_grad`: where a result looks like that of a differentiable operator, dropping a gradient in silence
    is a training run that learns nothing.
    """
    names = [argument.name for argument in op._schema.arguments]

    def call(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if _have_a_tangent(arguments):
            raise ForwardModeError(f"{op.name()} is not differentiable, an argument with a tangent arrived; {fix}")
        if torch.is_grad_enabled():
            for name, argument in zip(names, arguments, strict=False):
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    raise NotDifferentiableError(
                        f"{op.name()} is not differentiable and {name} requires grad; call it under torch.no_grad(), "
                        f"or {fix}"
                    )
        return below_autograd(op, keys, *arguments)

    return call

"""Tensors that answer operators themselves: what counts as one, how it is refused, how it is dequantised on request.

A quantised wrapper says bfloat16 and stores bytes; asked to run an unknown operator, it may dequantise every argument
and run the operator on the result, without a word. The operators of this package read plain tensors, and one of them
the parts of a wrapper (`scaled_tensors.py`). Nothing here knows a framework: a wrapper is told from a plain tensor by
its class, and dequantises itself by its own method.
"""

from __future__ import annotations

import torch

from mla_ops.errors import InvalidInputError, QuantizedInputError

# Modules of torch whose wrappers are what they say: tracing tensors, DTensor, a collective's pending result.
_HONEST_WRAPPERS = ("torch._subclasses.", "torch.distributed.")
# How quantised classes name the way back to plain numbers.
_DEQUANTIZE_METHODS = ("dequantize", "to_original_precision")


def is_wrapper(cls: type) -> bool:
    """Whether tensors of `cls` answer operators themselves and may not be what they say."""
    if cls is torch.Tensor or cls is torch.nn.Parameter:
        return False
    answers_itself = getattr(cls, "__torch_dispatch__", None) is not torch.Tensor.__torch_dispatch__
    return answers_itself and not cls.__module__.startswith(_HONEST_WRAPPERS)


def holds_wrapper(value: object) -> bool:
    """Whether `value` is a tensor that may not be what it says."""
    return isinstance(value, torch.Tensor) and is_wrapper(type(value))


def is_dtensor(value: object) -> bool:
    """Whether `value` is a DTensor; by name, because asking must not import torch.distributed.tensor."""
    return type(value).__name__ == "DTensor" and type(value).__module__.startswith("torch.distributed.tensor")


def wrapper_error(name: str, cls: type) -> InvalidInputError:
    """Return the error for an argument `name` that is a wrapper of class `cls`."""
    what = (
        f"{name} must be a plain tensor, got the wrapper subclass {cls.__name__}, whose reported dtype may not be what "
        "it stores"
    )
    if _dequantize_method(cls) is None:
        return InvalidInputError(f"{what}; convert it yourself first")
    return QuantizedInputError(
        f"{what}; nothing is dequantised unasked: dequantise it yourself, or pass to mla_ops.sparse_attn "
        'quantized="fused", which reads it as it is, or quantized="dequantize"'
    )


def dequantized(tensor: torch.Tensor, quantized: str) -> torch.Tensor:
    """Return `tensor`, or what its own method makes of a quantised wrapper if `quantized` asks for that."""
    if quantized == "error":
        return tensor
    if quantized not in ("dequantize", "fused"):
        raise InvalidInputError(f'quantized must be "error", "dequantize" or "fused", got {quantized!r}')
    cls = type(tensor)
    method = _dequantize_method(cls) if is_wrapper(cls) and quantized == "dequantize" else None
    return tensor if method is None else getattr(tensor, method)()


def _dequantize_method(cls: type) -> str | None:
    for name in _DEQUANTIZE_METHODS:
        # torch.Tensor has a dequantize() of its own, which every wrapper inherits and which means nothing to it.
        method = getattr(cls, name, None)
        if method is not None and method is not getattr(torch.Tensor, name, None):
            return name
    return None

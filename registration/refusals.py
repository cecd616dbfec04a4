"""Refusal of wrapper tensors below the Python front door, in raw calls of `torch.ops.mla`.

NOTE [A refusal is for one exact class]
A raw call with a wrapper tensor goes to the `__torch_dispatch__` of its class before any code of ours. torch lets a
library step in for a class it names, and looks the class up exactly: a rule for a base class does not fire for a class
derived from it. So a quantised class nobody named here can still dequantise itself into a raw call, silently;
`mla_ops.sparse_attn` sees its arguments first and refuses every wrapper.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.registration.library import LIBRARY, OPERATORS
from mla_ops.wrappers import is_wrapper, wrapper_error

_refused: set[type] = set()


def refuse_wrapper(*classes: type) -> None:
    """Make raw `torch.ops.mla` calls with tensors of exactly these classes raise instead of asking the class.

    For the quantised classes a process uses, once each; repeating a class does nothing. Classes derived from one of
    them are not covered: name them as well (NOTE [A refusal is for one exact class]).

    Raises:
        InvalidInputError: a class is no wrapper, so that raw calls with it already mean what they say.
    """
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, torch.Tensor) and is_wrapper(cls)):
            raise InvalidInputError(
                f"classes must be tensor subclasses with a __torch_dispatch__ of their own, got {cls}"
            )
    for cls in classes:
        if cls in _refused:
            continue
        for op in OPERATORS:
            torch.library.register_torch_dispatch(op, cls, _refuse, lib=LIBRARY)
        _refused.add(cls)


def _refuse(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    for name, value in given.items():
        if is_wrapper(type(value)):
            raise wrapper_error(name, type(value))
    raise AssertionError(f"no argument of {func} is a {cls.__name__}")

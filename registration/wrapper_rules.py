"""What raw calls of `torch.ops.mla` do with wrapper tensors, below the Python front door: refuse them, or read them.

NOTE [A rule is for one exact class]
A raw call with a wrapper tensor goes to the `__torch_dispatch__` of its class before any kernel of ours. torch lets a
library step in for a class it names, and looks the class up exactly: a rule for a base class does not fire for a class
derived from it. So a quantised class nobody named here can still dequantise itself into a raw call, silently;
`mla_ops.sparse_attn` sees its arguments first and refuses every wrapper.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.rules import check_logical_dtypes
from mla_ops.registration.library import LIBRARY, OPERATORS
from mla_ops.registration.sparse_attn import SPARSE_ATTN, SPARSE_ATTN_BWD
from mla_ops.registration.sparse_attn_scaled import SPARSE_ATTN_SCALED, SPARSE_ATTN_SCALED_BWD, open_wrapper
from mla_ops.wrappers import holds_wrapper, is_wrapper, wrapper_error

# Whether raw calls read a class (True) or refuse it.
_is_fused: dict[type, bool] = {}
# What reads wrappers as `q` and `kv`.
_SCALED = {
    SPARSE_ATTN: SPARSE_ATTN_SCALED,
    SPARSE_ATTN_BWD: SPARSE_ATTN_SCALED_BWD,
    SPARSE_ATTN_SCALED: SPARSE_ATTN_SCALED,
}


def refuse_wrapper(*classes: type) -> None:
    """Make raw `torch.ops.mla` calls with tensors of exactly these classes raise instead of asking the class.

    For the quantised classes a process uses, once each; the last of `refuse_wrapper` and `fuse_wrapper` holds. Classes
    derived from one of them are not covered: name them as well (NOTE [A rule is for one exact class]).

    Raises:
        InvalidInputError: a class is no wrapper, so that raw calls with it already mean what they say.
    """
    _set_rule(classes, is_fused=False)


def fuse_wrapper(*classes: type) -> None:
    """Make raw `torch.ops.mla.sparse_attn` calls read `q` and `kv` of exactly these classes as they are.

    As `mla_ops.sparse_attn(..., quantized="fused")` does: no dequantised copy is made, and autograd saves the wrappers.
    Every other operator refuses them. Otherwise as `refuse_wrapper`.

    Raises:
        InvalidInputError: a class is no wrapper.
    """
    _set_rule(classes, is_fused=True)


def _set_rule(classes: tuple[type, ...], *, is_fused: bool) -> None:
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, torch.Tensor) and is_wrapper(cls)):
            raise InvalidInputError(
                f"classes must be tensor subclasses with a __torch_dispatch__ of their own, got {cls}"
            )
    for cls in classes:
        if cls not in _is_fused:
            for op in OPERATORS:
                torch.library.register_torch_dispatch(op, cls, _answer, lib=LIBRARY)
        _is_fused[cls] = is_fused


def _answer(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
    for name, value in given.items():
        is_read = func in _SCALED and name in ("q", "kv") and _is_fused.get(type(value), False)
        if holds_wrapper(value) and not is_read:
            raise wrapper_error(name, type(value))
    if func is not SPARSE_ATTN_SCALED:
        check_logical_dtypes(given["q"], given["kv"])
        given["dtype"] = given["q"].dtype
    for name in ("q", "kv"):
        given[name], given[f"{name}_scale"] = open_wrapper(name, given[name], given.get(f"{name}_scale"))
    return _SCALED[func](**given)

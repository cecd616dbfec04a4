"""What transforms of several operators share: autocast, folding into the batch, loops, products of sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla_ops.wrappers import is_wrapper

AUTOCAST_DEVICES = ("cpu", "cuda")
# What autocast casts. fp64 it leaves alone, as everywhere; a quantised dtype, cast, would lose its scales.
_AUTOCAST_FROM = (torch.bfloat16, torch.float16, torch.float32)


def cast_by_autocast(q: torch.Tensor, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `q` and `kv` as an operator called here would see them: cast, where autocast is on for their device.

    For whoever looks at the arguments before the operator does, so that all entrances accept and describe the same.
    """
    device_type = q.device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return q, kv
    dtype = torch.get_autocast_dtype(device_type)
    # attn_sink is fp32 by contract; torch.library.register_autocast would cast it too.
    q, kv = (cast(tensor, dtype) for tensor in (q, kv))
    return q, kv


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor` as autocast to `dtype` leaves it; a wrapper, asked to cast itself, might dequantise."""
    if tensor.dtype == dtype or tensor.dtype not in _AUTOCAST_FROM or is_wrapper(type(tensor)):
        return tensor
    return tensor.to(dtype)


def cast_index_inputs_by_autocast(
    q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what index scores are made of as an operator called here would see it.

    `weights` keep their dtype: they hold every scale. Those that had the dtype of `q_idx` and no longer do become fp32,
    which the operators take beside any other.
    """
    had_dtype_of_q = weights.dtype == q_idx.dtype
    q_idx, k_idx = cast_by_autocast(q_idx, k_idx)
    return q_idx, k_idx, weights.float() if had_dtype_of_q and weights.dtype != q_idx.dtype else weights


def cast_paged_by_autocast(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Return `q` as attention to a pool called here would see it: cast where autocast is on, to the dtype of its rows.

    A pool is never cast, so `q` follows only where dense rows have the dtype of autocast. Beside rows of bytes `q`
    keeps its dtype, which says how the bytes of a 16-bit tail are read.
    """
    device_type = q.device.type
    if device_type not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device_type):
        return q
    dtype = torch.get_autocast_dtype(device_type)
    return q.to(dtype) if pages.dtype == dtype and q.dtype in _AUTOCAST_FROM else q


def shared_pool_message(name: str) -> str:
    """Return the words for a pool, or what belongs to it, with a vmapped dimension."""
    return (
        f"{name} has a vmapped dimension, a pool is shared by all elements of a vmap; number the pages of all pools "
        "together, or call in a loop"
    )


def casting_kernel(op: Any, device_type: str) -> Any:
    """Return the autocast kernel of an operator that begins with q, kv and indices."""

    def cast_and_call(q: torch.Tensor, kv: torch.Tensor, *args: Any) -> Any:
        q, kv = cast_by_autocast(q, kv)
        with torch.autocast(device_type, enabled=False):
            return op(q, kv, *args)

    return cast_and_call


def index_casting_kernel(op: Any, device_type: str) -> Any:
    """Return the autocast kernel of an operator that begins with q_idx, k_idx and weights."""

    def cast_and_call(q_idx: torch.Tensor, k_idx: torch.Tensor, weights: torch.Tensor, *args: Any) -> Any:
        arguments = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
        with torch.autocast(device_type, enabled=False):
            return op(*arguments, *args)

    return cast_and_call


def preserving_kernel(op: Any, device_type: str) -> Any:
    """Return the autocast kernel of an operator whose arguments have their dtypes already, as those of a backward.

    Such an operator needs a kernel all the same: what it runs inside, here matrix products, would be cast.
    """

    def call(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return op(*args)

    return call


def vmap_by_folding(
    op: Any,
    info: Any,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    elements: tuple[torch.Tensor, ...],
    into: tuple[int | None, ...],
    results_into: tuple[int, ...],
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run one call in which the vmapped dimension is part of another dimension, and take it out of the results.

    Args:
        op: the operator, whose results are one tensor or several.
        info: what torch says of the vmap.
        in_dims: where each of `args` has the vmapped dimension; the dispatcher strips trailing ones, with their `args`.
        args: the arguments.
        elements: results of the size of one element's (`call_without_data`).
        into: the dimension of each argument's element, counted from the end, that takes the vmapped one in front of it.
            A dimension that the element lacks is made. None leaves the argument, which all elements share, as it is.
        results_into: the same for the results.

    Returns:
        The results, and where each of them has the vmapped dimension.
    """

    def fold(arg: Any, in_dim: int | None, dim: int | None) -> Any:
        if dim is None or not isinstance(arg, torch.Tensor):
            return arg
        arg = arg.unsqueeze(0).expand(info.batch_size, *arg.shape) if in_dim is None else arg.movedim(in_dim, 0)
        return arg if -dim == arg.dim() else arg.movedim(0, dim - 1).flatten(dim - 1, dim)

    def unfold(result: torch.Tensor, element: torch.Tensor, dim: int) -> tuple[torch.Tensor, int]:
        if -dim > element.dim():
            return result, 0
        return result.unflatten(dim, (info.batch_size, element.shape[dim])), element.dim() + dim

    results = _as_tuple(op(*map(fold, args, in_dims, into)))
    unfolded, out_dims = zip(*map(unfold, results, elements, results_into), strict=True)
    return unfolded, out_dims


def vmap_by_loop(
    op: Any, fake: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run `op` once for every element of the vmapped dimension, and stack the results; `fake` is its fake."""
    calls = [
        _as_tuple(op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True))))
        for i in range(info.batch_size)
    ]
    if calls:
        results = tuple(torch.stack(column) for column in zip(*calls, strict=True))
    else:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        elements = call_without_data(fake, in_dims, args)
        results = tuple(torch.empty((0, *each.shape), dtype=each.dtype, device=device) for each in elements)
    return results, (0,) * len(results)


def call_without_data(
    fake: Callable[..., Any], in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[torch.Tensor, ...]:
    """Call the fake of an operator with one element of every argument, of no data: it checks them as in a single call.

    The fake and not the operator: whoever counts calls or FLOPs must not see this one.
    """

    def element(arg: Any, in_dim: int | None) -> Any:
        if not isinstance(arg, torch.Tensor):
            return arg
        shape = list(arg.shape)
        if in_dim is not None:
            del shape[in_dim]
        return torch.empty(shape, dtype=arg.dtype, device="meta")

    return _as_tuple(fake(*map(element, args, in_dims)))


def _as_tuple(results: Any) -> tuple[torch.Tensor, ...]:
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)

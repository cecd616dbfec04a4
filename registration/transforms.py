"""What transforms of several operators share: autocast, folding into the batch, loops, products of sizes."""

from __future__ import annotations

from typing import Any

import torch


def autocast_kernel(op: Any, device_type: str) -> Any:
    """Return the autocast kernel of an operator that begins with q, kv and indices."""

    def cast_and_call(q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, *args: Any) -> Any:
        # q and kv only: attn_sink is fp32 by contract (torch.library.register_autocast would cast it too), and fp64 is
        # left alone as everywhere in autocast.
        dtype = torch.get_autocast_dtype(device_type)
        q, kv = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, kv))
        with torch.autocast(device_type, enabled=False):
            return op(q, kv, indices, *args)

    return cast_and_call


def vmap_by_folding(
    op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...], unbatched: tuple[int, ...] = ()
) -> tuple[torch.Tensor, ...]:
    """Fold the vmapped dimension of every tensor into `batch`, except of those at the `unbatched` positions."""

    def fold(tensor: torch.Tensor, in_dim: int | None) -> torch.Tensor:
        if in_dim is None:
            tensor = tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
        else:
            tensor = tensor.movedim(in_dim, 0)
        return tensor if not has_batch else tensor.flatten(0, 1)

    has_batch = args[0].dim() - (in_dims[0] is not None) == 4
    folded = [
        fold(value, in_dim) if isinstance(value, torch.Tensor) and position not in unbatched else value
        for position, (value, in_dim) in enumerate(zip(args, in_dims, strict=True))
    ]
    results = op(*folded)
    results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
    if has_batch:
        results = tuple(result.unflatten(0, (info.batch_size, -1)) for result in results)
    return results


def vmap_by_loop(
    op: Any, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """Run the operator once for every element of the vmapped dimension, and stack the results."""
    calls = [
        op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(column) for column in zip(*calls, strict=True))
    return results, (0,) * len(results)

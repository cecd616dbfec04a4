"""Bytes that a rank receives: by the formulas of docs/distributed.md, and counted while a step runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of bf16, fp32 and int32.
NARROW, WIDE = 2, 4


@dataclass(frozen=True)
class Traffic:
    """Predicted bytes that each rank receives in a forward and in a backward."""

    forward: float
    backward: float

    def of(self, direction: str) -> int:
        """Of "fwd" or "fwd_bwd"."""
        return round(self.forward + (self.backward if direction == "fwd_bwd" else 0.0))


NOTHING = Traffic(0.0, 0.0)

# What a rank receives in a ring or from a switch, for the bytes that it passes in, in a group of `n`.
RECEIVED: dict[str, Callable[[float, int], float]] = {
    "all_gather": lambda own, n: (n - 1) * own,
    "all_to_all": lambda own, n: (n - 1) / n * own,
    "reduce_scatter": lambda own, n: (n - 1) / n * own,
    "all_reduce": lambda own, n: 2 * (n - 1) / n * own,
}


def tensor_parallel_traffic(shape: Any, n: int) -> Traffic:
    """Heads over `n` ranks: the sum of `dkv`."""
    return Traffic(0.0, 2 * (n - 1) / n * shape.Skv * shape.d_total * NARROW)


def key_sharded_traffic(shape: Any, n: int) -> Traffic:
    """Keys over `n` ranks: queries and indices out, partial results back; mirrored without the indices."""
    per_query = shape.H * (shape.d_total + shape.d_v) * NARROW + WIDE * shape.H
    share = (n - 1) / n * shape.Sq
    return Traffic(share * (per_query + WIDE * shape.topk), share * per_query)


def layer_traffic(shape: Any, hidden: int, data: int, tensor: int) -> Traffic:
    """One layer of one sequence a rank: FSDP2 over `data` ranks, heads over `tensor` ranks.

    Weights are gathered in both directions and their gradients scattered, in bf16. The ranks of the heads sum the
    layer's output and the gradient of its input, into which DTensor carries `dkv` as shares; so it does into the
    gradient of the weights of the keys, which is summed too.
    """
    of_heads, of_keys = shape.H * (shape.d_total + shape.d_v) * hidden, shape.d_total * hidden
    gather = (data - 1) / data * (of_heads / tensor + of_keys) * NARROW

    def summed(numbers: int) -> float:
        return RECEIVED["all_reduce"](numbers * NARROW, tensor)

    return Traffic(gather + summed(shape.Sq * hidden), 2 * gather + summed(shape.Skv * hidden + of_keys))


class CountedTraffic(TorchDispatchMode):
    """Counts what a rank receives while the mode is entered, in eager and in graphs compiled before."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes_by_kind: dict[str, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions run compiled; without this they would be skipped."""
        return True

    @property
    def received(self) -> int:
        """Of all collectives."""
        return sum(self.bytes_by_kind.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor turns into local tensors and collectives first; those come here again.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        if "process_group" in given:
            group = dist.ProcessGroup.unbox(given["process_group"])
        elif "group_name" in given:
            group = _resolve_process_group(given["group_name"])
        else:
            # A wait, or a wrapper: nothing moves.
            return
        name = func.__name__.strip("_").replace("allgather", "all_gather").replace("allreduce", "all_reduce")
        kind = next((kind for kind in RECEIVED if name.startswith(kind)), None)
        if kind is None:
            self.bytes_by_kind[f"{name}, not counted"] = 0
            return
        sources = (given[name] for name in ("input_tensor", "input", "self", "inputs", "tensors") if name in given)
        source: Tensor | list[Tensor] = next(sources)
        own = sum(tensor.nbytes for tensor in ([source] if isinstance(source, Tensor) else source))
        self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + round(RECEIVED[kind](own, group.size()))

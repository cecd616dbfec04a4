"""Which kernels run a call: sets of kernels are asked in order, and the reasons of those that refuse are kept."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.dense import DenseKernels
from mla_ops.ops.sparse_attn_paged.triton.hopper import HopperPagedKernels
from mla_ops.ops.sparse_attn_paged.triton.hopper_few_heads import HopperFewHeadsKernels
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints
from mla_ops.ops.sparse_attn_paged.triton.portable import PortableKernels


class KernelSet(Protocol):
    """Kernels that belong together.

    Launchers hand over calls with something to compute, whose tensors have inner strides of 1 and whose lengths, sinks
    and scales are contiguous. A set that takes a row format by row number and by table gives both the same bits.
    """

    name: str

    def refusal(self, problem: SparseAttnPagedProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why `problem` is not for this set, or None: it takes it. Without hints, for no size and no strides."""
        ...

    def plan(self, call: SparseAttnPagedCall, traits: DeviceTraits) -> Any:
        """Return what sizes and strides decide about a launch. It has a field `record`, the kernels' LaunchRecord."""
        ...

    def describe(self, plan: Any) -> tuple[str, ...]:
        """Say in lines for a person what `plan` launches, how rows are multiplied, and whether it is warm."""
        ...

    def run(self, call: SparseAttnPagedCall, plan: Any, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write `out` and `lse`, which are contiguous."""
        ...


PORTABLE = PortableKernels()
# In order of preference. The portable kernels are the last resort: what they refuse nobody runs.
KERNEL_SETS: tuple[KernelSet, ...] = (HopperFewHeadsKernels(), DenseKernels(), HopperPagedKernels(), PORTABLE)


class Choice(NamedTuple):
    """Who runs a call, and why not those before."""

    kernels: KernelSet
    refusals: tuple[str, ...] = ()


def choose(problem: SparseAttnPagedProblem, hints: Hints, traits: DeviceTraits) -> Choice:
    """Choose the kernels of a call.

    Raises:
        UnsupportedProblemError: every set refuses; dispatch has refused such a problem before.
    """
    refusals: list[str] = []
    for kernels in KERNEL_SETS:
        reason = kernels.refusal(problem, hints, traits)
        if reason is None:
            return Choice(kernels, tuple(refusals))
        refusals.append(f"{kernels.name} kernels: {reason}")
    raise UnsupportedProblemError(f"no kernels for {problem} on {traits}: {'; '.join(refusals)}")

"""Which kernels run a side of a problem: the first set that does not refuse, with the reasons of those before it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import Wrap
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, Side, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    ConfigKey,
    FewHeadsConfig,
    FwdConfig,
    HopperBwdConfig,
    HopperConfig,
)
from mla_ops.ops.sparse_attn.configs.lookup import key_of
from mla_ops.ops.sparse_attn.triton.hopper import HopperKernels, check_config
from mla_ops.ops.sparse_attn.triton.hopper_few_heads import HopperFewHeadsKernels
from mla_ops.ops.sparse_attn.triton.launch import Into
from mla_ops.ops.sparse_attn.triton.portable import PortableKernels
from mla_ops.settings import current


class KernelSet(Protocol):
    """Kernels that belong together: both sides of the operator for some devices and problems.

    Launchers hand over calls whose inner strides are 1, whose `topk_length` and `attn_sink` are contiguous and which
    have something to compute.
    """

    name: str
    is_inlinable: bool  # whether a compiler can trace the launch into a graph

    def refusal(self, side: Side, problem: SparseAttnProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why a side of `problem` is not for this set, or None: it takes it. Without hints, for no size."""
        ...

    def config(self, side: Side, key: ConfigKey, tuned_rows: str, *, is_deterministic: bool = False) -> Any:
        """Return the configuration of a forward, or the configurations of the passes of a backward."""
        ...

    def plan_forward(
        self,
        call: SparseAttnCall,
        config: Any,
        traits: DeviceTraits,
        num_splits: int | None,
        use_int64_offsets: bool | None,
    ) -> Any:
        """Return what sizes and strides decide about a forward, `num_splits` among it; what is None is derived."""
        ...

    def run_forward(
        self,
        call: SparseAttnCall,
        out: torch.Tensor | None,
        lse: torch.Tensor,
        plan: Any,
        wrap: Wrap,
    ) -> torch.Tensor:
        """Write `out` and `lse` and return `lse`; without `out`, return the largest logits instead of `lse`."""
        ...

    def plan_backward(self, call: SparseAttnCall, config: Any, use_int64_offsets: bool) -> Any:
        """Return what sizes and strides decide about a pass of a backward with `config`."""
        ...

    def prepared(self, call: SparseAttnCall) -> SparseAttnCall:
        """Return a call whose q and kv `run_backward` can read."""
        ...

    def run_backward(
        self,
        call: SparseAttnCall,
        results: Results,
        gradients: Gradients,
        into: Into,
        plan: Any,
        wrap: Wrap,
    ) -> None:
        """Write `into`, in one pass of a backward.

        The rows of `dout` are as aligned as those of a contiguous tensor; `out`, `lse` and `dlse` are contiguous.
        """
        ...


HOPPER, HOPPER_FEW_HEADS, PORTABLE = HopperKernels(), HopperFewHeadsKernels(), PortableKernels()
# In order of preference: kernels made for a device go before those that run on all of them.
KERNEL_SETS: tuple[KernelSet, ...] = (HOPPER, HOPPER_FEW_HEADS, PORTABLE)


class Choice(NamedTuple):
    """Who runs a side, how, and why not those before."""

    kernels: KernelSet
    config: Any  # as `KernelSet.config` returns it
    refusals: tuple[str, ...] = ()


def choose(
    side: Side,
    problem: SparseAttnProblem,
    hints: Hints,
    traits: DeviceTraits,
    *,
    is_deterministic: bool = False,
    inlinable_only: bool = False,
) -> Choice:
    """Choose the kernels of a side and their configuration.

    Raises:
        UnsupportedProblemError: every set refuses; dispatch has refused such a problem before.
    """
    refusals: list[str] = []
    for kernels in KERNEL_SETS:
        if inlinable_only and not kernels.is_inlinable:
            continue
        reason = kernels.refusal(side, problem, hints, traits)
        if reason is None:
            config = kernels.config(
                side, key_of(problem, traits), current().tuned_rows, is_deterministic=is_deterministic
            )
            return Choice(kernels, config, tuple(refusals))
        refusals.append(f"{kernels.name} kernels: {reason}")
    raise UnsupportedProblemError(f"no kernels for the {side} of {problem} on {traits}: {'; '.join(refusals)}")


def choice_of(
    config: FwdConfig | HopperConfig | FewHeadsConfig | tuple[BwdConfig | HopperBwdConfig, ...], key: ConfigKey
) -> Choice:
    """Return the choice that a caller made by naming a configuration, which belongs to one set.

    Raises:
        UnsupportedProblemError: the set does not run the problem of `key` with it.
    """
    one = config[-1] if isinstance(config, tuple) else config
    if not isinstance(one, (HopperConfig, FewHeadsConfig, HopperBwdConfig)):
        return Choice(PORTABLE, config)
    check_config(one, key)
    return Choice(HOPPER_FEW_HEADS if isinstance(one, FewHeadsConfig) else HOPPER, config)

"""The launchers past dispatch, with what is otherwise decided chosen by hand: for tuning, benchmarks and tests."""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.launching import Wrap, as_it_is
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, Side, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig, HopperBwdConfig, HopperConfig
from mla_ops.ops.sparse_attn.configs.lookup import key_of
from mla_ops.ops.sparse_attn.triton.backward import launch_backward, plan_backward
from mla_ops.ops.sparse_attn.triton.forward import launch_forward, launch_max_logits, plan_forward, readable
from mla_ops.ops.sparse_attn.triton.kernel_sets import Choice, choice_of, choose


def run_forward(
    call: SparseAttnCall,
    *,
    config: FwdConfig | HopperConfig | None = None,
    num_splits: int | None = None,
    use_int64_offsets: bool | None = None,
    traits: DeviceTraits | None = None,
    wrap: Wrap = as_it_is,
) -> Results:
    """Run a forward; what is None is derived, and `wrap` is applied to every kernel that is launched.

    Raises:
        UnsupportedProblemError: the kernels of `config` do not run the call, or not split or wrapped.
    """
    traits = traits or traits_of(call.q.device)
    call = readable(call)
    is_portable = num_splits is not None or wrap is not as_it_is
    choice = _choice("forward", config, call, traits, is_portable)
    plan = plan_forward(call, traits, choice=choice, num_splits=num_splits, use_int64_offsets=use_int64_offsets)
    return launch_forward(call, plan, wrap=wrap)


def run_max_logits(
    call: SparseAttnCall,
    *,
    config: FwdConfig | HopperConfig | None = None,
    traits: DeviceTraits | None = None,
    **options: Any,
) -> torch.Tensor:
    """Run a maximum of the logits; options and errors as of `run_forward`."""
    traits = traits or traits_of(call.q.device)
    choice = _choice("max_logits", config, call, traits, False)
    return launch_max_logits(call, plan_forward(call, traits, max_logits_only=True, choice=choice, **options))


def run_backward(
    call: SparseAttnCall,
    results: Results,
    gradients: Gradients,
    wanted: Wanted = Wanted(),  # noqa: B008  # a named tuple of constants
    *,
    configs: tuple[BwdConfig | HopperBwdConfig, ...] | None = None,
    use_int64_offsets: bool | None = None,
    in_key_order: bool = True,
    traits: DeviceTraits | None = None,
    wrap: Wrap = as_it_is,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a backward; what is None is derived, and `wrap` is applied to every kernel that is launched.

    With `in_key_order=False` atomics go through the keys in the order of the slots also where dkv exceeds the cache.

    Raises:
        UnsupportedProblemError: the kernels of `configs` do not run the call, or not wrapped.
    """
    traits = traits or traits_of(call.q.device)
    call, is_traced = readable(call), wrap is not as_it_is
    choice = _choice("backward", configs, call, traits, is_traced)
    plan = plan_backward(call, traits, wanted, choice=choice, use_int64_offsets=use_int64_offsets, is_traced=is_traced)
    if not in_key_order:
        plan = plan._replace(launch_rows=None)
    return launch_backward(call, results, gradients, wanted, plan, wrap=wrap)


def _choice(side: Side, config: Any, call: SparseAttnCall, traits: DeviceTraits, is_portable: bool) -> Choice | None:
    """Return the choice that `config` makes, None where the plan is to choose; split and wrapped, portable kernels."""
    problem = SparseAttnProblem.of(call)
    if config is not None:
        return choice_of(config, key_of(problem, traits))
    if not is_portable:
        return None
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    return choose(side, problem, Hints.of(call), traits, is_deterministic=is_deterministic, inlinable_only=True)

"""Launches of payloads: the portable kernels and their plans, with scales as further arguments.

See NOTE [Scales are folded] for what the kernels do. Scales and what goes with them are keyword arguments, which a
launch has among its options: so launches of plain tensors neither name nor pass them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import Wrap, as_it_is, contiguous, launch_record
from mla_ops.ops.sparse_attn.call import (
    Gradients,
    Hints,
    Results,
    Scales,
    SparseAttnCall,
    SparseAttnProblem,
    Wanted,
)
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig, program_count
from mla_ops.ops.sparse_attn.configs.lookup import key_of
from mla_ops.ops.sparse_attn.triton.backward import BackwardPlan, launch_backward, plan_backward
from mla_ops.ops.sparse_attn.triton.forward import ForwardPlan, launch_forward, plan_forward
from mla_ops.ops.sparse_attn.triton.kernel_sets import PORTABLE, Choice, choose
from mla_ops.ops.sparse_attn.triton.portable import PortableBackward, PortableForward, split_count

_Launch = TypeVar("_Launch", PortableForward, PortableBackward)


def plan_scaled_forward(
    call: SparseAttnCall,
    traits: DeviceTraits,
    problem: SparseAttnProblem,
    *,
    config: FwdConfig | None = None,
    num_splits: int | None = None,
) -> ForwardPlan:
    """Plan a forward of payloads on a device with `traits`; what is None is derived."""
    choice = choose("forward", problem, Hints.of(call), traits) if config is None else Choice(PORTABLE, config)
    config = choice.config
    if num_splits is None:
        programs = program_count(call.rows, problem.heads, problem.kv_group, config.block_h)
        num_splits = split_count(programs, problem.topk, config, traits, key_of(problem, traits))
    plan = plan_forward(call, traits, choice=choice, num_splits=num_splits)
    return plan._replace(
        launch=_with_options(plan.launch, IS_NATIVE_E4M3=traits.has_e4m3),
        record=launch_record(call.q.device, "forward", problem, call.indices.dtype, num_splits > 1, config),
        dtype=problem.dtype,
    )


def launch_scaled_forward(call: SparseAttnCall, scales: Scales, plan: ForwardPlan, *, wrap: Wrap = as_it_is) -> Results:
    """Run the forward kernels on payloads."""
    launch = _with_options(plan.launch, **_scale_arguments(scales))
    return launch_forward(_as_bytes(call, scales), plan._replace(launch=launch), wrap=wrap)


def plan_scaled_backward(
    call: SparseAttnCall,
    traits: DeviceTraits,
    wanted: Wanted,
    problem: SparseAttnProblem,
    *,
    configs: tuple[BwdConfig, ...] | None = None,
) -> BackwardPlan:
    """Plan a backward of payloads on a device with `traits`, in the mode that torch is in."""
    choice = None if configs is None else Choice(PORTABLE, configs)
    plan = plan_backward(call, traits, wanted, problem=problem, choice=choice)
    options = {"IS_NATIVE_E4M3": traits.has_e4m3}
    kernel = (call.q.device, "backward", problem, call.indices.dtype)
    return plan._replace(
        launches=tuple(_with_options(launch, **options) for launch in plan.launches),
        records=tuple(launch_record(*kernel, config) for config in plan.choice.config),
        dtype=problem.dtype,
    )


def launch_scaled_backward(
    call: SparseAttnCall,
    scales: Scales,
    results: Results,
    gradients: Gradients,
    wanted: Wanted,
    plan: BackwardPlan,
    *,
    wrap: Wrap = as_it_is,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward kernels on payloads; gradients are those of the real numbers."""
    arguments = _scale_arguments(scales)
    plan = plan._replace(launches=tuple(_with_options(launch, **arguments) for launch in plan.launches))
    return launch_backward(_as_bytes(call, scales), results, gradients, wanted, plan, wrap=wrap)


def _scale_arguments(scales: Scales) -> dict[str, Any]:
    return {
        "q_scale_ptr": contiguous(scales.q),
        "kv_scale_ptr": contiguous(scales.kv),
        "IS_Q_SCALED_BY_ROW": scales.q is not None and scales.q.dim() > 0,
        "IS_KV_SCALED_BY_ROW": scales.kv is not None and scales.kv.dim() > 0,
        "ELEMENT": _element(scales.dtype),
    }


def _as_bytes(call: SparseAttnCall, scales: Scales) -> SparseAttnCall:
    """Return `call` with its payloads as bytes: Triton refuses to load e4m3 for devices that do not convert it."""
    q, kv = call.q, call.kv
    return call._replace(
        q=q if scales.q is None else q.view(torch.uint8), kv=kv if scales.kv is None else kv.view(torch.uint8)
    )


def _with_options(launch: _Launch, **options: Any) -> _Launch:
    return launch._replace(options={**launch.options, **options})


@cache
def _element(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]

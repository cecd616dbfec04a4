"""The forward's launcher, which the maximum of the logits shares: planned once for calls alike, then run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import (
    LaunchRecord,
    Wrap,
    as_it_is,
    as_read,
    contiguous,
    launch_record,
    unfilled,
    with_unit_inner_stride,
)
from mla_ops.ops.sparse_attn.call import Hints, Results, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.triton.kernel_sets import Choice, KernelSet, choose

# What `explain` says of a plan without work.
NOTHING = "no queries or no heads: nothing is launched"


class ForwardPlan(NamedTuple):
    """What sizes, strides and settings decide about a forward, or about a maximum of the logits."""

    choice: Choice
    kernels: KernelSet  # of the choice, like the next two a field of its own: a launch reads them
    launch: Any  # what the kernels made of the sizes
    record: LaunchRecord
    out_shape: tuple[int, ...]  # as plain tuples: torch takes 0.4 us longer to read a torch.Size
    lse_shape: tuple[int, ...]
    dtype: torch.dtype  # of out
    is_empty: bool  # no queries or no heads: nothing is launched
    is_readable: bool  # kernels read the tensors of a call as they come


def plan_forward(
    call: SparseAttnCall,
    traits: DeviceTraits,
    *,
    max_logits_only: bool = False,
    problem: SparseAttnProblem | None = None,
    choice: Choice | None = None,
    num_splits: int | None = None,
    use_int64_offsets: bool | None = None,
) -> ForwardPlan:
    """Plan a forward on a device with `traits`; what is None is derived.

    In a trace sizes and strides may be symbolic: `call` must be `readable` then, `choice` and `num_splits` be given,
    and without `use_int64_offsets` a guard is added.
    """
    device, comes_readable = call.q.device, is_readable(call)
    call = call_as_read(call)
    if choice is None:
        problem, hints = problem or SparseAttnProblem.of(call), Hints.of(call)
        choice = choose("max_logits" if max_logits_only else "forward", problem, hints, traits)
    q, (heads, d_total) = call.q, call.q.shape[-2:]
    launch = choice.kernels.plan_forward(call, choice.config, traits, num_splits, use_int64_offsets)
    is_split = launch.num_splits > 1
    kernel = ("max_logits" if max_logits_only else "forward", d_total, call.d_v, heads, call.kv.shape[-2], q.dtype)
    return ForwardPlan(
        choice,
        choice.kernels,
        launch,
        launch_record(device, *kernel, call.indices.dtype, is_split, choice.config),
        out_shape=(*q.shape[:-1], call.d_v),
        lse_shape=(*q.shape[:-1],),
        dtype=q.dtype,
        is_empty=bool(q.numel() == 0),
        is_readable=comes_readable,
    )


def describe_forward(plan: ForwardPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if plan.is_empty:
        return (NOTHING,)
    config, launch = plan.choice.config, plan.launch
    line = f"forward: {config}, slots split over {launch.num_splits} programs; {plan.record}"
    return (line, *(f"forward not by {why}" for why in plan.choice.refusals))


def launch_forward(call: SparseAttnCall, plan: ForwardPlan, *, wrap: Wrap = as_it_is) -> Results:
    """Run the forward kernels; `wrap` is applied to every kernel that is launched."""
    q, is_traced = call.q, wrap is not as_it_is
    if is_traced and not plan.kernels.is_inlinable:
        raise UnsupportedProblemError(
            f"{plan.kernels.name} kernels run in eager only, got traced=True; pass a FwdConfig"
        )
    out = unfilled(plan.out_shape, plan.dtype, q, is_traced=is_traced)
    lse = unfilled(plan.lse_shape, torch.float32, q, is_traced=is_traced)
    if not plan.is_empty:
        call = call if plan.is_readable else readable(call)
        plan.kernels.run_forward(call, out, lse, plan.launch, wrap)
        plan.record.is_warm |= not is_traced
    return Results(out, lse)


def launch_max_logits(call: SparseAttnCall, plan: ForwardPlan) -> torch.Tensor:
    """Run the forward kernel up to the logits, and return the largest of each query and head."""
    max_logits = unfilled(plan.lse_shape, torch.float32, call.q, is_traced=False)
    if plan.is_empty:
        return max_logits
    call = call if plan.is_readable else readable(call)
    max_logits = plan.kernels.run_forward(call, None, max_logits, plan.launch, as_it_is)
    plan.record.is_warm = True
    return max_logits


def is_readable(call: SparseAttnCall) -> bool:
    """Return whether `readable(call)` copies nothing."""
    q, kv, indices, _, _, topk_length, attn_sink = call
    has_unit_strides = all(tensor.stride(-1) == 1 for tensor in (q, kv, indices))
    return has_unit_strides and all(t is None or t.is_contiguous() for t in (topk_length, attn_sink))


def call_as_read(call: SparseAttnCall) -> SparseAttnCall:
    """Return `call` with the strides of `readable(call)`: what a plan needs, without a copy."""
    return call._replace(q=as_read(call.q), kv=as_read(call.kv), indices=as_read(call.indices))


def readable(call: SparseAttnCall) -> SparseAttnCall:
    """Return `call` with inner strides of 1 and contiguous lengths and sinks, copied where they are not so."""
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
    return SparseAttnCall(
        with_unit_inner_stride(q),
        with_unit_inner_stride(kv),
        with_unit_inner_stride(indices),
        d_v,
        softmax_scale,
        contiguous(topk_length),
        contiguous(attn_sink),
    )

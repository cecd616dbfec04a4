"""The launcher: planned once for calls alike, then run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import as_read, contiguous, unfilled, with_unit_inner_stride
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.triton.kernel_sets import Choice, choose
from mla_ops.ops.sparse_attn_paged.triton.pool import Hints


class PagedPlan(NamedTuple):
    """What sizes, strides and settings decide about a call."""

    choice: Choice
    launch: Any  # what the kernels made of the sizes; None: nothing is launched
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    is_readable: bool  # kernels read the tensors of a call as they come


def plan_forward(
    call: SparseAttnPagedCall, traits: DeviceTraits, *, problem: SparseAttnPagedProblem | None = None
) -> PagedPlan:
    """Plan a call on a device with `traits`."""
    comes_readable = is_readable(call)
    call = call._replace(q=as_read(call.q), indices=as_read(call.indices))
    choice = choose(problem or SparseAttnPagedProblem.of(call), Hints.of(call), traits)
    return PagedPlan(
        choice,
        choice.kernels.plan(call, traits) if call.q.numel() else None,
        out_shape=(*call.q.shape[:-1], call.d_v),
        lse_shape=(*call.q.shape[:-1],),
        is_readable=comes_readable,
    )


def describe(plan: PagedPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if plan.launch is None:
        return ("no queries or no heads: nothing is launched",)
    kernels, refusals = plan.choice
    return (*kernels.describe(plan.launch), *(f"not by {why}" for why in refusals))


def launch_forward(call: SparseAttnPagedCall, plan: PagedPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels of `plan` and return `(out, lse)`."""
    out = unfilled(plan.out_shape, call.q.dtype, call.q, is_traced=False)
    lse = unfilled(plan.lse_shape, torch.float32, call.q, is_traced=False)
    if plan.launch is not None:
        plan.choice.kernels.run(call if plan.is_readable else readable(call), plan.launch, out, lse)
        plan.launch.record.is_warm = True
    return out, lse


def is_readable(call: SparseAttnPagedCall) -> bool:
    """Return whether `readable(call)` copies nothing."""
    has_unit_strides = all(t is None or t.stride(-1) == 1 for t in (call.q, call.indices, call.block_table))
    others = (call.seq_lens, call.topk_length, call.attn_sink, call.cache_scale)
    return has_unit_strides and all(t is None or t.is_contiguous() for t in others)


def readable(call: SparseAttnPagedCall) -> SparseAttnPagedCall:
    """Return `call` with inner strides of 1 and contiguous lengths, sinks and scales, copied where they are not so."""
    table = call.block_table
    return call._replace(
        q=with_unit_inner_stride(call.q),
        indices=with_unit_inner_stride(call.indices),
        block_table=None if table is None else with_unit_inner_stride(table),
        seq_lens=contiguous(call.seq_lens),
        topk_length=contiguous(call.topk_length),
        attn_sink=contiguous(call.attn_sink),
        cache_scale=contiguous(call.cache_scale),
    )

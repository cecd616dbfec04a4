"""The backward's launcher: both gradients in one pass or in one each, dkv summed by atomics or in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import (
    LaunchRecord,
    Wrap,
    aligned_like_contiguous,
    as_it_is,
    contiguous,
    launch_record,
    unfilled,
)
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.configs.launch import program_count, wave_programs
from mla_ops.ops.sparse_attn.triton.forward import NOTHING, call_as_read, is_readable, readable
from mla_ops.ops.sparse_attn.triton.kernel_sets import Choice, choose
from mla_ops.ops.sparse_attn.triton.key_order import add_in_key_order, rows_per_launch
from mla_ops.ops.sparse_attn.triton.launch import Into
from mla_ops.ops.sparse_attn.triton.portable import needs_int64_offsets
from mla_ops.row_sums import sum_in_query_order


class BackwardPlan(NamedTuple):
    """What sizes, strides and settings decide about a backward."""

    choice: Choice  # its configuration holds one for each pass
    launches: tuple[Any, ...]  # what the kernels made of the sizes, for each pass
    records: tuple[LaunchRecord, ...]  # of the passes
    is_deterministic: bool  # dkv is summed in the order of the queries
    wave_programs: int  # programs of the pass of dkv that run at a time
    launch_rows: int | None  # queries of a launch where atomics go through the keys in order
    dtype: torch.dtype  # of dq and dkv
    is_empty: bool  # no queries or no heads: nothing is launched
    is_readable: bool  # kernels read the tensors of a call as they come


def plan_backward(
    call: SparseAttnCall,
    traits: DeviceTraits,
    wanted: Wanted = Wanted(),  # noqa: B008  # a named tuple of constants
    *,
    problem: SparseAttnProblem | None = None,
    choice: Choice | None = None,
    use_int64_offsets: bool | None = None,
    is_traced: bool = False,
) -> BackwardPlan:
    """Plan a backward on a device with `traits`, in the mode that torch is in; what is None is derived.

    In a trace sizes and strides may be symbolic: `call` must be `readable` then, `choice` be given, and without
    `use_int64_offsets` a guard is added. A trace does not go through the keys in order, because lengths decide how
    often that launches.
    """
    device, comes_readable = call.q.device, is_readable(call)
    call = call_as_read(call)
    is_deterministic = wanted.dkv and torch.are_deterministic_algorithms_enabled()
    problem, hints = problem or SparseAttnProblem.of(call, needs_grad=True), Hints.of(call)
    if choice is None:
        choice = choose("backward", problem, hints, traits, is_deterministic=is_deterministic)
    if is_traced and not choice.kernels.is_inlinable:
        raise UnsupportedProblemError(
            f"{choice.kernels.name} kernels run in eager only, got traced=True; pass BwdConfigs"
        )
    launch_rows = None
    if wanted.dkv and not is_deterministic and not is_traced:
        launch_rows = rows_per_launch(choice.config[-1], problem, hints, traits)
    q = call.q
    kernel = ("backward", q.shape[-1], call.d_v, q.shape[-2], call.kv.shape[-2], q.dtype, call.indices.dtype)
    if use_int64_offsets is None:
        use_int64_offsets = needs_int64_offsets(call)
    return BackwardPlan(
        choice,
        launches=tuple(choice.kernels.plan_backward(call, config, use_int64_offsets) for config in choice.config),
        records=tuple(launch_record(device, *kernel, config) for config in choice.config),
        is_deterministic=is_deterministic,
        wave_programs=wave_programs(choice.config[-1], traits.num_sms),
        launch_rows=launch_rows,
        dtype=q.dtype,
        is_empty=bool(q.numel() == 0),
        is_readable=comes_readable,
    )


def describe_backward(plan: BackwardPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if plan.is_empty:
        return (NOTHING,)
    lines = []
    for config, record in zip(plan.choice.config, plan.records, strict=True):
        is_last = config is plan.choice.config[-1]  # a dq pass before it adds nothing
        in_key_order = plan.launch_rows is not None and is_last
        order = f", in key order, {plan.launch_rows} queries a launch" if in_key_order else ""
        lines.append(f"backward: {config}{order}; {record}")
    return (*lines, *(f"backward not by {why}" for why in plan.choice.refusals))


def launch_backward(
    call: SparseAttnCall,
    results: Results,
    gradients: Gradients,
    wanted: Wanted,
    plan: BackwardPlan,
    *,
    wrap: Wrap = as_it_is,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward kernels; `wrap` is applied to every kernel that is launched.

    dkv is summed in fp32: by atomics, which go through the keys in order where dkv exceeds the cache, or with
    `torch.use_deterministic_algorithms(True)` in the order of the queries.
    """
    if plan.is_empty:
        return _zeros(call, results, wanted, plan.dtype)
    is_traced = wrap is not as_it_is
    kernels, configs, _ = plan.choice
    call = kernels.prepared(call if plan.is_readable else readable(call))
    out, lse = results[0].contiguous(), results[1].contiguous()
    results = Results(out, lse)
    dout, dlse = gradients
    gradients = Gradients(None if dout is None else aligned_like_contiguous(dout), contiguous(dlse))
    q, kv = call.q, call.kv
    rows = call.rows

    def run(number: int, into: Into, call: SparseAttnCall = call) -> None:
        kernels.run_backward(call, results, gradients, into, plan.launches[number], wrap)
        plan.records[number].is_warm |= not is_traced

    dq = unfilled(q.shape, plan.dtype, q, is_traced=is_traced) if wanted.dq else None
    dsink = None if call.attn_sink is None else unfilled(lse.shape, torch.float32, q, is_traced=is_traced)
    dkv = None
    # What the pass of dkv computes besides it: dq and dsink, unless they have a pass of their own.
    others = (dq, dsink)
    has_two_passes = wanted.dq and wanted.dkv and len(configs) == 2
    if has_two_passes or (not wanted.dkv and (dq is not None or dsink is not None)):
        run(0, Into(dq, None, dsink, None, 0, rows))
        others = (None, None)
    if wanted.dkv:
        config = configs[-1]
        if plan.is_deterministic:
            head_blocks = program_count(1, q.shape[-2] // kv.shape[-2], 1, config.block_h)
            dkv = sum_in_query_order(
                kv,
                call.indices,
                call.topk_length,
                row_dtype(plan.dtype),
                lambda partial, *where: run(-1, Into(others[0], partial, others[1], *where)),
                head_blocks,
                plan.wave_programs,
                wrap,
                dtype=plan.dtype,
            )
        else:
            dkv = q.new_zeros(kv.shape, dtype=torch.float32)
            if plan.launch_rows is None:
                run(-1, Into(others[0], dkv, others[1], None, 0, rows))
            else:
                add_in_key_order(
                    call,
                    lambda ordered, *which: run(-1, Into(others[0], dkv, others[1], None, *which), ordered),
                    plan.launch_rows,
                )
    return (
        q.new_empty(0, dtype=plan.dtype) if dq is None else dq,
        kv.new_empty(0, dtype=plan.dtype) if dkv is None else dkv.to(plan.dtype),
        lse.new_empty(0) if dsink is None else dsink.view(-1, q.shape[-2]).sum(0),
    )


def _zeros(
    call: SparseAttnCall, results: Results, wanted: Wanted, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sink = call.attn_sink
    return (
        call.q.new_zeros(call.q.shape if wanted.dq else 0, dtype=dtype),
        call.kv.new_zeros(call.kv.shape if wanted.dkv else 0, dtype=dtype),
        results.lse.new_zeros(0 if sink is None else sink.shape),
    )


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the rows that are held for inputs of `dtype`: bf16 for bf16, else fp32.

    A row in bf16 is one more rounding, by 2^-9 at most, of a sum over heads whose factors, P and dS, were rounded as
    much before they were multiplied. Errors of independent terms add in squares: where the terms of dkv don't cancel
    systematically, those of P and dS, of the rows and of the result are equal, so the whole error grows by
    sqrt(3 / 2). The sum over queries stays fp32. A row in fp16 could overflow where the sum doesn't.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

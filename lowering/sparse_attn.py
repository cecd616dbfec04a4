"""The lowerings of both operators: the Triton launcher that dispatch picks, traced and inlined into Inductor's graph.

A compiled graph then contains the kernels themselves. Batch, sequence lengths and topk stay symbolic; widths and head
counts, for which kernels are compiled, are made constants by a guard. What cannot be inlined stays an extern call of
the operator, which runs everything the operator runs, and the log says why: `TORCH_LOGS="mla_ops"` shows it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.lowering import is_enabled
from mla_ops.lowering import sparse_attn_choices as choices
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import program_count
from mla_ops.ops.sparse_attn.configs.lookup import backward_configs
from mla_ops.ops.sparse_attn.triton import backend as triton
from mla_ops.ops.sparse_attn.triton import forward as triton_forward_plan
from mla_ops.ops.sparse_attn.triton import hopper as triton_hopper
from mla_ops.ops.sparse_attn.triton.key_order import rows_per_launch
from mla_ops.registration import SPARSE_ATTN, SPARSE_ATTN_BWD
from mla_ops.settings import current

_log = logging.getLogger(__name__)


@cache
def install() -> None:
    """Register the lowerings with Inductor, once."""
    inductor.register(SPARSE_ATTN, _lower_forward)
    inductor.register(SPARSE_ATTN_BWD, _lower_backward)


class _StayExtern(Exception):
    """Why a call is not inlined."""


@dataclass(frozen=True)
class _Plan:
    """What is known of a call that will be inlined; symbolic sizes stand in `problem` and `hints` with their hints."""

    problem: SparseAttnProblem
    hints: Hints
    traits: DeviceTraits
    use_int64_offsets: bool | None  # None: the launcher finds out, by a guard if the lengths are symbolic


def _lower_forward(
    q: Any,
    kv: Any,
    indices: Any,
    d_v: Any,
    softmax_scale: float,
    topk_length: Any = None,
    attn_sink: Any = None,
    backend: str = "auto",
) -> Any:
    try:
        plan = _plan(q, kv, indices, d_v, backend, needs_grad=False)
        _leave_specialised_to_the_operator(plan, triton_hopper.automatic_config)
    except _StayExtern as reason:
        args = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
        return _extern(SPARSE_ATTN, args, reason)
    problem, rows = plan.problem, plan.hints.batch * plan.hints.seq_q
    config = choices.forward(problem, plan.hints, plan.traits, softmax_scale)
    programs = program_count(rows, problem.heads, problem.kv_group, config.block_h)
    num_splits = triton_forward_plan.split_count(programs, problem.topk, config, plan.traits, *problem.widths)

    def launch(*tensors: Any) -> Any:
        q, kv, indices, topk_length, attn_sink = tensors
        return triton.launch_forward(
            q,
            kv,
            indices,
            problem.d_v,
            softmax_scale,
            topk_length,
            attn_sink,
            num_splits=num_splits,
            use_int64_offsets=plan.use_int64_offsets,
            config=config,
            traits=plan.traits,
            wrap=torch.library.wrap_triton,
        )

    _log.info("%s is inlined: %s, %s, num_splits=%d", SPARSE_ATTN, problem, config, num_splits)
    return inductor.inline(launch, (q, kv, indices, topk_length, attn_sink))


def _lower_backward(
    dout: Any,
    dlse: Any,
    q: Any,
    kv: Any,
    indices: Any,
    out: Any,
    lse: Any,
    d_v: Any,
    softmax_scale: float,
    topk_length: Any = None,
    attn_sink: Any = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> Any:
    try:
        plan = _plan(q, kv, indices, d_v, backend, needs_grad=True)
        _leave_specialised_to_the_operator(plan, triton_hopper.automatic_backward_config)
        if need_dkv:
            _leave_key_order_to_the_operator(plan)
    except _StayExtern as reason:
        args = (dout, dlse, q, kv, indices, out, lse, d_v, softmax_scale)
        return _extern(SPARSE_ATTN_BWD, (*args, topk_length, attn_sink, need_dq, need_dkv, backend), reason)
    configs = choices.backward(plan.problem, plan.hints, plan.traits, softmax_scale, need_dq, need_dkv)

    def launch(*tensors: Any) -> Any:
        dout, dlse, q, kv, indices, out, lse, topk_length, attn_sink = tensors
        return triton.launch_backward(
            dout,
            dlse,
            q,
            kv,
            indices,
            out,
            lse,
            plan.problem.d_v,
            softmax_scale,
            topk_length,
            attn_sink,
            need_dq,
            need_dkv,
            use_int64_offsets=plan.use_int64_offsets,
            configs=configs,
            traits=plan.traits,
            wrap=torch.library.wrap_triton,
        )

    _log.info("%s is inlined: %s, %s", SPARSE_ATTN_BWD, plan.problem, configs)
    return inductor.inline(launch, (dout, dlse, q, kv, indices, out, lse, topk_length, attn_sink))


def _leave_specialised_to_the_operator(plan: _Plan, automatic_config: Callable[..., object]) -> None:
    """Raise `_StayExtern` where eager runs a faster kernel that cannot be inlined; a package takes the plain one."""
    problem, rows = plan.problem, plan.hints.batch * plan.hints.seq_q
    tuned_rows = current().tuned_rows
    config = automatic_config(
        plan.traits, rows, problem.heads, problem.kv_group, problem.topk, problem.widths, tuned_rows
    )
    if config is not None and not inductor.is_ahead_of_time():
        raise _StayExtern(f"{config} is twice as fast as the plain kernel and written in Gluon, which is not inlined")


def _leave_key_order_to_the_operator(plan: _Plan) -> None:
    """Raise `_StayExtern` where eager adds to dkv in the order of the keys; a package does it in that of the slots."""
    if torch.are_deterministic_algorithms_enabled() or inductor.is_ahead_of_time():
        return
    problem, traits = plan.problem, plan.traits
    configs = backward_configs(*choices.config_key(problem, traits))
    assert configs is not None  # dispatch has refused what nothing fits
    launch_rows = rows_per_launch(
        configs[-1], traits, plan.hints.seq_kv, problem.heads, problem.kv_group, problem.topk, problem.widths
    )
    if launch_rows is not None:
        raise _StayExtern(f"dkv does not fit the cache, so {launch_rows} queries at a time add to it in key order")


def _extern(op: torch._ops.OpOverload, args: tuple[Any, ...], reason: _StayExtern) -> Any:
    _log.info("%s stays an extern call: %s", op, reason)
    return inductor.extern_call(op, args)


def _plan(q: Any, kv: Any, indices: Any, d_v: Any, backend: str, *, needs_grad: bool) -> _Plan:
    """Decide on a call, and guard its widths and head counts if it will be inlined; else raise `_StayExtern`."""
    if not is_enabled():
        raise _StayExtern("mla_ops.lowering is disabled")
    q_size, kv_size, indices_size = q.get_size(), kv.get_size(), indices.get_size()
    lengths = {"batch": q_size[0] if len(q_size) == 4 else 1, "seq_q": q_size[-3], "seq_kv": kv_size[-3]}
    topk = indices_size[-1]
    compiled_for = {"heads": q_size[-2], "kv_group": kv_size[-2], "d_total": q_size[-1], "d_v": d_v}
    for name, size in {**lengths, "topk": topk, **compiled_for}.items():
        if inductor.is_data_dependent(size):
            raise _StayExtern(f"{name} depends on data, so that a launch can't be chosen for it")
    for name, size in compiled_for.items():
        if inductor.is_marked_dynamic(size):
            raise _StayExtern(
                f"{name} is marked dynamic and kernels are compiled for one value of it; one graph serves all values, "
                "mark the dimension static to have the kernel inlined"
            )

    hints = Hints(**{name: inductor.hint(size) for name, size in lengths.items()})
    problem = SparseAttnProblem(
        d_total=inductor.hint(q_size[-1]),
        d_v=inductor.hint(d_v),
        topk=inductor.hint(topk),
        heads=inductor.hint(q_size[-2]),
        kv_group=inductor.hint(kv_size[-2]),
        dtype=q.get_dtype(),
        needs_grad=needs_grad,
    )
    traits = traits_of(q.get_device())
    decision = select(problem, traits, backend)
    if decision.backend is None or decision.backend.name != triton.TritonBackend.name:
        raise _StayExtern(f"only the triton backend is inlined\n{decision}")
    if needs_grad and torch.are_deterministic_algorithms_enabled():
        for name, size in {**lengths, "topk": topk}.items():
            if inductor.is_symbolic(size):
                raise _StayExtern(f"{name} is symbolic and decides how often a deterministic backward launches")
    for size in compiled_for.values():
        inductor.guard(size)
    return _Plan(problem, hints, traits, _needs_int64_offsets(kv, problem))


def _needs_int64_offsets(kv: Any, problem: SparseAttnProblem) -> bool | None:
    """Return True where offsets may pass 32 bits and no guard may be added that says otherwise, else None.

    That is so in a package, which has no guards, and where the caller has bounded the length above the limit.
    """
    seq_kv = kv.get_size()[-3]
    if not inductor.is_symbolic(seq_kv):
        return None
    row_strides = [problem.kv_group * problem.d_total, *(kv.maybe_get_stride() or [])[-3:-2]]
    limit = max(inductor.upper_bound(seq_kv * stride) for stride in row_strides)
    is_bounded = inductor.is_ahead_of_time() or limit < float("inf")
    return True if is_bounded and limit >= triton_forward_plan.INT32_OFFSETS else None

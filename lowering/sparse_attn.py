"""How `mla::sparse_attn` and its backward are lowered: the launcher that dispatch picks, traced into Inductor's graph.

A compiled graph then contains the kernels themselves. Batch, sequence lengths and topk stay symbolic; widths and head
counts, for which kernels are compiled, are made constants by a guard. What cannot be inlined stays an extern call of
the operator, which runs everything the operator runs, and the log says why: `TORCH_LOGS="mla_ops"` shows it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from mla_ops import settings
from mla_ops.device import DeviceTraits, traits_of
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.lowering import settings_of_trace
from mla_ops.lowering import sparse_attn_choices as choices
from mla_ops.lowering.inlining import (
    StayExtern,
    extern,
    needs_int64_offsets,
    require_inlinable,
    require_triton,
    wrap_kernel,
)
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, Side, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.triton.backward import launch_backward, plan_backward
from mla_ops.ops.sparse_attn.triton.forward import launch_forward, plan_forward, readable
from mla_ops.ops.sparse_attn.triton.kernel_sets import Choice, choose
from mla_ops.ops.sparse_attn.triton.key_order import rows_per_launch
from mla_ops.registration import SPARSE_ATTN, SPARSE_ATTN_BWD

_log = logging.getLogger(__name__)


@cache
def install() -> None:
    """Register the lowerings with Inductor, once."""
    inductor.register(SPARSE_ATTN, _lower_forward)
    inductor.register(SPARSE_ATTN_BWD, _lower_backward)


@dataclass(frozen=True)
class _Plan:
    """What is known of a call that will be inlined; symbolic sizes stand in `problem` and `hints` with their hints."""

    problem: SparseAttnProblem
    hints: Hints
    device: torch.device
    traits: DeviceTraits
    choice: Choice
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
        plan = _plan("forward", q, kv, indices, d_v, backend)
    except StayExtern as reason:
        args = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
        return extern(SPARSE_ATTN, args, reason)
    choice = choices.forward(plan.choice, plan.problem, plan.hints, plan.device, softmax_scale)
    num_splits = choices.split_count_of(choice, plan.problem, plan.hints, plan.traits)

    def launch(*tensors: Any) -> Any:
        q, kv, indices, topk_length, attn_sink = tensors
        call = readable(SparseAttnCall(q, kv, indices, plan.problem.d_v, softmax_scale, topk_length, attn_sink))
        launched = plan_forward(
            call, plan.traits, choice=choice, num_splits=num_splits, use_int64_offsets=plan.use_int64_offsets
        )
        return tuple(launch_forward(call, launched, wrap=wrap_kernel))  # a graph has no named tuples

    _log.info("%s is inlined: %s, %s, num_splits=%d", SPARSE_ATTN, plan.problem, choice.config, num_splits)
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
    wanted = Wanted(need_dq, need_dkv)
    # The thread that compiles a backward may be one of autograd's, which knows nothing of an override.
    with settings.use(settings_of_trace()):
        try:
            plan = _plan("backward", q, kv, indices, d_v, backend, is_dkv_wanted=need_dkv)
        except StayExtern as reason:
            args = (dout, dlse, q, kv, indices, out, lse, d_v, softmax_scale)
            return extern(SPARSE_ATTN_BWD, (*args, topk_length, attn_sink, need_dq, need_dkv, backend), reason)
        choice = choices.backward(plan.choice, plan.problem, plan.hints, plan.device, softmax_scale, wanted)

    def launch(*tensors: Any) -> Any:
        dout, dlse, q, kv, indices, out, lse, topk_length, attn_sink = tensors
        call = readable(SparseAttnCall(q, kv, indices, plan.problem.d_v, softmax_scale, topk_length, attn_sink))
        launched = plan_backward(
            call, plan.traits, wanted, choice=choice, use_int64_offsets=plan.use_int64_offsets, is_traced=True
        )
        results, gradients = Results(out, lse), Gradients(dout, dlse)
        return launch_backward(call, results, gradients, wanted, launched, wrap=wrap_kernel)

    _log.info("%s is inlined: %s, %s", SPARSE_ATTN_BWD, plan.problem, choice.config)
    return inductor.inline(launch, (dout, dlse, q, kv, indices, out, lse, topk_length, attn_sink))


def _choice(side: Side, problem: SparseAttnProblem, hints: Hints, traits: DeviceTraits, is_dkv_wanted: bool) -> Choice:
    """Return the kernels to inline; raise `StayExtern` where eager runs faster in a way that cannot be inlined.

    An AOTInductor package calls no operator of Python's: there the kernels that can be inlined are taken all the same.
    """
    is_deterministic = is_dkv_wanted and torch.are_deterministic_algorithms_enabled()
    is_package = inductor.is_ahead_of_time()
    choice = choose(side, problem, hints, traits, is_deterministic=is_deterministic, inlinable_only=is_package)
    if not choice.kernels.is_inlinable:
        raise StayExtern(
            f"{choice.config} is twice as fast as the plain kernel and written in Gluon, which is not inlined"
        )
    if side == "backward" and is_dkv_wanted and not is_deterministic and not is_package:
        launch_rows = rows_per_launch(choice.config[-1], problem, hints, traits)
        if launch_rows is not None:
            raise StayExtern(f"dkv does not fit the cache, so {launch_rows} queries at a time add to it in key order")
    return choice


def _plan(side: Side, q: Any, kv: Any, indices: Any, d_v: Any, backend: str, *, is_dkv_wanted: bool = False) -> _Plan:
    """Decide on a call, and guard its widths and head counts if it will be inlined; else raise `StayExtern`."""
    q_size, kv_size, indices_size = q.get_size(), kv.get_size(), indices.get_size()
    lengths = {"batch": q_size[0] if len(q_size) == 4 else 1, "seq_q": q_size[-3], "seq_kv": kv_size[-3]}
    topk = indices_size[-1]
    compiled_for = {"heads": q_size[-2], "kv_group": kv_size[-2], "d_total": q_size[-1], "d_v": d_v}
    require_inlinable({**lengths, "topk": topk}, compiled_for)

    hints = Hints(**{name: inductor.hint(size) for name, size in lengths.items()})
    problem = SparseAttnProblem(
        d_total=inductor.hint(q_size[-1]),
        d_v=inductor.hint(d_v),
        topk=inductor.hint(topk),
        heads=inductor.hint(q_size[-2]),
        kv_group=inductor.hint(kv_size[-2]),
        dtype=q.get_dtype(),
        needs_grad=side == "backward",
    )
    device: torch.device = q.get_device()
    traits = traits_of(device)
    require_triton(select(problem, traits, backend))
    choice = _choice(side, problem, hints, traits, is_dkv_wanted)
    if side == "backward" and torch.are_deterministic_algorithms_enabled():
        for name, size in {**lengths, "topk": topk}.items():
            if inductor.is_symbolic(size):
                raise StayExtern(f"{name} is symbolic and decides how often a deterministic backward launches")
    for size in compiled_for.values():
        inductor.guard(size)
    return _Plan(problem, hints, device, traits, choice, needs_int64_offsets(kv))

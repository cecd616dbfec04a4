"""How `mla::index_scores` and its backward are lowered: their launchers, traced into Inductor's graph.

Lengths and topk stay symbolic, but for a deterministic backward: they decide how often it launches.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.lowering.inlining import StayExtern, extern, needs_int64_offsets, require_inlinable, require_triton
from mla_ops.ops.index_scores.backends import select
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Side, Wanted
from mla_ops.ops.index_scores.triton.backward import launch_backward, plan_backward
from mla_ops.ops.index_scores.triton.forward import launch_forward, plan_forward
from mla_ops.registration import INDEX_SCORES, INDEX_SCORES_BWD

_log = logging.getLogger(__name__)


@cache
def install() -> None:
    """Register the lowerings with Inductor, once."""
    inductor.register(INDEX_SCORES, _lower_forward)
    inductor.register(INDEX_SCORES_BWD, _lower_backward)


def _lower_forward(
    q_idx: Any,
    k_idx: Any,
    weights: Any,
    indices: Any,
    topk_length: Any = None,
    relu: bool = True,
    backend: str = "auto",
) -> Any:
    try:
        traits = _require("forward", q_idx, k_idx, indices, backend)
    except StayExtern as reason:
        return extern(INDEX_SCORES, (q_idx, k_idx, weights, indices, topk_length, relu, backend), reason)
    use_int64_offsets = needs_int64_offsets(k_idx)

    def launch(*tensors: Any) -> Any:
        q_idx, k_idx, weights, indices, topk_length = tensors
        call = IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu)
        plan = plan_forward(call, traits, use_int64_offsets=use_int64_offsets)
        return launch_forward(call, plan, wrap=torch.library.wrap_triton)

    _log.info("%s is inlined", INDEX_SCORES)
    return inductor.inline(launch, (q_idx, k_idx, weights, indices, topk_length))


def _lower_backward(
    dscores: Any,
    q_idx: Any,
    k_idx: Any,
    weights: Any,
    indices: Any,
    topk_length: Any = None,
    relu: bool = True,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dw: bool = True,
    backend: str = "auto",
) -> Any:
    wanted = Wanted(need_dq, need_dk, need_dw)
    try:
        traits = _require("backward", q_idx, k_idx, indices, backend, is_dk_wanted=need_dk)
    except StayExtern as reason:
        args = (dscores, q_idx, k_idx, weights, indices, topk_length, relu, *wanted, backend)
        return extern(INDEX_SCORES_BWD, args, reason)
    use_int64_offsets = needs_int64_offsets(k_idx)

    def launch(*tensors: Any) -> Any:
        dscores, q_idx, k_idx, weights, indices, topk_length = tensors
        call = IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu)
        plan = plan_backward(call, traits, wanted, use_int64_offsets=use_int64_offsets)
        return launch_backward(call, dscores, wanted, plan, wrap=torch.library.wrap_triton)

    _log.info("%s is inlined", INDEX_SCORES_BWD)
    return inductor.inline(launch, (dscores, q_idx, k_idx, weights, indices, topk_length))


def _require(
    side: Side, q_idx: Any, k_idx: Any, indices: Any, backend: str, *, is_dk_wanted: bool = False
) -> DeviceTraits:
    """Return the traits of the device of a call that is inlined, its widths guarded; else raise `StayExtern`."""
    (*batch, seq_q, heads, width), (*_, seq_kv, kv_group, _) = q_idx.get_size(), k_idx.get_size()
    lengths = {"batch": (*batch, 1)[0], "seq_q": seq_q, "seq_kv": seq_kv, "topk": indices.get_size()[-1]}
    compiled_for = {"index_heads": heads, "kv_group": kv_group, "index_head_dim": width}
    require_inlinable(lengths, compiled_for)
    width, heads, kv_group, topk = (inductor.hint(size) for size in (width, heads, kv_group, lengths["topk"]))
    problem = IndexScoresProblem(width, heads, kv_group, topk, q_idx.get_dtype(), needs_grad=side == "backward")
    traits = traits_of(q_idx.get_device())
    require_triton(select(problem, traits, backend))
    if is_dk_wanted and torch.are_deterministic_algorithms_enabled():
        for name, size in lengths.items():
            if inductor.is_symbolic(size):
                raise StayExtern(f"{name} is symbolic and decides how often a deterministic backward launches")
    for size in compiled_for.values():
        inductor.guard(size)
    return traits

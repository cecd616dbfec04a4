"""How `mla::index_topk` is lowered: its launcher, traced into Inductor's graph, where one strip holds all scores.

Sizes decide how the keys of a row are selected, and in how many strips. So a call with a symbolic size stays extern,
which serves every size; with known sizes it is inlined if they make one strip whose rows fit registers.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.lowering.inlining import StayExtern, extern, require_inlinable, require_triton
from mla_ops.ops.index_topk.backends import select
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.triton.launch import launch_topk, plan_topk
from mla_ops.registration import INDEX_TOPK

_log = logging.getLogger(__name__)


@cache
def install() -> None:
    """Register the lowering with Inductor, once."""
    inductor.register(INDEX_TOPK, _lower)


def _lower(
    q_idx: Any,
    k_idx: Any,
    weights: Any,
    topk: Any,
    starts: Any = None,
    ends: Any = None,
    k_scale: Any = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> Any:
    try:
        problem, traits = _require(q_idx, k_idx, weights, topk, causal, backend)
    except StayExtern as reason:
        args = (q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu, backend)
        return extern(INDEX_TOPK, args, reason)

    def launch(*tensors: Any) -> Any:
        q_idx, k_idx, weights, starts, ends, k_scale = tensors
        call = IndexTopkCall(q_idx, k_idx, weights, problem.topk, starts, ends, k_scale, causal, relu)
        return launch_topk(call, plan_topk(call, problem, traits), wrap=torch.library.wrap_triton)

    _log.info("%s is inlined: %s", INDEX_TOPK, problem)
    return inductor.inline(launch, (q_idx, k_idx, weights, starts, ends, k_scale))


def _require(
    q_idx: Any, k_idx: Any, weights: Any, topk: Any, causal: bool, backend: str
) -> tuple[IndexTopkProblem, DeviceTraits]:
    """Return what is known of a call that is inlined, else raise `StayExtern`."""
    (*batch, seq_q, heads, width), (*_, seq_kv, kv_group, _) = q_idx.get_size(), k_idx.get_size()
    lengths = {"batch": (*batch, 1)[0], "seq_q": seq_q, "seq_kv": seq_kv}
    compiled_for = {"topk": topk, "index_heads": heads, "kv_group": kv_group, "index_head_dim": width}
    require_inlinable(lengths, compiled_for)
    for name, size in {**lengths, **compiled_for}.items():
        if inductor.is_symbolic(size):
            raise StayExtern(f"{name} is symbolic and decides how keys are selected")
    device = q_idx.get_device()
    width, heads, kv_group, topk = (inductor.hint(size) for size in (width, heads, kv_group, topk))
    problem, traits = IndexTopkProblem(width, heads, kv_group, topk, q_idx.get_dtype()), traits_of(device)
    require_triton(select(problem, traits, backend))
    q_like, k_like, weights_like = (_without_data(node) for node in (q_idx, k_idx, weights))
    plan = plan_topk(IndexTopkCall(q_like, k_like, weights_like, topk, causal=causal), problem, traits)
    if plan.strips and not plan.is_inlinable:
        raise StayExtern(
            f"it takes {len(plan.strips)} strips, keys selected {plan.selection.way}: more than one launch"
        )
    return problem, traits


def _without_data(node: Any) -> torch.Tensor:
    """Return a tensor of the size of a node, whose sizes are known."""
    size = [inductor.hint(expr) for expr in node.get_size()]
    return torch.empty(size, dtype=node.get_dtype(), device="meta")

"""How `mla::attn_mass` is lowered: its launcher, traced into Inductor's graph. Lengths and topk stay symbolic."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch

from mla_ops.device import traits_of
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.lowering.inlining import StayExtern, extern, needs_int64_offsets, require_inlinable, require_triton
from mla_ops.ops.attn_mass.backends import select
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem
from mla_ops.ops.attn_mass.triton.launch import launch_mass, plan_mass
from mla_ops.registration import ATTN_MASS

_log = logging.getLogger(__name__)


@cache
def install() -> None:
    """Register the lowering with Inductor, once."""
    inductor.register(ATTN_MASS, _lower)


def _lower(
    q: Any, kv: Any, indices: Any, lse: Any, softmax_scale: float, topk_length: Any = None, backend: str = "auto"
) -> Any:
    (*_, seq_q, heads, d_total), (*_, seq_kv, kv_group, _) = q.get_size(), kv.get_size()
    topk = indices.get_size()[-1]
    compiled_for = {"heads": heads, "kv_group": kv_group, "d_total": d_total}
    traits = traits_of(q.get_device())
    try:
        require_inlinable({"seq_q": seq_q, "seq_kv": seq_kv, "topk": topk}, compiled_for)
        d_total, heads, kv_group, topk = (inductor.hint(size) for size in (d_total, heads, kv_group, topk))
        problem = AttnMassProblem(d_total, heads, kv_group, topk, q.get_dtype())
        require_triton(select(problem, traits, backend))
    except StayExtern as reason:
        return extern(ATTN_MASS, (q, kv, indices, lse, softmax_scale, topk_length, backend), reason)
    for size in compiled_for.values():
        inductor.guard(size)
    use_int64_offsets = needs_int64_offsets(kv)

    def launch(*tensors: Any) -> Any:
        q, kv, indices, lse, topk_length = tensors
        call = AttnMassCall(q, kv, indices, lse, softmax_scale, topk_length)
        plan = plan_mass(call, traits, use_int64_offsets=use_int64_offsets)
        return launch_mass(call, plan, wrap=torch.library.wrap_triton)

    _log.info("%s is inlined: %s", ATTN_MASS, problem)
    return inductor.inline(launch, (q, kv, indices, lse, topk_length))

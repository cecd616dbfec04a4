"""The launcher of the score kernel: planned once for calls alike, then run."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import Wrap, as_it_is, unfilled
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem
from mla_ops.ops.index_scores.configs.tables import forward_config
from mla_ops.ops.index_scores.triton.launch import NOTHING, Launch, key_of, plan_launch, readable
from mla_ops.tiling import TileConfig, product_pieces


def plan_forward(
    call: IndexScoresCall,
    traits: DeviceTraits,
    *,
    config: TileConfig | None = None,
    use_int64_offsets: bool | None = None,
) -> Launch:
    """Plan a forward on a device with `traits`; what is None is derived."""
    config = config or forward_config(key_of(IndexScoresProblem.of(call), traits))
    return plan_launch("forward", call, config, use_int64_offsets)


def describe_forward(plan: Launch) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    return (NOTHING if 0 in plan.shape else f"forward: {plan.config}; {plan.record}",)


def launch_forward(call: IndexScoresCall, plan: Launch, *, wrap: Wrap = as_it_is) -> torch.Tensor:
    """Run the score kernel; `wrap` is applied to it."""
    is_traced = wrap is not as_it_is
    scores = unfilled(plan.shape, torch.float32, call.q_idx, is_traced=is_traced)
    if scores.numel() == 0:
        return scores
    q, k, weights, indices, topk_length, relu = readable(call)
    wrap(_scores_kernel())[(prod(indices.shape[:-1]),)](
        q, *plan.q_strides, k, *plan.k_strides, indices, *plan.indices_strides, topk_length, weights, scores,
        *plan.sizes, *plan.constants, *product_pieces(plan.config, q.shape[-1]), plan.stride_align,
        plan.use_int64_offsets, relu, **plan.config.options,
    )  # fmt: skip
    plan.record.is_warm |= not is_traced
    return scores


@lru_cache(maxsize=1)
def _scores_kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.index_scores.kernels.scores import _index_scores_kernel

    return _index_scores_kernel

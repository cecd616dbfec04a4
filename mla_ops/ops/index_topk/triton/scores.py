"""Launches of the scores of one strip."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import Wrap, alignment, outer_strides
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.launch import ConfigKey, ScoresConfig, launch_options
from mla_ops.ops.index_topk.configs.lookup import MAX_FEW_QUERIES, scores_config

# Bytes of weights up to which they are copied so that the weights of one head lie together, which the scores of many
# heads read 6 % faster. Beyond, they would be a notable part of the workspace.
MAX_COPIED_WEIGHTS = 32 * 2**20


class Strip(NamedTuple):
    """Rows whose scores are in memory at a time: queries of planes, a plane being a batch element and a KV group."""

    first_plane: int
    num_planes: int
    first_query: int
    num_queries: int

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.num_planes * self.num_queries


class ScoresLaunch(NamedTuple):
    """What sizes and strides decide about a launch of the scores."""

    config: ScoresConfig
    strides: tuple[tuple[int, ...], ...]  # of q_idx, k_idx, weights, k_scale
    copies_weights: bool
    seq_q: int
    seq_kv: int
    key_blocks: int  # programs along the keys
    constants: dict[str, Any]


def plan_scores(
    call: IndexTopkCall, problem: IndexTopkProblem, traits: DeviceTraits, config: ScoresConfig | None = None
) -> ScoresLaunch:
    """Plan the scores of a readable call; `config` is chosen by hand in measurements and tests."""
    seq_q, seq_kv = call.q_idx.shape[-3], call.k_idx.shape[-3]
    heads, element_size = problem.heads_per_group, problem.dtype.itemsize
    key = ConfigKey(traits.arch, traits.smem_bytes, heads, problem.index_head_dim, element_size)
    if config is None:
        config = scores_config(key, has_few_queries=bool(seq_q <= MAX_FEW_QUERIES))
    q_strides, k_strides = outer_strides(call.q_idx.stride()), outer_strides(call.k_idx.stride())
    copies_weights = config.way in ("passing heads", "wide") and call.weights.numel() * 4 <= MAX_COPIED_WEIGHTS
    constants = {
        "HEADS": heads, "KV_GROUP": problem.kv_group, "HEAD_DIM": problem.index_head_dim, "WIDTH": config.width,
        "CHUNKS": config.chunks, "BLOCK_H" if config.way == "head rows" else "BLOCK_Q": config.block_rows,
        "BLOCK_K": config.block_k, "STAGES": config.num_stages,
        "STRIDE_ALIGN": alignment((*q_strides, *k_strides)),
        "IS_CAUSAL": call.causal, "HAS_RELU": call.relu,
    }  # fmt: skip
    if config.way == "passing keys":
        constants["KEY_TILES"] = config.key_tiles
    elif config.way != "head rows":
        constants["IS_WIDE"] = config.way == "wide"
    weights_strides = transposed_strides(call) if copies_weights else batched(call.weights.stride(), 3)
    scale_strides = (0, 0, 0) if call.k_scale is None else batched(call.k_scale.stride(), 3)
    return ScoresLaunch(
        config,
        (q_strides, k_strides, weights_strides, scale_strides),
        copies_weights,
        seq_q,
        seq_kv,
        key_blocks=-(-seq_kv // (config.block_k * config.key_tiles)),
        constants=constants,
    )


def run_scores(
    call: IndexTopkCall, strip: Strip, scratch: torch.Tensor, row_stride: int, launch: ScoresLaunch, wrap: Wrap
) -> None:
    """Write the scores of a strip, bits of fp32, to the beginning of `scratch`; weights must be as the plan says.

    Where at most MAX_FEW_QUERIES queries of a batch element are asked for, the weighted products are summed over heads
    as a tree, else one head after the other, by fused multiplications and additions. So a score of one launch may
    differ from that of the other by the rounding of this sum, and by nothing else. The number of rows beside a row,
    and the place of the row, make no other difference.
    """
    q_strides, k_strides, weights_strides, scale_strides = launch.strides
    config = launch.config
    row_blocks = strip.num_planes
    if config.way != "head rows":
        row_blocks *= -(-strip.num_queries // config.block_rows)
    wrap(scores_kernel(config))[(row_blocks * launch.key_blocks,)](
        call.q_idx, *q_strides, call.k_idx, *k_strides, call.weights, *weights_strides, call.k_scale, *scale_strides,
        *ranges(call), scratch, row_stride, strip.first_plane, strip.first_query, strip.num_queries, launch.seq_q,
        launch.seq_kv, launch.key_blocks, **launch.constants, **launch_options(config),
    )  # fmt: skip


@cache
def scores_kernel(config: ScoresConfig) -> Any:
    """Return the kernel that `config` launches; importing it imports triton."""
    from mla_ops.ops.index_topk.kernels import scores

    if config.way == "passing keys":
        return scores._score_passing_keys_kernel
    if config.way == "head rows":
        return scores._score_head_rows_kernel
    return scores._score_passing_heads_kernel


def ranges(call: IndexTopkCall) -> tuple[Any, ...]:
    """Return `starts` and `ends`, each with its strides of batch and query, as kernels take them."""
    arguments: list[Any] = []
    for bound in (call.starts, call.ends):
        arguments += [bound, *((0, 0) if bound is None else batched(bound.stride(), 2))]
    return tuple(arguments)


def transposed_weights(call: IndexTopkCall) -> torch.Tensor:
    """Return the weights in fp32, those of one head together."""
    return call.weights.to(torch.float32).mT.contiguous()


def transposed_strides(call: IndexTopkCall) -> tuple[int, ...]:
    """Return the strides of batch, query and head of `transposed_weights(call)`."""
    seq_q, heads = call.weights.shape[-2:]
    return (seq_q * heads if call.weights.dim() == 3 else 0), 1, seq_q


def batched(strides: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """Return strides, with a 0 in front where there is no batch."""
    return strides if len(strides) == dims else (0, *strides)

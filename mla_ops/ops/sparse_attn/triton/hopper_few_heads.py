"""The Hopper kernel set for few heads: a warp-specialised Gluon forward for wide rows on sm90."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import Wrap, outer_strides, with_aligned_rows
from mla_ops.ops.sparse_attn.call import Hints, Side, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import ConfigKey, FewHeadsConfig
from mla_ops.ops.sparse_attn.configs.lookup import few_heads_config, key_of
from mla_ops.ops.sparse_attn.triton.hopper import WIDTHS, gluon_reason
from mla_ops.ops.sparse_attn.triton.splits import merge, partial_results

# Keys of a tile.
TILE = 64
# Query heads of one KV row that a work item takes at most.
MAX_HEADS = 32
# What a work item, and the merge of splits, take besides tiles, in the time of a tile.
ITEM_TILES, MERGE_TILES = 0.3, 1.0
MAX_SPLITS = 32


class FewHeadsForward(NamedTuple):
    """How a forward is launched."""

    config: FewHeadsConfig
    num_splits: int
    slots_per_split: int
    items: int  # a share of the slots of one (batch, query, group) each
    programs: int  # that share the items


class HopperFewHeadsKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "hopper_few_heads"
    is_inlinable = False  # compilers inline Triton and not Gluon

    def refusal(self, side: Side, problem: SparseAttnProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why a side of `problem` is not run by these kernels: they can't, or other kernels are faster."""
        if side != "forward":
            return f"they have no {side}"
        if traits.arch != 90:
            return f"the device is sm{traits.arch}, they need sm90"
        if problem.dtype.itemsize != 2:
            return f"dtype is {problem.dtype}, they need bf16 or fp16"
        if problem.heads_per_group > MAX_HEADS:
            return f"{problem.heads_per_group} heads share a KV row, they take {MAX_HEADS}"
        if few_heads_config(key_of(problem, traits)) is None:
            return f"widths are {problem.d_total}/{problem.d_v}, they take {WIDTHS}"
        return gluon_reason()

    def config(
        self, side: Side, key: ConfigKey, tuned_rows: str, *, is_deterministic: bool = False
    ) -> FewHeadsConfig | None:
        """Return the narrowest configuration that covers the row; a tuned row is one of the portable kernels."""
        return few_heads_config(key)

    def plan_forward(
        self,
        call: SparseAttnCall,
        config: FewHeadsConfig,
        traits: DeviceTraits,
        num_splits: int | None,
        use_int64_offsets: bool | None,
    ) -> FewHeadsForward:
        """Plan a launch of the forward kernel with as many programs as the device holds at a time."""
        groups, topk = call.rows * call.kv.shape[-2], call.indices.shape[-1]
        tiles = max(1, -(-topk // TILE))
        if num_splits is None:
            num_splits = split_count(groups, tiles, traits.num_sms)
        slots_per_split = -(-tiles // num_splits) * TILE
        items = groups * num_splits
        return FewHeadsForward(config, num_splits, slots_per_split, items, min(items, traits.num_sms))

    def run_forward(
        self, call: SparseAttnCall, out: torch.Tensor | None, lse: torch.Tensor, plan: FewHeadsForward, wrap: Wrap
    ) -> torch.Tensor:
        """Run the warp-specialised forward, and the merge kernel when a row's slots are shared out over programs."""
        if out is None:
            raise UnsupportedProblemError(
                "hopper kernels return out and lse, got max_logits_only=True; pass a FwdConfig"
            )
        from mla_ops.ops.sparse_attn.kernels.hopper_few_heads import _sparse_attn_fwd_few_heads_kernel

        q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = self.prepared(call)
        seq_q, heads, d_total = q.shape[-3:]
        seq_kv, kv_group = kv.shape[-3:-1]
        config, is_split = plan.config, plan.num_splits > 1
        kernel_out, kernel_lse = out, lse
        if is_split:
            partials = (call.rows, plan.num_splits, heads)
            kernel_out, kernel_lse = partial_results(partials, d_v, q, is_traced=False)
        _sparse_attn_fwd_few_heads_kernel[(plan.programs,)](
            q, *outer_strides(q.stride()), kv, *outer_strides(kv.stride()), indices, *outer_strides(indices.stride()),
            topk_length, None if is_split else attn_sink, None, 0, None, kernel_out, kernel_lse,
            softmax_scale, seq_q, seq_kv, seq_kv, 1, indices.shape[-1],
            plan.slots_per_split, plan.num_splits, plan.items,
            heads, kv_group, d_total, d_v,
            config.left, config.right, config.tail, config.block_h, config.stages, 128, False, softmax_scale < 0,
            num_warps=4,
        )  # fmt: skip
        if is_split:
            merge(kernel_out, kernel_lse, attn_sink, out, lse, partials, d_v)
        return lse

    def prepared(self, call: SparseAttnCall) -> SparseAttnCall:
        """Return `call` with rows of q and kv that asynchronous copies can begin at."""
        return call._replace(q=with_aligned_rows(call.q), kv=with_aligned_rows(call.kv))

    def plan_backward(self, *_: object) -> NoReturn:
        """Refuse: `refusal` and `check_config` let no backward come here."""
        raise UnsupportedProblemError("the Hopper kernels for few heads have no backward, pass BwdConfigs")

    run_backward = plan_backward


def split_count(groups: int, tiles: int, num_sms: int) -> int:
    """Return over how many work items the slots of one (batch, query, group) are shared out: the fastest number.

    Programs take work items in turn, so the device takes as long as the program with most of them.
    """

    def tiles_in_turn(splits: int) -> float:
        turns = -(-groups * splits // num_sms)
        return turns * (-(-tiles // splits) + ITEM_TILES) + (MERGE_TILES if splits > 1 else 0.0)

    shares = {-(-tiles // splits) for splits in range(1, min(MAX_SPLITS, tiles) + 1)}
    return min((-(-tiles // share) for share in sorted(shares, reverse=True)), key=tiles_in_turn)

"""The Hopper kernel set for few heads: a warp-specialised Gluon forward for wide rows on sm90."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import Wrap, as_it_is, outer_strides, unfilled, with_aligned_rows
from mla_ops.ops.sparse_attn.call import Hints, Side, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import ConfigKey, FewHeadsConfig
from mla_ops.ops.sparse_attn.configs.lookup import few_heads_config, key_of
from mla_ops.ops.sparse_attn.triton.hopper import WIDTHS, gluon_reason
from mla_ops.ops.sparse_attn.triton.portable import run_merge

# Keys of a tile.
TILE = 64
# Query heads of one KV row that a work item takes at most.
MAX_HEADS = 32
# With up to 16 heads, where the L2 cache holds all keys, as many work items for each multiprocessor from where on the
# plain kernel is faster: 4096 queries with topk 2048 and 8192 keys at 576/512 take 1.67 ms, the plain kernel 1.48. With
# 256 such queries it is 110 against 125 us, with 4096 of 32 heads 2.13 against 2.36 ms.
CACHED_ITEMS = 8
# What a work item, and the merge of splits, take besides tiles, in the time of a tile when the whole device is at work.
ITEM_TILES, MERGE_TILES = 0.5, 1.0
# The share of the device that takes rows from memory as fast as all of it, measured at 576/512.
BUSY_SHARE = 0.52
# More splits of a row never pay: the merge takes longer than they save.
MAX_SPLITS = 32


class FewHeadsForward(NamedTuple):
    """How a forward is launched."""

    config: FewHeadsConfig
    num_splits: int
    slots_per_split: int
    items: int  # a share of the slots of one (batch, query, group) each
    programs: int  # that share the items


class Rows(NamedTuple):
    """Where the kernel finds rows and what they hold."""

    strides: tuple[int, int, int]  # of a batch element, or of a page; of a row; of a group
    num_positions: int  # positions from it on are no keys
    page_size: int = 1
    num_pages: int = 1
    block_table: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    cache_scale: torch.Tensor | None = None
    is_paged: bool = False
    # Of rows in e4m3: channels of the payload, channels in 16 bits behind it, scales, where both stand in the row.
    format: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)


class HopperFewHeadsKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "hopper_few_heads"
    is_inlinable = False  # compilers inline Triton and not Gluon

    def refusal(self, side: Side, problem: SparseAttnProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why a side of `problem` is not run by these kernels: they can't, or other kernels are faster."""
        if side != "forward":
            return f"they have no {side}"
        if problem.is_scaled:
            return "q or kv is a payload of e4m3, they need plain rows"
        if hints is not None and problem.heads_per_group <= 16:
            kv_bytes = hints.batch * hints.seq_kv * problem.kv_group * problem.d_total * problem.dtype.itemsize
            if kv_bytes <= traits.l2_bytes and hints.rows * problem.kv_group >= CACHED_ITEMS * traits.num_sms:
                return f"the cache holds all keys of {hints.rows} queries"
        return problem_refusal(key_of(problem, traits), problem.dtype)

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
        """Plan a launch of the forward kernel; offsets are of 64 bits in any case."""
        kv = call.kv
        batch = kv.shape[0] if kv.dim() == 4 and kv.stride(0) else 1
        is_cached = batch * kv.shape[-3] * kv.stride(-3) * kv.element_size() <= traits.l2_bytes
        return plan_items(
            config, call.rows * kv.shape[-2], call.indices.shape[-1], traits, num_splits, is_streamed=not is_cached
        )

    def run_forward(
        self, call: SparseAttnCall, out: torch.Tensor | None, lse: torch.Tensor, plan: FewHeadsForward, wrap: Wrap
    ) -> torch.Tensor:
        """Run the warp-specialised forward, and the merge kernel when a row's slots are shared out over programs."""
        if out is None:
            raise UnsupportedProblemError(
                "hopper kernels return out and lse, got max_logits_only=True; pass a FwdConfig"
            )
        kv = with_aligned_rows(call.kv)
        run_few_heads(
            call.q, kv, call.indices, call.softmax_scale, call.topk_length, call.attn_sink, out, lse, plan,
            kv.shape[-2], Rows(outer_strides(kv.stride()), kv.shape[-3]),
        )  # fmt: skip
        return lse

    def prepared(self, call: SparseAttnCall) -> SparseAttnCall:
        """Return `call` as it is: there is no backward to prepare it for."""
        return call

    def plan_backward(self, *_: object) -> NoReturn:
        """Refuse: `refusal` lets no backward come here."""
        raise UnsupportedProblemError("the Hopper kernels for few heads have no backward; pass BwdConfigs")

    def run_backward(self, *_: object) -> NoReturn:
        """Refuse, as above."""
        self.plan_backward()


def problem_refusal(key: ConfigKey, dtype: torch.dtype, *, has_scales: bool = False) -> str | None:
    """Return why the kernel can't run a problem with `q` of this dtype."""
    if key.arch != 90:
        return f"the device is sm{key.arch}, they need sm90"
    if dtype.itemsize != 2:
        return f"dtype is {dtype}, they need bf16 or fp16"
    if key.heads_per_group > MAX_HEADS:
        return f"{key.heads_per_group} heads share a KV row, they take up to {MAX_HEADS}"
    if few_heads_config(key, has_scales=has_scales) is None:
        return f"widths are {key.d_total}/{key.d_v}, they take {WIDTHS}"
    return gluon_reason()


def plan_items(
    config: FewHeadsConfig,
    groups: int,
    topk: int,
    traits: DeviceTraits,
    num_splits: int | None = None,
    *,
    is_streamed: bool,
) -> FewHeadsForward:
    """Plan a launch for `groups` (batch, query, group) with as many programs as the device holds at a time.

    `is_streamed`: rows are copied as they are, from memory, whose bandwidth is all that a program waits for.
    """
    tiles = max(1, -(-topk // TILE))
    if num_splits is None:
        num_splits = split_count(groups, tiles, traits.num_sms, is_streamed=is_streamed)
    items = groups * num_splits
    return FewHeadsForward(config, num_splits, -(-tiles // num_splits) * TILE, items, min(items, traits.num_sms))


def run_few_heads(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: FewHeadsForward,
    kv_group: int,
    rows: Rows,
) -> None:
    """Run the kernel on rows in `kv`, and the merge kernel when a row's slots are shared out over programs."""
    q = with_aligned_rows(q)
    seq_q, heads, d_total = q.shape[-3:]
    d_v, config, is_split = out.shape[-1], plan.config, plan.num_splits > 1
    kernel_out, kernel_lse = out, lse
    if is_split:
        partials = (plan.items // (plan.num_splits * kv_group), plan.num_splits, heads)
        # Rounded as the weights are; in fp32 there would be twice the bytes to write and to merge.
        kernel_out = unfilled((*partials, d_v), q.dtype, q, is_traced=False)
        kernel_lse = unfilled(partials, torch.float32, q, is_traced=False)
    table, scale = rows.block_table, rows.cache_scale
    _kernel()[(plan.programs,)](
        q, *outer_strides(q.stride()), kv, *rows.strides, indices, *outer_strides(indices.stride()),
        topk_length, None if is_split else attn_sink, table, 0 if table is None else table.stride(0), rows.seq_lens,
        scale, 0 if scale is None or scale.numel() == 1 else 1, kernel_out, kernel_lse,
        softmax_scale, seq_q, rows.num_positions, rows.page_size, rows.num_pages, indices.shape[-1],
        plan.slots_per_split, plan.num_splits, plan.items,
        heads, kv_group, d_total, d_v,
        config.value, config.tail, config.block_h, config.stages, config.q_buffers,
        gather_registers(config, is_converting=rows.format[0] > 0),
        rows.is_paged, softmax_scale < 0, *rows.format,
        num_warps=4,
    )  # fmt: skip
    if is_split:
        run_merge(kernel_out, kernel_lse, attn_sink, out, lse, as_it_is)


def gather_registers(config: FewHeadsConfig, *, is_converting: bool) -> int:
    """Return the registers of a thread that gathers; what they leave goes to the one warpgroup that multiplies."""
    if not is_converting:
        return 128
    return 152 if config.block_h == 16 else 136


def split_count(groups: int, tiles: int, num_sms: int, *, is_streamed: bool) -> int:
    """Return over how many work items the slots of one (batch, query, group) are shared out: the fastest number.

    Programs take work items in turn. Those that stream rows share the bandwidth of the memory: from BUSY_SHARE of the
    device on, a tile takes longer the more of them are at work. Times are those of a tile when all of it is at work.
    """
    if groups == 0:
        return 1

    def duration(splits: int) -> float:
        turns = -(-groups * splits // num_sms)
        at_work = groups * splits / turns / num_sms
        tile = max(at_work, BUSY_SHARE) if is_streamed else 1.0
        return turns * (-(-tiles // splits) + ITEM_TILES) * tile + (MERGE_TILES if splits > 1 else 0.0)

    shares = {-(-tiles // splits) for splits in range(1, min(MAX_SPLITS, tiles) + 1)}
    return min((-(-tiles // share) for share in sorted(shares, reverse=True)), key=duration)


def _kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.sparse_attn.kernels.hopper_few_heads import _sparse_attn_fwd_few_heads_kernel

    return _sparse_attn_fwd_few_heads_kernel

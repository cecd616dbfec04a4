"""The Hopper kernel set: warp-specialised Gluon kernels for wide rows on sm90, about twice as fast as portable ones."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import Wrap, as_it_is, outer_strides, unfilled, with_aligned_rows
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, Side, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import (
    HOPPER_BLOCK_H,
    ConfigKey,
    FewHeadsConfig,
    HopperBwdConfig,
    HopperConfig,
    program_count,
)
from mla_ops.ops.sparse_attn.configs.lookup import (
    few_heads_config,
    hopper_backward_config,
    hopper_config,
    key_of,
)
from mla_ops.ops.sparse_attn.triton.launch import Into
from mla_ops.ops.sparse_attn.triton.portable import run_merge

_log = logging.getLogger(__name__)

# The fewest slots a query with which the kernels are faster than portable ones, by arithmetic for 576/512 on an H100.
# Forward: a work item of the Hopper kernel takes 4,000 cycles and 3,000 more for each of its tiles of 64 slots, of
# which it has two at least; a tile takes the portable kernel 7,300 cycles.
# Backward: a program of the Hopper kernel takes 25 us and 7.3 us more for each of its tiles; a tile takes the portable
# kernel 16 us.
MIN_TOPK = {"forward": 65, "backward": 192}

WIDTHS = "multiples of 8, d_v from 256 to 512 and d_total up to 576"


# What the forward takes in us at 576/512 on an H100, rows cold in HBM: a tile of 64 slots, what a work item takes
# besides its tiles, and what a share of slots costs until it is merged. Fitted to 1 to 100 queries of 128 heads with
# topk 512 and 2048 and 1 to 16 shares: of the numbers measured at a size, the one it chooses was the fastest.
TILE_US, ITEM_US, SHARE_US = 2.2, 0.5, 0.06
MAX_SPLITS = 16
# A share of slots is a multiple of a pair of tiles.
PAIR = 128


class HopperForward(NamedTuple):
    """How a forward is launched."""

    config: HopperConfig
    items: int  # 64 heads of one (batch, query, group) each, or a share of their slots
    programs: int  # that share the items
    num_splits: int
    slots_per_split: int
    is_cold: bool  # the rows that may be selected do not fit L2: those of e4m3 are prefetched


class HopperRows(NamedTuple):
    """Where the rows of a call are and how they are stored, as the forward kernel takes it."""

    rows: torch.Tensor  # channels, or bytes of rows that hold e4m3
    strides: tuple[int, int, int]  # of batch elements or pages, of rows, of KV groups
    row_bytes: int
    num_positions: int  # of a batch element
    page_size: int | None = None  # without pages None, and so is what follows
    num_pages: int | None = None
    table: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    cache_scale: torch.Tensor | None = None
    payload: int = 0  # channels of e4m3
    scales_at: int = 0  # bytes from the start of a row; 0: cache_scale
    tail_at: int = 0


class HopperKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "hopper"
    is_inlinable = False  # compilers inline Triton and not Gluon

    def refusal(self, side: Side, problem: SparseAttnProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why a side of `problem` is not run by these kernels: they can't, or portable kernels are faster.

        Portable kernels are faster where half of the 64 heads of a work item or more are not there, where less than a
        third of the device has a program, and where slots are few for what a work item costs besides them (MIN_TOPK).
        The forward shares the slots of a query out over up to MAX_SPLITS items. In us at 576/512 with 128 heads and
        topk 2048, in CUDA graphs on an H100, rows cold in HBM, beside portable kernels: 1 query 13.5 and 13.2, 2
        queries 14.5 and 16.1, 4 queries 17.8 and 24.6, 8 queries 22.7 and 38.3; 16 queries 36, 64 queries 84, 128
        queries 158.
        """
        key = key_of(problem, traits)
        if side == "max_logits":
            return "they return out and lse in one pass"
        config = hopper_config(key) if side == "forward" else hopper_backward_config(key)
        if traits.arch != 90:
            return f"the device is sm{traits.arch}, they need sm90"
        if problem.is_scaled:
            return "q or kv is a payload of e4m3, they need plain rows"
        if problem.dtype.itemsize != 2:
            return f"dtype is {problem.dtype}, they need bf16 or fp16"
        if config is None:
            return f"widths are {problem.d_total}/{problem.d_v}, they take {WIDTHS}"
        if problem.topk < MIN_TOPK[side]:
            return f"topk is {problem.topk}, they pay from {MIN_TOPK[side]} on"
        if 2 * problem.heads_per_group <= HOPPER_BLOCK_H:
            return f"{problem.heads_per_group} heads share a KV row, they pay from {HOPPER_BLOCK_H // 2 + 1} on"
        if hints is not None:
            programs = program_count(hints.rows, problem.heads, problem.kv_group, HOPPER_BLOCK_H)
            if side == "forward":
                programs *= min(MAX_SPLITS, -(-problem.topk // PAIR))
            if 3 * programs < traits.num_sms:
                return f"{programs} programs of {HOPPER_BLOCK_H} heads leave more than two thirds of the SMs idle"
        return gluon_reason()

    def config(
        self, side: Side, key: ConfigKey, tuned_rows: str, *, is_deterministic: bool = False
    ) -> HopperConfig | tuple[HopperBwdConfig, ...] | None:
        """Return the narrowest configuration that covers the row; a tuned row is one of the portable kernels."""
        if side == "forward":
            return hopper_config(key)
        config = hopper_backward_config(key)
        return None if config is None else (config,)

    def plan_forward(
        self,
        call: SparseAttnCall,
        config: HopperConfig,
        traits: DeviceTraits,
        num_splits: int | None,
        use_int64_offsets: bool | None,
    ) -> HopperForward:
        """Plan a launch of the forward kernel with as many programs as the device holds at a time."""
        kv = call.kv
        kv_bytes = kv.numel() * kv.element_size()
        return plan_items(
            call.rows, call.q.shape[-2], kv.shape[-2], call.indices.shape[-1], kv_bytes, config, traits, num_splits
        )

    def run_forward(
        self,
        call: SparseAttnCall,
        out: torch.Tensor | None,
        lse: torch.Tensor,
        plan: HopperForward,
        wrap: Wrap,
    ) -> torch.Tensor:
        """Run the warp-specialised forward, and the merge kernel where the slots of a query are shared out."""
        if out is None:
            raise UnsupportedProblemError(
                "hopper kernels return out and lse, got max_logits_only=True; pass a FwdConfig"
            )
        call = self.prepared(call)
        kv = call.kv
        rows = HopperRows(kv, outer_strides(kv.stride()), kv.shape[-1] * kv.element_size(), kv.shape[-3])
        run_items(call, rows, out, lse, plan)
        return lse

    def plan_backward(self, call: SparseAttnCall, config: HopperBwdConfig, use_int64_offsets: bool) -> HopperBwdConfig:
        """Return the configuration; offsets are of 64 bits in any case."""
        return config

    def prepared(self, call: SparseAttnCall) -> SparseAttnCall:
        """Return `call` with rows of q and kv that asynchronous copies can begin at."""
        return call._replace(q=with_aligned_rows(call.q), kv=with_aligned_rows(call.kv))

    def run_backward(
        self,
        call: SparseAttnCall,
        results: Results,
        gradients: Gradients,
        into: Into,
        plan: HopperBwdConfig,
        wrap: Wrap,
    ) -> None:
        """Run the warp-specialised backward."""
        from mla_ops.ops.sparse_attn.kernels.hopper_backward import _sparse_attn_bwd_hopper_kernel

        q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
        (out, lse), (dout, dlse), (dq, dkv, dsink, places, first_row, num_rows) = results, gradients, into
        seq_q, heads, d_total = q.shape[-3:]
        seq_kv, kv_group = kv.shape[-3:-1]
        do_strides = (0, 0, 0) if dout is None else outer_strides(dout.stride())
        first_item = program_count(first_row, heads, kv_group, plan.block_h)
        _sparse_attn_bwd_hopper_kernel[(program_count(num_rows, heads, kv_group, plan.block_h),)](
            q, *outer_strides(q.stride()), kv, *outer_strides(kv.stride()), indices, *outer_strides(indices.stride()),
            topk_length, attn_sink, out, lse, dout, *do_strides, dlse, dq, dkv, dsink, places,
            softmax_scale, first_item, seq_q, seq_kv, indices.shape[-1],
            heads, kv_group, d_total, d_v, plan.half_value, plan.half_tail,
            num_warps=4,
        )  # fmt: skip


def plan_items(
    rows: int,
    heads: int,
    kv_group: int,
    topk: int,
    pool_bytes: int,
    config: HopperConfig,
    traits: DeviceTraits,
    num_splits: int | None = None,
) -> HopperForward:
    """Plan a launch of the forward kernel for so many queries; `pool_bytes` are all rows that may be selected."""
    whole = program_count(rows, heads, kv_group, HOPPER_BLOCK_H)
    if num_splits is None:
        num_splits = split_count(whole, topk, traits.num_sms)
    items = whole * num_splits
    slots_per_split = -(-topk // (PAIR * num_splits)) * PAIR
    return HopperForward(
        config, items, min(items, traits.num_sms), num_splits, slots_per_split, is_cold=pool_bytes > traits.l2_bytes
    )


def split_count(items: int, topk: int, num_sms: int) -> int:
    """Return over how many items the slots of a work item are shared out: the fastest number."""
    most = min(MAX_SPLITS, max(1, -(-topk // PAIR)))
    return min(range(1, most + 1), key=lambda splits: time_us(items, topk, num_sms, splits))


def time_us(items: int, topk: int, num_sms: int, num_splits: int) -> float:
    """Return what a forward takes beside its launch: programs take items in turn, and the longest counts."""
    turns, tiles = -(-items * num_splits // num_sms), 2 * -(-topk // (PAIR * num_splits))
    return turns * (tiles * TILE_US + ITEM_US) + (SHARE_US * items * num_splits if num_splits > 1 else 0.0)


def run_items(
    call: SparseAttnCall, rows: HopperRows, out: torch.Tensor, lse: torch.Tensor, plan: HopperForward
) -> None:
    """Run the forward kernel on `rows`, which go before those of `call`, and merge partial results if there are any."""
    from mla_ops.ops.sparse_attn.kernels.hopper_forward import _sparse_attn_fwd_hopper_kernel

    q, _, indices, d_v, softmax_scale, topk_length, attn_sink = call
    seq_q, heads, d_total = q.shape[-3:]
    config, is_split, table = plan.config, plan.num_splits > 1, rows.table
    kernel_out, kernel_lse = out, lse
    if is_split:
        partials = (call.rows, plan.num_splits, heads)
        # As the kernel rounds its weights: fp32 would be twice the bytes to write and to merge.
        kernel_out = unfilled((*partials, d_v), q.dtype, q, is_traced=False)
        kernel_lse = unfilled(partials, torch.float32, q, is_traced=False)
    _sparse_attn_fwd_hopper_kernel[(plan.programs,)](
        q, *outer_strides(q.stride()), rows.rows, *rows.strides, indices, *outer_strides(indices.stride()),
        topk_length, None if is_split else attn_sink,
        table, None if table is None else table.stride(0), rows.seq_lens, rows.cache_scale,
        kernel_out, kernel_lse,
        softmax_scale, seq_q, rows.num_positions, rows.page_size, rows.num_pages, indices.shape[-1],
        *((plan.slots_per_split, plan.num_splits) if is_split else (None, None)), plan.items,
        heads, indices.shape[-2], d_total, d_v,
        config.left, config.right, config.tail, config.pairs,
        config.value_registers, config.gather_registers, softmax_scale < 0,
        is_split, rows.page_size is not None, rows.row_bytes if plan.is_cold else 0,
        # With one pair of tiles turns cost more than they give: 4.10 ms with turns and 4.04 without at DS, and 6 to 7 %
        # of the time of 64 to 256 queries whose rows come from HBM. Two pairs were measured with turns only. The gather
        # of e4m3 rows would wait for ever.
        rows.payload == 0 and config.pairs > 1,
        rows.payload, rows.scales_at, rows.tail_at,
        num_warps=4,
    )  # fmt: skip
    if is_split:
        run_merge(kernel_out, kernel_lse, attn_sink, out, lse, as_it_is, is_dependent=True)


def check_config(config: HopperConfig | FewHeadsConfig | HopperBwdConfig, key: ConfigKey) -> None:
    """Check a configuration that a caller chose: `refusal` and `config` never saw it.

    Raises:
        UnsupportedProblemError: the device, the installed triton, the dtype or the widths are not for these kernels.
    """
    reason = gluon_reason()
    if reason is not None:
        raise UnsupportedProblemError(reason)
    if isinstance(config, FewHeadsConfig):
        side, plain = "forward for few heads", "a FwdConfig"
        can_run = few_heads_config(key) is not None and key.heads_per_group <= config.block_h
        value, width = config.value, config.value + config.tail
    elif isinstance(config, HopperConfig):
        side, plain, can_run = "forward", "a FwdConfig", hopper_config(key) is not None
        value, width = config.left + config.right, config.left + config.right + config.tail
    else:
        side, plain, can_run = "backward", "BwdConfigs", hopper_backward_config(key) is not None
        value, width = 2 * config.half_value, 2 * (config.half_value + config.half_tail)
    if not can_run or key.d_v > value or key.d_total > width:
        raise UnsupportedProblemError(
            f"the Hopper {side} needs sm90, two-byte channels, and widths that are {WIDTHS}, covered by its "
            f"configuration; got sm{key.arch}, {key.element_size} bytes a channel, d_v={key.d_v}, "
            f"d_total={key.d_total}, {config}; pass {plain}"
        )


@lru_cache(maxsize=1)
def gluon_reason() -> str | None:
    """Return why the installed triton can't compile the kernels, or None; warn the first time that it can't."""
    from mla_ops.kernels.gluon_compat import unsupported_reason

    reason = unsupported_reason()
    if reason is not None:
        _log.warning("the Hopper kernels, about twice as fast where they run, are not used: %s", reason)
    return reason

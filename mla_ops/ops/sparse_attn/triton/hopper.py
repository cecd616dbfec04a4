"""The part of the Triton backend that launches the warp-specialised kernels of sm90, and decides when they are used."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd
from typing import Literal

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import outer_strides
from mla_ops.ops.sparse_attn.configs.launch import HOPPER_BLOCK_H, HopperBwdConfig, HopperConfig, program_count
from mla_ops.ops.sparse_attn.configs.lookup import MIN_HOPPER_D_V, hopper_backward_config, hopper_config, is_tuned

# From how many slots on the kernels are taken, by arithmetic for 576/512 on an H100. A work item of the forward takes
# 4,000 cycles, and 3,000 for each tile of 64 slots, of which it has two at least; the plain kernel takes 7,300 a tile.
# A program of the backward takes 25 us, and 7.3 us for each tile; the plain kernel takes 16 us a tile.
LEAST_TOPK = {"fwd": 65, "bwd": 192}


def automatic_config(
    traits: DeviceTraits, rows: int, heads: int, kv_group: int, topk: int, widths: tuple[int, int, int], tuned_rows: str
) -> HopperConfig | None:
    """Return the configuration that a forward of `rows` queries takes by itself, or None: the plain kernel.

    `widths` is d_total, d_v and the bytes of an element. The kernel is about twice as fast as the plain one, so it is
    taken where more than half of its 64 heads are real and at least a third of the device has a program: fewer heads
    leave its products empty, and the slots of fewer queries are split over programs, which it does not do (seen in CUDA
    graphs with topk 2048 and 128 heads: 16 queries take the plain kernel 48 us and 32 take it 90; 48 take this one 64,
    and so would fewer). And where slots are many enough for what a work item costs besides them: see LEAST_TOPK.
    """
    if traits.arch != 90 or widths[1] < MIN_HOPPER_D_V:  # most calls
        return None
    if not _is_worth_it("fwd", traits, rows, heads, kv_group, topk, widths, tuned_rows):
        return None
    return hopper_config(traits.arch, traits.smem_bytes, *widths)


def automatic_backward_config(
    traits: DeviceTraits, rows: int, heads: int, kv_group: int, topk: int, widths: tuple[int, int, int], tuned_rows: str
) -> HopperBwdConfig | None:
    """Return the configuration that a backward takes by itself, or None: see `automatic_config`."""
    if traits.arch != 90 or widths[1] < MIN_HOPPER_D_V:
        return None
    if not _is_worth_it("bwd", traits, rows, heads, kv_group, topk, widths, tuned_rows):
        return None
    return hopper_backward_config(traits.arch, traits.smem_bytes, *widths)


@lru_cache(maxsize=4096)
def _is_worth_it(
    side: Literal["fwd", "bwd"],
    traits: DeviceTraits,
    rows: int,
    heads: int,
    kv_group: int,
    topk: int,
    widths: tuple[int, int, int],
    tuned_rows: str,
) -> bool:
    """Return whether a kernel that can run is also the faster one, and nobody has tuned the plain one."""
    heads_per_group = heads // kv_group
    return (
        topk >= LEAST_TOPK[side]
        and 2 * heads_per_group > HOPPER_BLOCK_H
        and 3 * program_count(rows, heads, kv_group, HOPPER_BLOCK_H) >= traits.num_sms
        and gluon_reason() is None
        and not is_tuned(side, traits.arch, heads_per_group, *widths, tuned_rows)
    )


def launch_forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    config: HopperConfig,
    traits: DeviceTraits,
) -> None:
    """Run the warp-specialised forward into `out` and `lse`, with as many programs as the device holds at a time.

    The inner strides of q, kv and indices are 1; `topk_length` and `attn_sink` are contiguous.

    Raises:
        UnsupportedProblemError: the device, the installed triton, the dtype or the widths are not for this kernel.
    """
    d_total, d_v = q.shape[-1], out.shape[-1]
    is_covered = d_v <= config.left + config.right and d_total <= config.left + config.right + config.tail
    _check(hopper_config, is_covered, config, traits, q.dtype, d_total, d_v)
    from mla_ops.ops.sparse_attn.kernels.hopper_forward import _sparse_attn_fwd_hopper_kernel

    q, kv = with_aligned_rows(q), with_aligned_rows(kv)
    heads, (seq_kv, kv_group) = q.shape[-2], kv.shape[-3:-1]
    items = program_count(q.shape[:-2].numel(), heads, kv_group, HOPPER_BLOCK_H)
    _sparse_attn_fwd_hopper_kernel[(min(items, traits.num_sms),)](
        q, *outer_strides(q.stride()), kv, *outer_strides(kv.stride()), indices, *outer_strides(indices.stride()),
        topk_length, attn_sink, out, lse,
        softmax_scale, q.shape[-3], seq_kv, indices.shape[-1], items,
        heads, kv_group, d_total, d_v,
        config.left, config.right, config.tail, config.pairs,
        config.value_registers, config.gather_registers, softmax_scale < 0,
        num_warps=4,
    )  # fmt: skip


def launch_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    dq: torch.Tensor | None,
    dkv: torch.Tensor | None,
    dsink: torch.Tensor | None,
    config: HopperBwdConfig,
    traits: DeviceTraits,
    *,
    places: torch.Tensor | None = None,
    first_row: int = 0,
    num_rows: int | None = None,
) -> None:
    """Run the warp-specialised backward: write `dq` and `dsink` (`[..., heads]`), add to `dkv` (fp32); or not, if None.

    With `places` (of the slots, as `indices`) their rows are stored in `dkv` there instead. Of the queries only
    `num_rows` from `first_row` on, if given, are processed. The inner strides of q, kv and indices are 1, the rows of q
    and kv are aligned (`with_aligned_rows`), those of `dout` as those of a contiguous tensor, and everything else is
    contiguous.

    Raises:
        UnsupportedProblemError: the device, the installed triton, the dtype or the widths are not for this kernel.
    """
    d_total, d_v = q.shape[-1], out.shape[-1]
    is_covered = d_v <= 2 * config.half_value and d_total <= 2 * (config.half_value + config.half_tail)
    _check(hopper_backward_config, is_covered, config, traits, q.dtype, d_total, d_v)
    from mla_ops.ops.sparse_attn.kernels.hopper_backward import _sparse_attn_bwd_hopper_kernel

    heads, (seq_kv, kv_group) = q.shape[-2], kv.shape[-3:-1]
    do_strides = (0, 0, 0) if dout is None else outer_strides(dout.stride())
    num_rows = q.shape[:-2].numel() if num_rows is None else num_rows
    first_item = program_count(first_row, heads, kv_group, config.block_h)
    _sparse_attn_bwd_hopper_kernel[(program_count(num_rows, heads, kv_group, config.block_h),)](
        q, *outer_strides(q.stride()), kv, *outer_strides(kv.stride()), indices, *outer_strides(indices.stride()),
        topk_length, attn_sink, out, lse, dout, *do_strides, dlse, dq, dkv, dsink, places,
        softmax_scale, first_item, q.shape[-3], seq_kv, indices.shape[-1],
        heads, kv_group, d_total, d_v, config.half_value, config.half_tail,
        num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=1)
def gluon_reason() -> str | None:
    """Return why the installed triton can't compile the kernels, or None."""
    from mla_ops.kernels.gluon_compat import unsupported_reason

    return unsupported_reason()


@lru_cache(maxsize=4096)
def _check(
    lookup: Callable[..., object],
    is_covered: bool,
    config: HopperConfig | HopperBwdConfig,
    traits: DeviceTraits,
    dtype: torch.dtype,
    d_total: int,
    d_v: int,
) -> None:
    reason = gluon_reason()
    if reason is not None:
        raise UnsupportedProblemError(reason)
    if not is_covered or lookup(traits.arch, traits.smem_bytes, d_total, d_v, dtype.itemsize) is None:
        side, plain = ("forward", "a FwdConfig") if isinstance(config, HopperConfig) else ("backward", "BwdConfigs")
        raise UnsupportedProblemError(
            f"the Hopper {side} needs sm90, bf16 or fp16, and widths that are multiples of 8, d_v from 256 to 512 and "
            f"d_total up to 576, all covered by its configuration; got sm{traits.arch}, {dtype}, d_v={d_v}, "
            f"d_total={d_total}, {config}; pass {plain}"
        )


def with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, copied unless every row begins at a multiple of 16 bytes: the size of an asynchronous copy.

    A copy and not the plain kernel, so that strided inputs give the bits of contiguous ones.
    """
    offsets = (*outer_strides(tensor.stride()), tensor.storage_offset())
    return tensor if gcd(8, *offsets) == 8 else tensor.clone(memory_format=torch.contiguous_format)

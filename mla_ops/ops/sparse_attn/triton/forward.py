"""How the Triton backend launches a forward: what sizes, strides and settings decide, decided once for calls alike."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch

from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import alignment, outer_strides
from mla_ops.ops.sparse_attn.configs.launch import (
    FwdConfig,
    HopperConfig,
    chunk_widths,
    fwd_smem_bytes,
    launch_options,
    program_count,
    programs_by_registers,
)
from mla_ops.ops.sparse_attn.configs.lookup import forward_config
from mla_ops.ops.sparse_attn.triton import hopper

# Element offsets of KV rows from here on are computed in 64 bits.
INT32_OFFSETS = 2**31

_Config = TypeVar("_Config")


class ForwardPlan(NamedTuple):
    """What sizes and strides decide about a launch of the forward kernel."""

    config: FwdConfig
    launched: tuple[object, ...]  # what a launcher notes about it for `describe_launch`
    out_shape: tuple[int, ...]  # as plain tuples: torch takes 0.4 us longer to read a torch.Size
    lse_shape: tuple[int, ...]
    grid: tuple[int, int]
    partials: tuple[int, int, int]  # rows, splits, heads: the shape of a partial lse
    q_strides: tuple[int, int, int]
    kv_strides: tuple[int, int, int]
    indices_strides: tuple[int, int, int]
    sizes: tuple[int, int, int, int]  # seq_q, seq_kv, topk, slots_per_split
    constants: tuple[int | bool, ...]  # of the kernel, from HEADS to USE_INT64_OFFSETS
    options: dict[str, int]


class HopperForwardPlan(NamedTuple):
    """That a launch is one of the warp-specialised kernel; fields as in `ForwardPlan`."""

    config: HopperConfig
    launched: tuple[object, ...]
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]


@lru_cache(maxsize=4096)  # 7 of the 14 us that a launch took on the host
def plan_forward(
    q_shape: torch.Size,
    q_stride: tuple[int, ...],
    kv_shape: torch.Size,
    kv_stride: tuple[int, ...],
    indices_shape: torch.Size,
    indices_stride: tuple[int, ...],
    d_v: int,
    dtype: torch.dtype,
    traits: DeviceTraits,
    tuned_rows: str,
    config: FwdConfig | HopperConfig | None,
    num_splits: int | None,
    use_int64_offsets: bool | None,
    max_logits_only: bool,
    is_traced: bool,
) -> ForwardPlan | HopperForwardPlan:
    """Plan a launch that has something to compute; what is None is derived."""
    seq_q, heads, d_total = q_shape[-3:]
    seq_kv, kv_group = kv_shape[-3:-1]
    topk = indices_shape[-1]
    rows = seq_q if len(q_shape) == 3 else q_shape[0] * seq_q
    widths = (d_total, d_v, dtype.itemsize)
    in_one_pass = num_splits is None and not max_logits_only and not is_traced
    if config is None and in_one_pass:
        config = hopper.automatic_config(traits, rows, heads, kv_group, topk, widths, tuned_rows)
    if config is None:
        key = (traits.arch, traits.smem_bytes, heads // kv_group, *widths, tuned_rows)
        config = fitting(forward_config(*key), "forward", d_total, dtype, traits)
    launched = (d_total, d_v, heads, kv_group, dtype, config)
    out_shape, lse_shape = (*q_shape[:-1], d_v), (*q_shape[:-1],)
    if isinstance(config, HopperConfig):
        if not in_one_pass:
            raise UnsupportedProblemError(
                "a HopperConfig is for an eager call that returns out and lse in one pass, got "
                f"num_splits={num_splits}, max_logits_only={max_logits_only}, traced={is_traced}; "
                "pass a FwdConfig"
            )
        return HopperForwardPlan(config, launched, out_shape, lse_shape)
    programs = program_count(rows, heads, kv_group, config.block_h)
    if num_splits is None:
        num_splits = split_count(programs, topk, config, traits, *widths)
    slots_per_split = topk if num_splits == 1 else -(-topk // (num_splits * config.block_k)) * config.block_k
    q_strides, kv_strides = outer_strides(q_stride), outer_strides(kv_stride)
    if use_int64_offsets is None:
        use_int64_offsets = bool(seq_kv * kv_strides[1] >= INT32_OFFSETS)
    return ForwardPlan(
        config,
        launched,
        out_shape,
        lse_shape,
        grid=(programs, num_splits),
        partials=(rows, num_splits, heads),
        q_strides=q_strides,
        kv_strides=kv_strides,
        indices_strides=outer_strides(indices_stride),
        sizes=(seq_q, seq_kv, topk, slots_per_split),
        constants=(
            *(heads, kv_group, d_total, d_v, config.block_h, config.block_k),
            *chunk_widths(d_total, d_v, config.max_chunk),
            *(alignment((*q_strides, *kv_strides)), use_int64_offsets),
        ),
        options=launch_options(config),
    )


def split_count(
    programs: int, topk: int, config: FwdConfig, traits: DeviceTraits, d_total: int, d_v: int, element_size: int
) -> int:
    """Return over how many programs the slots of one row are shared out.

    To as many as take three quarters of the places on the device, if each gets four blocks or more: with fewer, the
    merge takes longer than they save. Three programs for two SMs pay with fewer blocks too; more than 32 a row never
    do. Over 200 sizes (1 to 500 queries, topk 128 to 2048, five shapes) this takes 3 % more than the best choice.
    """
    blocks = -(-topk // config.block_k)
    if blocks < 4 or programs == 0:
        return 1
    places = 3 * resident_programs(config, traits, d_total, d_v, element_size) // 4
    splits = max(1, min(places // programs, blocks // 4), min(3 * traits.num_sms // 2 // programs, blocks))
    return -(-blocks // -(-blocks // min(32, splits)))


def resident_programs(config: FwdConfig, traits: DeviceTraits, d_total: int, d_v: int, element_size: int) -> int:
    """Return how many programs of the forward kernel a device holds at a time, by shared memory and registers.

    A kernel without a limit takes 168 registers a thread, more or less.
    """
    by_memory = traits.smem_bytes // fwd_smem_bytes(config, traits.arch, d_total, d_v, element_size)
    return traits.num_sms * max(1, min(by_memory, programs_by_registers(config, 168)))


def fitting(found: _Config | None, side: str, d_total: int, dtype: torch.dtype, traits: DeviceTraits) -> _Config:
    """Return the configuration that was found for a call; dispatch refuses problems for which there is none."""
    if found is None:
        raise UnsupportedProblemError(f"no {side} configuration for d_total={d_total} in {dtype} fits {traits}")
    return found

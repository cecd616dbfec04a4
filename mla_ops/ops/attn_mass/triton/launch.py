"""The launcher of the mass kernel: planned once for calls alike, then run."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import (
    INT32_OFFSETS,
    LaunchRecord,
    Wrap,
    alignment,
    as_it_is,
    contiguous,
    launch_record,
    strides_as_read,
    unfilled,
    with_unit_inner_stride,
)
from mla_ops.ops.attn_mass.call import AttnMassCall, AttnMassProblem
from mla_ops.ops.attn_mass.configs.tables import mass_config
from mla_ops.tiling import TileConfig, TileKey, product_pieces


class MassPlan(NamedTuple):
    """What sizes and strides decide about a launch."""

    config: TileConfig
    record: LaunchRecord
    grid: tuple[int]
    shape: tuple[int, ...]  # of the result
    strides: tuple[tuple[int, int, int], ...]  # of q, kv and indices
    sizes: tuple[int, int, int]  # seq_q, seq_kv, topk
    constants: tuple[int | bool, ...]  # of the kernel, from HEADS on


def key_of(problem: AttnMassProblem, traits: DeviceTraits) -> TileKey:
    """Return what the table is asked with."""
    return TileKey.of(traits, problem.heads_per_group, problem.d_total, problem.dtype.itemsize)


def plan_mass(
    call: AttnMassCall,
    traits: DeviceTraits,
    *,
    config: TileConfig | None = None,
    use_int64_offsets: bool | None = None,
) -> MassPlan:
    """Plan a launch on a device with `traits`; what is None is derived.

    In a trace sizes and strides may be symbolic, and without `use_int64_offsets` a guard is added.
    """
    q, kv, indices, *_ = call
    problem = AttnMassProblem.of(call)
    config = config or mass_config(key_of(problem, traits))
    seq_q, heads, d_total = q.shape[-3:]
    seq_kv, kv_group = kv.shape[-3:-1]
    strides = tuple(strides_as_read(tensor) for tensor in (q, kv, indices))
    if use_int64_offsets is None:
        use_int64_offsets = bool(seq_kv * strides[1][1] >= INT32_OFFSETS)
    return MassPlan(
        config,
        launch_record(q.device, "attn_mass", d_total, heads, kv_group, q.dtype, indices.dtype, config),
        grid=(prod(indices.shape[:-1]),),
        shape=(*indices.shape,),
        strides=strides,
        sizes=(seq_q, seq_kv, indices.shape[-1]),
        constants=(
            *(heads, kv_group, d_total, config.block_h, config.block_k, *product_pieces(config, d_total)),
            *(alignment((*strides[0], *strides[1])), use_int64_offsets),
        ),
    )


def describe_mass(plan: MassPlan) -> tuple[str, ...]:
    """Say in lines for a person what `plan` launches."""
    if 0 in plan.shape:
        return ("no queries or no slots: nothing is launched",)
    return (f"mass: {plan.config}; {plan.record}",)


def launch_mass(call: AttnMassCall, plan: MassPlan, *, wrap: Wrap = as_it_is) -> torch.Tensor:
    """Run the mass kernel; `wrap` is applied to it."""
    q, kv, indices, lse, softmax_scale, topk_length = call
    is_traced = wrap is not as_it_is
    mass = unfilled(plan.shape, torch.float32, q, is_traced=is_traced)
    if mass.numel() == 0:
        return mass
    q, kv, indices = (with_unit_inner_stride(tensor) for tensor in (q, kv, indices))
    q_strides, kv_strides, indices_strides = plan.strides
    wrap(_mass_kernel())[plan.grid](
        q, *q_strides, kv, *kv_strides, indices, *indices_strides,
        contiguous(topk_length), lse.contiguous(), mass, softmax_scale,
        *plan.sizes, *plan.constants, **plan.config.options,
    )  # fmt: skip
    plan.record.is_warm |= not is_traced
    return mass


@lru_cache(maxsize=1)
def _mass_kernel() -> Any:
    """Return the kernel; importing it imports triton."""
    from mla_ops.ops.attn_mass.kernels.mass import _attn_mass_kernel

    return _attn_mass_kernel

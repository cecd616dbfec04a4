"""The part of the Triton backend that launches the warp-specialised kernels of sm90, and decides when they are used."""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch

from mla_ops.backends.triton_strides import outer_strides
from mla_ops.configs import MIN_HOPPER_D_V, forward_is_tuned, hopper_config
from mla_ops.configs.launch import HOPPER_BLOCK_H, HopperConfig
from mla_ops.device import DeviceTraits
from mla_ops.errors import UnsupportedProblemError


def automatic_config(
    traits: DeviceTraits, rows: int, heads: int, kv_group: int, widths: tuple[int, int, int], tuned_rows: str
) -> HopperConfig | None:
    """Return the configuration that a forward of `rows` queries takes by itself, or None: the plain kernel.

    `widths` is d_total, d_v and the bytes of an element. The kernel is about twice as fast as the plain one, so it is
    taken where at least half of its 64 heads are real and at least half of the device has a program: fewer heads leave
    its products empty, and fewer queries are split over programs, which it does not do.
    """
    if traits.arch != 90 or widths[1] < MIN_HOPPER_D_V:  # most calls
        return None
    return _automatic_config(traits, rows, heads, kv_group, widths, tuned_rows)


@lru_cache(maxsize=4096)
def _automatic_config(
    traits: DeviceTraits, rows: int, heads: int, kv_group: int, widths: tuple[int, int, int], tuned_rows: str
) -> HopperConfig | None:
    heads_per_group = heads // kv_group
    if 2 * heads_per_group <= HOPPER_BLOCK_H or 2 * item_count(rows, heads, kv_group) < traits.num_sms:
        return None
    if gluon_reason() is not None or forward_is_tuned(traits.arch, heads_per_group, *widths, tuned_rows):
        return None
    return hopper_config(traits.arch, traits.smem_bytes, *widths)


def item_count(rows: int, heads: int, kv_group: int) -> int:
    """Return how many work items a call has: one per row, KV group and block of 64 heads."""
    return rows * kv_group * -(-(heads // kv_group) // HOPPER_BLOCK_H)


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
    _check(config, traits, q.dtype, d_total, d_v)
    from mla_ops.kernels.hopper_forward import _sparse_attn_fwd_hopper_kernel

    q, kv = _with_aligned_rows(q), _with_aligned_rows(kv)
    heads, (seq_kv, kv_group) = q.shape[-2], kv.shape[-3:-1]
    items = item_count(q.shape[:-2].numel(), heads, kv_group)
    _sparse_attn_fwd_hopper_kernel[(min(items, traits.num_sms),)](
        q, *outer_strides(q.stride()), kv, *outer_strides(kv.stride()), indices, *outer_strides(indices.stride()),
        topk_length, attn_sink, out, lse,
        softmax_scale, q.shape[-3], seq_kv, indices.shape[-1], items,
        heads, kv_group, d_total, d_v,
        config.left, config.right, config.tail,
        config.value_registers, config.gather_registers, softmax_scale < 0,
        num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=1)
def gluon_reason() -> str | None:
    """Return why the installed triton can't compile the kernels, or None."""
    from mla_ops.kernels.gluon_compat import unsupported_reason

    return unsupported_reason()


@lru_cache(maxsize=4096)
def _check(config: HopperConfig, traits: DeviceTraits, dtype: torch.dtype, d_total: int, d_v: int) -> None:
    reason = gluon_reason()
    if reason is not None:
        raise UnsupportedProblemError(reason)
    value_width = config.left + config.right
    is_covered = value_width >= d_v and value_width + config.tail >= d_total
    if not is_covered or hopper_config(traits.arch, traits.smem_bytes, d_total, d_v, dtype.itemsize) is None:
        raise UnsupportedProblemError(
            "the Hopper forward needs sm90, bf16 or fp16, and widths that are multiples of 8, d_v from 256 to 512 and "
            f"d_total up to 576, all covered by its configuration; got sm{traits.arch}, {dtype}, d_v={d_v}, "
            f"d_total={d_total}, {config}; pass a FwdConfig"
        )


def _with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, copied unless every row begins at a multiple of 16 bytes: the size of an asynchronous copy.

    A copy and not the plain kernel, so that strided inputs give the bits of contiguous ones.
    """
    offsets = (*outer_strides(tensor.stride()), tensor.storage_offset())
    return tensor if gcd(8, *offsets) == 8 else tensor.clone(memory_format=torch.contiguous_format)

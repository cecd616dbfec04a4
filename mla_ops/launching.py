"""What the Triton launchers ask of tensors, and of what stands for them in a trace: strides, alignment, memory."""

from __future__ import annotations

from math import gcd

import torch


def with_unit_inner_stride(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, copied unless the elements of a row are neighbours."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def aligned_like_contiguous(dout: torch.Tensor) -> torch.Tensor:
    """Return `dout`, copied unless its rows are as aligned as those of a contiguous tensor.

    The order of rowsum(dout * out) follows the width of the loads, and a strided dout must give the contiguous bits.
    """
    has_aligned_rows = dout.stride(-1) == 1 and alignment(outer_strides(dout.stride())) == gcd(16, dout.shape[-1])
    if has_aligned_rows and dout.storage_offset() * dout.element_size() % 16 == 0:
        return dout
    return dout.clone(memory_format=torch.contiguous_format)


def outer_strides(stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the strides of batch (0 without one), sequence, and head or group."""
    return (stride[0], stride[1], stride[2]) if len(stride) == 4 else (0, stride[0], stride[1])


def alignment(strides: tuple[int, ...]) -> int:
    """Return the largest power of two up to 16 that divides every stride."""
    if all(type(stride) is int for stride in strides):
        return gcd(16, *strides)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    align = 16
    while not all(statically_known_true(stride % align == 0) for stride in strides):
        align //= 2
    return align


def unfilled(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor, *, is_traced: bool) -> torch.Tensor:
    """Return memory that is written before it is read.

    In deterministic mode `torch.empty` fills what it returns: a write of the whole of it, a tenth of a narrow forward.
    A storage made by hand is left alone; `set_` gives it its shape, not `view`: autograd lets nobody write to results
    that are views. In a trace the compiler allocates and doesn't fill.
    """
    if is_traced or not torch.are_deterministic_algorithms_enabled():
        return like.new_empty(shape, dtype=dtype)
    storage = torch.UntypedStorage(torch.Size(shape).numel() * dtype.itemsize, device=like.device)
    tensor = torch.empty(0, dtype=dtype, device=like.device)
    tensor.set_(storage, 0, shape)  # type: ignore[call-overload]  # the stub lacks the default of the strides
    return tensor

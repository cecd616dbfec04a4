"""What the launchers of every operator share: facts of a tensor, the device guard, strides, memory, what is warm."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, TypeVar

import torch

from mla_ops.device import is_current, is_readable

# Element offsets from here on are computed in 64 bits.
INT32_OFFSETS = 2**31

# Everything of a tensor but its values and its address: shape, strides, dtype, device with its index, layout.
Facts = tuple[object, ...]

# Applied to a kernel before it is launched: `as_it_is` in eager, `torch.library.wrap_triton` in a trace.
Wrap = Callable[[Any], Any]

_Result = TypeVar("_Result")


def facts(tensor: torch.Tensor) -> Facts:
    """Return what plans are looked up by."""
    try:
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.layout
    except RuntimeError:  # a sparse tensor has no strides to ask for
        return tensor.shape, None, tensor.dtype, tensor.device, tensor.layout


def as_it_is(kernel: Any) -> Any:
    """Return the kernel; a launcher that is given anything else is being traced."""
    return kernel


def launch_on(device: torch.device, launch: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call `launch(*arguments)` with `device`, the device of the tensors of a call, as the current one.

    Triton launches on the current device, which need not be that of the tensors: `device_map="auto"` and pipeline
    stages in one process spread a model over devices and switch to none of them.
    """
    if is_current(device):
        return launch(*arguments)
    with torch.cuda.device(device):
        return launch(*arguments)


class LaunchRecord:
    """Whether this process has launched a kernel; shared by all plans that launch it for the same problem."""

    __slots__ = ("is_warm",)

    def __init__(self) -> None:
        self.is_warm = False

    def __str__(self) -> str:
        return "warm" if self.is_warm else "not warm: mla_ops.warmup(...) compiles it ahead of the first call"


# By what makes a compiled kernel: problem, configuration, and the device with its index, which has its own binary.
_records: dict[tuple[object, ...], LaunchRecord] = {}


def launch_record(device: torch.device, *kernel: object) -> LaunchRecord:
    """Return the record of a kernel, described by hashable values, on a device."""
    return _records.setdefault((device, *kernel), LaunchRecord())


def warm_kernels() -> list[tuple[object, ...]]:
    """Return `(device, *kernel)` of every kernel that this process has launched."""
    return [key for key, record in _records.items() if record.is_warm]


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


def with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a real `tensor` of two-byte elements, copied unless every row begins at a multiple of 16 bytes.

    16 bytes are the size of an asynchronous copy. The address decides, not the storage offset: a tensor that came by
    DLPack has offset 0 wherever it begins. A copy and not another kernel, so that strided inputs give the bits of
    contiguous ones.
    """
    has_aligned_rows = gcd(8, *outer_strides(tensor.stride())) == 8 and tensor.data_ptr() % 16 == 0
    return tensor if has_aligned_rows else tensor.clone(memory_format=torch.contiguous_format)


def filled_alike(tensor: torch.Tensor, value: int) -> torch.Tensor:
    """Return a tensor of one value that kernels are specialised for as for `tensor`: its strides, its alignment.

    `torch.full_like` gives an expanded view strides of its own, and so another kernel than the view gets.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.data_ptr() % 16 // tensor.element_size() if is_readable(tensor) else 0
    storage = torch.full((offset + max(0, extent),), value, dtype=tensor.dtype, device=tensor.device)
    return storage.as_strided(tensor.shape, tensor.stride(), offset)


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return `tensor`, if there is one, copied unless it is contiguous."""
    return None if tensor is None else tensor.contiguous()


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


def as_read(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the strides of `with_unit_inner_stride(tensor)`, without a copy: all that a plan needs."""
    return tensor if tensor.stride(-1) == 1 else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def strides_as_read(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the outer strides of `with_unit_inner_stride(tensor)`, without a copy."""
    if tensor.stride(-1) == 1:
        return outer_strides(tensor.stride())
    size, middle, inner = tensor.shape[-3:]
    return (size * middle * inner if tensor.dim() == 4 else 0, middle * inner, inner)

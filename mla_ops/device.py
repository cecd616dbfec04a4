"""The only place that asks a device what it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from mla_ops.errors import UnsupportedProblemError


@dataclass(frozen=True)
class DeviceTraits:
    """What dispatch may know about a device; built by hand in tests, so every decision can be tested without a GPU."""

    type: str  # torch device type: "cpu", "cuda"
    arch: int = 0  # CUDA compute capability as major * 10 + minor; 0 elsewhere
    smem_bytes: int = 0  # shared memory one thread block may opt in to
    num_sms: int = 0
    l2_bytes: int = 0
    name: str = ""
    vendor: str = "nvidia"  # who made a CUDA device: torch calls those of AMD "cuda" too

    @property
    def has_e4m3(self) -> bool:
        """Whether the device converts e4m3 itself; where it doesn't, triton refuses the type."""
        return self.arch >= 89

    def __str__(self) -> str:
        if self.type != "cuda":
            return self.type
        if self.vendor != "nvidia":
            return f"{self.vendor} ({self.name}, {self.num_sms} compute units)"
        return f"sm{self.arch} ({self.name}, {self.num_sms} SMs, {self.smem_bytes} B shared memory per block)"


def traits_of(device: torch.device) -> DeviceTraits:
    """Return the traits of `device`, asking the driver once per CUDA device."""
    if device.type != "cuda":
        return DeviceTraits(type=device.type)
    return _cuda_traits(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_traits(index: int) -> DeviceTraits:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        # Its "compute capability" is a number of AMD's own, and several fields of NVIDIA's properties do not exist.
        return DeviceTraits(type="cuda", num_sms=properties.multi_processor_count, name=properties.name, vendor="amd")
    return DeviceTraits(
        type="cuda",
        arch=properties.major * 10 + properties.minor,
        smem_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # not in torch's stub
        num_sms=properties.multi_processor_count,
        l2_bytes=properties.L2_cache_size,
        name=properties.name,
    )


def triton_refusals(traits: DeviceTraits) -> list[str]:
    """Return every reason why Triton kernels of any operator do not run on a device with `traits`."""
    reasons = []
    if traits.type != "cuda":
        reasons.append(f"device is {traits.type}, needs CUDA; move the tensors to a GPU")
    elif traits.vendor != "nvidia":
        reasons.append(f'device is made by {traits.vendor}, needs nvidia; pass backend="eager" on this device')
    elif traits.arch < 80:
        have = f"{traits.arch // 10}.{traits.arch % 10}"
        reasons.append(f'compute capability is {have}, needs 8.0 or later; pass backend="eager" on this device')
    if not _has_triton():
        reasons.append("triton is not installed, needs triton>=3.6; pip install triton")
    return reasons


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def is_current(device: torch.device) -> bool:
    """Whether kernels for tensors on `device` may be launched as things are: it is the current CUDA device, or none."""
    return device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device()


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether the host may look at the values of `tensor` now: not while compiling or capturing, nor without data."""
    if torch.compiler.is_compiling() or tensor.is_meta or type(tensor).__module__.startswith("torch._subclasses."):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def pick_device(name: str) -> torch.device:
    """Resolve "auto" to the CUDA device if there is one, else the CPU; other names are torch's own.

    Raises:
        UnsupportedProblemError: the name is "cuda" and torch sees no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedProblemError("device must be one that torch sees, got cuda where it sees none; use cpu")
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def devices() -> list[torch.device]:
    """Return the CPU and every CUDA device."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]

"""The plain tensors inside quantised wrapper tensors, without a copy: torchao's and Transformer Engine's conventions.

Wrappers are told apart by the attributes they hold, so nothing is imported: neither framework has to be installed, and
a class of one's own that follows a convention is read like its model.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from mla_ops.errors import QuantizedInputError

FP8_DTYPE = torch.float8_e4m3fn


class _Convention(NamedTuple):
    """How a wrapper names its parts; `real = data * scale`, or `data / scale` where the scale is a reciprocal."""

    data: str
    scale: str
    is_reciprocal: bool


_CONVENTIONS = (
    _Convention("qdata", "scale", False),  # torchao.quantization.Float8Tensor
    _Convention("_data", "_scale_inv", False),  # Transformer Engine's Float8Tensor: bytes, and _fp8_dtype to read them
    _Convention("_data", "_scale", True),  # torchao.float8's Float8TrainingTensor
)
# The attributes above are private to their frameworks. Release series they were read and run in:
_TESTED_SERIES = {"torchao": "0.18"}


@dataclass(frozen=True)
class ScaledTensor:
    """A quantised tensor as two plain ones: `real = data.float() * scale`."""

    data: torch.Tensor  # float8_e4m3fn, shape of the wrapper; its memory is the wrapper's
    scale: torch.Tensor  # fp32, one element or one per row, [..., 1]
    logical_dtype: torch.dtype  # what the wrapper claims to be

    @property
    def is_per_row(self) -> bool:
        """Whether every row (last dimension) has a scale of its own."""
        return self.scale.numel() != 1

    def dequantize(self) -> torch.Tensor:
        """Return the real values in the logical dtype: a new, plain tensor."""
        return (self.data.float() * self.scale).to(self.logical_dtype)


def as_scaled(tensor: torch.Tensor, *, name: str = "tensor") -> ScaledTensor:
    """Return the payload and the scale of a quantised wrapper tensor; the payload is not copied.

    Args:
        tensor: a `Float8Tensor` of torchao or Transformer Engine, a `Float8TrainingTensor`, or a wrapper that names
            its parts as one of them does. The payload must be e4m3 with one fp32 scale, or one per row.
        name: what errors call it.

    Raises:
        QuantizedInputError: `tensor` follows no known convention, has no payload (Transformer Engine may keep only a
            transposed copy) or no scale, or a payload or scale that no attention row can be read with.
    """
    cls = type(tensor).__name__
    convention = _convention_of(tensor)
    if convention is None:
        known = ", ".join(f"({c.data}, {c.scale})" for c in _CONVENTIONS)
        raise QuantizedInputError(
            f"{name} must hold a payload and a scale named as one of {known}, got {cls}; quantise it to e4m3 with one "
            "float32 scale per row or tensor, or dequantise it"
        )
    _warn_if_untested(type(tensor).__module__.partition(".")[0])
    data, scale = getattr(tensor, convention.data), getattr(tensor, convention.scale)
    if data is None:
        raise QuantizedInputError(
            f"{name} must hold its payload, got {cls} whose {convention.data} is None; quantise it row-wise"
        )
    if scale is None:
        raise QuantizedInputError(
            f"{name} must hold its scale, got {cls} whose {convention.scale} is None; quantise it with a float32 scale"
        )
    if data.dtype == torch.uint8 and _names_e4m3(getattr(tensor, "_fp8_dtype", None)):
        data = data.view(FP8_DTYPE)
    if data.dtype != FP8_DTYPE or data.shape != tensor.shape:
        raise QuantizedInputError(
            f"{name} must hold an e4m3 payload of its own shape {list(tensor.shape)}, got {cls} with {data.dtype} "
            f"{list(data.shape)}; quantise q and kv to torch.float8_e4m3fn"
        )
    if scale.dtype != torch.float32 or (scale.numel() != 1 and scale.shape != (*data.shape[:-1], 1)):
        raise QuantizedInputError(
            f"{name} must have one float32 scale or one per row, [..., 1], got {cls} with {scale.dtype} "
            f"{list(scale.shape)}; quantise it per row or per tensor"
        )
    return ScaledTensor(data, scale.reciprocal() if convention.is_reciprocal else scale, tensor.dtype)


def _convention_of(tensor: torch.Tensor) -> _Convention | None:
    for convention in _CONVENTIONS:
        if hasattr(tensor, convention.data) and hasattr(tensor, convention.scale):
            return convention
    return None


def _names_e4m3(fp8_dtype: Any) -> bool:
    """Whether Transformer Engine's own type enum says e4m3 (`DType.kFloat8E4M3`)."""
    return str(fp8_dtype).lower().endswith("e4m3")


@cache
def _warn_if_untested(package: str) -> None:
    version = getattr(sys.modules.get(package), "__version__", None)
    tested = _TESTED_SERIES.get(package)
    if version is not None and (tested is None or not version.startswith(f"{tested}.")):
        series = ", ".join(f"{name} {series}" for name, series in _TESTED_SERIES.items())
        warnings.warn(
            f"as_scaled reads private attributes of {package} {version}, which is not tested; tested: {series}",
            RuntimeWarning,
            stacklevel=3,
        )

"""The plain tensors inside quantised wrapper tensors, without a copy: the public names of `mla_ops/scaled_tensors.py`.

The front door of sparse attention opens wrappers too, and must not import an adapter.
"""

from mla_ops.scaled_tensors import ScaledTensor, as_scaled

__all__ = ["ScaledTensor", "as_scaled"]

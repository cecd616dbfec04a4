"""The same values with other strides: what a kernel must read as it reads a contiguous tensor."""

from __future__ import annotations

import torch


def sliced(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the middle third of a tensor that is three times as long in a dimension."""
    wide = torch.cat([torch.full_like(tensor, 7), tensor, torch.full_like(tensor, 7)], dim)
    return wide.narrow(dim, tensor.shape[dim], tensor.shape[dim])


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a part of rows that are three elements longer, from the second on: no row is aligned."""
    return torch.nn.functional.pad(tensor, (1, 2), value=7)[..., 1:-2]


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose elements of a row are no neighbours."""
    return tensor.mT.contiguous().mT

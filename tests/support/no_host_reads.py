"""A mode under which an operator that makes the host wait for data fails."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.data_dependent_output not in func.tags, func  # .item() and its like
        if func is torch.ops.aten.index.Tensor:  # its shape depends on data for boolean masks only
            assert all(index is None or index.dtype != torch.bool for index in args[1]), func
        else:
            assert torch.Tag.dynamic_output_shape not in func.tags, func
        return func(*args, **(kwargs or {}))

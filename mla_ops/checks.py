"""What the input rules of every operator are made of: the same words for the same mistake.

Static facts (ranks, dtypes, devices) are plain `if`s. Sizes may be symbols, so they go through `require`, which asks
torch to record the condition in the graph instead of specialising on it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.wrappers import is_dtensor, is_wrapper, wrapper_error

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
_DEVICE_TYPES = ("cpu", "cuda", "meta")


def check_tensor_types(required: dict[str, object], optional: dict[str, object]) -> None:
    """Check that arguments are tensors (optional ones may be None), none a wrapper, all or none of them DTensors.

    Called by the Python front doors, where types are still visible: past the dispatcher a wrapper tensor has already
    been handed to its own class, which may dequantise it without a word.
    """
    for name, value in required.items():
        if not isinstance(value, torch.Tensor):
            raise InvalidInputError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    for name, value in optional.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise InvalidInputError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}")
    tensors = {**required, **optional}
    distributed = [name for name, value in tensors.items() if is_dtensor(value)]
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and is_wrapper(type(value)):
            raise wrapper_error(name, type(value))
        if distributed and value is not None and name not in distributed:
            raise InvalidInputError(
                f"{name} must be a DTensor because {distributed[0]} is one, got a plain tensor; if every rank has the "
                f"same, use DTensor.from_local({name}, mesh, [Replicate()])"
            )


def check_int(name: str, value: object) -> None:
    """Check that `value` is an int, or a symbol that stands for one."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise InvalidInputError(f"{name} must be an int, got {type(value).__name__}; use int({name})")


def check_bool(name: str, value: object) -> None:
    """Check that `value` is a bool."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name} must be a bool, got {type(value).__name__}; use bool({name})")


def check_scale(name: str, value: object) -> None:
    """Check that `value` is a float, or a symbol that stands for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise InvalidInputError(f"{name} must be a float, got {type(value).__name__}; it is a constant, use float(...)")


def check_string(name: str, value: object) -> None:
    """Check that `value` is a string."""
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} must be a string, got {type(value).__name__}")


def check_backend_type(backend: object) -> None:
    """Check that `backend` is a string; which ones there are is dispatch's business."""
    check_string("backend", backend)


def check_storage(**tensors: torch.Tensor | None) -> None:
    """Check that tensors are strided and on one device, that of the first of them."""
    first, device = "", None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            raise InvalidInputError(f"{name} must be a dense (strided) tensor, got {tensor.layout}; use .to_dense()")
        if device is None:
            first, device = name, tensor.device
            if device.type not in _DEVICE_TYPES:
                raise InvalidInputError(f"{name} must be on one of {', '.join(_DEVICE_TYPES)}, got {device}")
        elif tensor.device != device:
            raise InvalidInputError(f"{name} must be on the device of {first} ({device}), got {tensor.device}")


def check_rank(name: str, tensor: torch.Tensor, rank: int, expected: str) -> None:
    """Check the number of dimensions; `expected` names them."""
    if tensor.dim() != rank:
        # [batch, seq_q, topk] is what an indexer returns, and a cache of latent rows has no groups either.
        may_lack_group = "kv_group" in expected and tensor.dim() == rank - 1
        fix = f"; if kv_group is what it lacks, use {name}.unsqueeze(-2)" if may_lack_group else ""
        raise InvalidInputError(f"{name} must have {rank} dimensions, {expected}, got {shape_of(tensor)}{fix}")


def check_index_dtype(name: str, tensor: torch.Tensor) -> None:
    """Check that positions, lengths or bounds are int32 or int64."""
    if tensor.dtype not in INDEX_DTYPES:
        raise InvalidInputError(f"{name} must be int32 or int64, got {dtype_of(tensor)}; use {name}.to(torch.int32)")


def check_lists(
    q_name: str,
    q: torch.Tensor,
    kv_name: str,
    kv: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
) -> None:
    """Check lists of keys, and their lengths if there are any, against queries and keys that have been checked."""
    check_storage(**{q_name: q, "indices": indices, "topk_length": topk_length})
    lead = "batch, " if q.dim() == 4 else ""
    check_rank("indices", indices, q.dim(), f"[{lead}seq_q, kv_group, topk]")
    check_index_dtype("indices", indices)
    if topk_length is not None:
        check_rank("topk_length", topk_length, q.dim() - 2, f"[{lead}seq_q]")
        check_index_dtype("topk_length", topk_length)
    *batch, seq_q, _, _ = q.shape
    if batch:
        require_size("indices", indices, 0, batch[0], f"the batch of {q_name}")
    require_size("indices", indices, -3, seq_q, f"seq_q of {q_name}")
    require_size("indices", indices, -2, kv.shape[-2], f"kv_group of {kv_name}")
    if topk_length is not None:
        if batch:
            require_size("topk_length", topk_length, 0, batch[0], f"the batch of {q_name}")
        require_size("topk_length", topk_length, -1, seq_q, f"seq_q of {q_name}")


def is_quantised(dtype: torch.dtype) -> bool:
    """Whether numbers of `dtype` may stand for others, with scales: int8, uint8 and every 8-bit float."""
    return dtype.itemsize == 1 and dtype != torch.bool


def require_size(name: str, tensor: torch.Tensor, dim: int, size: int, source: str) -> None:
    """Check a size, which may be a symbol, against that of another argument, `source`."""
    require(
        tensor.shape[dim] == size,
        lambda: f"size {dim} of {name} must equal {source} ({size}), got {name} {shape_of(tensor)}",
    )


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise `InvalidInputError` unless `condition` holds; of a symbolic one, let the graph check it when it runs."""
    if condition is True:
        return
    if condition is False:
        raise InvalidInputError(message())
    torch._check_with(InvalidInputError, condition, message)


def shape_of(tensor: torch.Tensor) -> str:
    """Return the shape for a message."""
    return f"shape [{', '.join(map(str, tensor.shape))}]"


def dtype_of(tensor: torch.Tensor) -> str:
    """Return the dtype of a tensor for a message."""
    return name_of(tensor.dtype)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype for a message."""
    return str(dtype).removeprefix("torch.")

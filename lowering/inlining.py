"""What the lowerings of all operators share: whether a call is inlined, and what happens to one that is not.

Widths and head counts, for which kernels are compiled, are made constants by a guard; lengths stay symbolic.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from mla_ops.dispatch import Decision
from mla_ops.launching import INT32_OFFSETS
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.lowering import is_enabled

_log = logging.getLogger(__name__)


class StayExtern(Exception):
    """Why a call is not inlined."""


def extern(op: torch._ops.OpOverload, args: tuple[Any, ...], reason: StayExtern) -> Any:
    """Lower a call of `op` to a call of `op`, and say why."""
    _log.info("%s stays an extern call: %s", op, reason)
    return inductor.extern_call(op, args)


def wrap_kernel(kernel: Any) -> Any:
    """Return `torch.library.wrap_triton(kernel)`, which gets the defaults of the kernel's arguments by name.

    Without a value for every argument torch can't analyse a kernel, and takes all its inputs for mutated.
    """
    wrapped = torch.library.wrap_triton(kernel)
    defaults = {param.name: param.default for param in kernel.params if param.has_default}
    return _Defaulted(wrapped, defaults) if defaults else wrapped


class _Defaulted:
    """A wrapped kernel that is launched as `kernel[grid](...)`."""

    def __init__(self, wrapped: Any, defaults: dict[str, Any]) -> None:
        self.wrapped, self.defaults = wrapped, defaults

    def __getitem__(self, grid: Any) -> Any:
        launch = self.wrapped[grid]
        return lambda *args, **options: launch(*args, **self.defaults, **options)


def require_inlinable(lengths: dict[str, Any], compiled_for: dict[str, Any]) -> None:
    """Raise `StayExtern` where a size is of a kind that no launch can be chosen for.

    Args:
        lengths: sizes that may stay symbolic, by name.
        compiled_for: sizes for each value of which a kernel is compiled, by name.
    """
    if not is_enabled():
        raise StayExtern("mla_ops.lowering is disabled")
    for name, size in {**lengths, **compiled_for}.items():
        if inductor.is_data_dependent(size):
            raise StayExtern(f"{name} depends on data, so that a launch can't be chosen for it")
    for name, size in compiled_for.items():
        if inductor.is_marked_dynamic(size):
            raise StayExtern(
                f"{name} is marked dynamic and kernels are compiled for one value of it; one graph serves all values, "
                "mark the dimension static to have the kernel inlined"
            )


def require_triton(decision: Decision[Any, Any]) -> None:
    """Raise `StayExtern` unless the Triton backend runs the call: it alone has kernels that a graph can hold."""
    if decision.backend is None or decision.backend.name != "triton":
        raise StayExtern(f"only the triton backend is inlined\n{decision}")


def needs_int64_offsets(kv: Any) -> bool | None:
    """Return True where offsets into `kv`, `[..., seq_kv, kv_group, width]`, may pass 32 bits unguarded, else None.

    That is so in a package, which has no guards, and where the caller has bounded the length above the limit.
    """
    seq_kv, kv_group, width = kv.get_size()[-3:]
    if not inductor.is_symbolic(seq_kv):
        return None
    row_strides = [kv_group * width, *(kv.maybe_get_stride() or [])[-3:-2]]
    limit = max(inductor.upper_bound(seq_kv * stride) for stride in row_strides)
    is_bounded = inductor.is_ahead_of_time() or limit < float("inf")
    return True if is_bounded and limit >= INT32_OFFSETS else None

"""`mla::read_rows`, as torch sees it: schema, fake, kernel; it is not differentiable, and says so."""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.ops.read_rows.backends import plan_of
from mla_ops.ops.read_rows.call import ReadRowsCall
from mla_ops.ops.read_rows.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import refusing_grad
from mla_ops.registration.library import LIBRARY, define
from mla_ops.registration.transforms import shared_pool_message

READ_ROWS = define(
    "read_rows(Tensor pages, Tensor rows, SymInt d_total, SymInt d_v, str row_format, ScalarType dtype, "
    "Tensor? cache_scale=None) -> Tensor"
)


def read_rows_fake(
    pages: torch.Tensor,
    rows: torch.Tensor,
    d_total: int,
    d_v: int,
    row_format: str,
    dtype: torch.dtype,
    cache_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fake of `mla::read_rows`: the shape of the result from symbolic sizes, and the contract's checks."""
    tracing.prepare()
    check_inputs(ReadRowsCall(pages, rows, d_total, d_v, row_format, dtype, cache_scale))
    return pages.new_empty((rows.shape[0], pages.shape[2], d_total), dtype=dtype)


def read_rows_impl(
    pages: torch.Tensor,
    rows: torch.Tensor,
    d_total: int,
    d_v: int,
    row_format: str,
    dtype: torch.dtype,
    cache_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Kernel of `mla::read_rows` for every device."""
    call = ReadRowsCall(pages, rows, d_total, d_v, row_format, dtype, cache_scale)
    plan = plan_of(call)
    return plan.backend.run(call, plan.launch)


def _vmap_read_rows(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[torch.Tensor, int]:
    """Read the rows of all elements in one call."""
    pages, rows, *rest = args
    if any(dim is not None for dim in (in_dims[0], *in_dims[2:])):
        raise InvalidInputError(shared_pool_message("pages or cache_scale"))
    rows = rows.movedim(in_dims[1], 0)
    numbers = READ_ROWS(pages, rows.flatten(), *rest)
    return numbers.unflatten(0, rows.shape), 0


def register() -> None:
    """Attach fake, kernel, the vmap rule and the refusal of gradients to the operator."""
    torch.library.register_fake("mla::read_rows", read_rows_fake, lib=LIBRARY)
    LIBRARY.impl("read_rows", read_rows_impl, "CompositeExplicitAutograd")
    torch.library.register_vmap("mla::read_rows", _vmap_read_rows, lib=LIBRARY)
    refusal = refusing_grad(READ_ROWS, "index a tensor of rows where gradients must pass")
    LIBRARY.impl("read_rows", refusal, "Autograd", with_keyset=True)

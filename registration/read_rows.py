"""`mla::read_rows`, as torch sees it: schema, fake, kernel; it is not differentiable, and says so."""

from __future__ import annotations

import torch

from mla_ops.ops.read_rows.backends import plan_of
from mla_ops.ops.read_rows.call import ReadRowsCall
from mla_ops.ops.read_rows.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import refusing_grad
from mla_ops.registration.library import LIBRARY, define

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


def register() -> None:
    """Attach fake, kernel and the refusal of gradients to the operator."""
    torch.library.register_fake("mla::read_rows", read_rows_fake, lib=LIBRARY)
    LIBRARY.impl("read_rows", read_rows_impl, "CompositeExplicitAutograd")
    refusal = refusing_grad(READ_ROWS, "index a tensor of rows where gradients must pass")
    LIBRARY.impl("read_rows", refusal, "Autograd", with_keyset=True)

"""`mla::append_rows`, as torch sees it: schema, fake, kernel; it writes into `pages` and is not differentiable."""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.ops.append_rows.backends import plan_of
from mla_ops.ops.append_rows.call import AppendRowsCall
from mla_ops.ops.append_rows.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import refusing_grad
from mla_ops.registration.library import LIBRARY, define

APPEND_ROWS = define(
    "append_rows(Tensor latent, Tensor? tail, Tensor rows, Tensor(a!) pages, SymInt d_v, str row_format, "
    'str scale_rule="pow2", Tensor? cache_scale=None) -> ()'
)
_PAGES = 3  # the argument that is written


def append_rows_fake(
    latent: torch.Tensor,
    tail: torch.Tensor | None,
    rows: torch.Tensor,
    pages: torch.Tensor,
    d_v: int,
    row_format: str,
    scale_rule: str = "pow2",
    cache_scale: torch.Tensor | None = None,
) -> None:
    """Fake of `mla::append_rows`: the contract's checks."""
    tracing.prepare()
    check_inputs(AppendRowsCall(latent, tail, rows, pages, d_v, row_format, scale_rule, cache_scale))


def append_rows_impl(
    latent: torch.Tensor,
    tail: torch.Tensor | None,
    rows: torch.Tensor,
    pages: torch.Tensor,
    d_v: int,
    row_format: str,
    scale_rule: str = "pow2",
    cache_scale: torch.Tensor | None = None,
) -> None:
    """Kernel of `mla::append_rows` for every device."""
    call = AppendRowsCall(latent, tail, rows, pages, d_v, row_format, scale_rule, cache_scale)
    plan = plan_of(call)
    plan.backend.run(call, plan.launch)


def _count_the_write(keys: torch._C.DispatchKeySet, *arguments: Any) -> None:
    """Write, and tell autograd that `pages` changed, as every operator of torch does that writes in place."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        APPEND_ROWS.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)
    torch.autograd.graph.increment_version(arguments[_PAGES])


def _refuse_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> None:
    raise InvalidInputError(
        "append_rows has no vmap rule: it writes into a pool that all elements would share; flatten the vmapped "
        "dimension of latent, tail and rows into n"
    )


def register() -> None:
    """Attach fake, kernel, the count of writes and the refusals of gradients and vmap to the operator."""
    torch.library.register_fake("mla::append_rows", append_rows_fake, lib=LIBRARY)
    LIBRARY.impl("append_rows", append_rows_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("append_rows", _count_the_write, "ADInplaceOrView", with_keyset=True)
    torch.library.register_vmap("mla::append_rows", _refuse_vmap, lib=LIBRARY)
    refusal = refusing_grad(APPEND_ROWS, "pass latent.detach() if it must not")
    LIBRARY.impl("append_rows", refusal, "Autograd", with_keyset=True)

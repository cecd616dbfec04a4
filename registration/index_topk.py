"""`mla::index_topk`, as torch sees it: schema, fake, kernel, and autograd, which has nothing to do."""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.ops.index_topk.backends import check_backend_name, plan_of
from mla_ops.ops.index_topk.call import IndexTopkCall
from mla_ops.ops.index_topk.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import below_autograd
from mla_ops.registration.library import LIBRARY, define

INDEX_TOPK = define(
    "index_topk(Tensor q_idx, Tensor k_idx, Tensor weights, SymInt topk, Tensor? starts=None, Tensor? ends=None, "
    'Tensor? k_scale=None, bool causal=True, bool relu=True, str backend="auto") -> Tensor'
)


def index_topk_fake(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Fake of `mla::index_topk`: the shape of the result from symbolic sizes, plus the contract's checks."""
    tracing.prepare()
    check_backend_name(backend)
    check_inputs(IndexTopkCall(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu))
    return q_idx.new_empty((*q_idx.shape[:-2], k_idx.shape[-2], topk), dtype=torch.int32)


def index_topk_impl(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel of `mla::index_topk` for every device."""
    call = IndexTopkCall(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu)
    plan = plan_of(call, backend)
    return plan.backend.run(call, plan.launch)


def _index_topk(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
    """Go on below autograd: integers have neither gradients nor tangents, so that no derivative is lost here."""
    return below_autograd(INDEX_TOPK, keys, *arguments)


def register() -> None:
    """Attach fake, kernel and autograd to the operator."""
    torch.library.register_fake("mla::index_topk", index_topk_fake, lib=LIBRARY)
    LIBRARY.impl("index_topk", index_topk_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("index_topk", _index_topk, "Autograd", with_keyset=True)

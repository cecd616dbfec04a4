"""`mla::attn_mass`, as torch sees it: schema, fake, kernel; it is not differentiable."""

from __future__ import annotations

import torch

from mla_ops.ops.attn_mass.backends import check_backend_name, plan_of
from mla_ops.ops.attn_mass.call import AttnMassCall
from mla_ops.ops.attn_mass.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import without_grad
from mla_ops.registration.library import LIBRARY, define

ATTN_MASS = define(
    "attn_mass(Tensor q, Tensor kv, Tensor indices, Tensor lse, float softmax_scale, Tensor? topk_length=None, "
    'str backend="auto") -> Tensor mass'
)


def attn_mass_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Fake of `mla::attn_mass`: the shape of its result, and the contract's checks."""
    tracing.prepare()
    check_backend_name(backend)
    check_inputs(AttnMassCall(q, kv, indices, lse, softmax_scale, topk_length))
    return q.new_empty(indices.shape, dtype=torch.float32)


def attn_mass_impl(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel of `mla::attn_mass` for every device."""
    call = AttnMassCall(q, kv, indices, lse, softmax_scale, topk_length)
    plan = plan_of(call, backend)
    return plan.backend.run(call, plan.launch)


def register() -> None:
    """Attach fake, kernel and the rule that nothing is differentiated to the operator."""
    torch.library.register_fake("mla::attn_mass", attn_mass_fake, lib=LIBRARY)
    LIBRARY.impl("attn_mass", attn_mass_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("attn_mass", without_grad(ATTN_MASS), "Autograd", with_keyset=True)

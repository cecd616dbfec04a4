"""The kernels of the operators: check, decide, run. One function serves every device; dispatch knows the rest."""

from __future__ import annotations

import torch

from mla_ops.device import traits_of
from mla_ops.dispatch import select
from mla_ops.problem import SparseAttnProblem
from mla_ops.validation import check_bwd_inputs, check_inputs


def sparse_attn_impl(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn` for every device."""
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    problem = SparseAttnProblem.from_tensors(q, kv, indices, d_v)
    runner = select(problem, traits_of(q.device), backend).require_backend()
    return runner.forward(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)


def sparse_attn_bwd_impl(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn_bwd` for every device."""
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    check_bwd_inputs(dout, dlse, q, out, lse, d_v)
    problem = SparseAttnProblem.from_tensors(q, kv, indices, d_v, needs_grad=True)
    runner = select(problem, traits_of(q.device), backend).require_backend()
    return runner.backward(
        dout,
        dlse,
        q,
        kv,
        indices,
        out,
        lse,
        d_v,
        softmax_scale,
        topk_length,
        attn_sink,
        need_dq,
        need_dkv,
    )


def sparse_attn_max_logits_impl(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Kernel of `mla::sparse_attn_max_logits` for every device."""
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, None)
    problem = SparseAttnProblem.from_tensors(q, kv, indices, d_v)
    runner = select(problem, traits_of(q.device), backend).require_backend()
    return runner.max_logits(q, kv, indices, d_v, softmax_scale, topk_length)


def register(library: torch.library.Library) -> None:
    """Attach the kernels to the operators of `library`, under the key that every device and layout falls back to.

    Not CPU and CUDA alone: a sparse or foreign tensor must meet our checks and dispatch's reasons, not the
    dispatcher's list of keys.
    """
    library.impl("sparse_attn", sparse_attn_impl, "CompositeExplicitAutograd")
    library.impl("sparse_attn_bwd", sparse_attn_bwd_impl, "CompositeExplicitAutograd")
    library.impl("sparse_attn_max_logits", sparse_attn_max_logits_impl, "CompositeExplicitAutograd")

"""The kernels of the operators: check, decide, run. One function serves every device; dispatch knows the rest."""

from __future__ import annotations

from typing import Any

import torch

from mla_ops.backends.base import Backend
from mla_ops.device import traits_of
from mla_ops.dispatch import select
from mla_ops.problem import SparseAttnProblem
from mla_ops.validation import check_bwd_inputs, check_inputs

# Who runs a call, by everything that the checks and the decision read of it; a look-up instead of them saves 8 us.
_decided: dict[tuple[Any, ...], Backend] = {}
_MOST_DECIDED = 4096


def _decide(arguments: tuple[Any, ...], gradients: tuple[Any, ...] | None, backend: str) -> Backend:
    """Check a call and return who runs it.

    `arguments` are those of the forward up to `attn_sink`; `gradients`, of a backward, `(dout, dlse, out, lse)`.
    """
    q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = arguments
    key = (
        *(backend, d_v, softmax_scale),
        *(_facts(q), _facts(kv), _facts(indices), _facts(topk_length), _facts(attn_sink)),
        gradients and (*map(_facts, gradients),),
    )
    runner = _decided.get(key)
    if runner is None:
        check_inputs(*arguments)
        if gradients is not None:
            dout, dlse, out, lse = gradients
            check_bwd_inputs(dout, dlse, q, out, lse, d_v)
        problem = SparseAttnProblem.from_tensors(q, kv, indices, d_v, needs_grad=gradients is not None)
        runner = select(problem, traits_of(q.device), backend).require_backend()
        if len(_decided) == _MOST_DECIDED:  # lengths may be new in every call
            _decided.clear()
        _decided[key] = runner
    return runner


def _facts(tensor: torch.Tensor | None) -> tuple[object, ...] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.layout)


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
    arguments = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    return _decide(arguments, None, backend).forward(*arguments)


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
    arguments = (q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    return _decide(arguments, (dout, dlse, out, lse), backend).backward(
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
    arguments = (q, kv, indices, d_v, softmax_scale, topk_length)
    return _decide((*arguments, None), None, backend).max_logits(*arguments)


def register(library: torch.library.Library) -> None:
    """Attach the kernels to the operators of `library`, under the key that every device and layout falls back to.

    Not CPU and CUDA alone: a sparse or foreign tensor must meet our checks and dispatch's reasons, not the
    dispatcher's list of keys.
    """
    library.impl("sparse_attn", sparse_attn_impl, "CompositeExplicitAutograd")
    library.impl("sparse_attn_bwd", sparse_attn_bwd_impl, "CompositeExplicitAutograd")
    library.impl("sparse_attn_max_logits", sparse_attn_max_logits_impl, "CompositeExplicitAutograd")

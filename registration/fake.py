"""Fake (meta) functions: result shapes, dtypes and strides from symbolic sizes, plus the contract's checks.

Nothing here branches on a symbolic size, and no kernel limit appears here: both would specialise a graph.
"""

from __future__ import annotations

import torch

from mla_ops.dispatch import check_backend_name
from mla_ops.registration.sharding import install_if_dtensor_is_loaded
from mla_ops.validation import check_bwd_inputs, check_inputs


def sparse_attn_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fake of `mla::sparse_attn`."""
    install_if_dtensor_is_loaded()
    _prepare_compilation()
    check_backend_name(backend)
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    return q.new_empty((*q.shape[:-1], d_v)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def sparse_attn_bwd_fake(
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
    """Fake of `mla::sparse_attn_bwd`; a gradient that is not needed is an empty `[0]` tensor."""
    install_if_dtensor_is_loaded()
    _prepare_compilation()
    check_backend_name(backend)
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    check_bwd_inputs(dout, dlse, q, out, lse, d_v)
    dq = q.new_empty(q.shape if need_dq else 0)
    dkv = kv.new_empty(kv.shape if need_dkv else 0)
    dsink = q.new_empty(0 if attn_sink is None else attn_sink.shape, dtype=torch.float32)
    return dq, dkv, dsink


def sparse_attn_max_logits_fake(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Fake of `mla::sparse_attn_max_logits`."""
    check_backend_name(backend)
    check_inputs(q, kv, indices, d_v, softmax_scale, topk_length, None)
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


def _prepare_compilation() -> None:
    """Install the lowering when a graph is being traced: importing Inductor earlier would cost seconds for nothing."""
    if torch._guards.TracingContext.try_get() is not None:
        from mla_ops import lowering

        lowering.prepare()


def register(library: torch.library.Library) -> None:
    """Attach the fakes to the operators of `library`."""
    torch.library.register_fake("mla::sparse_attn", sparse_attn_fake, lib=library)
    torch.library.register_fake("mla::sparse_attn_bwd", sparse_attn_bwd_fake, lib=library)
    torch.library.register_fake("mla::sparse_attn_max_logits", sparse_attn_max_logits_fake, lib=library)

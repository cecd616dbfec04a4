"""`mla::sparse_attn_paged`, as torch sees it: schema, fake, kernel; it is not differentiable, and says so."""

from __future__ import annotations

import torch

from mla_ops.ops.sparse_attn_paged.backends import check_backend_name, plan_of
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.ops.sparse_attn_paged.rules import check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import refusing_grad
from mla_ops.registration.library import LIBRARY, define

SPARSE_ATTN_PAGED = define(
    "sparse_attn_paged(Tensor q, Tensor pages, Tensor indices, SymInt d_v, float softmax_scale, str row_format, "
    "Tensor? block_table=None, Tensor? seq_lens=None, Tensor? topk_length=None, Tensor? attn_sink=None, "
    'Tensor? cache_scale=None, str backend="auto") -> (Tensor out, Tensor lse)'
)


def sparse_attn_paged_fake(
    q: torch.Tensor,
    pages: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    row_format: str,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fake of `mla::sparse_attn_paged`: shapes of the results from symbolic sizes, and the contract's checks."""
    tracing.prepare()
    check_backend_name(backend)
    check_inputs(
        SparseAttnPagedCall(
            *(q, pages, indices, d_v, softmax_scale, row_format),
            *(block_table, seq_lens, topk_length, attn_sink, cache_scale),
        )
    )
    return q.new_empty((*q.shape[:-1], d_v)), q.new_empty(q.shape[:-1], dtype=torch.float32)


def sparse_attn_paged_impl(
    q: torch.Tensor,
    pages: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    row_format: str,
    block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn_paged` for every device."""
    call = SparseAttnPagedCall(
        *(q, pages, indices, d_v, softmax_scale, row_format),
        *(block_table, seq_lens, topk_length, attn_sink, cache_scale),
    )
    plan = plan_of(call, backend)
    return plan.backend.run(call, plan.launch)


def register() -> None:
    """Attach fake, kernel and the refusal of gradients to the operator."""
    torch.library.register_fake("mla::sparse_attn_paged", sparse_attn_paged_fake, lib=LIBRARY)
    LIBRARY.impl("sparse_attn_paged", sparse_attn_paged_impl, "CompositeExplicitAutograd")
    refusal = refusing_grad(SPARSE_ATTN_PAGED, "train with mla_ops.sparse_attn on rows that are tensors of their own")
    LIBRARY.impl("sparse_attn_paged", refusal, "Autograd", with_keyset=True)

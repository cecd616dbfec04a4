"""Drop-ins for the sparse-MLA functions of FlashMLA and TileLang: their arguments and conventions, any widths.

What each convention is and where it differs from `mla_ops.sparse_attn` stands in docs/flash_mla.md. Neither function
needs, imports or patches its original.
"""

from __future__ import annotations

import math

import torch

import mla_ops
from mla_ops.errors import InvalidInputError


def flash_mla_sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    indexer_topk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute sparse attention as `flash_mla.flash_mla_sparse_fwd` does, for any widths, head counts and topk.

    Two operators run, because FlashMLA always returns the largest logits: a caller that drops them saves a pass over
    the logits with `mla_ops.sparse_attn`. `out` and `lse` are differentiable, which FlashMLA's are not.

    Args:
        q: `[s_q, h_q, d_qk]`, bf16, fp16 or fp32; there is no batch dimension, as in FlashMLA.
        kv: `[s_kv, h_kv, d_qk]`, dtype of `q`.
        indices: `[s_q, h_kv, topk]`, int32 or int64; outside `[0, s_kv)` is no key.
        sm_scale: multiplies the logits.
        d_v: value width. FlashMLA's only value is the default.
        attn_sink: `[h_q]`, fp32; scales the output by `exp(lse) / (exp(lse) + exp(attn_sink))`, nothing else.
        topk_length: `[s_q]`, int32 or int64.
        indexer_topk: must be 0. FlashMLA's fourth result, the lse of the first `indexer_topk` slots, is
            `mla_ops.sparse_attn(q, kv, indices[..., :indexer_topk], ...).lse`.

    Returns:
        `(out, max_logits, lse)`: `[s_q, h_q, d_v]` in `q.dtype`, `[s_q, h_q]` and `[s_q, h_q]` in fp32. `lse` is a
        natural logarithm. A query without a valid slot gets `out = 0`, `max_logits = -inf` and `lse = +inf`.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn`; also for a batch dimension and for
            `indexer_topk`.
    """
    if isinstance(q, torch.Tensor) and q.dim() != 3:
        raise InvalidInputError(
            f"q must be [s_q, h_q, d_qk], got shape {list(q.shape)}; mla_ops.sparse_attn takes a batch dimension"
        )
    if indexer_topk != 0:
        raise InvalidInputError(
            f"indexer_topk must be 0, got {indexer_topk!r}; for that lse call "
            "mla_ops.sparse_attn(q, kv, indices[..., :indexer_topk], ...)"
        )
    out, lse = mla_ops.sparse_attn(
        q, kv, indices, d_v=d_v, softmax_scale=sm_scale, topk_length=topk_length, attn_sink=attn_sink
    )
    max_logits = mla_ops.sparse_attn_max_logits(
        q, kv, indices, d_v=d_v, softmax_scale=sm_scale, topk_length=topk_length
    )
    return out, max_logits, lse.masked_fill(lse == -torch.inf, torch.inf)


def sparse_mla(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, scaling: float, d_v: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute sparse attention with the arguments of `SparseMLA.apply` in TileLang's examples and in Megatron-Core.

    Differentiable in `q` and `kv`, through `out` and through `lse` (where the originals drop the gradient of `lse`).
    Causality is the caller's: TileLang's kernel skips keys behind the query's own position by itself, this one attends
    to every index in range.

    Args:
        q: `[batch, seq_q, heads, d_total]`, or without `batch`.
        kv: `[batch, seq_kv, kv_group, d_total]`, dtype of `q`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64; outside `[0, seq_kv)` is no key.
        scaling: multiplies the logits.
        d_v: value width; the originals take 512 for granted.

    Returns:
        `(out, lse)`: `[batch, seq_q, heads, d_v]` in `q.dtype`, and `[batch, seq_q, heads]` in fp32, in base 2 as the
        originals return it: `log2(sum(exp(logits)))`. A query without a valid slot gets `out = 0`, `lse = -inf`.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.sparse_attn`.
    """
    out, lse = mla_ops.sparse_attn(q, kv, indices, d_v=d_v, softmax_scale=scaling)
    return out, lse * math.log2(math.e)

"""The definition of index scores on a list of keys, written to be read and to be right, not to be fast.

Plain torch operators over one big gather, on any device and in any floating dtype; tests call it in fp64. Its gradients
are autograd's. No product path imports this module.
"""

from __future__ import annotations

import torch


def index_scores_reference(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
) -> torch.Tensor:
    """Compute `scores` as `mla_ops.index_scores` documents them, in the dtype of `q_idx` throughout.

    Shapes as there, 3-D or 4-D. `scores` come back in `q_idx.dtype` (the operator's are fp32). Differentiable in
    `q_idx`, `k_idx` and `weights`.
    """
    if q_idx.dim() == 3:
        length = None if topk_length is None else topk_length[None]
        return index_scores_reference(q_idx[None], k_idx[None], weights[None], indices[None], length, relu)[0]

    batch, seq_kv, kv_group, index_head_dim = k_idx.shape

    # A slot is valid when it lies inside the valid prefix of its row and names an existing key.
    valid = (indices >= 0) & (indices < seq_kv)  # [B, Sq, G, topk]
    if topk_length is not None:
        slot = torch.arange(indices.shape[-1], device=indices.device)
        valid = valid & (slot < topk_length[:, :, None, None])

    # One zero row stands in for every invalid slot: what a key that is not named holds (NaN included) is never read.
    padded = torch.cat([k_idx, k_idx.new_zeros(batch, 1, kv_group, index_head_dim)], dim=1)
    position = torch.where(valid, indices.long(), seq_kv)
    b = torch.arange(batch, device=k_idx.device)[:, None, None, None]
    g = torch.arange(kv_group, device=k_idx.device)[None, None, :, None]
    keys = padded[b, position, g]  # [B, Sq, G, topk, Di]

    heads_per_group = q_idx.shape[2] // kv_group  # head j reads group j // heads_per_group
    q_grouped = q_idx.unflatten(2, (kv_group, heads_per_group))
    w_grouped = weights.to(q_idx.dtype).unflatten(2, (kv_group, heads_per_group))
    dots = torch.einsum("bsghd,bsgkd->bsghk", q_grouped, keys)
    dots = torch.relu(dots) if relu else dots
    scores = torch.einsum("bsgh,bsghk->bsgk", w_grouped, dots)
    return scores.masked_fill(~valid, -torch.inf)


def index_scores_bwd_reference(
    dscores: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `(dq, dk, dw)` by autograd through `index_scores_reference`."""
    q_idx, k_idx, weights = (t.detach().requires_grad_() for t in (q_idx, k_idx, weights))
    with torch.enable_grad():
        scores = index_scores_reference(q_idx, k_idx, weights, indices, topk_length, relu)
        inputs, upstream = (q_idx, k_idx, weights), dscores.to(scores.dtype)
        dq, dk, dw = torch.autograd.grad(scores, inputs, upstream, materialize_grads=True)
    return dq, dk, dw

"""The definition of the dense loss, written to be read and to be right; its gradients are autograd's.

Tests call it in fp64. No product path imports this module.
"""

from __future__ import annotations

import torch

from mla_ops.ops.index_topk.reference import index_scores_dense_reference


def index_loss_dense_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    row_weight: torch.Tensor,
    softmax_scale: float,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
) -> torch.Tensor:
    """Compute the loss as `mla_ops.index_loss_dense` documents it, in the dtype of `q`, over all pairs at once."""
    q, k, lse = q.detach(), k.detach(), lse.detach().to(q.dtype)
    seq_q, seq_kv, kv_group = q.shape[-3], k.shape[-3], k.shape[-2]
    by_group = (kv_group, q.shape[-2] // kv_group)  # head h reads group h // (heads // kv_group)

    key, query = torch.arange(seq_kv, device=q.device), torch.arange(seq_q, device=q.device).unsqueeze(-1)
    eligible = key <= query + (seq_kv - seq_q) if causal else torch.ones_like(key <= query)
    if starts is not None:
        eligible = eligible & (key >= starts.unsqueeze(-1))
    if ends is not None:
        eligible = eligible & (key < ends.unsqueeze(-1))
    eligible = eligible.unsqueeze(-2)  # [..., Sq, 1, Skv]

    logits = softmax_scale * torch.einsum("...sghd,...kgd->...sghk", q.unflatten(-2, by_group), k)
    lse = lse.unflatten(-1, by_group).unsqueeze(-1)
    # A head with a normaliser of -inf attends to nothing.
    mass = torch.exp(logits - lse).masked_fill(lse == -torch.inf, 0.0).sum(dim=-2)  # [..., Sq, G, Skv]
    mass = mass.masked_fill(~eligible, 0.0)
    total = mass.sum(dim=-1, keepdim=True)
    row_weight = row_weight.to(q.dtype)
    row_weight = row_weight if row_weight.dim() == q.dim() - 1 else row_weight.unsqueeze(-1)  # [..., Sq, G or 1]
    skipped = (total == 0.0) | (row_weight.unsqueeze(-1) == 0.0)
    target = (mass / total).masked_fill(skipped, 0.0)

    scores = index_scores_dense_reference(q_idx, k_idx, weights, relu).masked_fill(~eligible, -torch.inf)
    log_softmax = scores.masked_fill(skipped, 0.0).log_softmax(dim=-1)
    cross_entropy = -torch.where(target == 0.0, 0.0, target * log_softmax).sum(dim=-1)
    loss: torch.Tensor = torch.special.xlogy(target, target).sum(dim=-1) + cross_entropy
    return (row_weight * loss).masked_fill(skipped.squeeze(-1), 0.0).sum()

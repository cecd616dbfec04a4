"""The definition of attention mass, written to be read and to be right, not to be fast; tests call it in fp64.

No product path imports this module.
"""

from __future__ import annotations

import torch


def attn_mass_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `mass` as `mla_ops.attn_mass` documents it, in the dtype of `q` throughout.

    Shapes as there, 3-D or 4-D. `mass` comes back in `q.dtype` (the operator's is fp32) and has no gradient.
    """
    if q.dim() == 3:
        length = None if topk_length is None else topk_length[None]
        return attn_mass_reference(q[None], kv[None], indices[None], lse[None], softmax_scale, length)[0]

    q, kv, lse = q.detach(), kv.detach(), lse.detach().to(q.dtype)
    batch, seq_kv, kv_group, d_total = kv.shape

    # A slot is valid when it lies inside the valid prefix of its row and names an existing KV row.
    valid = (indices >= 0) & (indices < seq_kv)  # [B, Sq, G, topk]
    if topk_length is not None:
        slot = torch.arange(indices.shape[-1], device=indices.device)
        valid = valid & (slot < topk_length[:, :, None, None])

    # One zero row stands in for every invalid slot: what an unselected KV row holds (NaN included) is never read.
    padded = torch.cat([kv, kv.new_zeros(batch, 1, kv_group, d_total)], dim=1)
    position = torch.where(valid, indices.long(), seq_kv)
    b = torch.arange(batch, device=kv.device)[:, None, None, None]
    g = torch.arange(kv_group, device=kv.device)[None, None, :, None]
    rows = padded[b, position, g]  # [B, Sq, G, topk, d_total]

    heads_per_group = q.shape[2] // kv_group  # head h reads group h // heads_per_group
    q_grouped = q.unflatten(2, (kv_group, heads_per_group))
    lse_grouped = lse.unflatten(2, (kv_group, heads_per_group)).unsqueeze(-1)
    logits = softmax_scale * torch.einsum("bsghd,bsgkd->bsghk", q_grouped, rows)
    # A head with a normaliser of -inf attends to nothing.
    weights = torch.exp(logits - lse_grouped).masked_fill(lse_grouped == -torch.inf, 0.0)
    return weights.sum(dim=3).masked_fill(~valid, 0.0)

"""The definition of index selection, written to be read and to be right, not to be fast.

Plain torch operators over all pairs of queries and keys, on any device and in any floating dtype; tests call it in
fp64. No product path imports this module.
"""

from __future__ import annotations

import torch


def index_scores_dense_reference(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    relu: bool = True,
    k_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the score of every key for every query: the sum over the index heads of `weights * relu(<q, k>)`.

    Shapes as in `mla_ops.index_topk`, with or without batch; e4m3 queries and keys are scored in fp32, all others in
    their own dtype. Differentiable in `q_idx`, `k_idx` and `weights`.

    Returns:
        `[batch, seq_q, kv_group, seq_kv]`; heads are summed within the group whose keys they read. `k_scale` multiplies
        the score of its key.
    """
    if q_idx.dtype == torch.float8_e4m3fn:
        q_idx, k_idx = q_idx.float(), k_idx.float()
    kv_group = k_idx.shape[-2]
    by_group = (kv_group, q_idx.shape[-2] // kv_group)  # head h reads group h // (heads // kv_group)
    q_grouped = q_idx.unflatten(-2, by_group)  # [..., Sq, G, heads, Di]
    weights_grouped = weights.to(q_idx.dtype).unflatten(-1, by_group)
    products = torch.einsum("...sghd,...kgd->...sghk", q_grouped, k_idx)
    if relu:
        products = products.relu()
    scores: torch.Tensor = (weights_grouped.unsqueeze(-1) * products).sum(dim=-2)  # [..., Sq, G, Skv]
    if k_scale is not None:
        scores = scores * k_scale.to(scores.dtype).transpose(-1, -2).unsqueeze(-3)
    return scores


def index_topk_reference(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
) -> torch.Tensor:
    """Compute `indices` as `mla_ops.index_topk` documents them, from scores in the dtype of `q_idx`.

    Returns:
        `[batch, seq_q, kv_group, topk]`, int32.
    """
    scores = index_scores_dense_reference(q_idx, k_idx, weights, relu, k_scale)
    *_, seq_q, _, seq_kv = scores.shape
    eligible = _eligible(seq_q, seq_kv, starts, ends, causal, q_idx.device).unsqueeze(-2).expand_as(scores)

    # From the largest score down, NaN first; of equal scores (-0.0 is 0.0) the lower position first. Then, still in
    # that order, the eligible keys before all others.
    # Every NaN is made the same one: torch sorts by bits on CUDA, where a negative NaN comes last.
    scores = (scores + 0.0).masked_fill(scores.isnan(), torch.nan)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    is_key = eligible.gather(-1, order)
    first = is_key.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    order, is_key = order.gather(-1, first), is_key.gather(-1, first)

    no_key = seq_kv  # sorts behind every position
    chosen = order.masked_fill(~is_key, no_key)[..., :topk].sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == no_key, -1)
    missing = topk - chosen.shape[-1]
    return torch.nn.functional.pad(chosen, (0, missing), value=-1).to(torch.int32)


def _eligible(
    seq_q: int,
    seq_kv: int,
    starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    causal: bool,
    device: torch.device,
) -> torch.Tensor:
    """Return which keys a query may choose, `[..., Sq, Skv]` bool, with batch where a bound has one."""
    key = torch.arange(seq_kv, device=device)
    query = torch.arange(seq_q, device=device).unsqueeze(-1)
    eligible = torch.ones(seq_q, seq_kv, dtype=torch.bool, device=device)
    if causal:
        eligible = key <= query + (seq_kv - seq_q)
    if starts is not None:
        eligible = eligible & (key >= starts.unsqueeze(-1))
    if ends is not None:
        eligible = eligible & (key < ends.unsqueeze(-1))
    return eligible

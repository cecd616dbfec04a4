"""The definition of the operator, written to be read and to be right, not to be fast.

Plain torch operators over one big gather, on any device and in any floating dtype; tests call it in fp64. Its
gradients are autograd's, so they are derived independently of every hand-written backward in the package. No product
path imports this module.
"""

from __future__ import annotations

import torch


def sparse_attn_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `(out, lse)` as `mla_ops.sparse_attn` documents them, in the dtype of `q` throughout.

    Shapes as there, 3-D or 4-D. `lse` comes back in `q.dtype` (the operator rounds it to fp32). Differentiable in
    `q`, `kv` and `attn_sink`. One thing differs: a query whose valid slots all have a logit of `-inf` gives NaN here.
    """
    if q.dim() == 3:
        length = None if topk_length is None else topk_length[None]
        out, lse = sparse_attn_reference(q[None], kv[None], indices[None], d_v, softmax_scale, length, attn_sink)
        return out[0], lse[0]

    logits, rows, valid = _logits(q, kv, indices, softmax_scale, topk_length)
    kv_group, topk = indices.shape[-2:]

    # An empty row has no maximum and no weights: its lse is log(0) = -inf, its output 0. Replacing its logits by 0
    # before the softmax, not its result after it, is what keeps its gradient 0 instead of 0 * NaN.
    empty = ~valid.any(dim=-1, keepdim=True)  # [B, Sq, G, 1, 1]
    lse = torch.logsumexp(logits.masked_fill(empty, 0.0), dim=-1, keepdim=True) if topk else logits.sum(-1, True)
    weights = torch.exp(logits - lse).masked_fill(~valid, 0.0)
    if attn_sink is not None:
        # Adding exp(sink) to the denominator scales every weight by exp(lse) / (exp(lse) + exp(sink)).
        sink = attn_sink.to(q.dtype).view(kv_group, -1, 1)
        weights = weights * torch.sigmoid(lse - sink)
    out = torch.einsum("bsghk,bsgkd->bsghd", weights, rows[..., :d_v]).masked_fill(empty, 0.0)
    lse = lse.masked_fill(empty, -torch.inf).squeeze(-1)
    return out.flatten(2, 3), lse.flatten(2, 3)


def sparse_attn_max_logits_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the maximum of the scaled logits over the valid slots, `-inf` where there are none, in `q.dtype`."""
    if q.dim() == 3:
        length = None if topk_length is None else topk_length[None]
        return sparse_attn_max_logits_reference(q[None], kv[None], indices[None], softmax_scale, length)[0]
    logits, _, _ = _logits(q, kv, indices, softmax_scale, topk_length)
    if logits.shape[-1] == 0:
        return torch.full_like(q[..., 0], -torch.inf)
    return logits.amax(dim=-1).flatten(2, 3)


def _logits(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, softmax_scale: float, topk_length: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return scaled logits `[B, Sq, G, heads, topk]` (-inf where invalid), the rows they are of, which are valid."""
    batch, _, heads, d_total = q.shape
    seq_kv, kv_group = kv.shape[1], kv.shape[2]
    topk = indices.shape[-1]

    # A slot is valid when it lies inside the valid prefix of its row and names an existing KV row.
    valid = (indices >= 0) & (indices < seq_kv)  # [B, Sq, G, topk]
    if topk_length is not None:
        slot = torch.arange(topk, device=q.device)
        valid = valid & (slot < topk_length[:, :, None, None])

    # One zero row stands in for every invalid slot: what an unselected KV row holds (NaN included) is never read.
    padded = torch.cat([kv, kv.new_zeros(batch, 1, kv_group, d_total)], dim=1)
    position = torch.where(valid, indices.long(), seq_kv)
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    g = torch.arange(kv_group, device=q.device)[None, None, :, None]
    rows = padded[b, position, g]  # [B, Sq, G, topk, d_total]

    q_grouped = q.unflatten(2, (kv_group, heads // kv_group))  # head h reads group h // (heads // kv_group)
    logits = softmax_scale * torch.einsum("bsghd,bsgkd->bsghk", q_grouped, rows)
    valid = valid[:, :, :, None, :]
    return logits.masked_fill(~valid, -torch.inf), rows, valid


def sparse_attn_bwd_reference(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute `(dq, dkv, dsink)` by autograd through `sparse_attn_reference`; `dsink` is None without a sink."""
    inputs = [t.detach().requires_grad_() for t in (q, kv)]
    if attn_sink is not None:
        inputs.append(attn_sink.detach().requires_grad_())
    with torch.enable_grad():
        sink = inputs[2] if attn_sink is not None else None
        out, lse = sparse_attn_reference(inputs[0], inputs[1], indices, d_v, softmax_scale, topk_length, sink)
        outputs = [(out, dout), (lse, None if dlse is None else dlse.to(lse.dtype))]
        outputs = [(output, grad) for output, grad in outputs if grad is not None]
        grads = torch.autograd.grad(
            [output for output, _ in outputs], inputs, [grad for _, grad in outputs], materialize_grads=True
        )
    return grads[0], grads[1], grads[2] if attn_sink is not None else None

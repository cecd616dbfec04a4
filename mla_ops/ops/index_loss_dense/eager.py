"""The dense loss in plain torch, on any device: strips of queries, blocks of keys, gradients in the same pass.

A strip of queries is a `[rows, keys]` matrix of masses and one of scores; products of all heads exist for one block of
keys at a time. So the workspace is bounded whatever the lengths, and what grows with them are results alone.
Attention's products, the expensive ones, are formed once; those of the indexer twice, for the scores and for the
gradients. How exactly fp32 factors are multiplied is what torch's own settings of matrix products say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_ops.gathering import compute_dtype
from mla_ops.ops.index_loss_dense.call import IndexLossDenseCall, LossAndGradients

# Half of it for the matrices of a strip, half for the products of a block. The contract allows 256 MiB in all.
_WORKSPACE_BYTES = 192 * 2**20
# Numbers of one key of one query: mass, scores, eligibility, and the temporaries of the loss and of the softmax.
_STRIP_MATRICES = 6
# Numbers of one key of one query and head: a product, its gradient, and a copy in the precision of the inputs.
_BLOCK_MATRICES = 3
# Queries times heads: more of them make no better matrix product, and a causal strip of more computes more in vain.
_PRODUCT_ROWS = 16384


def index_loss_dense(call: IndexLossDenseCall, need_grad: bool) -> LossAndGradients:
    """Run a checked call; see `mla_ops.index_loss_dense`."""
    q_idx, k_idx, weights = call.q_idx, call.k_idx, call.weights
    dtype = compute_dtype(q_idx.dtype)
    loss = q_idx.new_zeros((), dtype=dtype)
    dq = q_idx.new_zeros(q_idx.shape if need_grad else 0)
    dk = k_idx.new_zeros(k_idx.shape if need_grad else 0, dtype=dtype)  # a sum over strips, rounded once
    dw = weights.new_zeros(weights.shape if need_grad else 0)
    grads = _Grads(dq, dk, dw) if need_grad else None
    tile = _Tile.of(call, dtype)
    for sequence in _sequences(call, grads):
        for start in range(0, len(sequence.q), tile.rows):
            span = slice(start, min(start + tile.rows, len(sequence.q)))
            loss += _strip_loss(sequence, span, tile)
    return LossAndGradients(loss.float(), dq, dk.to(k_idx.dtype), dw)


@dataclass(frozen=True)
class _Tile:
    """How many queries and keys are worked on at once, and in which dtype."""

    rows: int  # queries of a strip
    block: int  # keys of a product
    dtype: torch.dtype

    @classmethod
    def of(cls, call: IndexLossDenseCall, dtype: torch.dtype) -> _Tile:
        seq_kv, kv_group = call.k.shape[-3:-1]
        heads = max(1, call.q.shape[-2] // kv_group, call.q_idx.shape[-2] // kv_group)
        numbers = _WORKSPACE_BYTES // 2 // dtype.itemsize
        rows = max(1, min(numbers // (_STRIP_MATRICES * max(1, seq_kv)), _PRODUCT_ROWS // heads))
        return cls(rows, max(1, numbers // (_BLOCK_MATRICES * heads * rows)), dtype)


@dataclass(frozen=True)
class _Grads:
    """Where gradients are written; of a sequence, views of those of the call."""

    dq: torch.Tensor  # as q_idx
    dk: torch.Tensor  # as k_idx, in the compute dtype
    dw: torch.Tensor  # as weights


@dataclass(frozen=True)
class _Sequence:
    """What one batch element and KV group has of a call."""

    q: torch.Tensor  # [seq_q, heads, d_total]
    k: torch.Tensor  # [seq_kv, d_total]
    lse: torch.Tensor  # [seq_q, heads]
    q_idx: torch.Tensor  # [seq_q, index_heads, index_head_dim]
    k_idx: torch.Tensor  # [seq_kv, index_head_dim]
    weights: torch.Tensor  # [seq_q, index_heads]
    row_weight: torch.Tensor  # [seq_q]
    first: torch.Tensor  # [seq_q], first key that a query may see
    end: torch.Tensor  # [seq_q], one past the last
    softmax_scale: float
    causal: bool
    relu: bool
    grads: _Grads | None

    def visible(self, span: slice) -> int:
        """Return how many keys the queries of `span` may see, as far as the lengths say."""
        seq_q, seq_kv = len(self.q), len(self.k)
        return min(seq_kv, max(0, span.stop + seq_kv - seq_q)) if self.causal else seq_kv


def _sequences(call: IndexLossDenseCall, grads: _Grads | None) -> Iterator[_Sequence]:
    (seq_q, heads), (seq_kv, kv_group) = call.q.shape[-3:-1], call.k.shape[-3:-1]
    index_heads = call.q_idx.shape[-2]
    has_batch = call.q.dim() == 4
    device = call.q.device
    first = torch.zeros(1, dtype=torch.int64, device=device) if call.starts is None else call.starts
    end = torch.full((1,), seq_kv, dtype=torch.int64, device=device) if call.ends is None else call.ends
    if call.causal:
        end = torch.minimum(end, torch.arange(seq_q, device=device) + (seq_kv - seq_q + 1))

    def sequence(b: int, g: int) -> _Sequence:
        mine, mine_of_index = (slice(g * n // kv_group, (g + 1) * n // kv_group) for n in (heads, index_heads))

        def of_batch(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[b] if has_batch else tensor

        row_weight = of_batch(call.row_weight)
        return _Sequence(
            q=of_batch(call.q)[:, mine],
            k=of_batch(call.k)[:, g],
            lse=of_batch(call.lse)[:, mine],
            q_idx=of_batch(call.q_idx)[:, mine_of_index],
            k_idx=of_batch(call.k_idx)[:, g],
            weights=of_batch(call.weights)[:, mine_of_index],
            row_weight=row_weight if row_weight.dim() == 1 else row_weight[:, g],
            first=(first[b] if first.dim() == 2 else first).expand(seq_q),
            end=(end[b] if end.dim() == 2 else end).expand(seq_q),
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            relu=call.relu,
            grads=grads
            and _Grads(
                of_batch(grads.dq)[:, mine_of_index], of_batch(grads.dk)[:, g], of_batch(grads.dw)[:, mine_of_index]
            ),
        )

    for b in range(call.q.shape[0] if has_batch else 1):
        for g in range(kv_group):
            yield sequence(b, g)


def _strip_loss(sequence: _Sequence, span: slice, tile: _Tile) -> torch.Tensor:
    """Return the weighted loss of a run of queries, and add its gradients."""
    visible = sequence.visible(span)
    if visible == 0:
        return sequence.row_weight.new_zeros((), dtype=tile.dtype)
    key = torch.arange(visible, device=sequence.q.device)
    not_eligible = key < sequence.first[span].unsqueeze(1)
    not_eligible |= key >= sequence.end[span].unsqueeze(1)

    row_weight = sequence.row_weight[span].unsqueeze(1).to(tile.dtype)
    target = _mass(sequence, span, visible, tile).masked_fill_(not_eligible, 0.0)
    total = target.sum(dim=1, keepdim=True)
    # What such a row holds, NaN included, counts nothing.
    skipped = (total == 0.0) | (row_weight == 0.0)
    row_weight.masked_fill_(skipped, 0.0)
    target.div_(total).masked_fill_(skipped, 0.0)

    queries = sequence.q_idx[span].transpose(0, 1).masked_fill(skipped, 0.0)
    weights = sequence.weights[span].t().unsqueeze(2).to(tile.dtype).masked_fill(skipped, 0.0)  # [heads, rows, 1]
    indexer = _Products(queries, sequence.k_idx[:visible], tile)
    scores = target.new_empty(target.shape)
    for block, dots in indexer.blocks():
        scores[:, block] = (dots.relu_() if sequence.relu else dots).mul_(weights).sum(dim=0)
    scores.masked_fill_(not_eligible, -torch.inf).masked_fill_(skipped, 0.0)
    lse = torch.logsumexp(scores, dim=1, keepdim=True)

    # Not a product everywhere: at keys that are not eligible it is 0 * -inf.
    terms = torch.special.xlogy(target, target).sub_(torch.where(target == 0.0, 0.0, target * scores))
    divergence = terms.sum(dim=1, keepdim=True).add_(lse).masked_fill_(skipped, 0.0)
    if sequence.grads is not None:
        dscores = scores.sub_(lse).exp_().sub_(target).mul_(row_weight)
        _add_gradients(sequence.grads, span, dscores, weights, indexer, sequence.relu)
    loss: torch.Tensor = (row_weight * divergence).sum()
    return loss


def _mass(sequence: _Sequence, span: slice, visible: int, tile: _Tile) -> torch.Tensor:
    """Return how much attention all heads give to each of the visible keys, `[rows, visible]`."""
    lse = sequence.lse[span].t().unsqueeze(2)  # [heads, rows, 1]
    # A head with a normaliser of -inf attends to nothing: exp(0 - inf).
    attends_to_nothing = lse == -torch.inf
    queries = sequence.q[span].transpose(0, 1).masked_fill(attends_to_nothing, 0.0)
    lse = lse.masked_fill(attends_to_nothing, torch.inf)
    mass = lse.new_empty((queries.shape[1], visible), dtype=tile.dtype)
    for block, logits in _Products(queries, sequence.k[:visible], tile).blocks():
        mass[:, block] = logits.mul_(sequence.softmax_scale).sub_(lse).exp_().sum(dim=0)
    return mass


def _add_gradients(
    grads: _Grads, span: slice, dscores: torch.Tensor, weights: torch.Tensor, indexer: _Products, relu: bool
) -> None:
    """Add what `dscores` `[rows, visible]` makes of a strip; `weights` are `[index_heads, rows, 1]`."""
    dq = dscores.new_zeros(indexer.q.shape)
    dw = dscores.new_zeros(weights.shape)
    for block, dots in indexer.blocks():
        ddots = weights * dscores[:, block]
        if relu:
            ddots.masked_fill_(dots <= 0, 0.0)
            dots.relu_()
        dw += dots.mul_(dscores[:, block]).sum(dim=2, keepdim=True)
        ddots, k = indexer.like_keys(ddots).flatten(0, 1), indexer.k[block]
        dq += _product(ddots, k, dq.dtype).view(dq.shape)
        grads.dk[block] += _product(ddots.t(), indexer.q.flatten(0, 1), dq.dtype)
    grads.dq[span] = dq.transpose(0, 1).to(grads.dq.dtype)
    grads.dw[span] = dw.squeeze(2).t().to(grads.dw.dtype)


@dataclass(frozen=True)
class _Products:
    """The queries of a strip, all heads of a group, with keys: multiplied block by block of keys."""

    q: torch.Tensor  # [heads, rows, width], contiguous
    k: torch.Tensor  # [keys, width]
    tile: _Tile

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield every block of keys and its products `[heads, rows, keys of the block]` in the compute dtype."""
        heads, rows, _ = self.q.shape
        for start in range(0, len(self.k), self.tile.block):
            block = slice(start, min(start + self.tile.block, len(self.k)))
            products = _product(self.q.flatten(0, 1), self.k[block].t(), self.tile.dtype)
            yield block, products.view(heads, rows, block.stop - block.start)

    def like_keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Round gradients to bf16 where the keys are bf16 and a device multiplies it faster.

        Gradients in fp16 would vanish: a mean over 32,768 rows weighs them with 3e-5, fp16 ends at 6e-8.
        """
        return tensor.to(self.k.dtype) if self.k.dtype == torch.bfloat16 and self.k.is_cuda else tensor


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `a @ b`, accumulated and returned in `dtype`."""
    if a.is_cuda and a.dtype == b.dtype and (a.dtype.itemsize, dtype) == (2, torch.float32):
        return torch.mm(a, b, out_dtype=dtype)  # only CUDA multiplies 16-bit factors into fp32
    return torch.mm(a.to(dtype), b.to(dtype))

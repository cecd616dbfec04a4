"""How DTensor runs index scores: which placements of their arguments need no communication, and what results become.

One mesh dimension may cut the batch, the query rows, or KV groups with their index heads. Cut rows leave the keys whole
on every rank, so that `dk` is a share of a sum: `Partial`. Their indices name rows of the whole `k_idx`. Index heads of
one group are summed into every score, so that they are gathered, as is everything else that DTensor finds cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mla_ops.registration.index_scores import INDEX_SCORES, INDEX_SCORES_BWD
from mla_ops.registration.sharding import Sharding, ranks_cutting
from mla_ops.registration.tracing import add_sharding_rule


@dataclass(frozen=True)
class _Cut:
    """Placements, on one mesh dimension, of everything the operators take and return."""

    per_row: Any  # q_idx, weights, indices, scores and gradients of the first two: the same dimensions in all of them
    k_idx: Any
    topk_length: Any
    dk: Any

    def arguments(self, topk_length: Any) -> list[Any]:
        """Place q_idx, k_idx, weights, indices and topk_length, if there is one; what follows is no tensor."""
        return [self.per_row, self.k_idx, self.per_row, self.per_row, None if topk_length is None else self.topk_length]


def _cuts(q_idx: Any, k_idx: Any) -> list[_Cut]:
    """Every cut of a call whose `q_idx` and `k_idx` have these specs; the call as a whole comes first."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()
    rows, heads = q_idx.ndim - 3, q_idx.ndim - 2
    cuts = [_Cut(whole, whole, whole, whole), _Cut(Shard(rows), whole, Shard(rows), Partial("sum"))]
    if q_idx.ndim == 4:
        cuts.append(_Cut(Shard(0), Shard(0), Shard(0), Shard(0)))
    kv_group, pieces = k_idx.shape[heads], ranks_cutting(heads, q_idx, k_idx)
    if pieces > 1 and kv_group % pieces == 0:
        cuts.append(_Cut(Shard(heads), Shard(heads), whole, Shard(heads)))
    return cuts


def _index_scores_shardings(
    q_idx: Any, k_idx: Any, weights: Any, indices: Any, topk_length: Any = None, *constants: Any
) -> Sequence[Sharding]:
    return [([cut.per_row], cut.arguments(topk_length)) for cut in _cuts(q_idx, k_idx)]


def _index_scores_bwd_shardings(
    dscores: Any,
    q_idx: Any,
    k_idx: Any,
    weights: Any,
    indices: Any,
    topk_length: Any = None,
    relu: bool = True,
    need_dq: bool = True,
    need_dk: bool = True,
    need_dw: bool = True,
    backend: str = "auto",
) -> Sequence[Sharding]:
    from torch.distributed.tensor import Replicate

    shardings = []
    for cut in _cuts(q_idx, k_idx):
        grads = ((cut.per_row, need_dq), (cut.dk, need_dk), (cut.per_row, need_dw))
        # A gradient that is not needed is an empty [0] tensor, the same everywhere.
        placed = [placement if need else Replicate() for placement, need in grads]
        shardings.append((placed, [cut.per_row, *cut.arguments(topk_length)]))
    return shardings


def register() -> None:
    """Give DTensor the rules of the operators."""
    add_sharding_rule(INDEX_SCORES, _index_scores_shardings)
    add_sharding_rule(INDEX_SCORES_BWD, _index_scores_bwd_shardings)

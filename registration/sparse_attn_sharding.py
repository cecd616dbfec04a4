"""How DTensor runs the operators: which placements of their arguments need no communication, and what results become.

One mesh dimension may cut the batch, the query rows or the heads; DTensor combines the cuts over the dimensions of a
mesh and redistributes what fits none of them, as for its own operators. Rows and heads leave the keys whole on every
rank, so their `dkv` (and the `dsink` of cut rows or batch) is a share of a sum: `Partial`. Sharded query rows need
indices that name rows of the whole `kv`. Backends are chosen by each rank for its local heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mla_ops.errors import UnsupportedShardingError
from mla_ops.registration.sharding import Sharding, ranks_cutting
from mla_ops.registration.sparse_attn import SPARSE_ATTN, SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS
from mla_ops.registration.tracing import add_sharding_rule


@dataclass(frozen=True)
class _Cut:
    """Placements, on one mesh dimension, of everything the operators take and return."""

    per_head: Any  # q, out, lse, max_logits and gradients: batch, rows and heads are the same dimensions in all of them
    kv: Any
    indices: Any
    topk_length: Any
    attn_sink: Any

    def summed(self, placement: Any) -> Any:
        """Placement of the gradient of an argument at `placement`: whole arguments of a cut call collect shares."""
        from torch.distributed.tensor import Partial

        is_cut = not self.per_head.is_replicate()
        return Partial("sum") if is_cut and placement.is_replicate() else placement


def _cuts(q: Any, kv: Any) -> list[_Cut]:
    """Every cut of a call whose `q` and `kv` have these specs; the call as a whole comes first."""
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    rows, heads = q.ndim - 3, q.ndim - 2
    cuts = [
        _Cut(whole, whole, whole, whole, whole),
        _Cut(Shard(rows), whole, Shard(rows), Shard(rows), whole),
    ]
    if q.ndim == 4:
        cuts.append(_Cut(Shard(0), Shard(0), Shard(0), Shard(0), whole))
    if kv.shape[heads] == 1:
        cuts.append(_Cut(Shard(heads), whole, whole, whole, Shard(0)))
    elif ranks_cutting(heads, q, kv) > 1:
        cuts.append(_Cut(Shard(heads), Shard(heads), Shard(heads), whole, Shard(0)))
    return cuts


def _check(q: Any, kv: Any) -> None:
    """Raise for placements that no redistribution should paper over, the same on every rank."""
    for name, spec in (("q", q), ("kv", kv)):
        if ranks_cutting(spec.ndim - 1, spec) > 1:
            raise UnsupportedShardingError(
                f"{name} must be whole along d_total (dim {spec.ndim - 1}), got placements {spec.placements} on "
                f"{spec.mesh}; shard its batch, query rows or heads: {name}.redistribute(placements=...)"
            )
    heads = q.ndim - 2
    kv_group, pieces = kv.shape[heads], ranks_cutting(heads, q, kv)
    if kv_group != 1 and kv_group % pieces:
        raise UnsupportedShardingError(
            f"heads (dim {heads}) are sharded over {pieces} ranks, a number that must divide kv_group ({kv_group}); "
            f"got placements {q.placements} of q and {kv.placements} of kv on {q.mesh}; shard heads over a divisor of "
            "kv_group, or shard batch or query rows instead"
        )


def _sparse_attn_shardings(
    q: Any, kv: Any, indices: Any, d_v: int, softmax_scale: float, *optional: Any
) -> Sequence[Sharding]:
    _check(q, kv)
    return [
        ([cut.per_head] * 2, [cut.per_head, cut.kv, cut.indices, None, None, *_optional(cut, optional)])
        for cut in _cuts(q, kv)
    ]


def _sparse_attn_max_logits_shardings(
    q: Any, kv: Any, indices: Any, d_v: int, softmax_scale: float, topk_length: Any = None, backend: str = "auto"
) -> Sequence[Sharding]:
    _check(q, kv)
    return [
        ([cut.per_head], [cut.per_head, cut.kv, cut.indices, None, None, *_optional(cut, [topk_length])])
        for cut in _cuts(q, kv)
    ]


def _sparse_attn_bwd_shardings(
    dout: Any,
    dlse: Any,
    q: Any,
    kv: Any,
    indices: Any,
    out: Any,
    lse: Any,
    d_v: int,
    softmax_scale: float,
    topk_length: Any = None,
    attn_sink: Any = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> Sequence[Sharding]:
    from torch.distributed.tensor import Replicate

    _check(q, kv)
    shardings = []
    for cut in _cuts(q, kv):
        grads = [
            # A gradient that is not needed is an empty [0] tensor, the same everywhere.
            cut.per_head if need_dq else Replicate(),
            cut.summed(cut.kv) if need_dkv else Replicate(),
            cut.summed(cut.attn_sink) if attn_sink is not None else Replicate(),
        ]
        upstream = [cut.per_head if grad is not None else None for grad in (dout, dlse)]
        arguments = [*upstream, cut.per_head, cut.kv, cut.indices, cut.per_head, cut.per_head, None, None]
        shardings.append((grads, arguments + _optional(cut, (topk_length, attn_sink))))
    return shardings


def _optional(cut: _Cut, values: Sequence[Any]) -> list[Any]:
    """Placements of `topk_length` and `attn_sink` as far as the call has them; what follows is no tensor."""
    placements = (cut.topk_length, cut.attn_sink)
    return [placement if value is not None else None for placement, value in zip(placements, values, strict=False)]


def register() -> None:
    """Give DTensor the rules of the operators."""
    add_sharding_rule(SPARSE_ATTN, _sparse_attn_shardings)
    add_sharding_rule(SPARSE_ATTN_BWD, _sparse_attn_bwd_shardings)
    add_sharding_rule(SPARSE_ATTN_MAX_LOGITS, _sparse_attn_max_logits_shardings)

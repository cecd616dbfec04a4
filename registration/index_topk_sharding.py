"""How DTensor runs index selection: which placements of its arguments need no communication, and what the result is.

One mesh dimension may cut the batch or the query rows. Rows are cut only without the causal bound, which counts from
the last row of all and would count from the last of each rank; bounds in `starts` and `ends` are cut with their rows.
Index heads are summed before the choice, so that they are gathered, as is everything else that DTensor finds cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mla_ops.registration.index_topk import INDEX_TOPK
from mla_ops.registration.sharding import Sharding
from mla_ops.registration.tracing import add_sharding_rule


def _index_topk_shardings(
    q_idx: Any,
    k_idx: Any,
    weights: Any,
    topk: int,
    starts: Any = None,
    ends: Any = None,
    k_scale: Any = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> Sequence[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    def bounds(of_batch: Any, of_row: Any) -> list[Any]:
        """Place `starts` and `ends`, which may lack the batch."""
        return [None if bound is None else of_batch if bound.ndim == 2 else of_row for bound in (starts, ends)]

    def cut(indices: Any, keys: Any, of_bounds: list[Any]) -> Sharding:
        scale = None if k_scale is None else keys
        return [indices], [indices, keys, indices, None, *of_bounds, scale]

    whole = Replicate()
    cuts = [cut(whole, whole, bounds(whole, whole))]
    if q_idx.ndim == 4:
        cuts.append(cut(Shard(0), Shard(0), bounds(Shard(0), whole)))
    if not causal:
        rows = q_idx.ndim - 3
        cuts.append(cut(Shard(rows), whole, bounds(Shard(1), Shard(0))))
    return cuts


def register() -> None:
    """Give DTensor the rule of the operator."""
    add_sharding_rule(INDEX_TOPK, _index_topk_shardings)

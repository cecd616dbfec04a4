"""How DTensor runs attention mass: which placements of its arguments need no communication, and what the mass becomes.

One mesh dimension may cut the batch, the query rows, or the heads. Heads of one KV group leave the keys whole, and each
rank has the mass of its heads: `Partial`, which a sum over the ranks completes. Heads of several groups are cut with
their groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mla_ops.registration.attn_mass import ATTN_MASS
from mla_ops.registration.sharding import Sharding, ranks_cutting
from mla_ops.registration.tracing import add_sharding_rule


def _attn_mass_shardings(
    q: Any, kv: Any, indices: Any, lse: Any, softmax_scale: float, topk_length: Any = None, backend: str = "auto"
) -> Sequence[Sharding]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def cut(mass: Any, per_head: Any, keys: Any, lists: Any, lengths: Any) -> Sharding:
        """Place the results; q, kv, indices, lse, softmax_scale and topk_length, if there is one."""
        return [mass], [per_head, keys, lists, per_head, None, None if topk_length is None else lengths]

    whole = Replicate()
    rows, heads = Shard(q.ndim - 3), Shard(q.ndim - 2)
    cuts = [cut(whole, whole, whole, whole, whole), cut(rows, rows, whole, rows, rows)]
    if q.ndim == 4:
        cuts.append(cut(*[Shard(0)] * 5))
    kv_group, pieces = kv.shape[heads.dim], ranks_cutting(heads.dim, q, kv)
    if kv_group == 1:
        cuts.append(cut(Partial("sum"), heads, whole, whole, whole))
    elif pieces > 1 and kv_group % pieces == 0:
        cuts.append(cut(heads, heads, heads, heads, whole))
    return cuts


def register() -> None:
    """Give DTensor the rule of the operator."""
    add_sharding_rule(ATTN_MASS, _attn_mass_shardings)

"""Key-sharded context parallelism: the operator when `kv` is too long for one rank.

Every rank owns some rows of `kv`, and they never move: the queries travel to the keys. Each rank attends, for the
queries of all ranks, to the selected keys that it owns; the partial results travel back to the owners of the queries,
which merge them by `lse`. That is an all-gather and an all-to-all, mirrored in the backward, and the gradient of `kv`
stays with its owner. Nothing reads tensor data on the host, so all of it stays in a compiled graph.

Batch, heads and query rows need nothing from this module: DTensor shards them
(`registration/sparse_attn_sharding.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mla_ops.api import SparseAttnOutput, serving
from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.call import SparseAttnCall
from mla_ops.ops.sparse_attn.rules import check_argument_types, check_inputs
from mla_ops.registration import SPARSE_ATTN, cast_by_autocast
from mla_ops.wrappers import is_dtensor

QShard = Literal["rows", "heads"]
KeyLayout = Literal["contiguous", "interleaved"]
_Part = tuple[torch.Tensor, torch.Tensor]


def sparse_attn_cp(
    q: torch.Tensor,
    kv_shard: torch.Tensor,
    indices: torch.Tensor,
    mesh: DeviceMesh,
    *,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
    mesh_dim: str | None = None,
    seq_kv: int,
    q_shard: QShard = "rows",
    key_layout: KeyLayout = "contiguous",
    check: bool = False,
) -> SparseAttnOutput:
    """Run `mla_ops.sparse_attn` with the keys sharded among the ranks of a mesh dimension.

    Every rank of the dimension calls it, with plain tensors that hold its own part; their shapes and dtypes are the
    same on every rank, except for the rows of `kv_shard` (see `seq_kv`). Differentiable once in `q`, `kv_shard` and
    `attn_sink`, through both results. Gradients are those of the sum of all ranks' losses: complete for `q` and
    `kv_shard`; for an `attn_sink` that is the same on every rank, this rank's share, to be all-reduced like the
    gradient of any replicated parameter.

    Args:
        q: this rank's queries, `[batch, seq_q, heads, d_total]` or without batch: a run of rows (`q_shard="rows"`), or
            a run of heads of every row (`"heads"`: for fewer rows than ranks, as in decoding, and where projections
            are tensor parallel over the same ranks). With several KV groups, the heads of all ranks together are a
            multiple of `kv_group`; a rank's own need not be.
        kv_shard: `[batch, rows, kv_group, d_total]`, the keys that this rank owns.
        indices: `[batch, seq_q, kv_group, topk]` for the rows of `q`. They name rows of the whole `kv`; an index local
            to a shard cannot be told from a global one.
        mesh: the ranks. One-dimensional, or `mesh_dim` names the dimension.
        d_v: as in `mla_ops.sparse_attn`.
        softmax_scale: as in `mla_ops.sparse_attn`.
        topk_length: `[batch, seq_q]` for the rows of `q`.
        attn_sink: `[heads]` for the heads of `q`; it joins the merged denominator, once.
        backend: as in `mla_ops.sparse_attn`.
        mesh_dim: the name of the mesh dimension that shards the keys.
        seq_kv: rows of the whole `kv`, the same on every rank. No rank can tell it from its own rows: where the ranks
            do not divide it, the last ones own fewer rows or none (see `key_layout`).
        q_shard: along what the queries are sharded.
        key_layout: rank `r` of `n` owns the `r`-th run of `ceil(seq_kv / n)` rows ("contiguous", as `torch.chunk`), or
            every `n`-th row from `r` on ("interleaved", as `kv[r::n]`). Causal selections crowd on early rows; which
            layout shares them out better is what `key_load` reports.
        check: compare the calls of all ranks first, and raise the same error on every rank if one is wrong or they
            disagree in anything but the mesh. One small collective and a host sync: for setting up, in eager only.
            Without it, ranks that disagree in shapes may wait for one another, as in any collective.

    Returns:
        `out` and `lse` for the rows and heads of `q`, as `mla_ops.sparse_attn` returns them. Partial results are
        rounded to `q.dtype`, then merged in fp32.

    Raises:
        InvalidInputError: an argument breaks a rule; raised before any communication.
        UnsupportedProblemError: no backend runs it, or not the named one.
    """
    ranks = _Ranks.of(mesh, mesh_dim)

    def checked_own_part() -> _Part:
        """Check this rank's call; return `q` and `kv_shard` in the dtype that travels, which autocast may lower."""
        _check_constants(q_shard, key_layout, seq_kv)
        check_argument_types(q, kv_shard, indices, d_v, softmax_scale, topk_length, attn_sink, backend)
        _check_plain(q=q, kv_shard=kv_shard, indices=indices, topk_length=topk_length, attn_sink=attn_sink)
        q_, kv_ = cast_by_autocast(q, kv_shard)
        if torch.compiler.is_compiling():
            # An error in traced Python loses its words, so the operator's fake checks: the gathered call below and, for
            # topk_length and attn_sink, which that call never sees, this one, which leaves the graph as dead code.
            one_group, no_slots = kv_.detach()[..., :1, :], indices[..., :1, :0]
            SPARSE_ATTN(q_.detach(), one_group, no_slots, d_v, softmax_scale, topk_length, attn_sink, backend)
        else:
            call = SparseAttnCall(q_, kv_, indices, d_v, softmax_scale, topk_length, attn_sink)
            head_shards = ranks.count if q_shard == "heads" else 1
            check_inputs(call, head_shards=head_shards)
        _check_owned_rows(kv_.shape[-3], owned_rows(seq_kv, ranks.count, ranks.index, key_layout), seq_kv)
        return q_, kv_

    if check:
        q, kv_shard = ranks.check_together(
            checked_own_part,
            q=q,
            kv_shard="own rows",  # whose number was checked against seq_kv
            indices=indices,
            topk_length=topk_length,
            attn_sink=attn_sink,
            d_v=d_v,
            softmax_scale=softmax_scale,
            backend=backend,
            seq_kv=seq_kv,
            q_shard=q_shard,
            key_layout=key_layout,
        )
    else:
        q, kv_shard = checked_own_part()

    rows = q.dim() - 3
    sharded_dim = rows if q_shard == "rows" else rows + 1

    q = ranks.gather(q, sharded_dim)
    if q_shard == "rows":
        indices = ranks.gather(indices, rows)
        topk_length = None if topk_length is None else ranks.gather(topk_length, rows)
    owner, local = _owner_and_local_row(indices, topk_length, seq_kv, ranks.count, key_layout)
    local, local_length = _pack(local, owner == ranks.index)
    out, lse = SPARSE_ATTN(q, kv_shard, local, d_v, softmax_scale, local_length, None, backend)
    return merge_partials(ranks.exchange(out, sharded_dim), ranks.exchange(lse, sharded_dim), attn_sink)


def merge_partials(out: torch.Tensor, lse: torch.Tensor, attn_sink: torch.Tensor | None = None) -> SparseAttnOutput:
    """Merge results over disjoint sets of keys into the result over all of them. Differentiable in every argument.

    Args:
        out: `[parts, ..., heads, d_v]`, each part's output, computed without a sink.
        lse: `[parts, ..., heads]`, fp32; `-inf` where a part had no valid slot.
        attn_sink: `[heads]`, fp32, the sink of the whole.

    Returns:
        `out` `[..., heads, d_v]` in the dtype of the parts and `lse` `[..., heads]`, as `mla_ops.sparse_attn` returns
        them: a row that is empty in every part gets `out = 0`, `lse = -inf` and zero gradients.
    """
    return serving.merge_partials(out.unbind(), lse.unbind(), attn_sink)


@dataclass(frozen=True)
class KeyLoad:
    """How the valid slots of a call spread over the ranks that own the keys."""

    slots: tuple[int, ...]  # of each rank

    @property
    def imbalance(self) -> float:
        """The busiest rank's slots over the mean: 1 is even, the number of ranks is one rank doing all the work."""
        total = sum(self.slots)
        return max(self.slots) * len(self.slots) / total if total else 1.0

    def __str__(self) -> str:
        return f"slots by rank {list(self.slots)}, imbalance {self.imbalance:.2f}"


def key_load(
    indices: torch.Tensor,
    mesh: DeviceMesh,
    *,
    seq_kv: int,
    topk_length: torch.Tensor | None = None,
    mesh_dim: str | None = None,
    q_shard: QShard = "rows",
    key_layout: KeyLayout = "contiguous",
) -> KeyLoad:
    """Count, for every rank, the selected keys that `sparse_attn_cp` would attend to there.

    Arguments as in `sparse_attn_cp`, and like it called by every rank. It sums over the queries of all ranks (one small
    all-reduce) and waits for the device: a report, not for the inside of a step.
    """
    ranks = _Ranks.of(mesh, mesh_dim)
    _check_constants(q_shard, key_layout, seq_kv)
    owner, _ = _owner_and_local_row(indices, topk_length, seq_kv, ranks.count, key_layout)
    slots = torch.stack([(owner == rank).sum() for rank in range(ranks.count)])
    if q_shard == "rows":
        dist.all_reduce(slots, group=ranks.group)
    return KeyLoad(tuple(slots.tolist()))


def owned_rows(seq_kv: int, ranks: int, rank: int, key_layout: KeyLayout = "contiguous") -> int:
    """Return how many of `seq_kv` rows rank `rank` of `ranks` owns."""
    if key_layout == "interleaved":
        return (seq_kv - rank + ranks - 1) // ranks
    run = -(-seq_kv // ranks)
    return min(max(seq_kv - rank * run, 0), run)


def _owner_and_local_row(
    indices: torch.Tensor, topk_length: torch.Tensor | None, seq_kv: int, ranks: int, key_layout: KeyLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each slot's owner, -1 for an invalid slot, and the row of its key in the owner's shard."""
    valid = (indices >= 0) & (indices < seq_kv)
    if topk_length is not None:
        slot = torch.arange(indices.shape[-1], device=indices.device)
        valid = valid & (slot < topk_length[..., None, None])
    if key_layout == "interleaved":
        owner, local = indices % ranks, indices // ranks
    else:
        run = max(-(-seq_kv // ranks), 1)
        owner, local = indices // run, indices % run
    return owner.masked_fill(~valid, -1), local


def _pack(local: torch.Tensor, mine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the slots that are `mine` to the front, in order, and count them: the kernels stop where the count ends.

    Args:
        local: `[..., seq_q, kv_group, topk]`, rows of this rank's shard.
        mine: bool, of the same shape.

    Returns:
        The packed rows, -1 behind the last, and the `topk_length` `[..., seq_q]` that covers every group's.
    """
    topk = local.shape[-1]
    # Both halves of the `where` together are a permutation of the slots, so the scatter writes each exactly once.
    position = torch.where(mine, mine.cumsum(-1) - 1, topk - (~mine).cumsum(-1))
    packed = torch.empty_like(local).scatter(-1, position, local.masked_fill(~mine, -1))
    return packed, mine.sum(-1, dtype=torch.int32).amax(-1)


def _fact(argument: object) -> str:
    """Return what of an argument has to be the same on every rank, in words."""
    if isinstance(argument, torch.Tensor):
        return f"{list(argument.shape)} {str(argument.dtype).removeprefix('torch.')}"
    return repr(argument)


def _check_constants(q_shard: object, key_layout: object, seq_kv: object) -> None:
    for name, value, known in (("q_shard", q_shard, QShard), ("key_layout", key_layout, KeyLayout)):
        if value not in get_args(known):
            raise InvalidInputError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {value!r}")
    if isinstance(seq_kv, bool) or not isinstance(seq_kv, (int, torch.SymInt)):
        raise InvalidInputError(f"seq_kv must be an int, got {type(seq_kv).__name__}; use int(seq_kv)")


def _check_plain(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and is_dtensor(tensor):
            raise InvalidInputError(
                f"{name} must be a plain tensor that holds this rank's part, got a DTensor; use {name}.to_local()"
            )


def _check_owned_rows(rows: int, expected: int, seq_kv: int) -> None:
    if rows != expected:
        raise InvalidInputError(f"kv_shard must hold the {expected} of {seq_kv} rows that this rank owns, got {rows}")


@dataclass(frozen=True)
class _Ranks:
    """One dimension of a mesh, as seen by one of its ranks, and the two moves of tensors along it."""

    count: int
    index: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, mesh: DeviceMesh, mesh_dim: str | None) -> _Ranks:
        if not isinstance(mesh, DeviceMesh):
            raise InvalidInputError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}; use init_device_mesh(...)")
        names = mesh.mesh_dim_names or ()
        if mesh_dim is None and mesh.ndim != 1:
            raise InvalidInputError(
                f"mesh has {mesh.ndim} dimensions {names}; name the one that shards the keys: mesh_dim="
            )
        if mesh_dim is not None and mesh_dim not in names:
            raise InvalidInputError(f"mesh_dim must be a dimension of the mesh, {names}, got {mesh_dim!r}")
        dim = 0 if mesh_dim is None else names.index(mesh_dim)
        return cls(mesh.size(dim), mesh.get_local_rank(dim), mesh.get_group(dim))

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate every rank's `tensor` along `dim`."""
        stacked: torch.Tensor = _AllGather.apply(tensor, self.count, self.group.group_name)  # type: ignore[no-untyped-call]
        return stacked.movedim(0, dim).flatten(dim, dim + 1)

    def exchange(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Send the `r`-th run of `dim` to rank `r`; what arrives is stacked by sender in a new first dimension."""
        by_rank = tensor.unflatten(dim, (self.count, tensor.shape[dim] // self.count)).movedim(dim, 0)
        received: torch.Tensor = _AllToAll.apply(by_rank, self.count, self.group.group_name)  # type: ignore[no-untyped-call]
        return received

    def check_together(self, checked_own_part: Callable[[], _Part], **arguments: object) -> _Part:
        """Return the checked part; raise the same error on every rank if one breaks a rule or the ranks disagree.

        They disagree if `arguments` differ in shape or dtype or, those that are no tensors, in value.
        """
        if torch.compiler.is_compiling():
            raise InvalidInputError("check=True exchanges Python objects, which no graph holds; check in eager")
        error, facts, part = None, {}, None
        try:
            part = checked_own_part()
            facts = {name: _fact(argument) for name, argument in arguments.items()}
        except InvalidInputError as broken_rule:
            error = str(broken_rule)
        except Exception as unforeseen:  # whatever it is, the other ranks wait for this one's report
            error = f"{type(unforeseen).__name__}: {unforeseen}"
        reports: list[Any] = [None] * self.count
        dist.all_gather_object(reports, (error, facts), group=self.group)
        for rank, (broken, of_rank) in enumerate(reports):
            if broken is not None:
                raise InvalidInputError(f"rank {rank} of {self.count}: {broken}")
            for name, first in reports[0][1].items():
                if of_rank[name] != first:
                    raise InvalidInputError(
                        f"{name} must be the same on every rank, got {first} on rank 0, {of_rank[name]} on rank {rank}"
                    )
        assert part is not None
        return part


# torch.distributed._functional_collectives wraps the same operators, but renamed its functions in torch 2.13, and the
# gradient of its gather sums in the gradient's dtype, rounding once per rank. These sum in fp32 for the same bytes.
class _AllGather(torch.autograd.Function):
    """Stack `tensor` of every rank; backward, return to each the sum of what the ranks have for it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        ctx.ranks, ctx.group = ranks, group
        pending = torch.ops._c10d_functional.all_gather_into_tensor(tensor.contiguous(), ranks, group)
        gathered: torch.Tensor = torch.ops._c10d_functional.wait_tensor(pending)
        return gathered.view(ranks, *tensor.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(grad, ctx.ranks, ctx.group).sum(dim=0), None, None


class _AllToAll(torch.autograd.Function):
    """Send the `r`-th part of the first dimension to rank `r`; its own transpose."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
        ctx.ranks, ctx.group = ranks, group
        return _all_to_all(tensor, ranks, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _all_to_all(grad, ctx.ranks, ctx.group), None, None


def _all_to_all(tensor: torch.Tensor, ranks: int, group: str) -> torch.Tensor:
    parts = [1] * ranks
    pending = torch.ops._c10d_functional.all_to_all_single(tensor.contiguous(), parts, parts, group)
    received: torch.Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return received

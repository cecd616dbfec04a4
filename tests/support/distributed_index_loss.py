"""Checks of DTensor's view of index scores and attention mass: batch, query rows, heads and groups cut."""

from __future__ import annotations

from typing import Any

import torch
from distributed_world import World, check, raises
from torch.distributed.device_mesh import DeviceMesh

import mla_ops
from mla_ops.errors import InvalidInputError, UnknownBackendError, UnsupportedShardingError
from mla_ops.testing import IndexCase, LossInputs, make_loss_inputs

SCORES = ("q_idx", "k_idx", "weights", "indices", "topk_length")
MASS = ("q", "kv", "indices", "lse", "topk_length")


def distributed(inputs: LossInputs, names: tuple[str, ...], mesh: DeviceMesh, placements: Any) -> dict[str, Any]:
    """The named tensors as DTensors; those without placements are replicated."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = [Replicate()] * mesh.ndim
    return {name: distribute_tensor(getattr(inputs, name), mesh, placements.get(name, whole)) for name in names}


def assert_sharded_scores(case: IndexCase, mesh: DeviceMesh, expected: list[list[Any]], **placements: Any) -> None:
    """Compare scores, dq, dk and dw with those of one process, and their placements with `expected`."""
    from torch.distributed.tensor import distribute_tensor

    inputs = make_loss_inputs(case, topk_length=True)
    leaves = [getattr(inputs, name).clone().requires_grad_() for name in SCORES[:3]]
    scores = mla_ops.index_scores(*leaves, inputs.indices, topk_length=inputs.topk_length)
    dscores = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    alone = [scores.detach(), *torch.autograd.grad(scores, leaves, dscores)]

    arguments = distributed(inputs, SCORES, mesh, placements)
    for name in SCORES[:3]:
        arguments[name].requires_grad_()
    scores = mla_ops.index_scores(**arguments)
    scores.backward(distribute_tensor(dscores, mesh, scores.placements))
    results = [scores.detach(), *(arguments[name].grad for name in SCORES[:3])]
    for name, result, want, whole in zip(("scores", "dq", "dk", "dw"), results, expected, alone, strict=True):
        assert list(result.placements) == want, f"{name}: {result.placements}, expected {want}"
        torch.testing.assert_close(result.full_tensor(), whole, msg=lambda text, name=name: f"{name}: {text}")


def assert_sharded_mass(case: IndexCase, mesh: DeviceMesh, expected: list[Any], **placements: Any) -> None:
    inputs = make_loss_inputs(case, topk_length=True)
    scale = inputs.softmax_scale
    mass = mla_ops.attn_mass(**distributed(inputs, MASS, mesh, placements), softmax_scale=scale)
    assert list(mass.placements) == expected, f"{mass.placements}, expected {expected}"
    torch.testing.assert_close(mass.full_tensor(), torch.ops.mla.attn_mass(*inputs.mass_args))


@check(2)
def index_scores_are_cut_by_rows_and_dk_is_partial(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard

    mesh = world.mesh(context=2)
    for case in (IndexCase(), IndexCase(batch=None, seq_q=6, kv_group=2)):
        cut = [Shard(len(case.lead))]
        rows = dict.fromkeys(("q_idx", "weights", "indices", "topk_length"), cut)
        assert_sharded_scores(case, mesh, [cut, cut, [Partial()], cut], **rows)


@check(2)
def index_scores_are_cut_by_batch_and_by_groups(world: World) -> None:
    from torch.distributed.tensor import Shard

    mesh, batch, group = world.mesh(data=2), [Shard(0)], [Shard(2)]
    assert_sharded_scores(IndexCase(batch=3), mesh, [batch] * 4, **dict.fromkeys(SCORES, batch))
    groups = dict.fromkeys(SCORES[:4], group)
    assert_sharded_scores(IndexCase(kv_group=2), mesh, [group] * 4, **groups)


@check(2)
def index_heads_of_one_group_are_gathered(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard

    whole = [Replicate()]
    heads = {"q_idx": [Shard(2)], "weights": [Shard(2)]}
    assert_sharded_scores(IndexCase(), world.mesh(tensor=2), [whole] * 4, **heads)
    assert_sharded_scores(IndexCase(), world.mesh(tensor=2), [whole] * 4)


@check(2)
def mass_of_cut_heads_is_partial_without_communication(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, heads = world.mesh(tensor=2), {"q": [Shard(2)], "lse": [Shard(2)]}
    assert_sharded_mass(IndexCase(), mesh, [Partial()], **heads)
    inputs = make_loss_inputs(IndexCase())
    arguments = distributed(inputs, MASS[:4], mesh, heads)
    with CommDebugMode() as communication:
        mass = mla_ops.attn_mass(**arguments, softmax_scale=inputs.softmax_scale)
    assert communication.get_total_counts() == 0
    # The loss needs the sum, once: of one number a slot.
    scores = mla_ops.index_scores(**distributed(inputs, SCORES[:4], mesh, {}))
    loss = mla_ops.index_kl(mass.redistribute(placements=scores.placements), scores)
    whole = mla_ops.index_loss(
        *(getattr(inputs, name) for name in (*MASS[:4], *SCORES[:3])), softmax_scale=inputs.softmax_scale
    )
    torch.testing.assert_close(loss.full_tensor(), whole)


@check(2)
def mass_is_cut_by_rows_batch_and_groups(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard

    mesh, batch, rows, group = world.mesh(data=2), [Shard(0)], [Shard(1)], [Shard(2)]
    assert_sharded_mass(IndexCase(batch=3), mesh, batch, **dict.fromkeys(MASS, batch))
    assert_sharded_mass(IndexCase(), mesh, rows, **dict.fromkeys(("q", "indices", "lse", "topk_length"), rows))
    assert_sharded_mass(IndexCase(kv_group=2), mesh, group, **dict.fromkeys(MASS[:4], group))
    assert_sharded_mass(IndexCase(), mesh, [Replicate()])


@check(2)
def bad_calls_of_the_loss_keep_their_words(world: World) -> None:
    mesh, inputs = world.mesh(data=2), make_loss_inputs(IndexCase())
    scores, mass = (distributed(inputs, names, mesh, {}) for names in (SCORES[:4], MASS[:4]))
    with raises(InvalidInputError, "indices must be int32 or int64, got float32"):
        mla_ops.index_scores(**{**scores, "indices": scores["indices"].float()})
    with raises(UnknownBackendError, "backend must be one of 'auto'", "got 'tritn'"):
        mla_ops.index_scores(**scores, backend="tritn")
    with raises(InvalidInputError, "lse must be a DTensor because q is one"):
        mla_ops.attn_mass(**{**mass, "lse": inputs.lse}, softmax_scale=1.0)
    with raises(InvalidInputError, "softmax_scale must be finite"):
        mla_ops.attn_mass(**mass, softmax_scale=float("nan"))
    row_weight = mass["lse"].sum(-1)
    dense = {"q": mass["q"], "k": mass["kv"], "lse": mass["lse"], **{name: scores[name] for name in SCORES[:3]}}
    with raises(UnsupportedShardingError, "index_loss_dense has no sharding rules"):
        mla_ops.index_loss_dense(**dense, row_weight=row_weight, softmax_scale=1.0)


@check(4)
def index_scores_are_cut_by_batch_and_rows_over_two_dimensions(world: World) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, cut = world.mesh(data=2, context=2), [Shard(0), Shard(1)]
    rows = dict.fromkeys(("q_idx", "weights", "indices", "topk_length"), cut)
    case = IndexCase(batch=2, seq_q=6)
    assert_sharded_scores(case, mesh, [cut, cut, [Shard(0), Partial()], cut], k_idx=[Shard(0), Replicate()], **rows)


@check(4)
def mass_is_cut_by_rows_and_heads_over_two_dimensions(world: World) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, rows, both = world.mesh(context=2, tensor=2), [Shard(1), Replicate()], [Shard(1), Shard(2)]
    case = IndexCase(seq_q=6)
    placements = {"q": both, "lse": both, "indices": rows, "topk_length": rows}
    assert_sharded_mass(case, mesh, [Shard(1), Partial()], **placements)

"""Checks of DTensor's view of index selection: batch and query rows cut, index heads and keys gathered."""

from __future__ import annotations

from typing import Any

import torch
from distributed_world import World, check, raises

import mla_ops
from mla_ops.errors import InvalidInputError, UnknownBackendError
from mla_ops.testing import IndexCase, IndexInputs, make_index_inputs


def sharded_choice(inputs: IndexInputs, mesh: Any, causal: bool, **placements: Any) -> Any:
    """The result of the same call on DTensors; arguments without a placement are replicated."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    tensors = {name: value for name, value in vars(inputs).items() if isinstance(value, torch.Tensor)}
    whole = [Replicate()] * mesh.ndim
    placed = {name: distribute_tensor(t, mesh, placements.get(name, whole)) for name, t in tensors.items()}
    arguments = [placed.pop(name) for name in ("q_idx", "k_idx", "weights")]
    return mla_ops.index_topk(*arguments, inputs.topk, **placed, causal=causal)


def assert_sharded_choice(
    case: IndexCase, mesh: Any, expected: list[Any], *, causal: bool, shared: bool = False, **placements: Any
) -> None:
    inputs = make_index_inputs(case, bounds=True)
    if shared:
        inputs = IndexInputs(**{**vars(inputs), "starts": inputs.starts[0], "ends": inputs.ends[0]})
    result = sharded_choice(inputs, mesh, causal, **placements)
    assert list(result.placements) == expected, f"{result.placements}, expected {expected}"
    alone = mla_ops.index_topk(*inputs.args[:4], **inputs.kwargs, causal=causal)
    # Bitwise, on random scores: a row does not depend on which rows a rank has.
    assert torch.equal(result.full_tensor(), alone)


@check(2)
def a_choice_is_cut_by_batch(world: World) -> None:
    from torch.distributed.tensor import Shard

    mesh, cut = world.mesh(data=2), [Shard(0)]
    case = IndexCase(batch=3, seq_kv=300, kv_group=2)
    tensors = dict.fromkeys(("q_idx", "k_idx", "weights"), cut)
    for causal in (True, False):
        assert_sharded_choice(case, mesh, cut, causal=causal, starts=cut, ends=cut, **tensors)
        assert_sharded_choice(case, mesh, cut, causal=causal, shared=True, **tensors)


@check(2)
def a_choice_is_cut_by_query_rows_where_nothing_counts_from_the_last_one(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = world.mesh(context=2)
    for case in (IndexCase(seq_q=7, seq_kv=300), IndexCase(batch=None, seq_q=8, seq_kv=300)):
        cut = [Shard(len(case.lead))]
        placements = dict.fromkeys(("q_idx", "weights", "starts", "ends"), cut)
        with CommDebugMode() as communication:
            sharded_choice(make_index_inputs(case, bounds=True), mesh, causal=False, **placements)
        kinds = {str(op) for op in communication.get_comm_counts()}
        assert not any("gather" in kind or "reduce" in kind or "all_to_all" in kind for kind in kinds), kinds
        assert_sharded_choice(case, mesh, cut, causal=False, **placements)
        # With the causal bound the rows are gathered, and the result is whole.
        assert_sharded_choice(case, mesh, [Replicate()], causal=True, **placements)
    shared = {"q_idx": [Shard(1)], "weights": [Shard(1)], "starts": [Shard(0)], "ends": [Shard(0)]}
    assert_sharded_choice(IndexCase(seq_q=7), mesh, [Shard(1)], causal=False, shared=True, **shared)


@check(2)
def index_heads_and_keys_are_gathered(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard

    mesh = world.mesh(tensor=2)
    for causal in (True, False):
        whole = [Replicate()]
        heads = {"q_idx": [Shard(2)], "weights": [Shard(2)]}
        assert_sharded_choice(IndexCase(kv_group=2), mesh, whole, causal=causal, **heads)
        assert_sharded_choice(IndexCase(), mesh, whole, causal=causal, k_idx=[Shard(1)])
        assert_sharded_choice(IndexCase(), mesh, whole, causal=causal, q_idx=[Shard(3)], k_idx=[Shard(3)])
        assert_sharded_choice(IndexCase(), mesh, whole, causal=causal)


@check(2)
def a_choice_of_e4m3_keys_is_cut_with_their_scales(world: World) -> None:
    from torch.distributed.tensor import DTensor, Shard

    mesh, cut = world.mesh(data=2), [Shard(0)]
    inputs = make_index_inputs(IndexCase(batch=4), torch.float8_e4m3fn)
    # Not distributed: gloo sends no e4m3.
    mine = [t.chunk(2)[world.rank] for t in (inputs.q_idx, inputs.k_idx, inputs.weights, inputs.k_scale)]
    q_idx, k_idx, weights, k_scale = (DTensor.from_local(t, mesh, cut) for t in mine)
    result = mla_ops.index_topk(q_idx, k_idx, weights, inputs.topk, k_scale=k_scale)
    assert list(result.placements) == cut
    assert torch.equal(result.full_tensor(), mla_ops.index_topk(*inputs.args[:4], **inputs.kwargs))


@check(2)
def a_bad_choice_keeps_its_words(world: World) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, inputs = world.mesh(data=2), make_index_inputs(IndexCase())
    q_idx, k_idx, weights = (distribute_tensor(t, mesh, [Replicate()]) for t in inputs.args[:3])
    with raises(InvalidInputError, "topk must be at least 0"):
        mla_ops.index_topk(q_idx, k_idx, weights, -1)
    with raises(UnknownBackendError, "backend must be one of 'auto'", "got 'tritn'"):
        mla_ops.index_topk(q_idx, k_idx, weights, 6, backend="tritn")
    with raises(InvalidInputError, "k_idx must be a DTensor because q_idx is one"):
        mla_ops.index_topk(q_idx, inputs.k_idx, weights, 6)


@check(4)
def a_choice_is_cut_by_batch_and_rows_over_two_dimensions(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard

    mesh, cut = world.mesh(data=2, context=2), [Shard(0), Shard(1)]
    placements = dict.fromkeys(("q_idx", "weights", "starts", "ends"), cut)
    case = IndexCase(batch=2, seq_q=6, seq_kv=300)
    assert_sharded_choice(case, mesh, cut, causal=False, k_idx=[Shard(0), Replicate()], **placements)

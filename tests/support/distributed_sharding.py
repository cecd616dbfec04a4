"""Checks of DTensor's view of the operators: batch, heads and query rows cut over the dimensions of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_world import World, check, raises, single_run
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

import mla_ops
from mla_ops.errors import InvalidInputError, UnknownBackendError, UnsupportedShardingError
from mla_ops.testing import Case, Inputs, assert_matches_oracle, make_inputs


def sharded_run(
    inputs: Inputs, mesh: DeviceMesh, op: Callable[..., Any] = torch.ops.mla.sparse_attn, **placements: list[Any]
) -> dict[str, Any]:
    """The results of the same call on DTensors; arguments without placements are replicated."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = [Replicate()] * mesh.ndim
    arguments = {
        name: distribute_tensor(getattr(inputs, name), mesh, placements.get(name, whole))
        for name in ("q", "kv", "indices", "topk_length", "attn_sink")
        if getattr(inputs, name) is not None
    }
    leaves = [arguments[name].requires_grad_() for name in ("q", "kv", "attn_sink") if name in arguments]
    out, lse = op(**arguments, d_v=inputs.d_v, softmax_scale=inputs.softmax_scale)
    upstream = [
        distribute_tensor(grad, mesh, result.placements) for grad, result in ((inputs.dout, out), (inputs.dlse, lse))
    ]
    torch.autograd.backward([out, lse], upstream)
    grads = zip(("dq", "dkv", "dsink"), (t.grad for t in leaves), strict=False)
    return {"out": out.detach(), "lse": lse.detach(), **dict(grads)}


def assert_sharded_run(
    case: Case,
    mesh: DeviceMesh,
    expected: dict[str, list[Any]],
    *,
    options: bool = True,
    exact: bool = True,
    **placements: list[Any],
) -> None:
    inputs = make_inputs(case, topk_length=options, attn_sink=options)
    results = sharded_run(inputs, mesh, **placements)
    for name, want in expected.items():
        assert list(results[name].placements) == want, f"{name}: {results[name].placements}, expected {want}"
    full = {name: result.full_tensor() for name, result in results.items()}
    if exact:
        whole = single_run(inputs)
        for name in ("out", "lse", "dq"):
            assert torch.equal(full[name], whole[name]), f"{name} differs from the single run"
    assert_matches_oracle(full, inputs)


@check(2)
def heads_of_one_group_leave_kv_whole_and_dkv_partial(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard

    cut = [Shard(2)]
    expected = {"out": cut, "lse": cut, "dq": cut, "dkv": [Partial()], "dsink": [Shard(0)]}
    case = Case(d_total=24, d_v=16, heads=4)
    assert_sharded_run(case, world.mesh(tensor=2), expected, q=cut, attn_sink=[Shard(0)])


@check(2)
def whole_arguments_of_cut_heads_are_cut_without_communication(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as communication:
        inputs = make_inputs(Case(d_total=24, d_v=16, heads=4), topk_length=True, attn_sink=True)
        results = sharded_run(inputs, world.mesh(tensor=2), q=[Shard(2)])
    # Scattering the arguments and the upstream gradients is the test's; the operators add nothing to it.
    kinds = {str(op) for op in communication.get_comm_counts()}
    assert not any("gather" in kind or "reduce" in kind or "all_to_all" in kind for kind in kinds), kinds
    assert list(results["dkv"].placements) == [Partial()]


@check(2)
def uneven_heads_without_batch(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard

    cut = [Shard(1)]
    expected = {"out": cut, "lse": cut, "dq": cut, "dkv": [Partial()], "dsink": [Shard(0)]}
    case = Case(d_total=24, d_v=16, heads=3, batch=None)
    # Not exact: the CPU's matrix products of two heads and of one round differently from those of three.
    assert_sharded_run(case, world.mesh(tensor=2), expected, exact=False, q=cut)


@check(2)
def heads_of_many_groups_are_cut_together_with_kv(world: World) -> None:
    from torch.distributed.tensor import Shard

    cut = [Shard(2)]
    expected = {"out": cut, "lse": cut, "dq": cut, "dkv": cut, "dsink": [Shard(0)]}
    case = Case(d_total=24, d_v=16, heads=8, kv_group=2)
    mesh = world.mesh(tensor=2)
    assert_sharded_run(case, mesh, expected, q=cut, kv=cut, indices=cut)
    assert_sharded_run(case, mesh, expected, q=cut)


@check(2)
def query_rows_leave_kv_whole_and_sums_partial(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard

    mesh = world.mesh(context=2)
    for case in (Case(d_total=24, d_v=16, seq_q=5), Case(d_total=24, d_v=16, seq_q=5, batch=None, kv_group=2)):
        cut = [Shard(len(case.lead))]
        expected = {"out": cut, "lse": cut, "dq": cut, "dkv": [Partial()], "dsink": [Partial()]}
        assert_sharded_run(case, mesh, expected, q=cut, indices=cut, topk_length=cut)


@check(2)
def batch_is_cut_in_everything_but_the_sink(world: World) -> None:
    from torch.distributed.tensor import Partial, Shard

    cut = [Shard(0)]
    expected = {"out": cut, "lse": cut, "dq": cut, "dkv": cut, "dsink": [Partial()]}
    case = Case(d_total=24, d_v=16, batch=3)
    assert_sharded_run(case, world.mesh(data=2), expected, q=cut, kv=cut, indices=cut, topk_length=cut)


@check(2)
def whole_arguments_give_whole_results(world: World) -> None:
    from torch.distributed.tensor import Replicate

    whole = [Replicate()]
    expected = dict.fromkeys(("out", "lse", "dq", "dkv"), whole)
    assert_sharded_run(Case(d_total=24, d_v=16), world.mesh(data=2), expected, options=False)


@check(2)
def sharded_key_rows_are_gathered(world: World) -> None:
    from torch.distributed.tensor import Shard

    case = Case(d_total=24, d_v=16, heads=4)
    assert_sharded_run(case, world.mesh(tensor=2), {}, q=[Shard(2)], kv=[Shard(1)])


@check(2)
def max_logits_are_placed_as_lse(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = world.mesh(tensor=2)
    groups = Case(d_total=24, d_v=16, heads=4, kv_group=2)
    for case, placements in (
        (Case(d_total=24, d_v=16, heads=4), {"q": Shard(2)}),
        (Case(d_total=24, d_v=16, heads=4, batch=None), {"q": Shard(1)}),
        (Case(d_total=24, d_v=16, heads=4), {"q": Shard(1), "indices": Shard(1), "topk_length": Shard(1)}),
        (Case(d_total=24, d_v=16), dict.fromkeys(("q", "kv", "indices", "topk_length"), Shard(0))),
        (groups, {"q": Shard(2), "kv": Shard(2), "indices": Shard(2)}),
        (groups, {}),
    ):
        inputs = make_inputs(case, topk_length=True)
        arguments = {
            name: distribute_tensor(getattr(inputs, name), mesh, [placements.get(name, Replicate())])
            for name in ("q", "kv", "indices", "topk_length")
        }
        keywords = {"d_v": inputs.d_v, "softmax_scale": inputs.softmax_scale}
        lse = mla_ops.sparse_attn(**arguments, **keywords).lse
        for op in (torch.ops.mla.sparse_attn_max_logits, mla_ops.sparse_attn_max_logits):
            max_logits = op(**arguments, **keywords)
            assert max_logits.placements == lse.placements == (placements.get("q", Replicate()),)
            assert_matches_oracle({"max_logits": max_logits.full_tensor()}, inputs)

    with raises(UnsupportedShardingError, "kv must be whole along d_total"):
        kv = distribute_tensor(inputs.kv, mesh, [Shard(3)])
        mla_ops.sparse_attn_max_logits(**{**arguments, "kv": kv}, **keywords)
    with raises(InvalidInputError, "d_v must be at most d_total (24"):
        mla_ops.sparse_attn_max_logits(**arguments, d_v=25, softmax_scale=0.1)
    with raises(UnknownBackendError, "backend must be one of 'auto'", "got 'tritn'"):
        mla_ops.sparse_attn_max_logits(**arguments, **keywords, backend="tritn")


@check(2)
def flash_mla_runs_on_sharded_heads(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from mla_ops.adapters.flash_mla import flash_mla_sparse_fwd

    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4, batch=None))
    tensors = (inputs.q, inputs.kv, inputs.indices)
    placed = [
        distribute_tensor(t, world.mesh(tensor=2), [p])
        for t, p in zip(tensors, (Shard(1), Replicate(), Replicate()), strict=True)
    ]
    alone = flash_mla_sparse_fwd(*tensors, inputs.softmax_scale, 16)
    for result, want in zip(flash_mla_sparse_fwd(*placed, inputs.softmax_scale, 16), alone, strict=True):
        assert result.placements == (Shard(1),)
        torch.testing.assert_close(result.full_tensor(), want)


@check(2)
def autocast_casts_mixed_dtypes_at_every_entrance(world: World) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4))
    mesh, keywords = world.mesh(tensor=2), {"d_v": inputs.d_v, "softmax_scale": inputs.softmax_scale}
    q = distribute_tensor(inputs.q.bfloat16(), mesh, [Shard(2)])
    kv, indices = (distribute_tensor(t, mesh, [Replicate()]) for t in (inputs.kv, inputs.indices))
    low = inputs.to(torch.bfloat16)
    for front, raw in (
        (mla_ops.sparse_attn, torch.ops.mla.sparse_attn),
        (mla_ops.sparse_attn_max_logits, torch.ops.mla.sparse_attn_max_logits),
    ):
        wants = tree_leaves(raw(low.q, low.kv, low.indices, **keywords))
        for op in (front, raw):
            with torch.autocast("cpu", torch.bfloat16):
                results = tree_leaves(op(q, kv, indices, **keywords))
            for result, want in zip(results, wants, strict=True):
                torch.testing.assert_close(result.full_tensor(), want)
        with raises(InvalidInputError, "kv must have the dtype of q (bfloat16), got float32"):
            front(q, kv, indices, **keywords)


@check(2)
def gradients_that_are_not_needed_are_not_made(world: World) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4), attn_sink=True)
    mesh = world.mesh(tensor=2)
    whole = single_run(inputs)
    for wanted, placement in (("q", Shard(2)), ("kv", Partial()), ("attn_sink", Shard(0))):
        for use_lse in (False, True):
            if wanted == "attn_sink" and use_lse:
                continue  # lse does not depend on the sink
            arguments = {
                name: distribute_tensor(getattr(inputs, name), mesh, [Shard(2) if name == "q" else Replicate()])
                for name in ("q", "kv", "indices", "attn_sink")
            }
            arguments[wanted].requires_grad_()
            out, lse = torch.ops.mla.sparse_attn(**arguments, d_v=inputs.d_v, softmax_scale=inputs.softmax_scale)
            result, upstream = (lse, inputs.dlse) if use_lse else (out, inputs.dout)
            result.backward(distribute_tensor(upstream, mesh, result.placements))
            grad = arguments[wanted].grad
            assert grad.placements == (placement,), (wanted, grad.placements)
            assert [name for name, t in arguments.items() if t.grad is not None] == [wanted]
            if wanted == "attn_sink":
                torch.testing.assert_close(grad.full_tensor(), whole["dsink"])

    # What is not made is an empty [0] tensor: nothing to shard, nothing to sum.
    forward = arguments["q"], arguments["kv"], arguments["indices"], out, lse, inputs.d_v, inputs.softmax_scale
    for grad in torch.ops.mla.sparse_attn_bwd(out, None, *forward, None, None, False, False):
        assert grad.placements == (Replicate(),)
        assert grad.shape == grad.to_local().shape == (0,)


@check(2)
def a_collective_still_under_way_is_an_ordinary_argument(world: World) -> None:
    import torch.distributed._functional_collectives as functional

    inputs = make_inputs(Case(d_total=24, d_v=16))
    q = functional.all_reduce(inputs.q / 2, "sum", dist.group.WORLD)
    assert type(q) is functional.AsyncCollectiveTensor
    out, _ = mla_ops.sparse_attn(q, inputs.kv, inputs.indices, d_v=16, softmax_scale=inputs.softmax_scale)
    torch.testing.assert_close(out, single_run(inputs)["out"])


@check(2)
def one_rule_serves_every_d_v(world: World) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    inputs = make_inputs(Case(d_total=24, d_v=16))
    mesh = world.mesh(data=2)
    q, kv, indices = (distribute_tensor(t, mesh, [Replicate()]) for t in (inputs.q, inputs.kv, inputs.indices))
    for d_v in (16, 8, 16, 4):
        out, _ = torch.ops.mla.sparse_attn(q, kv, indices, d_v, 0.1)
        assert out.shape[-1] == out.to_local().shape[-1] == d_v


@check(2)
def compiled_dtensor_call_is_one_graph_and_equals_eager(world: World) -> None:
    from torch._dynamo.testing import AotEagerAndRecordGraphs
    from torch.distributed.tensor import Shard

    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4), topk_length=True, attn_sink=True)
    mesh = world.mesh(tensor=2)
    cut = {"q": [Shard(2)], "attn_sink": [Shard(0)]}
    eager = sharded_run(inputs, mesh, **cut)
    for op in (torch.ops.mla.sparse_attn, lambda **kwargs: tuple(mla_ops.sparse_attn(**kwargs))):
        torch._dynamo.reset()
        backend = AotEagerAndRecordGraphs()
        compiled = sharded_run(inputs, mesh, torch.compile(op, fullgraph=True, backend=backend), **cut)
        for name, result in eager.items():
            assert compiled[name].placements == result.placements, name
            assert torch.equal(compiled[name].to_local(), result.to_local()), name
        (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
        assert "torch.ops.mla.sparse_attn.default" in forward.code
        assert "torch.ops.mla.sparse_attn_bwd.default" in backward.code
        assert "_c10d_functional" not in forward.code + backward.code


@check(2)
def bad_placements_raise_typed_errors_on_every_rank(world: World) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = world.mesh(tensor=2)
    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4), attn_sink=True)

    def place(name: str, placement: Any) -> Any:
        return distribute_tensor(getattr(inputs, name), mesh, [placement])

    whole = {name: place(name, Replicate()) for name in ("q", "kv", "indices", "attn_sink")}
    keywords = {"d_v": inputs.d_v, "softmax_scale": inputs.softmax_scale}
    for op in (torch.ops.mla.sparse_attn, mla_ops.sparse_attn):
        for name in ("q", "kv"):
            arguments = {**whole, name: place(name, Shard(3)), **keywords}
            words = (f"{name} must be whole along d_total (dim 3)", "Shard(dim=3)", "redistribute")
            with raises(UnsupportedShardingError, *words):
                op(**arguments)
        odd = make_inputs(Case(d_total=24, d_v=16, heads=6, kv_group=3))
        q, kv, indices = (distribute_tensor(t, mesh, [Replicate()]) for t in (odd.q, odd.kv, odd.indices))
        words = ("heads (dim 2) are sharded over 2 ranks", "kv_group (3)", "Shard(dim=2)")
        with raises(UnsupportedShardingError, *words):
            op(q.redistribute(placements=[Shard(2)]), kv, indices, **keywords)

    with raises(InvalidInputError, "kv must be a DTensor because q is one", "DTensor.from_local(kv, mesh"):
        mla_ops.sparse_attn(**{**whole, "kv": inputs.kv}, **keywords)
    with raises(InvalidInputError, "attn_sink must be a DTensor because q is one"):
        mla_ops.sparse_attn(**{**whole, "attn_sink": inputs.attn_sink}, **keywords)
    with raises(InvalidInputError, "q must be a DTensor because kv is one"):
        mla_ops.sparse_attn(**{**whole, "q": inputs.q}, **keywords)
    with raises(RuntimeError, "mixed torch.Tensor and DTensor"):
        torch.ops.mla.sparse_attn(**{**whole, "kv": inputs.kv}, **keywords)
    with raises(InvalidInputError, "d_v must be at most d_total (24"):
        mla_ops.sparse_attn(**whole, d_v=25, softmax_scale=0.1)
    with raises(UnknownBackendError, "backend must be one of 'auto'", "got 'tritn'"):
        mla_ops.sparse_attn(**whole, **keywords, backend="tritn")
    assert isinstance(mla_ops.sparse_attn(**whole, **keywords).out, DTensor)


@check(4)
def two_mesh_dimensions_cut_two_dimensions(world: World) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = world.mesh(data=2, tensor=2)
    batch, rows, heads, whole = Shard(0), Shard(1), Shard(2), Replicate()
    both = [batch, heads]
    expected = {"out": both, "lse": both, "dq": both, "dkv": [batch, Partial()], "dsink": [Partial(), Shard(0)]}
    case = Case(d_total=24, d_v=16, heads=4, batch=3)
    kept = [batch, whole]
    assert_sharded_run(case, mesh, expected, q=both, kv=kept, indices=kept, topk_length=kept)

    both = [rows, heads]
    expected = {"out": both, "dq": both, "dkv": [Partial(), Partial()], "dsink": [Partial(), Shard(0)]}
    assert_sharded_run(case, mesh, expected, q=both, indices=[rows, whole], topk_length=[rows, whole])

    # kv_group 2 is cut over `tensor` only, though it could not be cut over all four ranks.
    groups = Case(d_total=24, d_v=16, heads=4, kv_group=2)
    cut = [whole, heads]
    assert_sharded_run(groups, mesh, {"out": cut, "dq": cut, "dkv": cut}, q=cut, kv=cut, indices=cut)


@check(4)
def fewer_heads_than_ranks_is_right(world: World) -> None:
    from torch.distributed.tensor import Shard

    case = Case(d_total=24, d_v=16, heads=3)
    assert_sharded_run(case, world.mesh(tensor=4), {}, exact=False, q=[Shard(2)])

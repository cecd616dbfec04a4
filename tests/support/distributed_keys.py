"""Checks of `mla_ops.distributed`: keys sharded among the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from distributed_world import World, check, cut, raises, single_run
from torch.distributed.device_mesh import DeviceMesh

from mla_ops.distributed import key_load, sparse_attn_cp
from mla_ops.errors import InvalidInputError
from mla_ops.testing import Case, Inputs, assert_matches_oracle, make_inputs


def own_rows(seq_kv: int, world: World, key_layout: str) -> torch.Tensor:
    rows = torch.arange(seq_kv)
    if key_layout == "interleaved":
        return rows[world.rank :: world.size]
    runs = rows.chunk(world.size)
    return runs[world.rank] if world.rank < len(runs) else rows[:0]


def own_part(inputs: Inputs, world: World, q_shard: str, key_layout: str) -> Inputs:
    """What this rank passes to `sparse_attn_cp` of a whole call."""
    rows = inputs.q.dim() - 3
    kv = inputs.kv.index_select(rows, own_rows(inputs.kv.shape[rows], world, key_layout))
    if q_shard == "heads":
        sink = cut(inputs.attn_sink, world, 0)
        q, dout, dlse = (cut(t, world, rows + 1) for t in (inputs.q, inputs.dout, inputs.dlse))
        return replace(inputs, q=q, kv=kv, attn_sink=sink, dout=dout, dlse=dlse)
    names = ("q", "indices", "topk_length", "dout", "dlse")
    return replace(inputs, kv=kv, **{name: cut(getattr(inputs, name), world, rows) for name in names})


def whole_results(
    results: dict[str, torch.Tensor], inputs: Inputs, world: World, q_shard: str, key_layout: str
) -> dict[str, torch.Tensor]:
    """Put the parts of all ranks together."""
    rows = inputs.q.dim() - 3
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, results)
    sharded = rows if q_shard == "rows" else rows + 1
    whole = {name: torch.cat([part[name] for part in parts], sharded) for name in ("out", "lse", "dq")}
    whole["dkv"] = torch.empty_like(inputs.kv)
    for rank, part in enumerate(parts):
        owned = own_rows(inputs.kv.shape[rows], World(rank, world.size), key_layout)
        whole["dkv"].index_copy_(rows, owned, part["dkv"])
    if inputs.attn_sink is not None:
        shares = [part["dsink"] for part in parts]
        whole["dsink"] = torch.stack(shares).sum(0) if q_shard == "rows" else torch.cat(shares)
    return whole


def cp_run(
    inputs: Inputs,
    world: World,
    mesh: DeviceMesh,
    *,
    q_shard: str = "rows",
    key_layout: str = "contiguous",
    **kwargs: Any,
) -> dict[str, torch.Tensor]:
    part = own_part(inputs, world, q_shard, key_layout).requires_grad()
    out, lse = sparse_attn_cp(
        *part.args[:3],
        mesh,
        **part.kwargs,
        seq_kv=inputs.kv.shape[-3],
        q_shard=q_shard,
        key_layout=key_layout,
        **kwargs,
    )
    torch.autograd.backward([out, lse], [part.dout, part.dlse])
    grads = zip(("dq", "dkv", "dsink"), (t.grad for t in part.differentiable), strict=False)
    results = {"out": out.detach(), "lse": lse.detach(), **dict(grads)}
    return whole_results(results, inputs, world, q_shard, key_layout)


CP_CASES = (
    Case(d_total=24, d_v=16, heads=4, seq_q=8, seq_kv=24),
    Case(d_total=24, d_v=16, heads=8, kv_group=2, batch=None, seq_q=4, seq_kv=23, topk=7),
    Case(d_total=16, d_v=16, heads=4, seq_q=4, seq_kv=5, topk=9),
    Case(d_total=16, d_v=16, heads=4, kv_group=4, seq_q=4, seq_kv=9, topk=5),  # more groups than heads of a rank
)


@check(2, 4)
def sharded_keys_give_the_whole_call(world: World) -> None:
    mesh = world.mesh(context=world.size)
    for index, case in enumerate(CP_CASES):
        for q_shard in ("rows", "heads"):
            for key_layout in ("contiguous", "interleaved"):
                options = key_layout == "interleaved" or index == 1
                dtype = torch.int64 if q_shard == "heads" else torch.int32
                inputs = make_inputs(case, index_dtype=dtype, topk_length=options, attn_sink=options)
                results = cp_run(inputs, world, mesh, q_shard=q_shard, key_layout=key_layout, check=True)
                assert_matches_oracle(results, inputs)


@check(2)
def sharded_keys_in_low_precision(world: World) -> None:
    inputs = make_inputs(CP_CASES[0], torch.bfloat16, topk_length=True, attn_sink=True)
    results = cp_run(inputs, world, world.mesh(context=2))
    # Each part's output is rounded to bf16 before the merge: twice the rounding of one call.
    whole = single_run(inputs)
    for name in ("out", "dq", "dkv"):
        error = (results[name].float() - whole[name].float()).abs().max()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps * whole[name].float().abs().max(), (name, error)


@check(2)
def autocast_lowers_what_travels_and_what_is_computed(world: World) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Gathered(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.dtypes: list[torch.dtype] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
                self.dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    inputs = make_inputs(CP_CASES[0], attn_sink=True)
    low = replace(inputs.to(torch.bfloat16), attn_sink=inputs.attn_sink, dlse=inputs.dlse)
    want = cp_run(low, world, world.mesh(context=2))
    for q, kv in ((inputs.q, inputs.kv), (low.q, inputs.kv), (inputs.q, low.kv)):
        for together in (False, True):
            with torch.autocast("cpu", torch.bfloat16), Gathered() as gathered:
                got = cp_run(replace(low, q=q, kv=kv), world, world.mesh(context=2), check=together)
            assert gathered.dtypes[0] == torch.bfloat16  # of q
            for name, result in want.items():
                assert torch.equal(got[name].float(), result.float()), name


@check(2)
def autocast_casts_in_a_compiled_graph(world: World) -> None:
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    mesh = world.mesh(context=2)
    part = own_part(make_inputs(CP_CASES[0]), world, "rows", "contiguous")

    def call(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return sparse_attn_cp(q, kv, part.indices, mesh, **part.kwargs, seq_kv=24).out

    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.compile(call, fullgraph=True, backend=backend)(part.q, part.kv.bfloat16())
    assert torch.equal(got, call(part.q.bfloat16(), part.kv.bfloat16()))
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    gathered = [n.args[0].meta["val"].dtype for n in backend.fw_graphs[0].graph.nodes if n.target is gather]
    assert gathered[0] == torch.bfloat16  # of q


@check(2)
def uneven_shards_need_the_length_of_the_whole(world: World) -> None:
    mesh = world.mesh(context=2)
    inputs = make_inputs(Case(d_total=24, d_v=16, heads=4, seq_q=4, seq_kv=5, topk=3))
    part = own_part(inputs, world, "rows", "contiguous")
    assert part.kv.shape[1] == (3, 2)[world.rank]
    with raises(TypeError, "seq_kv"):
        sparse_attn_cp(*part.args[:3], mesh, **part.kwargs)
    whole = single_run(inputs)
    out, _ = sparse_attn_cp(*part.args[:3], mesh, **part.kwargs, seq_kv=5)
    torch.testing.assert_close(out, cut(whole["out"], world, 1))


@check(2)
def empty_rows_take_no_nan_from_upstream(world: World) -> None:
    inputs = make_inputs(CP_CASES[0], topk_length=True, attn_sink=True)
    want = cp_run(inputs, world, world.mesh(context=2))
    empty = (want["lse"] == -torch.inf).all(-1)
    assert empty.any()
    dout, dlse = inputs.dout.clone(), inputs.dlse.clone()
    dout[empty], dlse[empty] = torch.nan, torch.nan
    got = cp_run(replace(inputs, dout=dout, dlse=dlse), world, world.mesh(context=2))
    for name, result in want.items():
        assert torch.equal(got[name], result), name


@check(2)
def an_infinite_sink_is_applied_once(world: World) -> None:
    inputs = make_inputs(CP_CASES[0], attn_sink=True)
    for value in (torch.inf, -torch.inf, 0.5):
        sunk = replace(inputs, attn_sink=torch.full_like(inputs.attn_sink, value))
        assert_matches_oracle(cp_run(sunk, world, world.mesh(context=2)), sunk)


@check(2)
def compiled_key_sharding_is_one_graph_with_its_collectives(world: World) -> None:
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    mesh = world.mesh(context=2)
    inputs = make_inputs(CP_CASES[0], topk_length=True, attn_sink=True)
    part = own_part(inputs, world, "rows", "contiguous")

    def step(q: Any, kv: Any, indices: Any, topk_length: Any, attn_sink: Any) -> Any:
        out, lse = sparse_attn_cp(
            *(q, kv, indices, mesh),
            d_v=16,
            softmax_scale=20.0,
            topk_length=topk_length,
            attn_sink=attn_sink,
            seq_kv=world.size * kv.shape[1],
        )
        return out, lse

    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        leaves = part.requires_grad()
        out, lse = function(leaves.q, leaves.kv, leaves.indices, leaves.topk_length, leaves.attn_sink)
        torch.autograd.backward([out, lse], [part.dout, part.dlse])
        return [out, lse, *(t.grad for t in leaves.differentiable)]

    backends, results = [], []
    for dynamic in (False, True):
        torch._dynamo.reset()
        backends.append(AotEagerAndRecordGraphs())
        results.append(run(torch.compile(step, fullgraph=True, backend=backends[-1], dynamic=dynamic)))
    want = run(step)
    for backend, got in zip(backends, results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
        # q, indices and topk_length go out; out and lse come back, and so do their gradients and that of q.
        assert forward.code.count("all_gather_into_tensor.default") == 3
        assert forward.code.count("all_to_all_single.default") == 2
        assert backward.code.count("all_to_all_single.default") == 3
        # The call that only checks is in no graph.
        assert forward.code.count("mla.sparse_attn.default") == 1


@check(2)
def compiled_key_sharding_refuses_what_eager_refuses(world: World) -> None:
    mesh = world.mesh(context=2)
    part = own_part(make_inputs(CP_CASES[0], topk_length=True, attn_sink=True), world, "rows", "contiguous")

    def call(arguments: dict[str, Any]) -> torch.Tensor:
        return sparse_attn_cp(part.q, part.kv, part.indices, mesh, seq_kv=CP_CASES[0].seq_kv, **arguments).out

    for name, value, words in (
        ("attn_sink", part.attn_sink[:1], "size 0 of attn_sink must equal heads of q"),
        ("attn_sink", part.attn_sink[None], "attn_sink must be [heads], got shape"),
        ("attn_sink", part.attn_sink.half(), "attn_sink must be float32, got float16"),
        ("topk_length", part.topk_length.float(), "topk_length must be int32 or int64, got float32"),
        ("topk_length", part.topk_length > 0, "topk_length must be int32 or int64, got bool"),
        ("topk_length", part.topk_length[:1, :1], "size 0 of topk_length must equal the batch of q"),
    ):
        arguments = {**part.kwargs, name: value}
        with raises(InvalidInputError, words):
            call(arguments)
        for dynamic in (False, True):
            torch._dynamo.reset()
            with raises(RuntimeError, words):
                torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)(arguments)


@check(2, 4)
def load_report_counts_what_each_rank_attends_to(world: World) -> None:
    mesh = world.mesh(context=world.size)
    # Every query selects every earlier row: early keys are selected most.
    seq = 8 * world.size
    indices = torch.where(torch.arange(seq)[:, None] >= torch.arange(seq), torch.arange(seq), -1)[:, None]
    own = indices.chunk(world.size)[world.rank]
    load = key_load(own, mesh, seq_kv=seq)
    by_key = (indices >= 0).sum((0, 1))
    assert load.slots == tuple(int(run.sum()) for run in by_key.chunk(world.size))
    assert load.imbalance > 1.4
    even = key_load(own, mesh, seq_kv=seq, key_layout="interleaved")
    assert even.slots == tuple(int(by_key[rank :: world.size].sum()) for rank in range(world.size))
    assert even.imbalance < 1.2
    assert key_load(indices, mesh, seq_kv=seq, q_shard="heads").slots == load.slots
    lengths = torch.zeros(own.shape[0], dtype=torch.int32)
    assert key_load(own, mesh, seq_kv=seq, topk_length=lengths).imbalance == 1.0


@check(2)
def disagreeing_ranks_raise_the_same_error(world: World) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = world.mesh(context=2)
    inputs = make_inputs(CP_CASES[0], attn_sink=True)
    part = own_part(inputs, world, "rows", "contiguous")
    first = world.rank == 0

    def call(error: type[Exception], *words: str, mesh: Any = mesh, **changes: Any) -> None:
        names = ("q", "kv", "indices", "attn_sink")
        tensors = {name: changes.pop(name, getattr(part, name)) for name in names}
        keywords = {"d_v": part.d_v, "softmax_scale": part.softmax_scale, "seq_kv": 24, "check": True, **changes}
        with raises(error, *words):
            sparse_attn_cp(
                tensors["q"], tensors["kv"], tensors["indices"], mesh, attn_sink=tensors["attn_sink"], **keywords
            )

    # One rank's mistake, every rank's error.
    call(
        InvalidInputError,
        "rank 1 of 2",
        "indices must be int32",
        indices=part.indices if first else part.indices.float(),
    )
    call(InvalidInputError, "rank 1 of 2", "the 12 of 24 rows", "got 11", kv=part.kv if first else part.kv[:, 1:])
    call(InvalidInputError, "rank 1 of 2", "the 11 of 23 rows", "got 12", seq_kv=23)
    shorter = {"q": part.q[:, 1:], "indices": part.indices[:, 1:]}
    call(InvalidInputError, "q must be the same on every rank", **({} if first else shorter))
    call(InvalidInputError, "d_v must be the same on every rank, got 16 on rank 0, 8", d_v=16 if first else 8)
    call(InvalidInputError, "attn_sink must be the same", attn_sink=part.attn_sink if first else None)
    call(InvalidInputError, "rank 1 of 2", "kv must be a torch.Tensor, got NoneType", kv=part.kv if first else None)
    call(InvalidInputError, "rank 1 of 2", "q_shard must be one of", "'x'", q_shard="rows" if first else "x")
    call(InvalidInputError, "rank 1 of 2", "key_layout must be one of", key_layout="contiguous" if first else "x")
    for wrong in ("24", 24.0, True):
        words = f"seq_kv must be an int, got {type(wrong).__name__}"
        call(InvalidInputError, "rank 1 of 2", words, seq_kv=24 if first else wrong)
    call(InvalidInputError, "rank 1 of 2", "OverflowError", softmax_scale=1.0 if first else 10**400)
    # What all ranks share.
    words = "heads must be a multiple of kv_group, got heads=4 (q of each of 2 ranks) and kv_group=3"
    kv, indices = part.kv.expand(-1, -1, 3, -1), part.indices.expand(-1, -1, 3, -1)
    call(InvalidInputError, words, kv=kv, indices=indices, q_shard="heads", check=False)
    call(InvalidInputError, "seq_kv must be an int, got float", seq_kv=24.0, check=False)
    with raises(InvalidInputError, "seq_kv must be an int, got float"):
        key_load(part.indices, mesh, seq_kv=24.0)
    call(InvalidInputError, "mesh_dim must be a dimension of the mesh", "('context',)", "'cp'", mesh_dim="cp")
    call(InvalidInputError, "mesh has 2 dimensions", "mesh_dim=", mesh=world.mesh(data=1, context=2))
    call(InvalidInputError, "mesh must be a DeviceMesh, got ProcessGroup", mesh=dist.group.WORLD)
    call(InvalidInputError, "q_shard must be one of 'rows', 'heads', got 'batch'", q_shard="batch")
    call(InvalidInputError, "key_layout must be one of 'contiguous', 'interleaved'", key_layout="striped")
    whole = distribute_tensor(inputs.kv, mesh, [Replicate()])
    placed = {
        name: distribute_tensor(getattr(part, name), mesh, [Replicate()]) for name in ("q", "indices", "attn_sink")
    }
    call(InvalidInputError, "must be a plain tensor", "to_local()", kv=whole, **placed)
    call(InvalidInputError, "kv must be a DTensor", kv=part.kv, **placed)


@check(4)
def keys_are_sharded_over_one_dimension_of_a_mesh(world: World) -> None:
    mesh = world.mesh(data=2, context=2)
    inputs = make_inputs(CP_CASES[0], seed=mesh.get_local_rank("data"), topk_length=True, attn_sink=True)
    inner = World(mesh.get_local_rank("context"), 2)
    part = own_part(inputs, inner, "rows", "contiguous").requires_grad()
    out, lse = sparse_attn_cp(*part.args[:3], mesh, **part.kwargs, mesh_dim="context", seq_kv=inputs.kv.shape[1])
    whole = single_run(inputs)
    torch.testing.assert_close(out, cut(whole["out"], inner, 1))
    torch.autograd.backward([out, lse], [part.dout, part.dlse])
    torch.testing.assert_close(part.kv.grad, cut(whole["dkv"], inner, 1))

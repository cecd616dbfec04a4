"""Checks of composition: the compiled model of the demo trains under FSDP2 and data x tensor as it does alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from distributed_world import World, check, cut
from torch.distributed.device_mesh import DeviceMesh

from mla_ops.cli.model import LanguageModel, ModelConfig

# Widths that no two dimensions of a parameter share, so that a parameter's shape says which dimension is the heads'.
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=32,
    num_layers=1,
    heads=4,
    kv_lora_rank=12,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    topk=6,
    index_heads=2,
    index_head_dim=9,
    index_rope_head_dim=8,
)


def train(model: LanguageModel, batches: torch.Tensor, wrap: Callable[[torch.Tensor], torch.Tensor]) -> None:
    # Plain gradient descent: an adaptive step would turn rounding in a tiny gradient into a full-sized step.
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for tokens in batches:
        optimiser.zero_grad()
        sum(model.losses(wrap(tokens))).backward()
        optimiser.step()


def fresh_model() -> tuple[LanguageModel, torch.Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    return model, torch.randint(0, CONFIG.vocab_size, (3, 4, 13))


def assert_trained_alike(sharded: LanguageModel, alone: LanguageModel) -> None:
    names = [name for name, _ in alone.named_parameters()]
    before = dict(fresh_model()[0].named_parameters())
    for name, got, want in zip(names, sharded.parameters(), alone.parameters(), strict=True):
        whole = got.full_tensor().detach()
        assert not torch.equal(want, before[name]), f"{name} did not train"
        torch.testing.assert_close(
            whole, want.detach(), atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def shard_heads(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Tensor parallelism over heads: every parameter of the attention that has heads in a dimension is cut there."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    queries = CONFIG.heads * (CONFIG.qk_nope_head_dim + CONFIG.qk_rope_head_dim)
    values = CONFIG.heads * CONFIG.v_head_dim

    def partition(name: str, module: torch.nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            sizes = {CONFIG.heads, queries, values}
            dims = [dim for dim, size in enumerate(parameter.shape) if ".attn" in name and size in sizes]
            placement = Shard(dims[0]) if dims else Replicate()
            module.register_parameter(key, torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [placement])))

    distribute_module(model, mesh, partition)


def compile_layers(model: LanguageModel) -> Any:
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=backend)
    return backend


@check(2)
def compiled_layer_under_fsdp_trains_as_alone(world: World) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = world.mesh(data=2)
    (alone, batches), (model, _) = fresh_model(), fresh_model()
    train(alone, batches, lambda tokens: tokens)
    backend = compile_layers(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, batches, lambda tokens: cut(tokens, world, 0))
    assert_trained_alike(model, alone)
    assert "torch.ops.mla.sparse_attn.default" in backend.fw_graphs[0].code


@check(4)
def compiled_layer_on_a_data_by_tensor_mesh_trains_as_alone(world: World) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    mesh = world.mesh(data=2, tensor=2)
    data = World(mesh.get_local_rank("data"), 2)
    (alone, batches), (model, _) = fresh_model(), fresh_model()
    train(alone, batches, lambda tokens: tokens)
    shard_heads(model, mesh["tensor"])
    backend = compile_layers(model)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    # The model makes its rotary angles and masks inside: plain tensors, the same on every rank.
    with implicit_replication():
        train(model, batches, lambda tokens: DTensor.from_local(cut(tokens, data, 0), mesh["tensor"], [Replicate()]))
    assert_trained_alike(model, alone)
    # The operator in the graph runs on this rank's half of the heads.
    calls = [n for n in backend.fw_graphs[0].graph.nodes if n.target is torch.ops.mla.sparse_attn.default]
    assert [call.args[0].meta["val"].shape[2] for call in calls] == [CONFIG.heads // 2]

"""The problems of distributed.py and the ways to run them: one rank, tensor parallel, sharded keys, a mesh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from distributed_traffic import NOTHING, Traffic, key_sharded_traffic, layer_traffic, tensor_parallel_traffic
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import mla_ops
from mla_ops.distributed import KeyLayout, key_load, sparse_attn_cp

SCALE = 0.08
# Queries whose indices are drawn at once.
DRAWN_ROWS = 1024
# Sequences of the layer on a mesh, one for each of its data-parallel halves.
SEQUENCES = 2
# A CPU's sizes are this many times smaller.
TOY = 1024


@dataclass(frozen=True)
class Shape:
    """Sizes by the letters of the tables; G is 1."""

    Sq: int
    Skv: int
    H: int
    d_total: int
    d_v: int
    topk: int

    def toy(self) -> Shape:
        """The same widths at sizes for a CPU."""
        heads = 8 if self.H % 8 == 0 else 4
        return replace(self, Sq=16, Skv=self.Skv // TOY, H=heads, topk=8)


@dataclass(frozen=True)
class World:
    """One rank's view of the run."""

    device: torch.device
    mesh: DeviceMesh
    # The same ranks as data x tensor, if their number is even.
    grid: DeviceMesh | None

    @classmethod
    def of(cls, device: torch.device, ranks: int) -> World:
        """Make the meshes, once: a graph cannot hold two that are equal."""
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("ranks",))
        pairs = (SEQUENCES, ranks // SEQUENCES)
        is_even = ranks % SEQUENCES == 0
        return cls(
            device, mesh, init_device_mesh(device.type, pairs, mesh_dim_names=("data", "tensor")) if is_even else None
        )

    @property
    def on_gpu(self) -> bool:
        """Whether sizes and times are meant."""
        return self.device.type == "cuda"

    @property
    def rank(self) -> int:
        """This process."""
        return self.mesh.get_local_rank()

    @property
    def ranks(self) -> int:
        """How many processes share the problem."""
        return self.mesh.size()

    def normal(self, *size: int) -> Tensor:
        """Draw what is the same on every rank."""
        drawn = torch.randn(size, device=self.device, dtype=torch.bfloat16)
        dist.broadcast(drawn, src=0)
        return drawn

    def indices(self, shape: Shape, sequences: int, is_causal: bool) -> Tensor:
        """Distinct, in random order; causal ones from the past of queries that are spread evenly over the keys."""
        indices = torch.empty(sequences, shape.Sq, 1, shape.topk, device=self.device, dtype=torch.int32)
        keys = torch.arange(shape.Skv, device=self.device)
        last = torch.arange(1, shape.Sq + 1, device=self.device) * shape.Skv // shape.Sq - 1
        for sequence in indices:
            for rows, last_of_rows in zip(sequence[:, 0].split(DRAWN_ROWS), last.split(DRAWN_ROWS), strict=True):
                lots = torch.rand(len(rows), shape.Skv, device=self.device)
                if is_causal:
                    lots.masked_fill_(keys > last_of_rows[:, None], -1.0)
                drawn, where = lots.topk(shape.topk)
                rows.copy_(where.masked_fill(drawn < 0, -1))
        dist.broadcast(indices, src=0)
        return indices


@dataclass
class Way:
    """A way to run a problem, on this rank: what it computes, and what of the whole results that is."""

    forward: Callable[[], Tensor]
    # Gradients of this rank, by name; the forward is part of it.
    backward: Callable[[], dict[str, Tensor]]
    # This rank's part of a whole result; all of it where the way does not say.
    part: Callable[[str, Tensor], Tensor] = lambda name, whole: whole
    traffic: Traffic = NOTHING
    # Selected keys times heads that this rank attends to in a forward.
    local_slots: int = 0

    def inference(self) -> Tensor:
        """Forward without gradients; a plain tensor."""
        with torch.no_grad():
            return _local(self.forward())

    def results(self) -> dict[str, Tensor]:
        """Everything that is compared."""
        return {"out": self.inference(), **self.backward()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _count(indices: Tensor) -> int:
    return int((indices >= 0).sum())


Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


@dataclass(frozen=True)
class Attention:
    """The operator alone on one sequence, whole on every rank."""

    world: World
    shape: Shape
    q: Tensor
    kv: Tensor
    indices: Tensor
    dout: Tensor

    @classmethod
    def draw(cls, world: World, shape: Shape, is_causal: bool) -> Attention:
        """The same on every rank."""
        q, kv = world.normal(1, shape.Sq, shape.H, shape.d_total), world.normal(1, shape.Skv, 1, shape.d_total)
        return cls(
            world, shape, q, kv, world.indices(shape, 1, is_causal), world.normal(1, shape.Sq, shape.H, shape.d_v)
        )

    def _call(self, q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        return mla_ops.sparse_attn(q, kv, indices, d_v=self.shape.d_v, softmax_scale=SCALE).out

    def one_rank(self, compiled: Compile) -> Way:
        """The whole problem."""
        leaves = [self.q.detach().requires_grad_(), self.kv.detach().requires_grad_()]
        run = compiled(self._call)

        def forward() -> Tensor:
            return run(*leaves, self.indices)

        def backward() -> dict[str, Tensor]:
            dq, dkv = torch.autograd.grad(forward(), leaves, self.dout)
            return {"dq": dq, "dkv": dkv}

        return Way(forward, backward)

    def tensor_parallel(self, compiled: Compile) -> Way:
        """Heads over the ranks; the backward ends with the sum of `dkv`."""
        world, heads, whole = self.world, [Shard(2)], [Replicate()]

        def part(name: str, tensor: Tensor) -> Tensor:
            return tensor if name == "dkv" else tensor.chunk(world.ranks, 2)[world.rank]

        def place(tensor: Tensor, placements: list[Any]) -> DTensor:
            local = tensor if placements == whole else part("q", tensor).contiguous()
            return DTensor.from_local(local, world.mesh, placements, shape=tensor.shape, stride=tensor.stride())

        leaves = [place(self.q, heads).requires_grad_(), place(self.kv, whole).requires_grad_()]
        indices, dout, run = place(self.indices, whole), place(self.dout, heads), compiled(self._call)

        def forward() -> Tensor:
            return run(*leaves, indices)

        def backward() -> dict[str, Tensor]:
            dq, dkv = torch.autograd.grad(forward(), leaves, dout)
            return {"dq": dq.to_local(), "dkv": dkv.redistribute(placements=whole).to_local()}

        slots = _count(self.indices) * self.shape.H // world.ranks
        return Way(forward, backward, part, tensor_parallel_traffic(self.shape, world.ranks), slots)

    def key_sharded(self, compiled: Compile, key_layout: KeyLayout = "contiguous") -> Way:
        """Keys over the ranks, and the rows of the queries."""
        world, seq_kv = self.world, self.shape.Skv

        def part(name: str, tensor: Tensor) -> Tensor:
            if key_layout == "interleaved" and name in ("kv", "dkv"):
                return tensor[:, world.rank :: world.ranks]
            return tensor.chunk(world.ranks, 1)[world.rank]

        leaves = [part(name, getattr(self, name)).contiguous().requires_grad_() for name in ("q", "kv")]
        indices, dout = part("indices", self.indices).contiguous(), part("dout", self.dout).contiguous()
        constants = {"d_v": self.shape.d_v, "softmax_scale": SCALE, "seq_kv": seq_kv, "key_layout": key_layout}

        def call(q: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
            return sparse_attn_cp(q, kv, indices, world.mesh, **constants).out

        run = compiled(call)

        def forward() -> Tensor:
            return run(*leaves, indices)

        def backward() -> dict[str, Tensor]:
            dq, dkv = torch.autograd.grad(forward(), leaves, dout)
            return {"dq": dq, "dkv": dkv}

        load = key_load(indices, world.mesh, seq_kv=seq_kv, key_layout=key_layout)
        slots = load.slots[world.rank] * self.shape.H
        return Way(forward, backward, part, key_sharded_traffic(self.shape, world.ranks), slots)


class Layer(nn.Module):
    """The operator between the projections of a layer: absorbed queries, the latent row, the output of all heads."""

    def __init__(self, shape: Shape, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.shape = shape

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)

        self.queries = linear(hidden, shape.H * shape.d_total)
        self.keys = linear(hidden, shape.d_total)
        self.output = linear(shape.H * shape.d_v, hidden)
        for weight in self.parameters():
            # Channels of unit variance, as the operator's inputs have elsewhere.
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """`hidden` of all keys; the queries are its last rows."""
        shape = self.shape
        q = self.queries(hidden[:, -shape.Sq :]).unflatten(-1, (shape.H, shape.d_total))
        kv = self.keys(hidden).unsqueeze(2)
        out = mla_ops.sparse_attn(q, kv, indices, d_v=shape.d_v, softmax_scale=SCALE).out
        return self.output(out.flatten(2))


@dataclass(frozen=True)
class LayerProblem:
    """A layer on SEQUENCES sequences, whole on every rank; gradients are those of its input and its weights."""

    world: World
    shape: Shape
    hidden: Tensor
    indices: Tensor
    dout: Tensor
    weights: dict[str, Tensor]

    @classmethod
    def draw(cls, world: World, shape: Shape, width: int) -> LayerProblem:
        """The same on every rank; `width` is that of the layer's inputs and outputs."""
        weights = dict(Layer(shape, width, world.device).state_dict())
        for weight in weights.values():
            dist.broadcast(weight, src=0)
        hidden = world.normal(SEQUENCES, shape.Skv, width)
        indices = world.indices(shape, SEQUENCES, is_causal=False)
        return cls(world, shape, hidden, indices, world.normal(SEQUENCES, shape.Sq, width), weights)

    def _layer(self) -> Layer:
        layer = Layer(self.shape, self.hidden.shape[-1], self.world.device)
        layer.load_state_dict(self.weights)
        return layer

    def one_rank(self, compiled: Compile) -> Way:
        """All sequences."""
        layer = self._layer()
        run, hidden = compiled(layer), self.hidden.detach().requires_grad_()

        def forward() -> Tensor:
            return run(hidden, self.indices)

        def backward() -> dict[str, Tensor]:
            return _layer_gradients(layer, hidden, forward(), self.dout)

        return Way(forward, backward)

    def mesh(self, compiled: Compile) -> Way:
        """A sequence for each half of the ranks, with FSDP2 between the halves and the heads over the ranks of each."""
        grid = self.world.grid
        assert grid is not None
        data, tensor = grid["data"], grid["tensor"]
        cut = {"queries": Shard(0), "output": Shard(1)}
        layer, whole = self._layer(), [Replicate()]
        for name, module in layer.named_children():
            weight = distribute_tensor(module.weight.detach(), tensor, [cut.get(name, Replicate())])
            module.weight = nn.Parameter(weight)
        # Compiled before FSDP2, whose hooks stay outside of the graph.
        layer.forward = compiled(layer.forward)  # type: ignore[method-assign]
        # A root keeps its weights after the forward unless told otherwise; in a model, a layer is no root.
        fully_shard(layer, mesh=data, reshard_after_forward=True)

        def own(tensor: Tensor) -> Tensor:
            return tensor.chunk(SEQUENCES)[data.get_local_rank()]

        def part(name: str, tensor: Tensor) -> Tensor:
            # FSDP2 takes the mean of a weight's gradients over the data-parallel ranks.
            return own(tensor) if name in ("out", "hidden") else tensor / SEQUENCES

        hidden, indices = (DTensor.from_local(own(t), tensor, whole) for t in (self.hidden, self.indices))
        hidden.requires_grad_()
        dout = own(self.dout)

        def forward() -> Tensor:
            return layer(hidden, indices).redistribute(placements=whole).to_local()

        def backward() -> dict[str, Tensor]:
            grads = _layer_gradients(layer, hidden, forward(), dout)
            return grads | {"hidden": grads["hidden"].redistribute(placements=whole).to_local()}

        traffic = layer_traffic(self.shape, self.hidden.shape[-1], data.size(), tensor.size())
        return Way(forward, backward, part, traffic, _count(own(self.indices)) * self.shape.H // tensor.size())


def _layer_gradients(layer: Layer, hidden: Tensor, out: Tensor, dout: Tensor) -> dict[str, Any]:
    """Gradients of the input and of the weights, as they are placed."""
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
    out.backward(dout)
    return {name: leaf.grad for name, leaf in leaves.items()}

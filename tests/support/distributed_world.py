"""What the checks of `distributed_checks.py` share: the world that a rank sees, the registry, the single run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mla_ops.testing import Inputs

TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class World:
    rank: int
    size: int

    def mesh(self, **dims: int) -> DeviceMesh:
        return _mesh(tuple(dims.items()))


# One object per mesh, as a program has. DTensor caches placements under equal meshes, and a graph of torch 2.13 cannot
# hold two meshes that are equal but not the same: "Node tangents_2 was invalid, but is output".
@cache
def _mesh(dims: tuple[tuple[str, int], ...]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(size for _, size in dims), mesh_dim_names=tuple(name for name, _ in dims))


Check = Callable[[World], None]
CHECKS: dict[int, dict[str, Check]] = {2: {}, 4: {}}


def check(*sizes: int) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        for size in sizes:
            CHECKS[size][function.__name__] = function
        return function

    return register


@contextmanager
def raises(error: type[Exception], *words: str) -> Iterator[None]:
    with pytest.raises(error) as raised:
        yield
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{missing} not in: {raised.value}"


def single_run(inputs: Inputs) -> dict[str, torch.Tensor]:
    """The results of a whole call on this rank alone."""
    leaves = inputs.requires_grad()
    out, lse = torch.ops.mla.sparse_attn(*leaves.args)
    torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    grads = zip(("dq", "dkv", "dsink"), (t.grad for t in leaves.differentiable), strict=False)
    return {"out": out.detach(), "lse": lse.detach(), **dict(grads)}


def cut(tensor: torch.Tensor | None, world: World, dim: int) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().chunk(world.size, dim)[world.rank].clone()

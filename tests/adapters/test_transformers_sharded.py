"""Attached transformers models whose weights two ranks share: before and after sharding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import CLOSE, attention_layer, make_model, token_ids
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from mla_ops.adapters import transformers as adapter
from mla_ops.errors import UnsupportedFeatureError

RANKS = 2


def step(model: Any) -> torch.Tensor:
    output = model(token_ids(), labels=token_ids(), use_cache=False)
    output.loss.backward()
    return output.logits.detach()


def by_fully_shard(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def by_fsdp1(model: Any) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def attach_then(shard: Callable[[Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model = make_model()
        adapter.attach(model)
        return shard(model)

    return make


def shard_then_attach() -> Any:
    model = by_fully_shard(make_model())
    adapter.attach(model)
    return model


def fsdp1_then_attach() -> None:
    with pytest.raises(UnsupportedFeatureError, match=r"got Parameter .*a model for FSDP1 is attached before"):
        adapter.attach(by_fsdp1(make_model()))


def sharded_without_gathering() -> None:
    model = make_model()
    linear = attention_layer(model).kv_b_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight, init_device_mesh("cpu", (RANKS,)), [Shard(0)]))
    with pytest.raises(UnsupportedFeatureError, match=r"must be a plain floating-point parameter .* got DTensor"):
        adapter.attach(model)


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    whole = make_model()
    logits, gradient = step(whole), attention_layer(whole).kv_b_proj.weight.grad
    for make in (attach_then(by_fully_shard), shard_then_attach):
        model = make()
        torch.testing.assert_close(step(model), logits, **CLOSE)
        torch.testing.assert_close(attention_layer(model).kv_b_proj.weight.grad.full_tensor(), gradient, **CLOSE)
    wrapped = attach_then(by_fsdp1)()
    torch.testing.assert_close(step(wrapped), logits, **CLOSE)
    with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
        torch.testing.assert_close(attention_layer(wrapped.module).kv_b_proj.weight.grad, gradient, **CLOSE)
    fsdp1_then_attach()
    sharded_without_gathering()
    torch.distributed.destroy_process_group()


def test_two_ranks_that_share_the_weights_equal_one(tmp_path: Path) -> None:
    # "forkserver", because a spawned rank runs Python's finalization, where gloo's threads may abort it.
    torch.multiprocessing.start_processes(run_rank, args=(tmp_path,), nprocs=RANKS, start_method="forkserver")

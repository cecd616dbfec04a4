"""Selections that layers share: the schedule, and what a kept indexer learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_ops.adapters.torch_layer import IndexSharing
from mla_ops.cli.model import LanguageModel, ModelConfig
from mla_ops.errors import MLAMetadataError


def test_the_schedule_of_glm_52() -> None:
    sharing = IndexSharing.periodic(78, every=4, first=3)
    assert sharing.owners == (0, 1, 2, *range(6, 78, 4))
    assert len(sharing.owners) == 21
    assert [sharing.owner_of(layer) for layer in range(8)] == [0, 1, 2, 2, 2, 2, 6, 6]
    assert [sharing.served_by(owner) for owner in (0, 1, 2, 74)] == [range(1), range(1, 2), range(2, 6), range(74, 78)]
    assert [layer for layer in range(78) if sharing.is_owner(layer)] == list(sharing.owners)


@pytest.mark.parametrize(("num_layers", "every", "first"), [(1, 1, 1), (5, 1, 1), (7, 3, 1), (2, 4, 3), (9, 2, 4)])
def test_every_layer_is_served_once_by_an_owner_at_or_below_it(num_layers: int, every: int, first: int) -> None:
    sharing = IndexSharing.periodic(num_layers, every=every, first=first)
    served = [(owner, layer) for owner in sharing.owners for layer in sharing.served_by(owner)]
    assert [layer for _, layer in served] == list(range(num_layers))
    assert all(sharing.owner_of(layer) == owner <= layer for owner, layer in served)
    assert sharing == IndexSharing(num_layers, reversed(sharing.owners))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IndexSharing(4, [1, 3]), r"layer 0 must own an indexer, because no layer below it .* got \[1, 3\]"),
        (lambda: IndexSharing(4, []), "layer 0 must own an indexer"),
        (lambda: IndexSharing(4, [0, 4, -1]), r"owners must be layers 0 to 3, got \[-1, 4\]"),
        (lambda: IndexSharing(4, [0, 2, 2]), r"owners must be named once each, got \[0, 2, 2\]"),
        (lambda: IndexSharing(0, [0]), "num_layers must be at least 1, got 0; owners must be"),
        (lambda: IndexSharing.periodic(4, every=0), "every and first must be at least 1, got every=0 and first=1"),
        (lambda: IndexSharing.periodic(4, every=2, first=0), "got every=2 and first=0; layer 0 must own"),
        (lambda: IndexSharing(4, [0]).owner_of(4), "layer must be 0 to 3, got 4"),
        (lambda: IndexSharing(4, [0, 2]).served_by(3), "layer 3 owns no indexer, it is served by layer 2"),
    ],
)
def test_impossible_schedules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        make()


def test_a_kept_indexer_learns_from_the_mean_attention_of_the_layers_that_it_serves() -> None:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=3, index_every=3, topk=8)
    model = LanguageModel(config)
    tokens = torch.randint(0, 256, (2, 41))
    seen: list[tuple[torch.Tensor, ...]] = []
    for layer in model.layers:
        attend = layer.attn.mla.attend

        def record(*rows: torch.Tensor, attend: Any = attend) -> Any:
            seen.append(rows)
            return attend(*rows)

        layer.attn.mla.attend = record
    hidden: list[torch.Tensor] = []
    model.layers[0].attn_norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    _, index_loss = model.losses(tokens)
    index_loss.backward()

    indexer, scale = model.layers[0].attn.indexer, model.layers[0].attn.mla.meta.softmax_scale
    grads = {name: parameter.grad for name, parameter in indexer.named_parameters()}
    indices = seen[0][2].long().squeeze(2)
    assert all(torch.equal(rows[2], seen[0][2]) for rows in seen)
    is_key = indices >= 0
    weights = []
    for q, kv, _ in seen:
        rows = kv[torch.arange(2)[:, None, None], indices.clamp_min(0), 0]
        logits = scale * torch.einsum("bshd,bskd->bshk", q, rows)
        weights.append(logits.masked_fill(~is_key.unsqueeze(2), -torch.inf).softmax(-1).mean(2))
    target = torch.stack(weights).mean(0).detach()
    scores = indexer.scores(*indexer.project(hidden[0]), seen[0][2]).squeeze(2)
    divergence = torch.where(is_key, target * (target.log() - scores.log_softmax(-1)), 0.0)
    expected = divergence.sum(-1).mean()
    torch.testing.assert_close(index_loss, expected)
    for name, grad in zip(grads, torch.autograd.grad(expected, list(indexer.parameters())), strict=True):
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        f"layers.0.attn.indexer.{name}" for name in grads
    ]


def test_layers_that_share_a_selection_own_no_indexer_and_train() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(num_layers=4, index_every=2))
    assert [layer.attn.indexer is not None for layer in model.layers] == [True, False, True, False]
    loss, index_loss = model.losses(torch.randint(0, 256, (2, 65)))
    (loss + index_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

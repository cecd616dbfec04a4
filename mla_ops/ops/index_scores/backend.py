"""The protocol of a backend of `mla::index_scores`."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.dispatch import Declares
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Side, Wanted


class Backend(Declares[IndexScoresProblem], Protocol):
    """One way to run the operator and its backward. Support is declared, never discovered by trying.

    Calls that arrive here have passed `rules`; tensors have any strides, and any of `topk`, `seq_q`, `seq_kv` and
    `batch` may be 0. What a call comes with is the plan that this backend made for a call of the same kind: of equal
    shapes, strides, dtypes, device, settings.
    """

    def plan(
        self, side: Side, call: IndexScoresCall, problem: IndexScoresProblem, traits: DeviceTraits, wanted: Wanted
    ) -> Any:
        """Decide how calls like `call`, which this backend supports, are launched; no data is read."""
        ...

    def describe(self, plan: Any) -> tuple[str, ...]:
        """Say in lines for a person what `plan` would launch, and of every kernel whether it is warm on its device."""
        ...

    def forward(self, call: IndexScoresCall, plan: Any) -> torch.Tensor:
        """Return `scores` as `mla_ops.index_scores` documents them, contiguous."""
        ...

    def backward(
        self, call: IndexScoresCall, dscores: torch.Tensor, wanted: Wanted, plan: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `(dq, dk, dw)`; one that is not wanted is an empty `[0]` tensor."""
        ...

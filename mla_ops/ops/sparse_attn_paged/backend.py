"""The protocol of a backend of `mla::sparse_attn_paged`."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.dispatch import Declares
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem


class Backend(Declares[SparseAttnPagedProblem], Protocol):
    """One way to run the operator. Support is declared, never discovered by trying.

    Calls that arrive here have passed `rules`; tensors have any strides that the rules let pass, and sizes may be 0.
    What a call comes with is the plan that this backend made for a call of the same kind: of equal shapes, strides,
    dtypes, device, settings.
    """

    def plan(self, call: SparseAttnPagedCall, problem: SparseAttnPagedProblem, traits: DeviceTraits) -> Any:
        """Decide how calls like `call`, which this backend supports, are launched; no data is read."""
        ...

    def describe(self, plan: Any) -> tuple[str, ...]:
        """Say in lines for a person what `plan` would launch, and of every kernel whether it is warm on its device."""
        ...

    def run(self, call: SparseAttnPagedCall, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(out, lse)` as `mla_ops.sparse_attn_paged` documents them."""
        ...

"""The protocol of a backend: what it declares, and the calls it answers."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.call import Gradients, Results, Scales, Side, SparseAttnCall, SparseAttnProblem, Wanted


class Backend(Protocol):
    """One way to run the operator. Support is declared, never discovered by trying.

    Calls that arrive here have passed `rules`; tensors have any strides. Results are contiguous. What a call comes with
    is the plan that this backend made for a call of the same kind: of equal shapes, strides, dtypes, device, settings.
    With `scales`, q, kv or both are payloads, and results and gradients have `scales.dtype`.
    """

    name: str

    def unsupported_reasons(self, problem: SparseAttnProblem, traits: DeviceTraits) -> list[str]:
        """Every reason why this backend cannot run `problem` on `traits`; each says have, want and the fix."""
        ...

    def auto_excluded_reason(self, problem: SparseAttnProblem, traits: DeviceTraits) -> str | None:
        """Why `backend="auto"` must not pick this backend although it could run, or None."""
        ...

    def plan(
        self, side: Side, call: SparseAttnCall, problem: SparseAttnProblem, traits: DeviceTraits, wanted: Wanted
    ) -> Any:
        """Decide how calls like `call`, which this backend supports, are launched; no data is read."""
        ...

    def describe(self, plan: Any) -> tuple[str, ...]:
        """Say in lines for a person what `plan` would launch, and of every kernel whether it is warm on its device.

        A kernel is warm when this process has launched it there for the same problem.
        """
        ...

    def forward(self, call: SparseAttnCall, plan: Any, scales: Scales | None = None) -> Results:
        """Return `out` and `lse` as `mla_ops.sparse_attn` documents them."""
        ...

    def max_logits(self, call: SparseAttnCall, plan: Any) -> torch.Tensor:
        """Return what `mla_ops.sparse_attn_max_logits` documents; `attn_sink` is not read."""
        ...

    def backward(
        self,
        call: SparseAttnCall,
        results: Results,
        gradients: Gradients,
        wanted: Wanted,
        plan: Any,
        scales: Scales | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `(dq, dkv, dsink)`; one that is not wanted (`dsink` without a sink) is an empty `[0]` tensor."""
        ...

"""The protocol of a backend of `mla::read_rows`."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.dispatch import Declares
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem


class Backend(Declares[ReadRowsProblem], Protocol):
    """One way to run the operator. Support is declared, never discovered by trying.

    Calls that arrive here have passed `rules`; tensors have any strides that the rules let pass, and sizes may be 0.
    What a call comes with is the plan that this backend made for a call of the same kind: of equal shapes, strides,
    dtypes, device, settings.
    """

    def plan(self, call: ReadRowsCall, problem: ReadRowsProblem, traits: DeviceTraits) -> Any:
        """Decide how calls like `call`, which this backend supports, are launched; no data is read."""
        ...

    def describe(self, plan: Any) -> tuple[str, ...]:
        """Say in lines for a person what `plan` would launch, and of every kernel whether it is warm on its device."""
        ...

    def run(self, call: ReadRowsCall, plan: Any) -> torch.Tensor:
        """Return what `mla_ops.read_rows` documents."""
        ...

"""The protocol of a backend of `mla::append_rows`."""

from __future__ import annotations

from typing import Any, Protocol

from mla_ops.device import DeviceTraits
from mla_ops.dispatch import Declares
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem


class Backend(Declares[AppendRowsProblem], Protocol):
    """One way to run the operator. Support is declared, never discovered by trying.

    Calls that arrive here have passed `rules`; tensors have any strides that the rules let pass, and sizes may be 0.
    What a call comes with is the plan that this backend made for a call of the same kind: of equal shapes, strides,
    dtypes, device, settings.
    """

    def plan(self, call: AppendRowsCall, problem: AppendRowsProblem, traits: DeviceTraits) -> Any:
        """Decide how calls like `call`, which this backend supports, are launched; no data is read."""
        ...

    def describe(self, plan: Any) -> tuple[str, ...]:
        """Say in lines for a person what `plan` would launch, and of every kernel whether it is warm on its device."""
        ...

    def run(self, call: AppendRowsCall, plan: Any) -> None:
        """Write the rows as `mla_ops.append_rows` documents it."""
        ...

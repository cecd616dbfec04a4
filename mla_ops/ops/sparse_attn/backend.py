"""The protocol of a backend: what it declares, and the calls it answers."""

from __future__ import annotations

from typing import Protocol

import torch

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem


class Backend(Protocol):
    """One way to run the operator. Support is declared, never discovered by trying.

    Arguments of the calls have passed `validation`; tensors have any strides. Results are contiguous.
    """

    name: str

    def unsupported_reasons(self, problem: SparseAttnProblem, traits: DeviceTraits) -> list[str]:
        """Every reason why this backend cannot run `problem` on `traits`; each says have, want and the fix."""
        ...

    def auto_excluded_reason(self, problem: SparseAttnProblem, traits: DeviceTraits) -> str | None:
        """Why `backend="auto"` must not pick this backend although it could run, or None."""
        ...

    def describe_launch(self, problem: SparseAttnProblem, traits: DeviceTraits, hints: Hints) -> tuple[str, ...]:
        """How `problem`, which this backend supports, would be launched at the sizes of `hints`: lines for a person.

        They say of every kernel whether it is warm, that is, whether this process has launched it for this problem.
        """
        ...

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        d_v: int,
        softmax_scale: float,
        topk_length: torch.Tensor | None,
        attn_sink: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(out, lse)` as `mla_ops.sparse_attn` documents them."""
        ...

    def max_logits(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        d_v: int,
        softmax_scale: float,
        topk_length: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what `mla_ops.sparse_attn_max_logits` documents."""
        ...

    def backward(
        self,
        dout: torch.Tensor | None,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_v: int,
        softmax_scale: float,
        topk_length: torch.Tensor | None,
        attn_sink: torch.Tensor | None,
        need_dq: bool,
        need_dkv: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `(dq, dkv, dsink)`; one that is not needed (`dsink` without a sink) is an empty `[0]` tensor."""
        ...

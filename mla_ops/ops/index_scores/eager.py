"""The eager backend: plain torch operators, a backward by hand, bounded memory. The CPU's implementation.

Rows (one query of one KV group, all its index heads) are processed in chunks of gathered keys (`mla_ops/gathering.py`).
The backward multiplies again instead of keeping the products of all heads, which are what the forward never stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_ops import gathering, settings
from mla_ops.device import DeviceTraits
from mla_ops.gathering import NamedKeys, compute_dtype, unrounded_dtype
from mla_ops.ops.index_scores.call import IndexScoresCall, IndexScoresProblem, Side, Wanted

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class EagerBackend:
    """Runs anywhere torch runs; picked by `backend="auto"` on the CPU only."""

    name = "eager"

    def unsupported_reasons(self, problem: IndexScoresProblem, traits: DeviceTraits) -> list[str]:
        """See `Declares.unsupported_reasons`."""
        if problem.dtype in _SUPPORTED_DTYPES:
            return []
        return [f"dtype is {problem.dtype}, needs bf16, fp16, fp32 or fp64; cast q_idx and k_idx"]

    def auto_excluded_reason(self, problem: IndexScoresProblem, traits: DeviceTraits) -> str | None:
        """See `Declares.auto_excluded_reason`."""
        if traits.type == "cpu":
            return None
        return f'excluded from backend="auto" on {traits.type}; pass backend="eager" to accept chunked gathers'

    def plan(
        self, side: Side, call: IndexScoresCall, problem: IndexScoresProblem, traits: DeviceTraits, wanted: Wanted
    ) -> None:
        """See `Backend.plan`; chunks follow from the sizes at hand."""

    def describe(self, plan: None) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return (f"keys are gathered in chunks of {settings.current().eager_workspace_mb} MiB; nothing to warm",)

    def forward(self, call: IndexScoresCall, plan: None) -> torch.Tensor:
        """See `Backend.forward`."""
        scores = call.q_idx.new_empty(call.indices.shape, dtype=torch.float32)
        rows = _Rows.of(call)
        if rows.k.is_empty:
            return scores.fill_(-torch.inf)
        score_rows = scores.view(len(rows.q), 1, -1)
        for chunk in rows.chunks():
            dots = chunk.dots()
            if call.relu:
                dots.relu_()
            score_rows[chunk.span] = torch.bmm(chunk.weights, dots).masked_fill_(chunk.invalid, -torch.inf)
        return scores

    def backward(
        self, call: IndexScoresCall, dscores: torch.Tensor, wanted: Wanted, plan: None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Backend.backward`."""
        q_idx, k_idx, weights = call.q_idx, call.k_idx, call.weights
        dq = q_idx.new_empty(q_idx.shape if wanted.dq else 0)
        dw = weights.new_empty(weights.shape if wanted.dw else 0)
        rows = _Rows.of(call)
        if rows.k.is_empty:
            return dq.zero_(), k_idx.new_zeros(k_idx.shape if wanted.dk else 0), dw.zero_()

        dk_rows = rows.k.accumulator() if wanted.dk else k_idx.new_empty(0)
        dq_rows = dq.view(rows.q.shape) if wanted.dq else dq
        dw_rows = dw.view(rows.weights.shape) if wanted.dw else dw
        dscore_rows = dscores.reshape(len(rows.q), 1, -1)
        for chunk in rows.chunks():
            dots = chunk.dots()
            # What arrives at invalid slots may be NaN.
            dscore = dscore_rows[chunk.span].to(dots.dtype).masked_fill(chunk.invalid, 0.0)  # [rows, 1, topk]
            ddots = chunk.weights.transpose(1, 2) * dscore  # [rows, heads, topk]
            if call.relu:
                ddots.masked_fill_(dots <= 0, 0.0)
            if wanted.dw:
                scored = dots.relu_() if call.relu else dots
                dw_rows[chunk.span] = torch.bmm(dscore, scored.transpose(1, 2)).masked_fill_(chunk.empty, 0.0)
            if wanted.dq:
                dq_rows[chunk.span] = torch.bmm(ddots, chunk.keys).masked_fill_(chunk.empty, 0.0)
            if wanted.dk:
                dkeys = torch.bmm(ddots.transpose(1, 2), chunk.queries, out=chunk.keys)  # the gather is spent
                dk_rows.index_add_(0, chunk.scatter_to, dkeys.flatten(0, 1))
        dk = dk_rows[:-1].view(k_idx.shape).to(k_idx.dtype) if wanted.dk else dk_rows
        return dq, dk, dw


@dataclass(frozen=True)
class _Chunk(gathering.Chunk):
    """A run of rows with the keys that they name, every number in the compute dtype."""

    queries: torch.Tensor  # [rows, heads, index_head_dim]
    weights: torch.Tensor  # [rows, 1, heads]

    def dots(self) -> torch.Tensor:
        """Return the products of every head with every named key, `[rows, heads, topk]`."""
        return torch.bmm(self.queries, self.keys.transpose(1, 2))


@dataclass(frozen=True)
class _Rows:
    """The call with (batch, query, group) flattened into rows."""

    q: torch.Tensor  # [rows, heads_per_group, index_head_dim]
    weights: torch.Tensor  # [rows, 1, heads_per_group]
    k: NamedKeys

    @classmethod
    def of(cls, call: IndexScoresCall) -> _Rows:
        *_, heads, index_head_dim = call.q_idx.shape
        # fp64 factors stay fp64; all others are multiplied as selection multiplies them.
        dtype = torch.promote_types(compute_dtype(call.q_idx.dtype), unrounded_dtype(call.q_idx.device))
        k = NamedKeys.of(call.k_idx, call.indices, call.topk_length, dtype)
        num_rows, heads_per_group = len(k.indices), heads // k.kv_group
        q = call.q_idx.reshape(num_rows, heads_per_group, index_head_dim)
        return cls(q, call.weights.reshape(num_rows, 1, heads_per_group), k)

    def chunks(self) -> Iterator[_Chunk]:
        """Yield every row once, in order; products and their gradients count as work of a chunk."""
        dtype, layout = self.k.compute_dtype, torch.contiguous_format
        for chunk in self.k.chunks(numbers_per_slot=2 * self.q.shape[1]):
            # A copy even where the dtype fits: the same bits in the same layout, whatever the strides of q_idx.
            queries = self.q[chunk.span].to(dtype, copy=True, memory_format=layout)
            weights = self.weights[chunk.span].to(dtype, copy=True, memory_format=layout)
            yield _Chunk(**vars(chunk), queries=queries, weights=weights)

"""The eager backend: plain torch operators, analytic backward, bounded memory. The CPU's implementation.

Rows (one query token of one KV group, all its heads) are processed in chunks sized so that the gathered KV of a chunk
stays in cache: `[B, Sq, topk, d_total]` never exists. A chunk holds whole rows, so the backward recomputes its softmax
instead of trusting a rounded `lse`, which is also what fp64 gradients need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_ops import gathering, settings
from mla_ops.device import DeviceTraits
from mla_ops.gathering import Lists, NamedKeys
from mla_ops.ops.sparse_attn.call import (
    SCALED_FORMAT,
    Gradients,
    Results,
    Scales,
    Side,
    SparseAttnCall,
    SparseAttnProblem,
    Wanted,
)

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class EagerBackend:
    """Runs anywhere torch runs; picked by `backend="auto"` on the CPU only."""

    name = "eager"

    def unsupported_reasons(self, problem: SparseAttnProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        reasons = []
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16, fp32 or fp64; cast q and kv")
        if problem.kv_format not in ("dense", SCALED_FORMAT):
            reasons.append(f"kv_format is {problem.kv_format!r}, needs 'dense'; dequantise kv first")
        return reasons

    def auto_excluded_reason(self, problem: SparseAttnProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        if traits.type == "cpu":
            return None
        return f'excluded from backend="auto" on {traits.type}; pass backend="eager" to accept chunked gathers'

    def plan(
        self, side: Side, call: SparseAttnCall, problem: SparseAttnProblem, traits: DeviceTraits, wanted: Wanted
    ) -> None:
        """See `Backend.plan`; chunks follow from the sizes at hand."""

    def describe(self, plan: None) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return (f"rows are gathered in chunks of {settings.current().eager_workspace_mb} MiB; nothing to warm",)

    def forward(self, call: SparseAttnCall, plan: None, scales: Scales | None = None) -> Results:
        """See `Backend.forward`."""
        return attend(call.q, _keys_of(call, scales), call.d_v, call.softmax_scale, call.attn_sink, scales)

    def max_logits(self, call: SparseAttnCall, plan: None) -> torch.Tensor:
        """See `Backend.max_logits`."""
        max_logits = call.q.new_empty(call.q.shape[:-1], dtype=torch.float32)
        rows = _Rows.of(call.q, NamedKeys.of(call.kv, call.indices, call.topk_length))
        if rows.is_empty:
            return max_logits.fill_(-torch.inf)
        max_rows = rows.by_head(max_logits)
        for chunk in rows.chunks():
            max_rows[chunk.span] = chunk.logits(call.softmax_scale).amax(dim=2, keepdim=True)
        return max_logits

    def backward(
        self,
        call: SparseAttnCall,
        results: Results,
        gradients: Gradients,
        wanted: Wanted,
        plan: None,
        scales: Scales | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Backend.backward`; `results` are not read (module docstring)."""
        q, kv, attn_sink = call.q, call.kv, call.attn_sink
        dout, dlse = gradients
        keys = _keys_of(call, scales)
        rows = _Rows.of(q, keys, scales)
        dtype = q.dtype if scales is None else scales.dtype
        dq = q.new_empty(q.shape if wanted.dq else 0, dtype=dtype)
        dkv_rows = keys.accumulator() if wanted.dkv else kv.new_empty(0)
        dsink = q.new_zeros(0 if attn_sink is None else attn_sink.shape, dtype=torch.float32)
        if rows.is_empty or (dout is None and dlse is None):
            return dq.zero_(), kv.new_zeros(kv.shape if wanted.dkv else 0, dtype=dtype), dsink

        dq_rows = rows.by_head(dq) if wanted.dq else dq
        dout_rows = None if dout is None else rows.by_head(dout)
        dlse_rows = None if dlse is None else rows.by_head(dlse)
        sink = None if attn_sink is None else rows.per_head(attn_sink)
        dsink_rows = None if attn_sink is None else rows.per_head(dsink)
        for chunk in rows.chunks():
            weights, row_lse = chunk.softmax(call.softmax_scale)
            values = chunk.keys[..., : call.d_v]
            if dout_rows is None:
                chunk_dout, out_weights, dlogits = None, weights, torch.zeros_like(weights)
            else:
                chunk_dout = chunk.of(dout_rows)
                keep = None if sink is None else _keep(row_lse, sink[chunk.groups].unsqueeze(2))
                out_weights = weights if keep is None else weights * keep
                dlogits = torch.bmm(chunk_dout, values.transpose(1, 2))  # gradient of out_weights
                delta = (out_weights * dlogits).sum(dim=2, keepdim=True)  # rowsum(dout * out)
                dlogits.sub_(delta).mul_(out_weights)
                if keep is not None and dsink_rows is not None:
                    share = ((keep - 1.0) * delta).masked_fill_(chunk.empty, 0.0)
                    dsink_rows.index_add_(0, chunk.groups, share.squeeze(2).to(torch.float32))
            if dlse_rows is not None:
                dlogits.addcmul_(weights, chunk.of(dlse_rows))
            dlogits.mul_(call.softmax_scale)
            if wanted.dq:
                dq_rows[chunk.span] = torch.bmm(dlogits, chunk.keys).masked_fill_(chunk.empty, 0.0)
            if wanted.dkv:
                dkeys = torch.bmm(dlogits.transpose(1, 2), chunk.queries, out=chunk.keys)  # the gather is spent
                if chunk_dout is not None:
                    dkeys[..., : call.d_v] += torch.bmm(out_weights.transpose(1, 2), chunk_dout)
                dkv_rows.index_add_(0, chunk.scatter_to, dkeys.flatten(0, 1))
        dkv = (dkv_rows[:-1].view(kv.shape) if wanted.dkv else dkv_rows).to(dtype)
        return dq, dkv, dsink


def attend(
    q: torch.Tensor,
    kv: Lists,
    d_v: int,
    softmax_scale: float,
    attn_sink: torch.Tensor | None,
    scales: Scales | None = None,
) -> Results:
    """Attend queries `[..., heads, d_total]` to the rows that lists name, wherever those rows stand."""
    out = q.new_empty((*q.shape[:-1], d_v), dtype=q.dtype if scales is None else scales.dtype)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    rows = _Rows.of(q, kv, scales)
    if rows.is_empty:
        return Results(out.zero_(), lse.fill_(-torch.inf))
    out_rows, lse_rows = rows.by_head(out), rows.by_head(lse)
    sink = None if attn_sink is None else rows.per_head(attn_sink)
    for chunk in rows.chunks():
        weights, row_lse = chunk.softmax(softmax_scale)
        if sink is not None:
            weights.mul_(_keep(row_lse, sink[chunk.groups].unsqueeze(2)))
        chunk_out = torch.bmm(weights, chunk.keys[..., :d_v])
        out_rows[chunk.span] = chunk_out.masked_fill_(chunk.empty, 0.0)
        lse_rows[chunk.span] = row_lse
    return Results(out, lse)


def _keys_of(call: SparseAttnCall, scales: Scales | None) -> NamedKeys:
    if scales is None:
        return NamedKeys.of(call.kv, call.indices, call.topk_length)
    keys = NamedKeys.of(call.kv, call.indices, call.topk_length, gathering.compute_dtype(scales.dtype))
    return keys if scales.kv is None else _Payloads(**vars(keys), scale=scales.kv.to(keys.compute_dtype))


@dataclass(frozen=True)
class _Payloads(NamedKeys):
    """Keys that are payloads with scales; they become real numbers as they are gathered."""

    scale: torch.Tensor  # [] or [..., seq_kv, kv_group, 1], in the compute dtype

    def gather(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        """See `Lists.gather`."""
        super().gather(keys, out)
        out.mul_(self.scale if self.scale.dim() == 0 else self.scale.reshape(-1, 1).index_select(0, keys))


def _keep(lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Share of the softmax mass that the sink leaves, exp(lse) / (exp(lse) + exp(sink)), finite for infinite sinks."""
    return torch.sigmoid(lse - sink).masked_fill_(lse == -torch.inf, 0.0)


@dataclass(frozen=True)
class _Chunk(gathering.Chunk):
    """A run of rows with the keys that they name and their queries, every number in the compute dtype."""

    queries: torch.Tensor  # [rows, heads, d_total]

    def logits(self, scale: float) -> torch.Tensor:
        """Return scaled logits `[rows, heads, topk]`, -inf at invalid slots."""
        return torch.bmm(self.queries, self.keys.transpose(1, 2)).mul_(scale).masked_fill_(self.invalid, -torch.inf)

    def softmax(self, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights `[rows, heads, topk]` (exactly 0 at invalid slots, no sink) and lse `[rows, heads, 1]`."""
        logits = self.logits(scale)
        peak = logits.amax(dim=2, keepdim=True)
        peak.masked_fill_(peak == -torch.inf, 0.0)  # exp(-inf - 0) = 0, where exp(-inf + inf) would be NaN
        weights = logits.sub_(peak).exp_()
        total = weights.sum(dim=2, keepdim=True)
        lse = total.log().add_(peak)
        return weights.div_(total.masked_fill_(total == 0.0, 1.0)), lse

    def of(self, grads: torch.Tensor) -> torch.Tensor:
        """Cut this chunk out of per-row gradients; those of empty rows, which may be NaN, become 0."""
        return grads[self.span].to(self.keys.dtype).masked_fill(self.empty, 0.0)


@dataclass(frozen=True)
class _Rows:
    """The call with (batch, query, group) flattened into rows."""

    q: torch.Tensor  # [rows, heads_per_group, d_total]
    kv: Lists
    q_scale: torch.Tensor | None  # of payloads: [rows, heads_per_group, 1], in the compute dtype

    @classmethod
    def of(cls, q: torch.Tensor, kv: Lists, scales: Scales | None = None) -> _Rows:
        *_, heads, d_total = q.shape
        rows = q.reshape(len(kv.indices), heads // kv.kv_group, d_total)
        if scales is None or scales.q is None:
            return cls(rows, kv, None)
        q_scale = scales.q.to(kv.compute_dtype).expand(*q.shape[:-1], 1)
        return cls(rows, kv, q_scale.reshape(*rows.shape[:-1], 1))

    @property
    def is_empty(self) -> bool:
        """True when no slot can be valid or no number is asked for."""
        return self.q.numel() == 0 or self.kv.is_empty

    def by_head(self, t: torch.Tensor) -> torch.Tensor:
        """View `[..., heads, width]` or `[..., heads]` as `[rows, heads_per_group, width or 1]`."""
        return t.reshape(*self.q.shape[:2], -1)

    def per_head(self, t: torch.Tensor) -> torch.Tensor:
        """View a `[heads]` tensor as `[kv_group, heads_per_group]`."""
        return t.view(self.kv.kv_group, self.q.shape[1])

    def chunks(self) -> Iterator[_Chunk]:
        """Yield every row once, in order, in chunks whose gathered keys and logits fit the workspace setting."""
        for chunk in self.kv.chunks(numbers_per_slot=self.q.shape[1]):
            # A copy even where the dtype fits: the same bits in the same layout, whatever the strides of q.
            layout = torch.contiguous_format
            queries = self.q[chunk.span].to(self.kv.compute_dtype, copy=True, memory_format=layout)
            if self.q_scale is not None:
                queries.mul_(self.q_scale[chunk.span])
            yield _Chunk(**vars(chunk), queries=queries)

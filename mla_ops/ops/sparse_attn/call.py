"""What is asked of the operator: a call as one value, and what of it decides who runs it.

`SparseAttnCall` is the operator's arguments; torch itself (schema, fakes, autograd, transforms, sharding, lowering)
passes them one by one, everything else passes the call. `SparseAttnProblem` is what is left of a call without tensors
and devices: registration makes one from a call, tests from integers, and dispatch sees nothing else. Batch and sequence
lengths are no fields of it: they are symbolic in a compiled graph and decide nothing about support (see `Hints`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

# What a call is planned for: the operator itself, its backward, or its maximum of the logits alone.
Side = Literal["forward", "backward", "max_logits"]

# The format of rows that are payloads of e4m3 with `Scales`.
SCALED_FORMAT = "e4m3"

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class SparseAttnCall(NamedTuple):
    """The arguments of `mla::sparse_attn` in the order of its schema, up to `attn_sink`; see `mla_ops.sparse_attn`."""

    q: torch.Tensor  # [batch, seq_q, heads, d_total], or without batch, like all tensors but attn_sink
    kv: torch.Tensor  # [batch, seq_kv, kv_group, d_total]
    indices: torch.Tensor  # [batch, seq_q, kv_group, topk]
    d_v: int
    softmax_scale: float
    topk_length: torch.Tensor | None = None  # [batch, seq_q]
    attn_sink: torch.Tensor | None = None  # [heads]

    @property
    def rows(self) -> int:
        """Queries of all batch elements; a row is one (batch, query) pair."""
        shape = self.q.shape
        return shape[0] if len(shape) == 3 else shape[0] * shape[1]


class Scales(NamedTuple):
    """What makes numbers of a call whose q, kv or both are payloads of e4m3: `real = payload * scale`.

    None for one that is plain. No gradient belongs to a scale.
    """

    q: torch.Tensor | None  # fp32, [] for one of the tensor, [..., heads, 1] for one of each row
    kv: torch.Tensor | None  # fp32, [] or [..., seq_kv, kv_group, 1]
    dtype: torch.dtype  # what q and kv stand for: the dtype of the one that is plain, of out and of the gradients


class Results(NamedTuple):
    """What a forward returns."""

    out: torch.Tensor  # [batch, seq_q, heads, d_v], contiguous
    lse: torch.Tensor  # [batch, seq_q, heads], fp32


class Gradients(NamedTuple):
    """What a backward starts from: gradients of the results, None for one that did not arrive."""

    dout: torch.Tensor | None
    dlse: torch.Tensor | None


class Wanted(NamedTuple):
    """Which gradients a backward computes; that of a sink is computed where there is a sink."""

    dq: bool = True
    dkv: bool = True


@dataclass(frozen=True)
class SparseAttnProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    d_total: int  # width of one absorbed query / latent KV row
    d_v: int  # leading channels of the row that are the value; the output width
    topk: int  # selected slots per query and KV group
    heads: int  # of all KV groups
    kv_group: int  # KV heads; 1 in MLA
    dtype: torch.dtype  # of q and kv
    needs_grad: bool = False
    kv_format: str = "dense"  # how a KV row is stored; "dense" is plain `dtype` channels, "e4m3" has `Scales`
    q_format: str = "dense"  # how a query is stored, in the same words

    @property
    def d_tail(self) -> int:
        """Channels that take part in the logits only, `d_total - d_v`; may be 0."""
        return self.d_total - self.d_v

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV row."""
        return self.heads // self.kv_group

    @property
    def is_scaled(self) -> bool:
        """Whether q, kv or both are payloads with scales."""
        return SCALED_FORMAT in (self.q_format, self.kv_format)

    @classmethod
    def of(cls, call: SparseAttnCall, *, needs_grad: bool = False, scales: Scales | None = None) -> SparseAttnProblem:
        """Read the problem off a checked call."""
        q = call.q
        *_, heads, d_total = q.shape
        kv_group, topk = call.kv.shape[-2], call.indices.shape[-1]
        if scales is None:
            return cls(d_total, call.d_v, topk, heads, kv_group, q.dtype, needs_grad)
        q_format, kv_format = ("dense" if scale is None else SCALED_FORMAT for scale in (scales.q, scales.kv))
        return cls(d_total, call.d_v, topk, heads, kv_group, scales.dtype, needs_grad, kv_format, q_format)

    def __str__(self) -> str:
        dtype = _DTYPE_NAMES.get(self.dtype, str(self.dtype))
        q_format = "" if self.q_format == "dense" else f"q_format={self.q_format} "
        return (
            f"d_total={self.d_total} d_v={self.d_v} heads={self.heads} kv_group={self.kv_group} topk={self.topk} "
            f"{dtype} {q_format}kv_format={self.kv_format} needs_grad={self.needs_grad}"
        )


@dataclass(frozen=True)
class Hints:
    """Sizes that may be symbolic: they choose between ways to launch, and never decide about support."""

    batch: int
    seq_q: int
    seq_kv: int

    @property
    def rows(self) -> int:
        """Queries of all batch elements."""
        return self.batch * self.seq_q

    @classmethod
    def of(cls, call: SparseAttnCall) -> Hints:
        """Read the hints off a checked call."""
        q = call.q
        return cls(batch=q.shape[0] if q.dim() == 4 else 1, seq_q=q.shape[-3], seq_kv=call.kv.shape[-3])


def call_like(problem: SparseAttnProblem, hints: Hints) -> SparseAttnCall:
    """Return a call of these sizes on tensors without data, contiguous: for plans that are made to be read."""
    rows, dtype = (hints.batch, hints.seq_q), problem.dtype
    return SparseAttnCall(
        torch.empty(*rows, problem.heads, problem.d_total, dtype=dtype, device="meta"),
        torch.empty(hints.batch, hints.seq_kv, problem.kv_group, problem.d_total, dtype=dtype, device="meta"),
        torch.empty(*rows, problem.kv_group, problem.topk, dtype=torch.int32, device="meta"),
        problem.d_v,
        softmax_scale=1.0,
    )

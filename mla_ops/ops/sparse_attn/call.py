"""What is asked of the operator, free of tensors and devices.

`SparseAttnProblem` is the hinge between the layers: registration makes one from tensors, tests from integers, and
dispatch sees nothing else of the call. Batch and sequence lengths are not fields: they are symbolic in a compiled
graph and decide nothing about support (see `Hints`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class SparseAttnProblem:
    """The shape-and-type facts that decide which backend runs a call and with which launch configuration."""

    d_total: int  # width of one absorbed query / latent KV row
    d_v: int  # leading channels of the row that are the value; the output width
    topk: int  # selected slots per query and KV group
    heads: int
    kv_group: int  # KV heads; 1 in MLA
    dtype: torch.dtype  # of q and kv
    needs_grad: bool = False
    kv_format: str = "dense"  # how a KV row is stored; "dense" is plain `dtype` channels

    @property
    def d_tail(self) -> int:
        """Channels that take part in the logits only, `d_total - d_v`; may be 0."""
        return self.d_total - self.d_v

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV row."""
        return self.heads // self.kv_group

    @property
    def widths(self) -> tuple[int, int, int]:
        """`d_total`, `d_v` and the bytes of a channel: what launch configurations are chosen by, beside the heads."""
        return self.d_total, self.d_v, self.dtype.itemsize

    @classmethod
    def from_tensors(
        cls, q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, d_v: int, *, needs_grad: bool = False
    ) -> SparseAttnProblem:
        """Read the problem off checked operator arguments (3-D or 4-D)."""
        return cls(
            d_total=q.shape[-1],
            d_v=d_v,
            topk=indices.shape[-1],
            heads=q.shape[-2],
            kv_group=kv.shape[-2],
            dtype=q.dtype,
            needs_grad=needs_grad,
        )

    def __str__(self) -> str:
        dtype = _DTYPE_NAMES.get(self.dtype, str(self.dtype))
        return (
            f"d_total={self.d_total} d_v={self.d_v} heads={self.heads} kv_group={self.kv_group} topk={self.topk} "
            f"{dtype} kv_format={self.kv_format} needs_grad={self.needs_grad}"
        )


@dataclass(frozen=True)
class Hints:
    """Sizes that may be symbolic: they choose between ways to launch, and never decide about support."""

    batch: int
    seq_q: int
    seq_kv: int

    @classmethod
    def from_tensors(cls, q: torch.Tensor, kv: torch.Tensor) -> Hints:
        """Read the hints off checked operator arguments (3-D or 4-D)."""
        return cls(batch=q.shape[0] if q.dim() == 4 else 1, seq_q=q.shape[-3], seq_kv=kv.shape[-3])

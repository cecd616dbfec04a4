"""What eager backends share: the rows of keys that lists of indices name, gathered in chunks that stay in cache.

A row of lists is one query of one KV group. Rows are gathered in chunks sized by the workspace setting, so
`[batch, seq_q, topk, width]` never exists.

NOTE [Invalid slots point at a selected row]
    A slot that names no key still has to gather something. It gathers a row that the same query attends to anyway
    (its `anchor`), with weight exactly 0. So unselected keys are never read, and 0 * NaN can only arise where the
    query's own row is poisoned already; zero-filling the gathered tile would cost another pass over it. A query without
    any valid slot has no anchor: it gathers row 0 and its results are overwritten. In a backward, invalid slots scatter
    into one spare row of the accumulator that is then dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_ops import settings


@dataclass(frozen=True)
class Chunk:
    """A run of rows with the keys that they name, in the compute dtype."""

    span: slice  # of the flattened rows
    groups: torch.Tensor  # [rows] KV group of each row
    keys: torch.Tensor  # [rows, topk, width], a buffer that the next chunk overwrites
    invalid: torch.Tensor  # [rows, 1, topk] bool
    empty: torch.Tensor  # [rows, 1, 1] bool, rows without a valid slot
    scatter_to: torch.Tensor  # [rows * topk] destination row of each slot's gradient; the spare row where invalid


@dataclass(frozen=True)
class Lists(ABC):
    """Lists that name keys, (batch, query, group) flattened into rows; what a key is, a derived class says."""

    indices: torch.Tensor  # [rows, topk]
    topk_length: torch.Tensor | None  # [batch * seq_q]
    compute_dtype: torch.dtype
    seq_q: int
    kv_group: int

    @property
    @abstractmethod
    def num_keys(self) -> int:
        """Keys there are, of all batch elements and groups."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers of a key."""

    @abstractmethod
    def named(self, indices: torch.Tensor, token: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Return the keys that int64 `indices` `[rows, topk]` of these tokens and groups name, -1 where they name none.

        Keys are numbered from 0; `topk_length` is not this method's business.
        """

    @abstractmethod
    def gather(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        """Write the keys of these numbers `[n]`, none of them negative, into `out` `[n, width]`."""

    @property
    def is_empty(self) -> bool:
        """True when no slot can be valid."""
        return self.indices.numel() == 0 or self.num_keys == 0

    def chunks(self, numbers_per_slot: int) -> Iterator[Chunk]:
        """Yield every row once, in order.

        A chunk's gathered keys, and `numbers_per_slot` more numbers for every slot, fit the workspace setting.
        """
        num_rows, topk = self.indices.shape
        row_bytes = topk * (self.width + numbers_per_slot) * self.compute_dtype.itemsize
        size = max(1, min(num_rows, _workspace_bytes() // max(1, row_bytes)))
        key_buffer = self.indices.new_empty((size * topk, self.width), dtype=self.compute_dtype)
        for start in range(0, num_rows, size):
            yield self._chunk(slice(start, min(start + size, num_rows)), key_buffer)

    def _chunk(self, span: slice, key_buffer: torch.Tensor) -> Chunk:
        row = torch.arange(span.start, span.stop, device=self.indices.device)
        token, group = row // self.kv_group, row % self.kv_group

        key = self.named(self.indices[span].long(), token, group)
        if self.topk_length is not None:
            slot = torch.arange(key.shape[1], device=key.device)
            key = key.where(slot < self.topk_length[token].unsqueeze(1), -1)
        valid = key >= 0
        anchor = key.amax(dim=1, keepdim=True)

        gather_from = torch.where(valid, key, anchor.clamp_min(0)).flatten()
        keys = key_buffer[: gather_from.numel()]
        self.gather(gather_from, keys)
        return Chunk(
            span=span,
            groups=group,
            keys=keys.view(*key.shape, keys.shape[-1]),
            invalid=~valid.unsqueeze(1),
            empty=(anchor < 0).unsqueeze(2),
            scatter_to=torch.where(valid, key, self.num_keys).flatten(),
        )


@dataclass(frozen=True)
class NamedKeys(Lists):
    """Lists of positions in a tensor of keys, (batch, key, group) flattened."""

    keys: torch.Tensor  # [batch * seq_kv * kv_group, width]
    seq_kv: int

    @classmethod
    def of(
        cls,
        keys: torch.Tensor,
        indices: torch.Tensor,
        topk_length: torch.Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> NamedKeys:
        """Flatten `keys` `[..., seq_kv, kv_group, width]` and `indices` `[..., seq_q, kv_group, topk]`.

        `dtype` is what to compute in, by default `compute_dtype` of the keys.
        """
        seq_q, kv_group, topk = indices.shape[-3:]
        key_rows = keys.reshape(keys.shape[:-1].numel(), keys.shape[-1])
        # Low precision is widened after each gather, or once before all of them if that is less work and little memory.
        widened_bytes = key_rows.numel() * torch.float32.itemsize
        if keys.dtype.itemsize == 2 and len(key_rows) <= indices.numel() and widened_bytes <= 8 * _workspace_bytes():
            key_rows = key_rows.float()
        return cls(
            keys=key_rows,
            indices=indices.reshape(indices.shape[:-1].numel(), topk),
            topk_length=None if topk_length is None else topk_length.reshape(-1),
            compute_dtype=dtype or compute_dtype(keys.dtype),
            seq_q=seq_q,
            seq_kv=keys.shape[-3],
            kv_group=kv_group,
        )

    @property
    def num_keys(self) -> int:
        """See `Lists.num_keys`."""
        return len(self.keys)

    @property
    def width(self) -> int:
        """See `Lists.width`."""
        return self.keys.shape[-1]

    def accumulator(self) -> torch.Tensor:
        """Return zeros for the gradient of every key, and one spare row that takes what invalid slots scatter."""
        return self.keys.new_zeros((len(self.keys) + 1, self.keys.shape[-1]), dtype=self.compute_dtype)

    def named(self, indices: torch.Tensor, token: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """See `Lists.named`; positions count within the batch element of a token."""
        first_key = (token // self.seq_q) * (self.seq_kv * self.kv_group) + group
        valid = (indices >= 0) & (indices < self.seq_kv)
        return torch.where(valid, indices * self.kv_group + first_key.unsqueeze(1), -1)

    def gather(self, keys: torch.Tensor, out: torch.Tensor) -> None:
        """See `Lists.gather`."""
        if self.keys.dtype == out.dtype:
            torch.index_select(self.keys, 0, keys, out=out)
        else:
            out.copy_(self.keys.index_select(0, keys))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what eager backends compute in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unrounded_dtype(device: torch.device) -> torch.dtype:
    """Return what multiplies fp32 factors unrounded: fp32, and fp64 where torch was told to round fp32 factors.

    That setting (TF32, or bf16 in oneDNN) belongs to the process: switching it off for a while would race with other
    threads. fp64 factors are never rounded.
    """
    library = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    is_unrounded = library.matmul.fp32_precision in ("none", "ieee")
    return torch.float32 if is_unrounded else torch.float64


def _workspace_bytes() -> int:
    return settings.current().eager_workspace_mb * 2**20

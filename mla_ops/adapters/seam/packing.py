"""Question 2, the rows: where a packed batch keeps its sequences, and which rotary table its rows need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mla_ops.adapters.seam.metadata import MLALayerMeta
from mla_ops.device import is_readable
from mla_ops.errors import MLALayoutError

Layout = Literal["bshd", "sbhd", "bhsd", "thd"]


@dataclass(frozen=True, kw_only=True)
class PackedSeq:
    """Sequences laid end to end without a batch dimension, one per segment.

    Raises `MLALayoutError` on fields that cannot be. How many rows there are is not a field: the tensors say so.
    """

    cu_seqlens_q: torch.Tensor  # [segments + 1], int32 or int64: running total of the query lengths, from 0
    cu_seqlens_kv: torch.Tensor  # the same for the keys
    max_seqlen_q: int  # of the longest segment; on the host, because it plans the rotary table
    max_seqlen_kv: int
    # With gaps between the segments: where each one starts. The unpadded totals then give the lengths alone.
    cu_seqlens_q_padded: torch.Tensor | None = None
    cu_seqlens_kv_padded: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("max_seqlen_q", "max_seqlen_kv"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                raise MLALayoutError(
                    f"packed sequence has {name}={value!r}, needs an int: without it the length of the rotary table "
                    "cannot be planned; pass the length of the longest segment"
                )
        first = self.cu_seqlens_q
        for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
            cu_seqlens = getattr(self, name)
            if cu_seqlens is None and name.endswith("_padded"):
                continue
            if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
                got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
                raise MLALayoutError(f"{name} must be an int32 or int64 tensor, got {got}")
            if cu_seqlens.device != first.device:
                raise MLALayoutError(
                    f"{name} must be on the device of cu_seqlens_q ({first.device}), got {cu_seqlens.device}"
                )
            if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.shape != first.shape:
                raise MLALayoutError(
                    f"{name} must be [segments + 1] with at least one segment and as long as cu_seqlens_q, got "
                    f"{list(cu_seqlens.shape)} and {list(first.shape)}"
                )

    @property
    def rotary_len(self) -> int:
        """Rows of a rotary table that serves every segment; a batch of gaps alone has rows to rotate too."""
        return max(self.max_seqlen_q, self.max_seqlen_kv, 1)

    def segment_of_row(self, rows: int) -> torch.Tensor:
        """Return int64 `[rows]`: the segment of each query row; rows of a gap belong to the segment before it."""
        ends = self._bounds("q")[1:]
        row = torch.arange(rows, device=ends.device, dtype=ends.dtype)
        # Rows beyond the last segment, which a check refuses where values can be read, must not index past the table.
        return torch.searchsorted(ends, row, right=True).clamp_max(ends.shape[0] - 1)

    def position_of_row(self, rows: int) -> torch.Tensor:
        """Return int64 `[rows]`: each query row's position in its segment; in a gap, any of the rotary table."""
        segment = self.segment_of_row(rows)
        start, length = self.start_and_length("q")
        positions = torch.arange(rows, device=segment.device) - start[segment]
        # A gap may be longer than what the table has left.
        return torch.where(positions < length[segment], positions, positions.clamp_max(self.rotary_len - 1))

    def start_and_length(self, side: Literal["q", "kv"]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int64 `[segments]` each: the first row of every segment and how many rows it has."""
        cu_seqlens = self.cu_seqlens_q if side == "q" else self.cu_seqlens_kv
        return self._bounds(side)[:-1].long(), cu_seqlens.diff().long()

    def key_bounds(self, rows: int, *, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return int64 `[rows]` each: the first key that a query row may see, and one past the last one.

        Causality is within the segment, whose last query meets its last key; a row of a gap sees none.
        """
        segment = self.segment_of_row(rows)
        start_q, length_q = (bound[segment] for bound in self.start_and_length("q"))
        start, length = (bound[segment] for bound in self.start_and_length("kv"))
        row = torch.arange(rows, device=segment.device) - start_q
        seen = row + 1 + length - length_q if causal else length
        return start, start + torch.where(row < length_q, seen, 0)

    def check(self, rows_q: int, rows_kv: int | None = None) -> None:
        """Raise `MLALayoutError` unless the totals describe that many rows (of keys: None is any number).

        Reads values, so it does nothing while compiling or capturing.
        """
        if not is_readable(self.cu_seqlens_q):
            return
        self._check_side("q", "query", rows_q, self.max_seqlen_q)
        self._check_side("kv", "key", rows_kv, self.max_seqlen_kv)

    def _check_side(self, side: Literal["q", "kv"], what: str, rows: int | None, longest: int) -> None:
        is_padded = (self.cu_seqlens_q_padded if side == "q" else self.cu_seqlens_kv_padded) is not None
        name = f"cu_seqlens_{side}_padded" if is_padded else f"cu_seqlens_{side}"
        bounds = self._bounds(side).tolist()
        lengths = self.start_and_length(side)[1].tolist()
        if rows is not None and bounds[-1] != rows:
            raise MLALayoutError(
                f"{name} ends at {bounds[-1]} but {what} has {rows} rows; a packed batch is covered from its first row "
                "to its last"
            )
        if bounds[0] != 0 or min(lengths) < 0:
            raise MLALayoutError(f"{name} must start at 0 and never fall, got {bounds}")
        if any(length > end - start for length, start, end in zip(lengths, bounds, bounds[1:], strict=False)):
            raise MLALayoutError(f"{name} leaves too little room: lengths {lengths}, starts {bounds[:-1]}")
        if max(lengths) > longest:
            raise MLALayoutError(
                f"max_seqlen_{side} is {longest} but the longest segment has {max(lengths)} rows: the rotary table "
                "would end before the segment does"
            )

    def _bounds(self, side: Literal["q", "kv"]) -> torch.Tensor:
        if side == "q":
            return self.cu_seqlens_q if self.cu_seqlens_q_padded is None else self.cu_seqlens_q_padded
        return self.cu_seqlens_kv if self.cu_seqlens_kv_padded is None else self.cu_seqlens_kv_padded


@dataclass(frozen=True, kw_only=True)
class PositionPlan:
    """What a caller that applies rotary embedding itself must prepare before it does."""

    rotary_len: int  # rows of the table
    freqs_shape: tuple[int, ...]  # of a table that broadcasts against the rope part of a query in its layout
    # int64 [rows], each row's position in its own sequence; rows of a gap have any of the table. None under context
    # parallelism: which rows a rank holds is the communication layer's knowledge.
    positions: torch.Tensor | None
    segment_of_row: torch.Tensor | None  # int64 [rows] of a packed batch

    def check_freqs(self, freqs: torch.Tensor) -> None:
        """Raise `MLALayoutError` unless a rotary table has the planned shape; before it is applied."""
        if tuple(freqs.shape) != self.freqs_shape:
            raise MLALayoutError(
                f"rotary table has shape {tuple(freqs.shape)}, planned is {self.freqs_shape}: it spans the longest "
                f"sequence ({self.rotary_len} rows), neither the rows of a packed batch nor one rank's share of them"
            )


def plan_positions(
    meta: MLALayerMeta,
    layout: Layout,
    rows: int,
    packed: PackedSeq | None = None,
    *,
    batch: int = 1,
    cp_size: int = 1,
    device: torch.device | None = None,
    rotary_pos_emb: object = None,
    check: bool = True,
) -> PositionPlan:
    """Plan the rotary table of a layer from sizes alone, before any rotary call.

    Args:
        meta: the layer.
        layout: of its query.
        rows: query rows on this rank; in "thd" too, where `cp_size` times as many make the packed batch.
        packed: the packed batch, exactly when `layout` is "thd".
        batch: batch size of the hidden states.
        cp_size: ranks that share each sequence. A packed table spans the longest segment whatever `cp_size` is.
        device: of `positions`; default: that of `packed`, else the CPU.
        rotary_pos_emb: what a generic builder hands every layer. MLA rotates its rope columns only and makes its own
            table, so anything but None is refused.
        check: in eager, hold the totals of `packed` against `rows`; this reads them on the host.

    Raises:
        MLALayoutError: layout, batch and packed sequence disagree, or a finished rotary embedding came along.
    """
    check_layout(layout, packed)
    if rotary_pos_emb is not None:
        raise MLALayoutError(
            "rotary_pos_emb was passed to an MLA layer, which rotates only its qk_rope_head_dim columns and plans its "
            "own table; drop the argument (in Megatron: build the layer through adapt_spec)"
        )
    if packed is None:
        rotary_len = rows * cp_size
        positions = torch.arange(rows, device=device) if cp_size == 1 else None
        return PositionPlan(
            rotary_len=rotary_len,
            freqs_shape=_freqs_shape(layout, rotary_len, meta.qk_rope_head_dim),
            positions=positions,
            segment_of_row=None,
        )
    if batch != 1:
        raise MLALayoutError(
            f"a packed batch has no batch dimension, got batch={batch}; concatenate the rows and their cu_seqlens"
        )
    if check:
        packed.check(rows * cp_size)
    return PositionPlan(
        rotary_len=packed.rotary_len,
        freqs_shape=_freqs_shape(layout, packed.rotary_len, meta.qk_rope_head_dim),
        positions=packed.position_of_row(rows) if cp_size == 1 else None,
        segment_of_row=packed.segment_of_row(rows) if cp_size == 1 else None,
    )


def check_layout(layout: str, packed: PackedSeq | None) -> None:
    """Raise `MLALayoutError` unless `layout` is known and a packed sequence comes with "thd" and only with it."""
    if layout not in get_args(Layout):
        raise MLALayoutError(
            f"layout must be one of {', '.join(map(repr, get_args(Layout)))}, got {layout!r}; it is stated, never "
            "guessed from the rank of a tensor"
        )
    if packed is None and layout == "thd":
        raise MLALayoutError("layout 'thd' needs its PackedSeq, got none; a batch without one has another layout")
    if packed is not None and layout != "thd":
        raise MLALayoutError(
            f"a packed sequence came with layout {layout!r}, whose rows have a batch dimension; pass layout='thd' and "
            "tensors without one, or no packed sequence"
        )


def _freqs_shape(layout: Layout, length: int, width: int) -> tuple[int, ...]:
    return {
        "bshd": (1, length, 1, width),
        "sbhd": (length, 1, 1, width),
        "bhsd": (1, 1, length, width),
        "thd": (length, 1, width),
    }[layout]

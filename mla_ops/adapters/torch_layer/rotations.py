"""What turns rows: rotary position embedding with the positions that it takes, and the Hadamard rotation."""

from __future__ import annotations

from typing import Literal

import torch

from mla_ops.adapters.seam import PackedSeq
from mla_ops.errors import MLALayoutError

# Which channels turn together: "half" pairs channel i with channel i + width / 2, "interleaved" 2i with 2i + 1.
RopeLayout = Literal["half", "interleaved"]


def rotate(
    x: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0, *, layout: RopeLayout = "half"
) -> torch.Tensor:
    """Apply rotary position embedding.

    Checkpoints are made for one layout: DeepSeek's attention pairs neighbouring channels, its indexer halves. Weights
    for the other layout need the rope columns of their projections permuted.

    Args:
        x: `[..., rows, heads, width]`, an even width, which may be 0.
        positions: `[rows]` or `[..., rows]`, integers.
        theta: the base of the frequencies.
        layout: "half" pairs channel `i` with channel `i + width / 2`, "interleaved" channel `2i` with `2i + 1`.
    """
    half = x.shape[-1] // 2
    # Angles in fp32 at least: bf16 cannot tell position 257 from 256.
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / max(half, 1))
    angle = positions[..., None, None].to(dtype) * frequency  # [..., rows, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    if layout == "half":
        first, second = x[..., :half], x[..., half:]
    else:
        first, second = x[..., 0::2], x[..., 1::2]
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1) if layout == "half" else torch.stack(turned, dim=-1).flatten(-2)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Multiply rows by the Hadamard matrix of their width, a power of two, times `width ** -0.5`: a rotation.

    It keeps every product of two rows and spreads a channel's outliers over all channels before they are quantised.
    """
    signs = x.new_ones(1, 1)
    while signs.shape[0] < x.shape[-1]:
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    scale: float = x.shape[-1] ** -0.5
    return (x @ signs) * scale


def positions_of(
    hidden: torch.Tensor, positions: torch.Tensor | None, packed: PackedSeq | None, *, check: bool
) -> torch.Tensor:
    """Return the position of each row of `hidden` in its sequence, `[rows]` or as given: what `project` rotates by.

    Args:
        hidden: `[batch, rows, hidden_size]`, or `[rows, hidden_size]` with `packed`.
        positions: `[rows]` or `[batch, rows]`; None counts each row from the start of its sequence.
        packed: the segments of a batch laid end to end.
        check: in eager, hold the totals of `packed` against the rows; this reads them on the host.

    Raises:
        MLALayoutError: a shape, or what `packed` describes, does not fit `hidden`.
    """
    if hidden.dim() != (3 if packed is None else 2):
        wanted = "[batch, rows, hidden_size]" if packed is None else "[rows, hidden_size] (it is packed)"
        raise MLALayoutError(f"hidden must be {wanted}, got {list(hidden.shape)}")
    *batch, rows, _ = hidden.shape
    if positions is not None:
        _check_positions(positions, batch, rows)
        return positions
    if packed is None:
        return torch.arange(rows, device=hidden.device)
    if check:
        packed.check(rows)
    return packed.position_of_row(rows)


def _check_positions(positions: torch.Tensor, batch: list[int], rows: int) -> None:
    is_one_row = positions.dim() == 1
    is_batch = positions.dim() == 2 and len(batch) == 1 and positions.shape[0] in (1, *batch)
    if not (is_one_row or is_batch) or positions.shape[-1] != rows:
        wanted = f"[{rows}] or {[*batch, rows]}" if batch else f"[{rows}] (it is packed)"
        raise MLALayoutError(
            f"positions must be {wanted}, one for each row of hidden, got {list(positions.shape)}; pass none to count "
            "each row from the start of its sequence"
        )

"""Question 2, the tensors: any layout, form and index policy brought to the one call the operator takes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from mla_ops.adapters.seam.metadata import MLALayerMeta
from mla_ops.adapters.seam.packing import Layout, PackedSeq, check_layout
from mla_ops.device import is_readable
from mla_ops.errors import MLALayoutError

InvalidSlots = Literal["sentinel", "mask", "length"]  # how the caller marks slots that name no key
Origin = Literal["global", "segment"]  # whether an index counts the packed rows or those of its own segment

# Hidden by an additive mask: exp(-1e4) is 0 in every dtype, and no bias in use is that large.
_HIDDEN_BIAS = -1e4
_PATTERNS = {"bshd": "[b, s, {}]", "sbhd": "[s, b, {}]", "thd": "[t, {}]"}


@dataclass(frozen=True, kw_only=True)
class SparseCall:
    """The operator's input in its canonical form, and the way back to the caller's.

    `indices` holds -1 in every slot that names no key, so nothing else needs to know the caller's policy.
    """

    q: torch.Tensor  # [B, S, H, d_total]
    kv: torch.Tensor  # [B, T, G, d_total]
    indices: torch.Tensor  # int32 [B, S, G, K], global rows of kv
    softmax_scale: float
    d_v: int
    out_width: int  # what the caller wants back; more than d_v when it handed in a padded value
    layout: Layout

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """Turn the operator's `out` `[B, S, H, d_v]` into the caller's layout and width, as a view where it can be."""
        if self.out_width != self.d_v:
            out = torch.nn.functional.pad(out, (0, self.out_width - self.d_v))
        if self.layout == "thd":
            return out.squeeze(0)
        return _swap_to_bshd(out, self.layout)  # its own inverse


def normalize_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    indices: torch.Tensor,
    *,
    meta: MLALayerMeta,
    layout: Layout,
    invalid: InvalidSlots,
    packed: PackedSeq | None = None,
    mask: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    origin: Origin = "global",
    check: bool = True,
) -> SparseCall:
    """Bring a framework's tensors to the operator's form; nothing is copied but the indices (and the expanded rows).

    Sizes in the shapes below are those of "bshd"; "sbhd" and "bhsd" permute query, key and value (never indices, mask
    or topk_length, which are batch first always), and "thd" drops the batch dimension of all of them.

    Args:
        query: `[B, S, heads, d_total]` absorbed, or `[B, S, heads, k_channels]` expanded.
        key: `[B, T, kv_group, d_total]` absorbed: latent rows. Expanded: `[B, T, G, k_channels]`, where G is read off
            the tensor.
        value: None in the absorbed form (the value is the key's first `kv_lora_rank` columns). Expanded: `[B, T, G,
            v_channels]`, or zero-padded to `k_channels`, as Megatron does for packed batches.
        indices: `[B, S, K]`, one list for all groups, or `[B, S, G, K]`; int32 or int64, in any order.
        meta: the layer.
        layout: of query, key and value; stated, never guessed.
        invalid: how unusable slots are marked. "sentinel": by -1. "mask": by `mask`. "length": by `topk_length`. A -1
            is unusable under each of them.
        packed: the packed batch, exactly when `layout` is "thd".
        mask: `[B, S, T]` or `[B, 1, S, T]` (`[S, T]` in "thd"), batch may be 1; bool (True is visible) or additive
            float (0 is visible, -1e4 and below is hidden).
        topk_length: `[B, S]`; the first slots of a row that count.
        origin: "segment" when an index counts from the start of its own segment of a packed batch.
        check: in eager, raise on indices that name no row of their sequence; this reads them on the host. Such slots
            are never used: where nothing can be read (compiling, capturing) or `check` is False, they become -1.

    Raises:
        MLALayoutError: layout, shapes, policy, packed sequence or (see `check`) indices disagree.
    """
    check_layout(layout, packed)
    _check_policy(invalid, mask, topk_length, origin, packed)
    _check_shapes(query, key, value, meta, layout)
    q, kv = _rows(_to_bshd(query, layout), _to_bshd(key, layout), value, meta, layout, check)
    if q.shape[0] != kv.shape[0]:
        raise MLALayoutError(f"query and key have batch {q.shape[0]} and {kv.shape[0]}; they must agree")
    # Eager only: in a graph this would narrow the range of a symbolic length.
    if not torch.compiler.is_compiling() and kv.shape[1] >= 2**31:
        raise MLALayoutError(f"key must have fewer than 2**31 rows, got {kv.shape[1]}: indices are brought to int32")
    if packed is not None:
        if packed.cu_seqlens_kv.device != indices.device:
            raise MLALayoutError(
                f"cu_seqlens must be on the device of indices ({indices.device}), got {packed.cu_seqlens_kv.device}"
            )
        if check:
            packed.check(q.shape[1], kv.shape[1])

    if layout == "thd":
        indices, mask, topk_length = (
            indices.unsqueeze(0),
            None if mask is None else mask.unsqueeze(0),
            None if topk_length is None else topk_length.unsqueeze(0),
        )
    indices, mask = _check_index_shapes(indices, mask, topk_length, q, kv, layout)
    readable = check and is_readable(indices)
    canonical = _canonical_indices(indices, mask, topk_length, kv.shape[1], packed, origin, readable)
    return SparseCall(
        q=q,
        kv=kv,
        indices=canonical.expand(-1, -1, kv.shape[2], -1),  # one list for all groups stays one list
        softmax_scale=meta.softmax_scale,
        d_v=meta.d_v,
        out_width=meta.d_v if value is None or meta.form == "absorbed" else value.shape[-1],
        layout=layout,
    )


def _swap_to_bshd(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    swap = {"bshd": (0, 0), "sbhd": (0, 1), "bhsd": (1, 2)}[layout]
    return tensor.transpose(*swap)


def _to_bshd(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    return tensor.unsqueeze(0) if layout == "thd" else _swap_to_bshd(tensor, layout)


def _check_policy(
    invalid: str, mask: torch.Tensor | None, topk_length: torch.Tensor | None, origin: str, packed: PackedSeq | None
) -> None:
    if invalid not in get_args(InvalidSlots):
        raise MLALayoutError(f"invalid must be one of {', '.join(map(repr, get_args(InvalidSlots)))}, got {invalid!r}")
    for name, policy, tensor in (("mask", "mask", mask), ("topk_length", "length", topk_length)):
        if (tensor is not None) != (invalid == policy):
            got = "was passed" if tensor is not None else "was not"
            raise MLALayoutError(
                f"invalid={invalid!r} but {name} {got}: {name} belongs to invalid={policy!r}, and an argument that "
                "nobody reads would be dropped in silence"
            )
    if origin not in get_args(Origin):
        raise MLALayoutError(f"origin must be one of {', '.join(map(repr, get_args(Origin)))}, got {origin!r}")
    if origin == "segment" and packed is None:
        raise MLALayoutError(
            "origin='segment' counts rows from a segment's start and needs a packed sequence; got none"
        )


def _check_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, meta: MLALayerMeta, layout: Layout
) -> None:
    rank = 3 if layout == "thd" else 4
    width = "d_total" if meta.form == "absorbed" else "k_channels"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor is None or tensor.dim() == rank:
            continue
        sizes = {"query": f"heads, {width}", "key": f"kv_group, {width}", "value": "kv_group, v_channels"}[name]
        hint = (
            "a packed batch has no batch dimension: drop it, or pass another layout without packed"
            if layout == "thd"
            else "a packed batch is layout='thd' with its PackedSeq"
        )
        raise MLALayoutError(
            f"layout {layout!r} needs {name} {_pattern(layout, sizes)}, got {tensor.dim()}-D {_sizes(tensor)}; {hint}"
        )
    if meta.form == "absorbed":
        _check_absorbed(query, key, value, meta, layout)
    else:
        _check_expanded(query, key, value, meta, layout)


def _check_absorbed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, meta: MLALayerMeta, layout: Layout
) -> None:
    if value is not None:
        raise MLALayoutError(
            "value must be None in the absorbed form, whose value is the first kv_lora_rank columns of the key; got "
            f"{_sizes(value)}; for per-head values resolve the layer with form='expanded'"
        )
    _check_heads("query", query, meta.heads, "the layer's heads", layout)
    groups = _heads(key, layout)
    if groups != meta.kv_group:
        raise MLALayoutError(
            f"key has {groups} heads but the layer's latent rows are shared by all heads of each of its kv_group="
            f"{meta.kv_group} groups: taking some of them would be silently wrong; pass the latent rows "
            f"{_pattern(layout, f'{meta.kv_group}, {meta.d_total}')}, or resolve the layer with form='expanded'"
        )
    for name, tensor in (("query", query), ("key", key)):
        _check_width(name, tensor, meta.d_total, "d_total = kv_lora_rank + qk_rope_head_dim")


def _check_expanded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, meta: MLALayerMeta, layout: Layout
) -> None:
    if value is None:
        raise MLALayoutError("the expanded form needs a value; got None; for latent rows use form='absorbed'")
    _check_heads("query", query, meta.heads, "the layer's heads", layout)
    groups = _heads(key, layout)
    if groups < 1 or meta.heads % groups:
        raise MLALayoutError(f"the layer's heads ({meta.heads}) must be a multiple of the key's heads, got {groups}")
    if value.shape[:-1] != key.shape[:-1]:
        raise MLALayoutError(f"value must be key but for its width, got {_sizes(value)} and {_sizes(key)}")
    for name, tensor in (("query", query), ("key", key)):
        _check_width(name, tensor, meta.k_channels, "k_channels = qk_nope_head_dim + qk_rope_head_dim")
    if value.shape[-1] not in (meta.v_channels, max(meta.v_channels, meta.k_channels)):
        is_wider = meta.k_channels > meta.v_channels
        padded = f", or zero-padded to k_channels ({meta.k_channels})" if is_wider else ""
        raise MLALayoutError(
            f"value must be v_channels ({meta.v_channels}) wide{padded}, got {value.shape[-1]}; pass the value as wide "
            "as the layer's v_head_dim, or correct the metadata"
        )


def _rows(
    q: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, meta: MLALayerMeta, layout: Layout, check: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the operator's q and kv. Expanded heads become rows [value | key] met by queries [0 | query]: exact."""
    if meta.form == "absorbed" or value is None:
        return q, key
    value = _to_bshd(value, layout)
    value, padding = value[..., : meta.v_channels], value[..., meta.v_channels :]
    if padding.shape[-1] and check and is_readable(padding) and padding.any():
        raise MLALayoutError(
            f"value is wider than v_channels ({meta.v_channels}) and its further columns are not the zeros that pad a "
            "packed batch; the layer's v_head_dim and this value disagree"
        )
    return torch.nn.functional.pad(q, (meta.v_channels, 0)), torch.cat([value, key], dim=-1)


def _check_index_shapes(
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    layout: Layout,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bring the batched indices to `[B, S, G or 1, K]` and mask to `[B, S, T]`, or say which shape they should have."""
    batch, seq_q, seq_kv, groups = q.shape[0], q.shape[1], kv.shape[1], kv.shape[2]
    if indices.dtype not in (torch.int32, torch.int64):
        raise MLALayoutError(f"indices must be int32 or int64, got {indices.dtype}; use indices.to(torch.int32)")
    if indices.dim() == 3:
        indices = indices.unsqueeze(2)
    lead = "[t" if layout == "thd" else "[b, s"
    if indices.dim() != 4 or indices.shape[:2] != (batch, seq_q) or indices.shape[2] not in (1, groups):
        raise MLALayoutError(
            f"indices must be {lead}, K] or {lead}, {groups}, K] with {batch * seq_q} rows in all (batch first, "
            f"whatever the layout of query), got {_sizes(indices)} (with its batch and group) for query rows "
            f"{[batch, seq_q]}"
        )
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise MLALayoutError(f"mask must be bool (True is visible) or additive float (0 is), got {mask.dtype}")
        if mask.dim() == 4 and mask.shape[1] == 1:
            mask = mask.squeeze(1)
        if mask.dim() != 3 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (seq_q, seq_kv):
            raise MLALayoutError(
                f"mask must be [{batch} or 1, {seq_q}, {seq_kv}], one for all heads, got {_sizes(mask)}: indices are "
                "shared by heads and cannot express a mask per head"
            )
    if topk_length is not None and (topk_length.shape != (batch, seq_q) or topk_length.is_floating_point()):
        raise MLALayoutError(f"topk_length must be integer [{batch}, {seq_q}], got {_sizes(topk_length)}")
    return indices, mask


def _canonical_indices(
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    seq_kv: int,
    packed: PackedSeq | None,
    origin: Origin,
    check: bool,
) -> torch.Tensor:
    """Return `indices` as int32, -1 in every slot that is marked unusable or names no row of its sequence."""
    used = indices != -1
    if topk_length is not None:
        slot = torch.arange(indices.shape[-1], device=indices.device)
        used = used & (slot < topk_length[:, :, None, None])
    first: torch.Tensor | int = 0
    last: torch.Tensor | int = seq_kv
    row = indices.long()
    if packed is not None:
        start, length = packed.start_and_length("kv")
        segment = packed.segment_of_row(indices.shape[1])
        first = start[segment][:, None, None]  # [t, 1, 1]
        last = first + length[segment][:, None, None]
        if origin == "segment":
            row = row + first
    inside = (row >= first) & (row < last)
    if mask is not None and seq_kv > 0:
        # Gathered at the selected keys, so a [S, T] mask is read but none is made. Outside rows read any row here.
        at_rows = row.clamp(0, seq_kv - 1).flatten(2)
        seen = mask.expand(row.shape[0], -1, -1).gather(2, at_rows).view(row.shape)
        if mask.dtype != torch.bool:
            if check and ((seen != 0) & (seen > _HIDDEN_BIAS) & used).any():
                raise MLALayoutError(
                    "mask adds finite biases to the logits, which indices cannot express; only 0 (visible) and "
                    f"{_HIDDEN_BIAS} or less (hidden) can"
                )
            seen = seen == 0
        used = used & seen
    if check and (wrong := used & ~inside).any():
        raise _outside(wrong, indices, first, last, packed, origin)
    return torch.where(used & inside, row, -1).to(torch.int32)


def _outside(
    wrong: torch.Tensor,
    indices: torch.Tensor,
    first: torch.Tensor | int,
    last: torch.Tensor | int,
    packed: PackedSeq | None,
    origin: Origin,
) -> MLALayoutError:
    b, s, g, k = wrong.nonzero()[0].tolist()
    at = f"indices[{b}, {s}, {g}, {k}] is {int(indices[b, s, g, k])}"
    count = f"{int(wrong.sum())} such {'slot' if int(wrong.sum()) == 1 else 'slots'}"
    if packed is None:
        return MLALayoutError(f"{at}, outside the {last} rows of key and not -1 ({count})")
    low, high = (int(torch.as_tensor(bound).flatten()[s]) for bound in (first, last))
    if origin == "segment":
        low, high = 0, high - low
    return MLALayoutError(
        f"{at}, outside its segment's rows [{low}, {high}) (origin={origin!r}) and not -1 ({count}): a packed sequence "
        "may only read its own keys; mark unusable slots with -1"
    )


def _heads(tensor: torch.Tensor, layout: Layout) -> int:
    return tensor.shape[1] if layout == "bhsd" else tensor.shape[-2]


def _check_heads(name: str, tensor: torch.Tensor, heads: int, source: str, layout: Layout) -> None:
    if _heads(tensor, layout) != heads:
        raise MLALayoutError(
            f"{name} has {_heads(tensor, layout)} heads, {source} are {heads}; layout {layout!r} is "
            f"{_pattern(layout, 'heads, width')}, got {_sizes(tensor)}; is it another layout?"
        )


def _check_width(name: str, tensor: torch.Tensor, width: int, source: str) -> None:
    if tensor.shape[-1] != width:
        raise MLALayoutError(f"{name} must be {width} wide ({source}), got {_sizes(tensor)}")


def _pattern(layout: Layout, sizes: str) -> str:
    return f"[b, {sizes.replace(', ', ', s, ', 1)}]" if layout == "bhsd" else _PATTERNS[layout].format(sizes)


def _sizes(tensor: torch.Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"

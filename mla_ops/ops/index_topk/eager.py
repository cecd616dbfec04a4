"""The eager backend of index selection: plain torch operators, bounded memory. The CPU's implementation.

A tile of queries walks over blocks of keys; what it keeps are the best keys so far. Neither `[Sq, Skv]` nor
`[Sq, index_heads, Skv]` ever exists, whatever the lengths.

NOTE [Ordinals make a choice unique]
    A score and its position become one int64, an ordinal: above, the bits of the fp32 score, mapped to an integer of
    the same order; below, the position, counted down. All ordinals differ, and the larger one is the better key by
    every rule: a larger score, of equal scores the lower position, NaN above `+inf`. Keys that are not eligible have
    the lowest ordinal, which no score has. So `torch.topk`, which promises nothing about equal values, has one answer,
    and the best of two blocks are the best among the best of each.

NOTE [Every product has the same shape]
    How a matrix product sums may change with its number of rows (MKL: other last bits for 1, 2, 3 or 4 rows than for
    more), and a query must not choose by how many others are there. So a tile always has its full number of rows,
    filled with zeros, and a block of keys begins and ends where `seq_kv` says, whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mla_ops.device import DeviceTraits
from mla_ops.gathering import unrounded_dtype
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)

# What a tile allocates beside the result, at most. The contract allows 256 MiB in all; a CUDA sort keeps some too.
_WORKSPACE_BYTES = 192 * 2**20
# Of one key of one query: fp32 score, int32 bits and their temporaries, int64 ordinal, mask, copies for topk.
_BYTES_PER_KEY = 56
# Keys of a product at most, and numbers in it. On the CPU a product of 256 KiB stays in the L2 cache: 8 x 256 queries
# of 256 keys take 15 ms, and 52 ms with 32 queries a product, most of it spent between operators.
_CPU_BLOCK, _CPU_PRODUCT = 512, 2**16
# Elsewhere launches are what costs.
_BLOCK, _PRODUCT = 4096, 2**20
_MAX_ROWS = 256
# Keys that are compared at once, at least: with a topk of 2048 a fifth of what `torch.topk` reads was kept before.
_MIN_COMPARED = 8192

_LOW_32_BITS = 2**32 - 1
_LOWEST_ORDINAL = -(2**63)

# First eligible key and one past the last, of every query of a tile: [queries, 1] each.
_Eligible = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Tile:
    """How many queries and keys are worked on at once; decided by widths and `seq_kv`, never by how many queries."""

    rows: int  # queries of a tile
    block: int  # keys of a product
    compared: int  # keys that are compared at once, a multiple of `block`
    kept: int  # best keys of each query that are kept

    @classmethod
    def of(cls, call: IndexTopkCall, traits: DeviceTraits) -> Tile:
        """Choose the tile of a call: products of the size above, fewer queries where widths or topk are very large."""
        block, product = (_CPU_BLOCK, _CPU_PRODUCT) if traits.type == "cpu" else (_BLOCK, _PRODUCT)
        seq_kv = call.k_idx.shape[-3]
        rows = min(_MAX_ROWS, product // max(1, min(block, seq_kv)))
        kept = min(call.topk, seq_kv)
        compared = -(-max(_MIN_COMPARED, 2 * kept) // block) * block
        row_bytes = _BYTES_PER_KEY * (compared + kept) + torch.float64.itemsize * call.q_idx.shape[-2:].numel()
        return cls(max(1, min(rows, _WORKSPACE_BYTES // row_bytes)), block, compared, kept)


class EagerBackend:
    """Runs anywhere torch runs; picked by `backend="auto"` on the CPU only."""

    name = "eager"

    def unsupported_reasons(self, problem: IndexTopkProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        if problem.dtype in _SUPPORTED_DTYPES:
            return []
        return [f"dtype is {problem.dtype}, needs bf16, fp16, fp32, fp64 or e4m3; cast q_idx and k_idx"]

    def auto_excluded_reason(self, problem: IndexTopkProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        if traits.type == "cpu":
            return None
        return f'excluded from backend="auto" on {traits.type}; pass backend="eager" to accept a product for each head'

    def plan(self, call: IndexTopkCall, problem: IndexTopkProblem, traits: DeviceTraits) -> Tile:
        """See `Backend.plan`."""
        return Tile.of(call, traits)

    def describe(self, plan: Tile) -> tuple[str, ...]:
        """See `Backend.describe`."""
        return (f"tiles of {plan.rows} queries x {plan.compared} keys, products of {plan.block} keys; nothing to warm",)

    def run(self, call: IndexTopkCall, plan: Tile) -> torch.Tensor:
        """See `Backend.run`."""
        q_idx, k_idx = call.q_idx, call.k_idx
        indices = q_idx.new_full((*q_idx.shape[:-2], k_idx.shape[-2], call.topk), -1, dtype=torch.int32)
        if indices.numel() == 0 or k_idx.shape[-3] == 0:
            return indices
        rows = indices if q_idx.dim() == 4 else indices[None]
        dtype = unrounded_dtype(q_idx.device)
        for b, g, span, visible, eligible in _tiles(call, plan):
            keys = _Keys.of(call, b, g, dtype)
            queries = _Queries.of(call, b, g, span, plan.rows, dtype)
            positions = _best_positions(queries, keys, visible, eligible, plan)
            rows[b, span, g, : positions.shape[-1]] = positions
        return indices


def _tiles(call: IndexTopkCall, plan: Tile) -> Iterator[tuple[int, int, slice, int, _Eligible]]:
    """Yield every (batch element, group, run of queries), how many keys it may see at most, and what is eligible."""
    seq_q, seq_kv, kv_group = call.q_idx.shape[-3], call.k_idx.shape[-3], call.k_idx.shape[-2]
    batch = call.q_idx.shape[0] if call.q_idx.dim() == 4 else 1
    device = call.q_idx.device
    first = torch.zeros(1, dtype=torch.int64, device=device) if call.starts is None else call.starts.long()
    end = torch.full((1,), seq_kv, dtype=torch.int64, device=device) if call.ends is None else call.ends.long()
    if call.causal:
        end = torch.minimum(end, torch.arange(seq_q, device=device) + (seq_kv - seq_q + 1))
    first, end = first.expand(batch, seq_q), end.expand(batch, seq_q)
    for b in range(batch):
        for start in range(0, seq_q, plan.rows):
            span = slice(start, min(start + plan.rows, seq_q))
            visible = max(0, span.stop + seq_kv - seq_q) if call.causal else seq_kv
            eligible = first[b, span].unsqueeze(1), end[b, span].unsqueeze(1)
            for g in range(kv_group):
                yield b, g, span, min(visible, seq_kv), eligible


def _best_positions(queries: _Queries, keys: _Keys, visible: int, eligible: _Eligible, plan: Tile) -> torch.Tensor:
    """Return the positions that each query of a tile chooses, ascending, then -1; int32, at most `plan.kept` of them.

    Keys from `visible` on are eligible for no query of the tile, and are not read beyond the block that it ends in.
    """
    best = torch.empty(queries.count, 0, dtype=torch.int64, device=keys.k.device)
    for start in range(0, visible, plan.compared):
        stop = min(start + plan.compared, -(-visible // plan.block) * plan.block, len(keys.k))
        scores = torch.empty(queries.count, stop - start, dtype=torch.float32, device=keys.k.device)
        for key in range(start, stop, plan.block):
            block = slice(key, min(key + plan.block, len(keys.k)))
            scores[:, block.start - start : block.stop - start] = queries.scores(keys, block)
        ordinals = _ordinals(scores, torch.arange(start, stop, device=keys.k.device), eligible)
        candidates = torch.cat([best, ordinals], dim=1) if start else ordinals
        best = candidates.topk(min(plan.kept, candidates.shape[1]), dim=1, sorted=False).values
    positions = (_LOW_32_BITS - (best & _LOW_32_BITS)).sort(dim=1).values
    return positions.masked_fill_(positions == _LOW_32_BITS, -1).to(torch.int32)


def _ordinals(scores: torch.Tensor, positions: torch.Tensor, eligible: _Eligible) -> torch.Tensor:
    """Return the ordinals `[queries, keys]` of scores of keys at `positions` (NOTE [Ordinals make a choice unique])."""
    bits = scores.add(0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))  # of negative numbers the larger bits are the smaller
    bits.masked_fill_(scores.isnan(), 2**31 - 1)
    ordinals = bits.long().bitwise_left_shift_(32).add_(_LOW_32_BITS - positions)
    first, end = eligible
    return ordinals.masked_fill_((positions < first).logical_or_(positions >= end), _LOWEST_ORDINAL)


@dataclass(frozen=True)
class _Keys:
    """The keys of one batch element and group."""

    k: torch.Tensor  # [seq_kv, index_head_dim], as the call has them
    scale: torch.Tensor | None  # [seq_kv]
    dtype: torch.dtype  # of products

    @classmethod
    def of(cls, call: IndexTopkCall, b: int, g: int, dtype: torch.dtype) -> _Keys:
        k, scale = call.k_idx, call.k_scale
        if k.dim() == 4:
            k, scale = k[b], None if scale is None else scale[b]
        return cls(k[:, g], None if scale is None else scale[:, g], dtype)

    def transposed(self, block: slice) -> torch.Tensor:
        """Return `[index_head_dim, keys]`: always a copy, so that strides and alignment decide no bit of a product."""
        return self.k[block].to(self.dtype, copy=True, memory_format=torch.contiguous_format).t()


@dataclass(frozen=True)
class _Queries:
    """A tile of queries of one group, every number in the dtype it is computed in."""

    # [heads, rows of a tile, index_head_dim], zeros from `count` on (NOTE [Every product has the same shape])
    q: torch.Tensor
    weights: torch.Tensor  # [heads, count, 1], fp32
    count: int
    relu: bool

    @classmethod
    def of(cls, call: IndexTopkCall, b: int, g: int, span: slice, rows: int, dtype: torch.dtype) -> _Queries:
        q, weights = call.q_idx, call.weights
        if q.dim() == 4:
            q, weights = q[b], weights[b]
        heads = q.shape[1] // call.k_idx.shape[-2]
        mine = slice(g * heads, (g + 1) * heads)
        count = span.stop - span.start
        tile = torch.zeros(heads, rows, q.shape[-1], dtype=dtype, device=q.device)
        tile[:, :count] = q[span, mine].transpose(0, 1)
        return cls(tile, weights[span, mine].t().unsqueeze(2).float(), count, call.relu)

    def scores(self, keys: _Keys, block: slice) -> torch.Tensor:
        """Return fp32 scores `[count, keys of the block]`, summed over the heads one after the other."""
        k = keys.transposed(block)
        scores = torch.zeros(self.count, k.shape[1], dtype=torch.float32, device=k.device)
        for q, weight in zip(self.q, self.weights, strict=True):
            product = torch.mm(q, k)[: self.count].float()
            if self.relu:
                product.relu_()
            scores.add_(product.mul_(weight))
        return scores if keys.scale is None else scores.mul_(keys.scale[block])

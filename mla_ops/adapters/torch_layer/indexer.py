"""The lightning indexer of DeepSeek-V3.2 as a plain `torch.nn` layer: what selects the keys of sparse attention."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch
from torch import nn

from mla_ops.adapters.seam import PackedSeq
from mla_ops.adapters.torch_layer.rotations import RopeLayout, hadamard, positions_of, rotate
from mla_ops.api import index_loss, index_loss_dense, index_scores, index_topk
from mla_ops.errors import MLALayoutError, MLAMetadataError

KeyNorm = Literal["layer", "rms", "none"]

# The largest e4m3 number, and the magnitude below which DeepSeek's kernels treat a row as if it were larger.
_E4M3_MAX = 448.0
_MIN_AMAX = 1e-4


def to_e4m3(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows to FP8 with a power of two as the scale of each, as DeepSeek-V3.2's indexer does.

    Args:
        rows: `[..., width]`, any floating dtype.

    Returns:
        `[..., width]` float8_e4m3fn and `[...]` fp32: rows are about `quantised * scale`. Neither has a gradient.
    """
    exact = rows.detach().float()
    ratio = exact.abs().amax(dim=-1).clamp_min(_MIN_AMAX) / _E4M3_MAX
    # In the bits of a positive fp32 number: carry any mantissa into the exponent, then drop the mantissa.
    scale = ((ratio.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return (exact / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


class Indexer(nn.Module):
    """Scores every key that a query may see and names the best `topk`.

        score[t, s] = sum over index heads j of weights[t, j] * relu(<q_idx[t, j], k_idx[s]>)

    `forward` is `project`, then `select`; call the two yourself to keep index keys in a cache. The indexer learns from
    `loss`, which pulls its scores towards the attention on the selected keys, and in a warm-up from `dense_loss`, which
    does so on all keys. Compiles without a graph break, one
    graph for every length above 1 when they are dynamic. The defaults are DeepSeek-V3.2's but for `query_size`,
    `qk_rope_head_dim`, `use_hadamard` and `use_fp8`, which it has.

    Args:
        hidden_size: width of the hidden states.
        topk: keys per query.
        index_heads: heads that score; they share one key per token.
        index_head_dim: width of an index query and key.
        qk_rope_head_dim: leading channels that rotate with the position; even, 0 for none.
        query_size: width of what queries are projected from, the attention's query latent for instance; None for the
            hidden states.
        key_norm: "layer" (LayerNorm), "rms" or "none".
        norm_eps: what that norm adds to the variance or the mean square.
        rope_theta: the base of the rotary frequencies.
        rope_layout: "half" pairs channel `i` with `i + qk_rope_head_dim / 2`, "interleaved" neighbours. DeepSeek's
            indexer has "half", its attention "interleaved"; GLM-5's indexer has "interleaved".
        use_hadamard: rotate queries and keys by the Hadamard matrix, which matters for FP8 only; `index_head_dim` must
            be a power of two.
        use_fp8: select on queries and keys in FP8, one scale per row; `scores` and `loss` stay in the rows' dtype.
        relu: whether products pass through ReLU; a few GLM-5 ports leave it out.
        detach_input: cut hidden states and `query` off the graph, so that the indexer's loss trains the indexer only.
        backend: which backend runs the operators; a named one never falls back.
        check_packed: in eager, hold the totals of `packed` against the rows. That reads them on the host, once a call.
        device: where the parameters are made; on "meta", `to_empty` and each module's `reset_parameters` fill them.
        dtype: of the parameters.

    Raises:
        MLAMetadataError: a size or an option cannot be; all of them are named at once.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        topk: int,
        index_heads: int,
        index_head_dim: int,
        qk_rope_head_dim: int = 0,
        query_size: int | None = None,
        key_norm: KeyNorm = "layer",
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_layout: RopeLayout = "half",
        use_hadamard: bool = False,
        use_fp8: bool = False,
        relu: bool = True,
        detach_input: bool = True,
        backend: str = "auto",
        check_packed: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        bad = [
            f"{name} must be at least 1, got {size}"
            for name, size in (("topk", topk), ("index_heads", index_heads), ("index_head_dim", index_head_dim))
            if size < 1
        ]
        if qk_rope_head_dim % 2 or not 0 <= qk_rope_head_dim <= max(index_head_dim, 0):
            bad.append(f"qk_rope_head_dim must be even and at most index_head_dim, got {qk_rope_head_dim}")
        for name, option, known in (("key_norm", key_norm, KeyNorm), ("rope_layout", rope_layout, RopeLayout)):
            if option not in get_args(known):
                bad.append(f"{name} must be one of {', '.join(map(repr, get_args(known)))}, got {option!r}")
        if use_hadamard and index_head_dim & (index_head_dim - 1):
            bad.append(f"index_head_dim must be a power of two with use_hadamard, got {index_head_dim}")
        if bad:
            raise MLAMetadataError(f"Indexer: {'; '.join(bad)}", bad=tuple(bad))
        self.topk = topk
        self.index_heads = index_heads
        self.index_head_dim = index_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.query_size = query_size
        self.rope_theta = rope_theta
        self.rope_layout: RopeLayout = rope_layout
        self.use_hadamard = use_hadamard
        self.use_fp8 = use_fp8
        self.relu = relu
        self.detach_input = detach_input
        self.backend = backend
        self.check_packed = check_packed
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.q_proj = linear(hidden_size if query_size is None else query_size, index_heads * index_head_dim)
        self.k_proj = linear(hidden_size, index_head_dim)
        self.k_norm: nn.Module = nn.Identity()
        if key_norm != "none":
            self.k_norm = norms[key_norm](index_head_dim, eps=norm_eps, device=device, dtype=dtype)
        self.weights_proj = linear(hidden_size, index_heads)

    def extra_repr(self) -> str:
        """Return what the printed submodules do not tell."""
        return (
            f"topk={self.topk}, index_heads={self.index_heads}, index_head_dim={self.index_head_dim}, "
            f"qk_rope_head_dim={self.qk_rope_head_dim}, rope_layout={self.rope_layout!r}, "
            f"rope_theta={self.rope_theta:g}, use_hadamard={self.use_hadamard}, use_fp8={self.use_fp8}, "
            f"relu={self.relu}, detach_input={self.detach_input}, backend={self.backend!r}"
        )

    def forward(
        self,
        hidden: torch.Tensor,
        *,
        query: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        packed: PackedSeq | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        """Select `topk` rows of `hidden` for each of its rows.

        Args:
            hidden: `[batch, rows, hidden_size]`, or `[rows, hidden_size]` with `packed`.
            query: `[..., rows, query_size]`, exactly when the layer has a `query_size`.
            positions: `[rows]` or `[batch, rows]`, of each row in its sequence; default: counted from its start.
            packed: the segments of a batch laid end to end; each one selects among its own rows only.
            causal: whether a row sees itself and earlier ones only.

        Returns:
            `[..., rows, 1, topk]` int32, what `MLASparseAttention` takes: ascending, then -1 where there are fewer than
            `topk`. With `packed` they count the rows of all segments (its `origin="global"`).

        Raises:
            MLALayoutError: the arguments disagree.
        """
        rows = self.project(hidden, query=query, positions=positions, packed=packed)
        return self.select(*rows, packed=packed, causal=causal)

    def project(
        self,
        hidden: torch.Tensor,
        *,
        query: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        packed: PackedSeq | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what the operators take: `q_idx`, `k_idx` and `weights`. Arguments as in `forward`.

        They are `[..., rows, index_heads, index_head_dim]`, `[..., rows, 1, index_head_dim]`, rotated, and
        `[..., rows, index_heads]` in fp32 with `(index_heads * index_head_dim) ** -0.5` folded in. `k_idx` is what a
        decoding cache keeps.
        """
        positions = positions_of(hidden, positions, packed, check=self.check_packed)
        query = self._query(hidden, query)
        if self.detach_input:
            hidden, query = hidden.detach(), query.detach()
        q_idx = self.q_proj(query).unflatten(-1, (self.index_heads, self.index_head_dim))
        # Under autocast a norm returns fp32 where a projection returns the dtype of autocast.
        k_idx = self.k_norm(self.k_proj(hidden)).to(q_idx.dtype).unsqueeze(-2)
        weights = self.weights_proj(hidden)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        scale = (self.index_heads * self.index_head_dim) ** -0.5
        return self._turn(q_idx, positions), self._turn(k_idx, positions), weights * scale

    def select(
        self,
        q_idx: torch.Tensor,
        k_idx: torch.Tensor,
        weights: torch.Tensor,
        *,
        starts: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
        packed: PackedSeq | None = None,
        causal: bool = True,
        k_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `indices` `[..., rows, 1, topk]` int32, as `forward` does; no gradient passes.

        Args:
            q_idx: `[..., rows, index_heads, index_head_dim]`.
            k_idx: `[..., keys, 1, index_head_dim]`, also a cache with more rows than `q_idx`; in float8_e4m3fn with
                `k_scale`.
            weights: `[..., rows, index_heads]`.
            starts: `[batch, rows]` or `[rows]`, the first key that a query may choose; default: 0.
            ends: one past the last key that it may choose; default: all keys.
            packed: the segments of a packed batch, instead of `starts` and `ends`.
            causal: whether the last query sees all keys and each one before it a key less.
            k_scale: `[..., keys, 1]` fp32, of keys that are quantised already (see `to_e4m3`).

        Raises:
            MLALayoutError: `starts` or `ends` came with `packed`, which says both.
            InvalidInputError: tensors break the operator's rules.
        """
        starts, ends, causal = self._bounds(q_idx, k_idx, starts, ends, packed, causal)
        if self.use_fp8 or k_scale is not None:
            q_idx, q_scale = to_e4m3(q_idx)
            weights = weights.detach().float() * q_scale
            if k_scale is None:
                k_idx, k_scale = to_e4m3(k_idx)
        return index_topk(
            q_idx,
            k_idx,
            weights,
            self.topk,
            starts=starts,
            ends=ends,
            k_scale=k_scale,
            causal=causal,
            relu=self.relu,
            backend=self.backend,
        )

    def scores(
        self,
        q_idx: torch.Tensor,
        k_idx: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        *,
        topk_length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the scores of selected keys, `[..., rows, 1, topk]` fp32, `-inf` in slots without one; differentiable.

        For a loss of your own: `index_kl(mass, scores)` with the summed mass of several layers, for instance.
        """
        return index_scores(
            q_idx, k_idx, weights, indices, topk_length=topk_length, relu=self.relu, backend=self.backend
        )

    def loss(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        lse: torch.Tensor,
        q_idx: torch.Tensor,
        k_idx: torch.Tensor,
        weights: torch.Tensor,
        *,
        softmax_scale: float,
        topk_length: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the KL divergence from the scores on the selected keys to the attention there, one number per query.

        Args:
            q: the attention's queries, `[..., rows, heads, d_total]`; like `kv` and `lse` they get no gradient.
            kv: the attention's rows, `[..., keys, 1, d_total]`.
            indices: what `select` returned and the attention read, `[..., rows, 1, topk]`.
            lse: what the attention returned, `[..., rows, heads]`.
            q_idx: `[..., rows, index_heads, index_head_dim]`.
            k_idx: `[..., keys, 1, index_head_dim]`.
            weights: `[..., rows, index_heads]`.
            softmax_scale: the attention's.
            topk_length: `[..., rows]`, the leading slots of a row that count.

        Returns:
            `[..., rows, 1]` fp32; mean, padding and coefficients are the caller's. A query without keys has 0.
        """
        return index_loss(
            q,
            kv,
            indices,
            lse,
            q_idx,
            k_idx,
            weights,
            softmax_scale=softmax_scale,
            topk_length=topk_length,
            relu=self.relu,
            backend=self.backend,
        )

    def dense_loss(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        lse: torch.Tensor,
        q_idx: torch.Tensor,
        k_idx: torch.Tensor,
        weights: torch.Tensor,
        row_weight: torch.Tensor,
        *,
        softmax_scale: float,
        starts: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
        packed: PackedSeq | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        """Return the divergence over all keys that a query may see, summed with weights: the warm-up's loss.

        Args:
            q: the attention's queries, `[..., rows, heads, d_total]`; like `k` and `lse` they get no gradient.
            k: the attention's keys, `[..., keys, 1, d_total]`.
            lse: of dense attention, `[..., rows, heads]`.
            q_idx: `[..., rows, index_heads, index_head_dim]`.
            k_idx: `[..., keys, 1, index_head_dim]`.
            weights: `[..., rows, index_heads]`.
            row_weight: `[..., rows]` fp32; `mask / mask.sum()` makes a mean. A coefficient belongs in here too.
            softmax_scale: the attention's.
            starts: `[batch, rows]` or `[rows]`, the first key that a query may see; default: 0.
            ends: one past the last key that it may see; default: all keys.
            packed: the segments of a packed batch, instead of `starts` and `ends`.
            causal: whether the last query sees all keys and each one before it a key less.

        Returns:
            A scalar in fp32.

        Raises:
            MLALayoutError: `starts` or `ends` came with `packed`, which says both.
            InvalidInputError: tensors break the operator's rules.
        """
        starts, ends, causal = self._bounds(q_idx, k_idx, starts, ends, packed, causal)
        return index_loss_dense(
            q,
            k,
            lse,
            q_idx,
            k_idx,
            weights,
            row_weight,
            softmax_scale=softmax_scale,
            starts=starts,
            ends=ends,
            causal=causal,
            relu=self.relu,
        )

    def _bounds(
        self,
        q_idx: torch.Tensor,
        k_idx: torch.Tensor,
        starts: torch.Tensor | None,
        ends: torch.Tensor | None,
        packed: PackedSeq | None,
        causal: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
        """Return `starts`, `ends` and `causal` for the operators, which know no segments."""
        if packed is None:
            return starts, ends, causal
        if starts is not None or ends is not None:
            raise MLALayoutError("packed says which keys a query may choose; pass it without starts and ends")
        if self.check_packed:
            packed.check(q_idx.shape[0], k_idx.shape[0])
        # Causality counts within a segment, and the ends have it.
        return *packed.key_bounds(q_idx.shape[0], causal=causal), False

    def _query(self, hidden: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """Return what queries are projected from."""
        if (query is None) != (self.query_size is None):
            got = "none" if query is None else f"one of shape {list(query.shape)}"
            raise MLALayoutError(f"query must come exactly when there is a query_size ({self.query_size}), got {got}")
        if query is None:
            return hidden
        if query.shape[:-1] != hidden.shape[:-1] or query.shape[-1] != self.query_size:
            raise MLALayoutError(
                f"query must be {[*hidden.shape[:-1], self.query_size]}, a row for each of hidden, got "
                f"{list(query.shape)}"
            )
        return query

    def _turn(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate `[..., rows, heads, index_head_dim]`: the leading channels by position, then all of them as asked."""
        if self.qk_rope_head_dim:
            rope, rest = rows.tensor_split([self.qk_rope_head_dim], dim=-1)
            rows = torch.cat([rotate(rope, positions, self.rope_theta, layout=self.rope_layout), rest], dim=-1)
        return hadamard(rows) if self.use_hadamard else rows

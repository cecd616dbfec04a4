"""Sparse MLA as a plain `torch.nn` layer.

Absorbed throughout: queries move into the latent space (`absorb_q`), keys and values stay there as one row per token,
and only what the attention returns is projected up (`project_v`). No head's keys or values ever exist.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from mla_ops.adapters.seam import MLALayerMeta, Origin, PackedSeq, normalize_call
from mla_ops.adapters.torch_layer.rotations import positions_of, rotate
from mla_ops.api import sparse_attn
from mla_ops.errors import MLAMetadataError


def absorb_q(q_nope: torch.Tensor, q_rope: torch.Tensor, w_uk: torch.Tensor) -> torch.Tensor:
    """Move queries into the latent space: `<q_nope, w_uk latent> = <w_uk^T q_nope, latent>`.

    Args:
        q_nope: `[..., heads, qk_nope_head_dim]`.
        q_rope: `[..., heads, qk_rope_head_dim]`, rotated; the width may be 0.
        w_uk: `[heads, qk_nope_head_dim, kv_lora_rank]`, the keys' up-projection.

    Returns:
        `[..., heads, kv_lora_rank + qk_rope_head_dim]`, the operator's `q`.
    """
    return torch.cat([torch.einsum("...hn,hnr->...hr", q_nope, w_uk), q_rope], dim=-1)


def project_v(latent: torch.Tensor, w_uv: torch.Tensor) -> torch.Tensor:
    """Project what the operator returned to the heads' values.

    Args:
        latent: `[..., heads, kv_lora_rank]`, the operator's `out`.
        w_uv: `[heads, v_head_dim, kv_lora_rank]`, the values' up-projection.

    Returns:
        `[..., heads, v_head_dim]`.
    """
    return torch.einsum("...hr,hvr->...hv", latent, w_uv)


class MLASparseAttention(nn.Module):
    """Multi-head latent attention over the keys that `indices` name, from hidden states to hidden states.

    `forward` is `project`, then `attend`; call the two yourself to choose indices from the projected rows or to keep
    those rows in a cache. Compiles without a graph break, one graph for every length above 1 when they are dynamic.

    Args:
        hidden_size: width of the hidden states.
        meta: the layer, in the absorbed form, with one KV group and an even `qk_rope_head_dim`.
        q_lora_rank: rank of the queries' own bottleneck; None for a full-rank projection.
        rope_theta: the base of the rotary frequencies.
        norm_eps: what the norms add to the mean square; None for torch's choice, the epsilon of the input's dtype.
        backend: which backend runs the operator; a named one never falls back.
        check_indices: in eager, raise on an index that names no row of its sequence. That reads the indices on the
            host, once a call; without it such a slot counts as "no key", as it always does in compiled code.
        device: where the parameters are made; on "meta", `to_empty` and each module's `reset_parameters` fill them.
        dtype: of the parameters.

    Raises:
        MLAMetadataError: `meta` is no `MLALayerMeta`, or describes another kind of layer.
    """

    def __init__(
        self,
        hidden_size: int,
        meta: MLALayerMeta,
        *,
        q_lora_rank: int | None = None,
        rope_theta: float = 10000.0,
        norm_eps: float | None = None,
        backend: str = "auto",
        check_indices: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(meta, MLALayerMeta):
            raise MLAMetadataError(
                f"MLASparseAttention: meta must be an MLALayerMeta, got {type(meta).__name__}; use "
                "resolve_layer_meta(..., form='absorbed') of mla_ops.adapters.seam, which reads mappings and configs"
            )
        bad = []
        if meta.form != "absorbed":
            bad.append(f"form must be 'absorbed', got {meta.form!r}")
        if meta.kv_group != 1:
            bad.append(f"kv_group must be 1, got {meta.kv_group}")
        if meta.qk_rope_head_dim % 2:
            bad.append(f"qk_rope_head_dim must be even, got {meta.qk_rope_head_dim}")
        if bad:
            raise MLAMetadataError(f"MLASparseAttention: {'; '.join(bad)}", bad=tuple(bad), source=meta.source)
        self.meta = meta
        self.rope_theta = rope_theta
        self.backend = backend
        self.check_indices = check_indices
        rank = meta.kv_lora_rank
        q_width = meta.heads * meta.k_channels
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        norm = partial(nn.RMSNorm, eps=norm_eps, device=device, dtype=dtype)
        self.q_proj: nn.Module
        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, q_width)
        else:
            self.q_proj = nn.Sequential(
                linear(hidden_size, q_lora_rank), norm(q_lora_rank), linear(q_lora_rank, q_width)
            )
        self.kv_proj = linear(hidden_size, meta.d_total)
        self.kv_norm = norm(rank)
        self.w_uk = nn.Parameter(torch.empty(meta.heads, meta.qk_nope_head_dim, rank, device=device, dtype=dtype))
        self.w_uv = nn.Parameter(torch.empty(meta.heads, meta.v_head_dim, rank, device=device, dtype=dtype))
        self.out_proj = linear(meta.heads * meta.v_head_dim, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `w_uk` and `w_uv`, the parameters that are this module's own; its submodules draw theirs."""
        for weight in (self.w_uk, self.w_uv):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        """Return what the printed submodules do not tell."""
        meta = self.meta
        return (
            f"heads={meta.heads}, kv_lora_rank={meta.kv_lora_rank}, qk_nope_head_dim={meta.qk_nope_head_dim}, "
            f"qk_rope_head_dim={meta.qk_rope_head_dim}, v_head_dim={meta.v_head_dim}, "
            f"softmax_scale={meta.softmax_scale:.6g}, rope_theta={self.rope_theta:g}, backend={self.backend!r}, "
            f"check_indices={self.check_indices}"
        )

    def forward(
        self,
        hidden: torch.Tensor,
        indices: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        packed: PackedSeq | None = None,
        origin: Origin = "global",
    ) -> torch.Tensor:
        """Attend each row of `hidden` to the rows its indices name.

        Args:
            hidden: `[batch, rows, hidden_size]`, or `[rows, hidden_size]` with `packed`.
            indices: `[batch, rows, topk]` (`[rows, topk]` with `packed`), int32 or int64, any order; -1 is no key.
                Causality is the caller's.
            positions: `[rows]` or `[batch, rows]`, of each row in its sequence; default: counted from its start.
            packed: the segments of a batch laid end to end; each one reads its own rows only.
            origin: with `packed`, whether an index counts all rows ("global") or those of its segment.

        Returns:
            The shape and dtype of `hidden`. A row without any key gets 0.

        Raises:
            MLALayoutError: the arguments disagree; in eager also for indices that name no row of their sequence.
        """
        q, kv = self.project(hidden, positions=positions, packed=packed)
        return self.attend(q, kv, indices, packed=packed, origin=origin)[0]

    def project(
        self, hidden: torch.Tensor, *, positions: torch.Tensor | None = None, packed: PackedSeq | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the operator's `q` `[..., rows, heads, d_total]` and `kv` `[..., rows, 1, d_total]`, rotated.

        `kv` is what a decoding cache keeps. Arguments as in `forward`.
        """
        meta = self.meta
        positions = positions_of(hidden, positions, packed, check=self.check_indices)
        q = self.q_proj(hidden).unflatten(-1, (meta.heads, meta.k_channels))
        q_nope, q_rope = q.split([meta.qk_nope_head_dim, meta.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_proj(hidden).unsqueeze(-2).split([meta.kv_lora_rank, meta.qk_rope_head_dim], dim=-1)
        q = absorb_q(q_nope, rotate(q_rope, positions, self.rope_theta), self.w_uk)
        kv = torch.cat([self.kv_norm(latent), rotate(k_rope, positions, self.rope_theta)], dim=-1)
        return q, kv

    def attend(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        *,
        packed: PackedSeq | None = None,
        origin: Origin = "global",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new hidden states and `lse` `[batch, rows, heads]` (fp32; no batch with `packed`).

        `kv` may hold more rows than `q`, a cache for instance; then `indices` count its rows.
        """
        call = normalize_call(
            q,
            kv,
            None,
            indices,
            meta=self.meta,
            layout="bshd" if packed is None else "thd",
            packed=packed,
            invalid="sentinel",
            origin=origin,
            check=self.check_indices,
        )
        out, lse = sparse_attn(
            call.q,
            call.kv,
            call.indices,
            d_v=call.d_v,
            softmax_scale=call.softmax_scale,
            backend=self.backend,
        )
        return self.project_out(call.restore(out)), lse if packed is None else lse.squeeze(0)

    def project_out(self, latent: torch.Tensor) -> torch.Tensor:
        """Return the new hidden states `[..., rows, hidden_size]` of what the operator returned.

        `attend` ends with it. Decoding calls it on what attention over a cache returned, `[..., rows, heads, d_v]`.
        """
        hidden: torch.Tensor = self.out_proj(project_v(latent, self.w_uv).flatten(-2))
        return hidden

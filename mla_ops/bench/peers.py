"""What `mla-ops bench` compares with: the same mathematics written in plain PyTorch, and other libraries' kernels.

Every function takes `(q, kv, indices, d_v)` as `mla_ops.sparse_attn` does and returns `out`. Those that need a mask
build it inside: with a learned indexer the indices are new in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from mla_ops.bench.shapes import SOFTMAX_SCALE, Shape
from mla_ops.errors import InvalidInputError

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]

# By which names peers are asked for; "flash" is what `flash_libraries` finds.
PEERS = ("gather", "sdpa", "flex", "flash")

# What a formulation that gathers holds at once must leave room for its gradients.
_LARGEST_BYTES = 12 * 2**30

# The file names in which FlashMLA and FlashAttention-3 are shipped as operators; see `flash_libraries`.
_FLASH_LIBRARIES = {"FlashMLA": "_flashmla_C.abi3.so", "FlashAttention-3": "_vllm_fa3_C.abi3.so"}


def ours(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    """The operator of this package."""
    out: Tensor = torch.ops.mla.sparse_attn(q, kv, indices, d_v, SOFTMAX_SCALE)[0]
    return out


def gather(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    """Gather the selected rows, then attend densely to them: what one writes first."""
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    rows = kv[batch, indices.squeeze(2).long(), 0]
    logits = torch.einsum("bshd,bskd->bshk", q, rows) * SOFTMAX_SCALE
    return torch.einsum("bshk,bskd->bshd", logits.float().softmax(-1).to(q.dtype), rows[..., :d_v])


def masked_sdpa(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    """Scatter the indices into a boolean mask and attend to all keys."""
    k = kv.transpose(1, 2).expand(-1, q.shape[2], -1, -1)
    mask = _selected(indices, kv.shape[1])[:, None]
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k, k[..., :d_v], mask, scale=SOFTMAX_SCALE
    )
    return out.transpose(1, 2)


def flex(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    """`flex_attention` with a block mask made from the indices; to be compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    selected = _selected(indices, kv.shape[1])
    mask = create_block_mask(
        lambda b, h, i, j: selected[b, i, j], q.shape[0], None, q.shape[1], kv.shape[1], device=q.device
    )
    k = kv.transpose(1, 2)
    out = flex_attention(
        q.transpose(1, 2), k, k[..., :d_v], block_mask=mask, scale=SOFTMAX_SCALE, enable_gqa=q.shape[2] > 1
    )
    return out.transpose(1, 2)


def plain_peers(shape: Shape, names: Collection[str]) -> dict[str, Attention]:
    """Return the formulations in plain PyTorch among `names`, those to be compiled compiled for `shape` alone."""
    peers: dict[str, Attention] = {}
    torch.compiler.reset()
    if "gather" in names and shape.slots * shape.d_total * 2 < _LARGEST_BYTES:
        peers["gather + torch.compile"] = torch.compile(gather)
    if "sdpa" in names:
        peers["SDPA with mask"] = masked_sdpa
    if "flex" in names:
        peers["flex_attention with mask"] = torch.compile(flex)
    return peers


def flash_libraries(folder: Path) -> list[str]:
    """Load FlashMLA and FlashAttention-3 from the shared objects in `folder`; return the names of those found.

    They are the files `vllm/_flashmla_C.abi3.so` and `vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so` of a vLLM wheel built
    for the running torch (0.24.0 for torch 2.11).

    Raises:
        InvalidInputError: `folder` holds neither.
    """
    found = [name for name, file in _FLASH_LIBRARIES.items() if (folder / file).exists()]
    if not found:
        raise InvalidInputError(f"--flash-libraries must hold {' or '.join(_FLASH_LIBRARIES.values())}, got {folder}")
    for name in found:
        torch.ops.load_library(str(folder / _FLASH_LIBRARIES[name]))
    return found


def flash_peers(shape: Shape, libraries: list[str]) -> dict[str, Attention]:
    """Return the forward-only kernels of `libraries` that accept `shape`: one sequence, their widths and heads."""
    peers: dict[str, Attention] = {}
    if shape.B == 1 and "FlashMLA" in libraries and shape.d_total in (512, 576) and shape.H in (64, 128):
        peers["FlashMLA"] = _flash_mla
    if shape.B == 1 and "FlashAttention-3" in libraries and (shape.d_total, shape.d_v) == (576, 512):
        peers["FlashAttention-3"] = _flash_attention_3
    return peers


@torch.no_grad()  # forward only
def _flash_mla(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    result = torch.ops._flashmla_C.sparse_prefill_fwd(q[0], kv[0], indices[0], SOFTMAX_SCALE, d_v, None, None, None)
    return result[0][None]  # type: ignore[no-any-return]


@torch.no_grad()  # forward only
def _flash_attention_3(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> Tensor:
    """Paged attention with pages of one row: the page table is the list of selected rows."""
    seq_q, topk = indices.shape[1], indices.shape[3]
    used = torch.full((seq_q,), topk, device=q.device, dtype=torch.int32)
    starts = torch.arange(seq_q + 1, device=q.device, dtype=torch.int32)
    k, v = kv[0, :, None, :, d_v:], kv[0, :, None, :, :d_v]
    q_rope, q_latent = q[0, ..., d_v:].contiguous(), q[0, ..., :d_v].contiguous()
    result = torch.ops._vllm_fa3_C.fwd(
        q_rope, k, v, None, None, q_latent, None, starts, None, None, None, used, 1, topk, indices[0, :, 0], None, None,
        None, None, None, None, None, None, SOFTMAX_SCALE, False, -1, -1, 0.0, True, None, 1, None, 0, None, 1, 0, None,
    )  # fmt: skip
    return result[0][None]  # type: ignore[no-any-return]


def _selected(indices: Tensor, seq_kv: int) -> Tensor:
    """Return the indices `[B, Sq, 1, topk]` as a mask `[B, Sq, Skv]`."""
    mask = torch.zeros(*indices.shape[:2], seq_kv, dtype=torch.bool, device=indices.device)
    return mask.scatter_(2, indices.squeeze(2).long(), True)

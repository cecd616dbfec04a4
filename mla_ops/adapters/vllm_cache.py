"""vLLM's writer of MLA cache rows, with its signature: `concat_and_cache_mla`, for any widths.

It needs, imports and patches nothing of vLLM. Its reader is `mla_ops.sparse_attn_paged`, or with FlashMLA's signature
`mla_ops.adapters.flash_mla.flash_mla_with_kvcache`.
"""

from __future__ import annotations

import torch

import mla_ops
from mla_ops.errors import InvalidInputError, UnsupportedFeatureError

# vLLM's names of what a cache holds -> the row format. "fp8" there is one scale for the whole cache, in an argument.
_ROW_FORMATS = {
    "auto": "dense",
    "bfloat16": "dense",
    "half": "dense",
    "float16": "dense",
    "fp8_ds_mla": "fp8",
    "fp8": "fp8_cache",
    "fp8_e4m3": "fp8_cache",
}


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor | None,
) -> None:
    """Write latent rows into a paged cache as `vllm._custom_ops.concat_and_cache_mla` does.

    Scales are `amax / 448`, any fp32 number. A foreign reader that takes them for powers of two reads other values:
    for such a reader write with `mla_ops.append_rows`, whose default is a power of two.

    Args:
        kv_c: `[tokens, kv_lora_rank]`, bf16 or fp16; rows behind those that `slot_mapping` names are padding.
        k_pe: `[tokens, qk_rope_head_dim]`, or `[tokens, 1, qk_rope_head_dim]`; the width may be 0.
        kv_cache: `[num_blocks, block_size, row]`, written. For "fp8_ds_mla" a row is 656 bytes at 576/512; see
            `mla_ops.bytes_per_row` for other widths.
        slot_mapping: `[tokens]` or fewer, int32 or int64 row numbers; -1, or any other that names no row, is skipped.
        kv_cache_dtype: "auto", "bfloat16", "half" and "float16" keep the numbers, "fp8_ds_mla" quantises 128 channels
            a scale, "fp8" and "fp8_e4m3" all of them by `scale`.
        scale: `[1]` fp32, for "fp8" and "fp8_e4m3"; ignored for others.

    Raises:
        InvalidInputError, UnsupportedProblemError: as `mla_ops.append_rows`.
        UnsupportedFeatureError: a `kv_cache_dtype` of another kind.
    """
    row_format = _ROW_FORMATS.get(kv_cache_dtype)
    if row_format is None:
        raise UnsupportedFeatureError(
            f"kv_cache_dtype must be one of {', '.join(map(repr, _ROW_FORMATS))}, got {kv_cache_dtype!r}"
        )
    if kv_cache.dim() != 3:
        raise InvalidInputError(
            f"kv_cache must be [num_blocks, block_size, row], got shape {list(kv_cache.shape)}; mla_ops.append_rows "
            "takes one with KV groups"
        )
    tokens = slot_mapping.shape[0]
    mla_ops.append_rows(
        kv_c[:tokens].unsqueeze(1),
        slot_mapping,
        kv_cache.unsqueeze(2),
        d_v=kv_c.shape[-1],
        row_format=row_format,
        tail=k_pe[:tokens].reshape(tokens, 1, k_pe.shape[-1]),
        scale_rule="amax",
        cache_scale=scale.reshape(1) if row_format == "fp8_cache" and scale is not None else None,
    )

"""What the rest of torch may ask of `mla::attn_mass`: autocast, vmap, FLOP counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from mla_ops.registration.attn_mass import ATTN_MASS, attn_mass_fake
from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.library import LIBRARY
from mla_ops.registration.transforms import (
    AUTOCAST_DEVICES,
    call_without_data,
    cast_by_autocast,
    casting_kernel,
    vmap_by_folding,
)

# Into which dimensions of q, kv, indices, lse, softmax_scale, topk_length, backend a vmapped one folds, and of the mass
# (`vmap_by_folding`). Keys that all elements share are not copied where the vmapped dimension joins the rows.
_INTO_ROWS = (-3, None, -3, -2, None, -1, None), (-3,)
_INTO_BATCH = (-4, -4, -4, -3, None, -2, None), (-4,)


def _vmap_attn_mass(
    info: Any, in_dims: tuple[int | None, ...], q: torch.Tensor, kv: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, int]:
    args = (*cast_by_autocast(q, kv), *args)
    elements = call_without_data(attn_mass_fake, in_dims, args)
    into, result_into = _INTO_ROWS if in_dims[1] is None else _INTO_BATCH
    (mass,), (out_dim,) = vmap_by_folding(ATTN_MASS, info, in_dims, args, elements, into, result_into)
    return mass, out_dim


def attn_mass_flops(
    q_shape: Sequence[int], kv_shape: Sequence[int], indices_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """FLOPs of the logits: QK^T over d_total. Invalid slots count as work."""
    return 2 * math.prod(q_shape) * indices_shape[-1]


def register() -> None:
    """Attach autocast kernels, the vmap rule and the FLOP formula to the operator."""
    for device_type in AUTOCAST_DEVICES:
        LIBRARY.impl("attn_mass", casting_kernel(ATTN_MASS, device_type), f"Autocast{device_type.upper()}")
    torch.library.register_vmap("mla::attn_mass", _vmap_attn_mass, lib=LIBRARY)
    register_flop_formulas({torch.ops.mla.attn_mass: attn_mass_flops})

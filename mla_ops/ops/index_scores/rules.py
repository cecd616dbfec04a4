"""The input rules of `mla::index_scores`: the same words in eager and at trace time; no tensor data is read."""

from __future__ import annotations

import torch

from mla_ops.checks import (
    check_backend_type,
    check_bool,
    check_lists,
    check_rank,
    check_storage,
    check_tensor_types,
    dtype_of,
    require_size,
)
from mla_ops.errors import InvalidInputError
from mla_ops.ops.index_scores.call import IndexScoresCall
from mla_ops.ops.index_topk.rules import check_index_tensors


def check_argument_types(
    q_idx: object,
    k_idx: object,
    weights: object,
    indices: object,
    topk_length: object,
    relu: object,
    backend: object,
) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    check_tensor_types(
        {"q_idx": q_idx, "k_idx": k_idx, "weights": weights, "indices": indices}, {"topk_length": topk_length}
    )
    check_bool("relu", relu)
    check_backend_type(backend)


def check_inputs(call: IndexScoresCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::index_scores`; shapes in `mla_ops.index_scores`."""
    q_idx, k_idx, weights, indices, topk_length, _ = call
    check_index_tensors(q_idx, k_idx, weights, allow_fp8=False)
    check_lists("q_idx", q_idx, "k_idx", k_idx, indices, topk_length)


def check_bwd_inputs(call: IndexScoresCall, dscores: torch.Tensor) -> None:
    """Check what `mla::index_scores_bwd` takes beyond a call, which `check_inputs` has passed."""
    check_storage(q_idx=call.q_idx, dscores=dscores)
    if dscores.dtype != torch.float32:
        raise InvalidInputError(f"dscores must be float32, got {dtype_of(dscores)}; use dscores.float()")
    check_rank("dscores", dscores, call.indices.dim(), "[..., kv_group, topk]")
    for dim, size in enumerate(call.indices.shape):
        require_size("dscores", dscores, dim, size, f"size {dim} of indices")

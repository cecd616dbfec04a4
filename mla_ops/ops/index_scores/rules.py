"""The input rules of `mla::index_scores`: the same words in eager and at trace time; no tensor data is read."""

from __future__ import annotations

import torch

from mla_ops.checks import (
    INDEX_DTYPES,
    check_backend_type,
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
    if not isinstance(relu, bool):
        raise InvalidInputError(f"relu must be a bool, got {type(relu).__name__}; use bool(relu)")
    check_backend_type(backend)


def check_inputs(call: IndexScoresCall) -> None:
    """Raise `InvalidInputError` at the first broken rule of `mla::index_scores`; shapes in `mla_ops.index_scores`."""
    q_idx, k_idx, weights, indices, topk_length, _ = call
    check_index_tensors(q_idx, k_idx, weights, allow_fp8=False)
    check_storage(q_idx=q_idx, indices=indices, topk_length=topk_length)

    lead = "batch, " if q_idx.dim() == 4 else ""
    check_rank("indices", indices, q_idx.dim(), f"[{lead}seq_q, kv_group, topk]")
    if indices.dtype not in INDEX_DTYPES:
        raise InvalidInputError(f"indices must be int32 or int64, got {dtype_of(indices)}; use indices.to(torch.int32)")
    if topk_length is not None:
        check_rank("topk_length", topk_length, q_idx.dim() - 2, f"[{lead}seq_q]")
        if topk_length.dtype not in INDEX_DTYPES:
            raise InvalidInputError(
                f"topk_length must be int32 or int64, got {dtype_of(topk_length)}; use topk_length.to(torch.int32)"
            )

    *batch, seq_q, _, _ = q_idx.shape
    if batch:
        require_size("indices", indices, 0, batch[0], "the batch of q_idx")
    require_size("indices", indices, -3, seq_q, "seq_q of q_idx")
    require_size("indices", indices, -2, k_idx.shape[-2], "kv_group of k_idx")
    if topk_length is not None:
        if batch:
            require_size("topk_length", topk_length, 0, batch[0], "the batch of q_idx")
        require_size("topk_length", topk_length, -1, seq_q, "seq_q of q_idx")


def check_bwd_inputs(call: IndexScoresCall, dscores: torch.Tensor) -> None:
    """Check what `mla::index_scores_bwd` takes beyond a call, which `check_inputs` has passed."""
    check_storage(q_idx=call.q_idx, dscores=dscores)
    if dscores.dtype != torch.float32:
        raise InvalidInputError(f"dscores must be float32, got {dtype_of(dscores)}; use dscores.float()")
    check_rank("dscores", dscores, call.indices.dim(), "[..., kv_group, topk]")
    for dim, size in enumerate(call.indices.shape):
        require_size("dscores", dscores, dim, size, f"size {dim} of indices")

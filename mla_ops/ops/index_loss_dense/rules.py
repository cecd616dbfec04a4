"""The input rules of `mla::index_loss_dense`: those of index selection and of attention mass, and that they fit."""

from __future__ import annotations

import torch

from mla_ops.checks import check_bool, check_scale, check_storage, check_tensor_types, dtype_of, require_size, shape_of
from mla_ops.errors import InvalidInputError
from mla_ops.ops.attn_mass.rules import check_attention
from mla_ops.ops.index_loss_dense.call import IndexLossDenseCall
from mla_ops.ops.index_topk.call import IndexTopkCall
from mla_ops.ops.index_topk.rules import check_index_tensors
from mla_ops.ops.index_topk.rules import check_inputs as check_selection


def check_argument_types(call: IndexLossDenseCall) -> None:
    """Check the Python types that the operator's schema would refuse in its own words, and tensor wrappers."""
    tensors = {name: getattr(call, name) for name in IndexLossDenseCall._fields[:7]}
    check_tensor_types(tensors, {"starts": call.starts, "ends": call.ends})
    check_scale("softmax_scale", call.softmax_scale)
    check_bool("causal", call.causal)
    check_bool("relu", call.relu)


def check_inputs(call: IndexLossDenseCall) -> None:
    """Raise `InvalidInputError` at the first broken rule; shapes in `mla_ops.index_loss_dense`."""
    q, k, lse, q_idx, k_idx, weights, row_weight, softmax_scale, starts, ends, causal, relu = call
    check_attention(q, k, lse, softmax_scale, "k")
    check_index_tensors(q_idx, k_idx, weights, allow_fp8=False)
    check_selection(IndexTopkCall(q_idx, k_idx, weights, 0, starts, ends, None, causal, relu))
    check_storage(q=q, q_idx=q_idx, row_weight=row_weight)

    if q_idx.dim() != q.dim():
        raise InvalidInputError(f"q_idx must have the {q.dim()} dimensions of q, got {shape_of(q_idx)}")
    *batch, seq_q, _, _ = q.shape
    if batch:
        require_size("q_idx", q_idx, 0, batch[0], "the batch of q")
    require_size("q_idx", q_idx, -3, seq_q, "seq_q of q")
    require_size("k_idx", k_idx, -3, k.shape[-3], "seq_kv of k")
    require_size("k_idx", k_idx, -2, k.shape[-2], "kv_group of k")

    if row_weight.dtype != torch.float32:
        raise InvalidInputError(f"row_weight must be float32, got {dtype_of(row_weight)}; use row_weight.float()")
    rows = (*batch, seq_q)
    if row_weight.dim() not in (len(rows), len(rows) + 1):
        lead = "batch, " if batch else ""
        raise InvalidInputError(
            f"row_weight must be [{lead}seq_q] or [{lead}seq_q, kv_group], got {shape_of(row_weight)}"
        )
    for dim, size in enumerate(rows):
        require_size("row_weight", row_weight, dim, size, f"size {dim} of q")
    if row_weight.dim() > len(rows):
        require_size("row_weight", row_weight, -1, k.shape[-2], "kv_group of k")
    if row_weight.requires_grad:
        raise InvalidInputError("row_weight must not require grad, which it gets none of; use row_weight.detach()")

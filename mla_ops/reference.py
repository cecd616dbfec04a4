"""The readable definitions of the operators: in fp64, the truth that every path is compared with."""

from mla_ops.ops.attn_mass.reference import attn_mass_reference
from mla_ops.ops.index_loss_dense.reference import index_loss_dense_reference
from mla_ops.ops.index_scores.reference import index_scores_bwd_reference, index_scores_reference
from mla_ops.ops.index_topk.reference import index_scores_dense_reference, index_topk_reference
from mla_ops.ops.read_rows.reference import read_rows_reference
from mla_ops.ops.sparse_attn.reference import (
    sparse_attn_bwd_reference,
    sparse_attn_max_logits_reference,
    sparse_attn_reference,
)
from mla_ops.ops.sparse_attn_paged.reference import sparse_attn_paged_reference

__all__ = [
    "attn_mass_reference",
    "index_loss_dense_reference",
    "index_scores_bwd_reference",
    "index_scores_dense_reference",
    "index_scores_reference",
    "index_topk_reference",
    "read_rows_reference",
    "sparse_attn_bwd_reference",
    "sparse_attn_max_logits_reference",
    "sparse_attn_paged_reference",
    "sparse_attn_reference",
]

"""The readable definitions of the operators: in fp64, the truth that every path is compared with."""

from mla_ops.ops.index_topk.reference import index_scores_dense_reference, index_topk_reference
from mla_ops.ops.sparse_attn.reference import (
    sparse_attn_bwd_reference,
    sparse_attn_max_logits_reference,
    sparse_attn_reference,
)

__all__ = [
    "index_scores_dense_reference",
    "index_topk_reference",
    "sparse_attn_bwd_reference",
    "sparse_attn_max_logits_reference",
    "sparse_attn_reference",
]

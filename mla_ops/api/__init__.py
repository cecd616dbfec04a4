"""The Python front doors of all operators."""

from mla_ops.api.attention import SparseAttnOutput, explain, sparse_attn, sparse_attn_max_logits, warmup
from mla_ops.api.selection import explain_index_topk, index_topk, warmup_index_topk

__all__ = [
    "SparseAttnOutput",
    "explain",
    "explain_index_topk",
    "index_topk",
    "sparse_attn",
    "sparse_attn_max_logits",
    "warmup",
    "warmup_index_topk",
]

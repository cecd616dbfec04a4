"""The Python front doors of all operators."""

from mla_ops.api.attention import SparseAttnOutput, explain, sparse_attn, sparse_attn_max_logits, warmup
from mla_ops.api.indexer_loss import (
    attn_mass,
    explain_attn_mass,
    explain_index_scores,
    index_kl,
    index_loss,
    index_loss_dense,
    index_scores,
    warmup_index_loss,
)
from mla_ops.api.selection import explain_index_topk, index_topk, warmup_index_topk

__all__ = [
    "SparseAttnOutput",
    "attn_mass",
    "explain",
    "explain_attn_mass",
    "explain_index_scores",
    "explain_index_topk",
    "index_kl",
    "index_loss",
    "index_loss_dense",
    "index_scores",
    "index_topk",
    "sparse_attn",
    "sparse_attn_max_logits",
    "warmup",
    "warmup_index_loss",
    "warmup_index_topk",
]

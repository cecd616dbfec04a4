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
from mla_ops.api.serving import (
    append_rows,
    bytes_per_row,
    explain_sparse_attn_paged,
    merge_partials,
    read_rows,
    sparse_attn_paged,
    warmup_sparse_attn_paged,
)

__all__ = [
    "SparseAttnOutput",
    "append_rows",
    "attn_mass",
    "bytes_per_row",
    "explain",
    "explain_attn_mass",
    "explain_index_scores",
    "explain_index_topk",
    "explain_sparse_attn_paged",
    "index_kl",
    "index_loss",
    "index_loss_dense",
    "index_scores",
    "index_topk",
    "merge_partials",
    "read_rows",
    "sparse_attn",
    "sparse_attn_max_logits",
    "sparse_attn_paged",
    "warmup",
    "warmup_index_loss",
    "warmup_index_topk",
    "warmup_sparse_attn_paged",
]

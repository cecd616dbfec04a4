"""The Python front doors of all operators."""

from mla_ops.api.attention import SparseAttnOutput, explain, sparse_attn, sparse_attn_max_logits, warmup

__all__ = ["SparseAttnOutput", "explain", "sparse_attn", "sparse_attn_max_logits", "warmup"]

"""`mla::sparse_attn`, its backward and `mla::sparse_attn_max_logits`."""

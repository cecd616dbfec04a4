"""Device code of `mla::sparse_attn_paged`."""

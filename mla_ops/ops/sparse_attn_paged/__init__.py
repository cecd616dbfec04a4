"""The room of `mla::sparse_attn_paged`: sparse attention on rows that stand in a pool of pages, quantised or not."""

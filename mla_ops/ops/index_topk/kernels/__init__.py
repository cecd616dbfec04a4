"""Device code of `mla::index_topk`."""

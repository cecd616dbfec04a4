"""The room of `mla::index_topk`: for every query, which keys its attention reads."""

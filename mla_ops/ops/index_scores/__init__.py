"""The room of `mla::index_scores` and its backward: the indexer's scores of keys that a list names."""

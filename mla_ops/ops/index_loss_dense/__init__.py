"""The room of `mla::index_loss_dense`: the indexer's loss over all eligible keys, for its warm-up."""

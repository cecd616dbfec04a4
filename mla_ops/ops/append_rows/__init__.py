"""The room of `mla::append_rows`: latent rows are quantised and written into a pool of pages."""

"""Device code of `mla::append_rows`."""

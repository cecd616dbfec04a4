"""Device code of `mla::read_rows`."""

"""The `mla-ops` command line; `python -m mla_ops` is the same."""

"""Benchmark and tuning tools: what `mla-ops bench` and `mla-ops tune` run."""

"""Who runs a call: one module per backend, each behind the protocol of `base`. Backends never import one another.

`triton_deterministic` is a part of `triton`.
"""

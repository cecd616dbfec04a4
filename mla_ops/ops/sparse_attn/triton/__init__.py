"""Who runs a call: one module per backend, each behind the protocol of `base`. Backends never import one another.

Modules named `triton_*` are parts of `triton`.
"""

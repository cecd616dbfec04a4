"""How the kernels of `mla::index_topk` are launched: configurations as values, and the rule that picks one."""

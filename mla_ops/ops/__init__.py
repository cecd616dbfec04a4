"""One room for each operator: what a call is, its rules, its definition, who runs it, and its kernels."""

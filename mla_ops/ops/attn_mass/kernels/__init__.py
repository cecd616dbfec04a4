"""`@triton.jit` code and nothing else; imported when something is launched."""

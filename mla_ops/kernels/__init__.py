"""Device code: `@triton.jit` functions only. Nothing here knows a tensor, a problem or a configuration table."""

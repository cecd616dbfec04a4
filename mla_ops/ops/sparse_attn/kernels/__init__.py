"""`@triton.jit` and, for the wide rows of Hopper, `@gluon.jit` code; imported when something is launched."""

"""The Triton backend: kernel sets, and the launchers that plan a side once for calls alike and run it.

The launchers allocate from shapes, never synchronise with the device and read no data, so they can be captured. They
run below the dispatcher in eager, and are traced with `wrap=torch.library.wrap_triton` when a compiler inlines them.
"""

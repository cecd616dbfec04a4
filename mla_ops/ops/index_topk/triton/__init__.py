"""The Triton backend of `mla::index_topk`: what it supports, and the launcher of scores and selection.

The launcher allocates from shapes, never synchronises with the device and reads no data, so it can be captured.
"""

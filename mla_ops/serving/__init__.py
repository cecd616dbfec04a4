"""Latent rows between calls: a pool of pages as a module, and a cache of many requests on top of it."""

from mla_ops.serving.index_keys import IndexKeys
from mla_ops.serving.paged_cache import PagedCache
from mla_ops.serving.row_cache import RowCache

__all__ = ["IndexKeys", "PagedCache", "RowCache"]

"""Everything torch must know about the operators before any tracing: schema, fakes, kernels, autograd, integrations.

Importing this package registers `mla::sparse_attn` and `mla::sparse_attn_bwd`, once and deterministically. The folder
sits beside `mla_ops/` in a checkout; its only import name is `mla_ops.registration`.
"""

if __name__ != "mla_ops.registration":
    raise ImportError(f"import mla_ops.registration, not {__name__}: a second copy would register the operators twice")

from mla_ops.registration import autograd, fake, impl, integrations
from mla_ops.registration.cache_key import tag_compile_caches
from mla_ops.registration.schema import LIBRARY, SPARSE_ATTN, SPARSE_ATTN_BWD

fake.register(LIBRARY)
impl.register(LIBRARY)
autograd.register(LIBRARY)
integrations.register(LIBRARY)
tag_compile_caches()

__all__ = ["SPARSE_ATTN", "SPARSE_ATTN_BWD"]

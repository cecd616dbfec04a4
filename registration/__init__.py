"""Everything torch must know about the operators before any tracing: schema, fakes, kernels, autograd, integrations.

Importing this package registers `mla::sparse_attn`, `mla::sparse_attn_bwd` and `mla::sparse_attn_max_logits`, once and
deterministically. The folder sits beside `mla_ops/` in a checkout; its only import name is `mla_ops.registration`.
"""

if __name__ != "mla_ops.registration":
    raise ImportError(f"import mla_ops.registration, not {__name__}: a second copy would register the operators twice")

from mla_ops.registration import autograd, fake, impl, integrations
from mla_ops.registration.cache_key import tag_compile_caches
from mla_ops.registration.refusals import refuse_wrapper
from mla_ops.registration.schema import LIBRARY, SPARSE_ATTN, SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS

fake.register(LIBRARY)
impl.register(LIBRARY)
autograd.register(LIBRARY)
integrations.register(LIBRARY)
tag_compile_caches()

__all__ = ["SPARSE_ATTN", "SPARSE_ATTN_BWD", "SPARSE_ATTN_MAX_LOGITS", "refuse_wrapper"]

"""Everything torch must know about the operators before any tracing: schemas, fakes, kernels, autograd, transforms.

Importing this package registers every operator of the namespace `mla`, once and deterministically. The folder sits
beside `mla_ops/` in a checkout; its only import name is `mla_ops.registration`.
"""

if __name__ != "mla_ops.registration":
    raise ImportError(f"import mla_ops.registration, not {__name__}: a second copy would register the operators twice")

from mla_ops.registration import (
    append_rows,
    attn_mass,
    attn_mass_sharding,
    attn_mass_transforms,
    index_loss_dense,
    index_scores,
    index_scores_sharding,
    index_scores_transforms,
    index_topk,
    index_topk_sharding,
    index_topk_transforms,
    read_rows,
    sparse_attn,
    sparse_attn_paged,
    sparse_attn_paged_transforms,
    sparse_attn_scaled,
    sparse_attn_sharding,
    sparse_attn_transforms,
)
from mla_ops.registration.append_rows import APPEND_ROWS
from mla_ops.registration.attn_mass import ATTN_MASS
from mla_ops.registration.cache_key import tag_compile_caches
from mla_ops.registration.index_loss_dense import INDEX_LOSS_DENSE
from mla_ops.registration.index_scores import INDEX_SCORES, INDEX_SCORES_BWD
from mla_ops.registration.index_topk import INDEX_TOPK
from mla_ops.registration.read_rows import READ_ROWS
from mla_ops.registration.sparse_attn import SPARSE_ATTN, SPARSE_ATTN_BWD, SPARSE_ATTN_MAX_LOGITS
from mla_ops.registration.sparse_attn_paged import SPARSE_ATTN_PAGED
from mla_ops.registration.sparse_attn_scaled import SPARSE_ATTN_SCALED, open_wrapper
from mla_ops.registration.transforms import cast_by_autocast, cast_index_inputs_by_autocast, cast_paged_by_autocast
from mla_ops.registration.wrapper_rules import fuse_wrapper, refuse_wrapper

for _operator in (
    *(sparse_attn, sparse_attn_transforms, sparse_attn_sharding, sparse_attn_scaled),
    *(index_topk, index_topk_transforms, index_topk_sharding),
    *(index_scores, index_scores_transforms, index_scores_sharding),
    *(attn_mass, attn_mass_transforms, attn_mass_sharding),
    index_loss_dense,
    *(sparse_attn_paged, sparse_attn_paged_transforms, append_rows, read_rows),
):
    _operator.register()
tag_compile_caches()

__all__ = [
    "APPEND_ROWS",
    "ATTN_MASS",
    "INDEX_LOSS_DENSE",
    "INDEX_SCORES",
    "INDEX_SCORES_BWD",
    "INDEX_TOPK",
    "READ_ROWS",
    "SPARSE_ATTN",
    "SPARSE_ATTN_BWD",
    "SPARSE_ATTN_MAX_LOGITS",
    "SPARSE_ATTN_PAGED",
    "SPARSE_ATTN_SCALED",
    "cast_by_autocast",
    "cast_index_inputs_by_autocast",
    "cast_paged_by_autocast",
    "fuse_wrapper",
    "open_wrapper",
    "refuse_wrapper",
]

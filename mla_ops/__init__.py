"""SparseMLA for PyTorch: `torch.ops.mla.sparse_attn`, token-level top-k sparse multi-head latent attention, any width.

Importing this package registers the operators. It imports neither triton, Inductor nor any model framework. Its public
modules (`mla_ops.adapters`, `distributed`, `lowering`, `reference`, `serving`, `testing`) are imported when first
named; in compiled code they must be imported before, because Dynamo finds nothing else.
"""

# In a checkout this package's own folder lies on its path (see below), so a walk over its modules finds it again.
if __name__ != "mla_ops":
    raise ImportError(f"import mla_ops, not {__name__}: a second copy would register the operators twice")

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout, registration/ and lowering/ lie beside this folder but are subpackages of it (see pyproject.toml).
# Installs map them; this serves plain runs from the checkout and strict editable installs.
if not (_Path(__file__).parent / "registration").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from mla_ops import settings as settings
from mla_ops.api import (
    SparseAttnOutput,
    append_rows,
    attn_mass,
    bytes_per_row,
    explain,
    explain_attn_mass,
    explain_index_scores,
    explain_index_topk,
    explain_sparse_attn_paged,
    index_kl,
    index_loss,
    index_loss_dense,
    index_scores,
    index_topk,
    merge_partials,
    read_rows,
    sparse_attn,
    sparse_attn_max_logits,
    sparse_attn_paged,
    warmup,
    warmup_index_loss,
    warmup_index_topk,
    warmup_sparse_attn_paged,
)
from mla_ops.errors import (
    DoubleBackwardError,
    ForwardModeError,
    InvalidInputError,
    MissingExtraError,
    MlaOpsError,
    NotDifferentiableError,
    OutOfPagesError,
    QuantizedInputError,
    UnknownBackendError,
    UnsupportedProblemError,
    UnsupportedShardingError,
)
from mla_ops.ops.sparse_attn.backends import backend_names
from mla_ops.registration import fuse_wrapper, refuse_wrapper

if TYPE_CHECKING:
    from mla_ops import adapters as adapters
    from mla_ops import distributed as distributed
    from mla_ops import lowering as lowering
    from mla_ops import reference as reference
    from mla_ops import serving as serving
    from mla_ops import testing as testing
else:  # hidden from type checkers, to which a module with __getattr__ has every name
    _LAZY_MODULES = ("adapters", "distributed", "lowering", "reference", "serving", "testing")

    def __getattr__(name: str) -> object:
        if name in _LAZY_MODULES:
            return _importlib.import_module(f"mla_ops.{name}")
        raise AttributeError(f"module 'mla_ops' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY_MODULES})


# Without the modules imported on demand: a star import would import them all.
__all__ = [
    "DoubleBackwardError",
    "ForwardModeError",
    "InvalidInputError",
    "MissingExtraError",
    "MlaOpsError",
    "NotDifferentiableError",
    "OutOfPagesError",
    "QuantizedInputError",
    "SparseAttnOutput",
    "UnknownBackendError",
    "UnsupportedProblemError",
    "UnsupportedShardingError",
    "__version__",
    "append_rows",
    "attn_mass",
    "backend_names",
    "bytes_per_row",
    "explain",
    "explain_attn_mass",
    "explain_index_scores",
    "explain_index_topk",
    "explain_sparse_attn_paged",
    "fuse_wrapper",
    "index_kl",
    "index_loss",
    "index_loss_dense",
    "index_scores",
    "index_topk",
    "merge_partials",
    "read_rows",
    "refuse_wrapper",
    "sparse_attn",
    "sparse_attn_max_logits",
    "sparse_attn_paged",
    "warmup",
    "warmup_index_loss",
    "warmup_index_topk",
    "warmup_sparse_attn_paged",
]

"""The seam between the operator and model frameworks: three questions, answered before any generic builder runs.

1. `resolve_layer_meta`: which widths and which softmax scale does this MLA layer have?
2. `normalize_call` and `plan_positions`: what do these tensors mean, and which rotary table do they need?
3. `resolve_backend`: who will run it, and why not the others?

No framework appears here. What changes none of the three answers stays out: kernel geometry and tuning, choosing
indices, quantisation recipes, paged caches, communication, checkpoints.
"""

from mla_ops.adapters.seam.backend_plan import BackendPlan, resolve_backend
from mla_ops.adapters.seam.layout import InvalidSlots, Origin, SparseCall, normalize_call
from mla_ops.adapters.seam.metadata import Form, MLALayerMeta, resolve_layer_meta
from mla_ops.adapters.seam.packing import Layout, PackedSeq, PositionPlan, plan_positions

__all__ = [
    "BackendPlan",
    "Form",
    "InvalidSlots",
    "Layout",
    "MLALayerMeta",
    "Origin",
    "PackedSeq",
    "PositionPlan",
    "SparseCall",
    "normalize_call",
    "plan_positions",
    "resolve_backend",
    "resolve_layer_meta",
]

"""The operators' schemas, written by hand, and the one `Library` that owns them."""

from __future__ import annotations

import torch

# Kept in a module global: torch drops every registration of a Library object when that object dies.
LIBRARY = torch.library.Library("mla", "DEF")

# needs_exact_strides: the strides a compiled caller traced with are the strides the kernels see. The widths are SymInt
# in every schema, so a graph can carry them as symbols; the optional tensors are positional because register_autograd
# and register_vmap refuse keyword-only tensors.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

LIBRARY.define(
    "sparse_attn(Tensor q, Tensor kv, Tensor indices, SymInt d_v, float softmax_scale, "
    'Tensor? topk_length=None, Tensor? attn_sink=None, str backend="auto") -> (Tensor out, Tensor lse)',
    tags=_TAGS,
)
LIBRARY.define(
    "sparse_attn_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor kv, Tensor indices, Tensor out, Tensor lse, "
    "SymInt d_v, float softmax_scale, Tensor? topk_length=None, Tensor? attn_sink=None, "
    'bool need_dq=True, bool need_dkv=True, str backend="auto") -> (Tensor dq, Tensor dkv, Tensor dsink)',
    tags=_TAGS,
)
# d_v does not change the result; with it the call is launched, or refused, as the forward beside it.
LIBRARY.define(
    "sparse_attn_max_logits(Tensor q, Tensor kv, Tensor indices, SymInt d_v, float softmax_scale, "
    'Tensor? topk_length=None, str backend="auto") -> Tensor',
    tags=_TAGS,
)

# Bound once: an attribute walk through torch.ops costs more than the call's own argument parsing.
SPARSE_ATTN = torch.ops.mla.sparse_attn.default
SPARSE_ATTN_BWD = torch.ops.mla.sparse_attn_bwd.default
SPARSE_ATTN_MAX_LOGITS = torch.ops.mla.sparse_attn_max_logits.default

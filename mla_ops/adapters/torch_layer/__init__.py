"""Sparse MLA and its indexer as plain `torch.nn` layers: the adapter for models that are nobody's framework."""

from mla_ops.adapters.torch_layer.attention import MLASparseAttention, absorb_q, project_v
from mla_ops.adapters.torch_layer.indexer import Indexer, KeyNorm, to_e4m3
from mla_ops.adapters.torch_layer.rotations import RopeLayout, hadamard, rotate
from mla_ops.adapters.torch_layer.sharing import IndexSharing

__all__ = [
    "IndexSharing",
    "Indexer",
    "KeyNorm",
    "MLASparseAttention",
    "RopeLayout",
    "absorb_q",
    "hadamard",
    "project_v",
    "rotate",
    "to_e4m3",
]

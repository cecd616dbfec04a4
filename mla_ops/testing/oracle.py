"""The reference run on a whole call, forward and backward, and results of any backend held against it."""

from __future__ import annotations

import torch

from mla_ops.ops.sparse_attn.reference import (
    sparse_attn_bwd_reference,
    sparse_attn_max_logits_reference,
    sparse_attn_reference,
)
from mla_ops.testing.closeness import assert_within_budget
from mla_ops.testing.inputs import Inputs


def run_reference(
    inputs: Inputs, dtype: torch.dtype, *, use_dout: bool = True, use_dlse: bool = True
) -> dict[str, torch.Tensor]:
    """Compute `out`, `lse`, `max_logits`, `dq`, `dkv` and, with a sink, `dsink` in `dtype`.

    `use_*` choose which of the first two the loss is of.
    """
    cast = inputs.to(dtype)
    out, lse = sparse_attn_reference(*cast.args)
    max_logits = sparse_attn_max_logits_reference(cast.q, cast.kv, cast.indices, cast.softmax_scale, cast.topk_length)
    grads = sparse_attn_bwd_reference(cast.dout if use_dout else None, cast.dlse if use_dlse else None, *cast.args)
    names = ("out", "lse", "max_logits", "dq", "dkv", "dsink")
    results = zip(names, (out, lse, max_logits, *grads), strict=True)
    return {name: result for name, result in results if result is not None}


def assert_matches_oracle(
    actual: dict[str, torch.Tensor], inputs: Inputs, *, use_dout: bool = True, use_dlse: bool = True
) -> None:
    """Assert that results of a call, by the names of `run_reference`, are within their budget of the fp64 oracle."""
    oracle = run_reference(inputs, torch.float64, use_dout=use_dout, use_dlse=use_dlse)
    low = run_reference(inputs, inputs.q.dtype, use_dout=use_dout, use_dlse=use_dlse)
    terms = inputs.indices.shape[-1] + inputs.q.shape[-1]
    every_query = inputs.indices.numel() * inputs.q.shape[-2]
    for name, result in actual.items():
        summed = terms + every_query if name in ("dkv", "dsink") else terms
        assert_within_budget(result, oracle[name], low[name], terms=summed, name=name)

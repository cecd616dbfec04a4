"""`mla-ops explain`: the dispatch decision for sizes given on the command line."""

from __future__ import annotations

import argparse

import torch

from mla_ops.bench.shapes import check_sizes
from mla_ops.device import pick_device, traits_of
from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the decision; the exit status is 0 when a backend runs the problem and 1 when none does."""
    check_sizes(arguments)
    if arguments.heads % arguments.kv_group:
        raise InvalidInputError(
            f"--heads must be a multiple of --kv-group, got {arguments.heads} and {arguments.kv_group}"
        )
    problem = SparseAttnProblem(
        d_total=arguments.d_total,
        d_v=arguments.d_v,
        topk=arguments.topk,
        heads=arguments.heads,
        kv_group=arguments.kv_group,
        dtype=_DTYPES[arguments.dtype],
        needs_grad=not arguments.inference,
    )
    hints = Hints(batch=arguments.batch, seq_q=arguments.seq_q, seq_kv=arguments.seq_kv)
    decision = select(problem, traits_of(pick_device(arguments.device)), arguments.backend, hints)
    print(decision)
    return 0 if decision.backend is not None else 1

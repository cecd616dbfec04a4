"""The warp-specialised kernels of sm90, asked for by their configurations, on wide rows: for the tests of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mla_ops.device import traits_of
from mla_ops.ops.sparse_attn.call import Gradients, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.call import Results as CallResults
from mla_ops.ops.sparse_attn.configs.launch import ConfigKey
from mla_ops.ops.sparse_attn.configs.lookup import hopper_backward_config, hopper_config, key_of
from mla_ops.ops.sparse_attn.triton.direct import run_backward, run_forward
from mla_ops.testing import Case, Inputs, assert_matches_oracle, make_inputs

WIDE = Case(d_total=576, d_v=512, topk=200, heads=64, seq_q=6, seq_kv=300)
Results = dict[str, torch.Tensor]


def wide_inputs(case: Case = WIDE, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Inputs:
    return make_inputs(case, dtype, "cuda", **options)


def config_key(inputs: Inputs) -> ConfigKey:
    return key_of(SparseAttnProblem.of(SparseAttnCall(*inputs.args)), traits_of(inputs.q.device))


def forward(inputs: Inputs, num_splits: int = 1) -> Results:
    config = hopper_config(config_key(inputs))
    assert config is not None
    return run_forward(SparseAttnCall(*inputs.args), config=config, num_splits=num_splits)._asdict()


def backward(
    inputs: Inputs, out: torch.Tensor, lse: torch.Tensor, *, use_dout: bool = True, use_dlse: bool = True,
    need_dq: bool = True, need_dkv: bool = True,
) -> Results:  # fmt: skip
    config = hopper_backward_config(config_key(inputs))
    assert config is not None
    gradients = Gradients(inputs.dout if use_dout else None, inputs.dlse if use_dlse else None)
    wanted = Wanted(need_dq, need_dkv)
    results = run_backward(SparseAttnCall(*inputs.args), CallResults(out, lse), gradients, wanted, configs=(config,))
    count = 2 if inputs.attn_sink is None else 3
    return dict(zip(["dq", "dkv", "dsink"][:count], results, strict=False))


def check_forward(inputs: Inputs, num_splits: int = 1) -> Results:
    actual = forward(inputs, num_splits)
    assert_matches_oracle(actual, inputs)
    return actual


def check_backward(inputs: Inputs, **uses: bool) -> Results:
    results = forward(inputs)
    actual = backward(inputs, **results, **uses)
    assert_matches_oracle({**results, **actual}, inputs, **uses)
    return actual


def replay_with_other_indices(run: Callable[[Inputs], Results], case: Case = WIDE) -> tuple[Results, Results]:
    """Return what `run` gives when it was captured with other indices and is replayed, and what it gives in eager."""
    inputs, other = wide_inputs(case, topk_length=True), wide_inputs(case, topk_length=True, seed=1)
    run(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    inputs.indices.copy_(other.indices)
    inputs.topk_length.copy_(other.topk_length)
    graph.replay()
    return captured, run(inputs)

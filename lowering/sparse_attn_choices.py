"""Which launch configuration is inlined: the table's, or under max-autotune the fastest of a short list.

The list holds the configurations of the rows nearest to the problem; the first is the table's own choice. They are
timed while the graph is compiled, on random tensors of the sizes at hand, and the winner is part of the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from mla_ops.device import DeviceTraits
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig
from mla_ops.ops.sparse_attn.configs.lookup import backward_candidates, forward_candidates
from mla_ops.ops.sparse_attn.triton import backend as triton
from mla_ops.settings import current

# A launch compiles in seconds, so the list is short.
SHORT_LIST = 4

_log = logging.getLogger(__name__)
_Choice = TypeVar("_Choice", FwdConfig, tuple[BwdConfig, ...])


def forward(problem: SparseAttnProblem, hints: Hints, traits: DeviceTraits, softmax_scale: float) -> FwdConfig:
    """Return the configuration to inline a forward with."""
    candidates = forward_candidates(*config_key(problem, traits), count=_count(hints))

    def prepare() -> Callable[[FwdConfig], Any]:
        arguments = (*_random_inputs(problem, hints, traits), problem.d_v, softmax_scale, None, None)
        return lambda config: triton.launch_forward(*arguments, config=config)

    return _fastest(candidates, prepare)


def backward(
    problem: SparseAttnProblem,
    hints: Hints,
    traits: DeviceTraits,
    softmax_scale: float,
    need_dq: bool,
    need_dkv: bool,
) -> tuple[BwdConfig, ...]:
    """Return the configurations, one per pass, to inline a backward with."""
    is_deterministic = need_dkv and torch.are_deterministic_algorithms_enabled()
    candidates = backward_candidates(*config_key(problem, traits), is_deterministic, count=_count(hints))

    def prepare() -> Callable[[tuple[BwdConfig, ...]], Any]:
        inputs = _random_inputs(problem, hints, traits)
        out, lse = triton.launch_forward(*inputs, problem.d_v, softmax_scale, None, None)
        arguments = (torch.randn_like(out), None, *inputs, out, lse, problem.d_v, softmax_scale, None, None)
        return lambda configs: triton.launch_backward(*arguments, need_dq, need_dkv, configs=configs)

    return _fastest(candidates, prepare)


def config_key(problem: SparseAttnProblem, traits: DeviceTraits) -> tuple[int, int, int, int, int, int, str]:
    """Return what the tables of `configs.lookup` are asked with."""
    heads = max(1, problem.heads_per_group)  # no heads: nothing is launched
    return traits.arch, traits.smem_bytes, heads, *problem.widths, current().tuned_rows


def _count(hints: Hints) -> int:
    """Return how many configurations to consider; without a query there is nothing to time."""
    return SHORT_LIST if inductor.is_max_autotune() and hints.batch * hints.seq_q > 0 else 1


def _fastest(candidates: Sequence[_Choice], prepare: Callable[[], Callable[[_Choice], Any]]) -> _Choice:
    if len(candidates) == 1:
        return candidates[0]
    from triton.testing import do_bench

    with inductor.real_tensors():
        launch = prepare()
        times = {choice: do_bench(lambda: launch(choice), return_mode="median") for choice in candidates}  # noqa: B023
    _log.info("timed, in ms: %s", times)
    return min(times, key=times.__getitem__)


def _random_inputs(
    problem: SparseAttnProblem, hints: Hints, traits: DeviceTraits
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, kv and indices of a problem; every index is valid, for a gather of one row would flatter."""
    rows = (hints.batch, hints.seq_q)
    return (
        torch.randn(*rows, problem.heads, problem.d_total, device=traits.type).to(problem.dtype),
        torch.randn(hints.batch, hints.seq_kv, problem.kv_group, problem.d_total, device=traits.type).to(problem.dtype),
        torch.randint(max(1, hints.seq_kv), (*rows, problem.kv_group, problem.topk), device=traits.type).int(),
    )

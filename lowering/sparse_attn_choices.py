"""Which launch configuration is inlined: the table's, or under max-autotune the fastest of a short list.

The list holds the configurations of the rows nearest to the problem; the first is the table's own choice. They are
timed while the graph is compiled, on random tensors of the sizes at hand, and the winner is part of the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.launching import launch_on
from mla_ops.lowering import inductor_compat as inductor
from mla_ops.ops.sparse_attn.call import Gradients, Hints, SparseAttnCall, SparseAttnProblem, Wanted
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig, program_count
from mla_ops.ops.sparse_attn.configs.lookup import backward_candidates, forward_candidates, key_of
from mla_ops.ops.sparse_attn.triton.backward import launch_backward, plan_backward
from mla_ops.ops.sparse_attn.triton.forward import launch_forward, plan_forward
from mla_ops.ops.sparse_attn.triton.kernel_sets import Choice
from mla_ops.ops.sparse_attn.triton.portable import split_count
from mla_ops.settings import current

# A launch compiles in seconds, so the list is short.
SHORT_LIST = 4

_log = logging.getLogger(__name__)
_Choice = TypeVar("_Choice", FwdConfig, tuple[BwdConfig, ...])


def forward(
    chosen: Choice, problem: SparseAttnProblem, hints: Hints, device: torch.device, softmax_scale: float
) -> Choice:
    """Return what to inline a forward with: what was chosen, or the same kernels in a faster configuration."""
    traits = traits_of(device)
    candidates = forward_candidates(key_of(problem, traits), current().tuned_rows, count=_count(hints))

    def prepare() -> Callable[[FwdConfig], Any]:
        call = random_call(problem, hints, device, softmax_scale)
        return lambda config: launch_forward(call, plan_forward(call, traits, choice=chosen._replace(config=config)))

    return chosen._replace(config=_fastest(candidates, device, prepare))


def backward(
    chosen: Choice,
    problem: SparseAttnProblem,
    hints: Hints,
    device: torch.device,
    softmax_scale: float,
    wanted: Wanted,
) -> Choice:
    """Return what to inline a backward with, as `forward` does; its configuration holds one for each pass."""
    traits = traits_of(device)
    is_deterministic = wanted.dkv and torch.are_deterministic_algorithms_enabled()
    candidates = backward_candidates(
        key_of(problem, traits), current().tuned_rows, is_deterministic, count=_count(hints)
    )

    def prepare() -> Callable[[tuple[BwdConfig, ...]], Any]:
        call = random_call(problem, hints, device, softmax_scale)
        results = launch_forward(call, plan_forward(call, traits))
        gradients = Gradients(torch.randn_like(results.out), None)

        def launch(configs: tuple[BwdConfig, ...]) -> Any:
            # As it will be inlined: not in key order, which a trace does not do.
            choice = chosen._replace(config=configs)
            plan = plan_backward(call, traits, wanted, choice=choice, is_traced=True)
            return launch_backward(call, results, gradients, wanted, plan)

        return launch

    return chosen._replace(config=_fastest(candidates, device, prepare))


def split_count_of(choice: Choice, problem: SparseAttnProblem, hints: Hints, traits: DeviceTraits) -> int:
    """Return over how many programs the slots of a row are shared out in the call that is compiled for."""
    programs = program_count(hints.rows, problem.heads, problem.kv_group, choice.config.block_h)
    return split_count(programs, problem.topk, choice.config, traits, key_of(problem, traits))


def random_call(problem: SparseAttnProblem, hints: Hints, device: torch.device, softmax_scale: float) -> SparseAttnCall:
    """Return a call of these sizes; every index is valid, for a gather of one row would flatter."""
    rows, kv_rows = (hints.batch, hints.seq_q), (hints.batch, hints.seq_kv)
    return SparseAttnCall(
        torch.randn(*rows, problem.heads, problem.d_total, device=device).to(problem.dtype),
        torch.randn(*kv_rows, problem.kv_group, problem.d_total, device=device).to(problem.dtype),
        torch.randint(max(1, hints.seq_kv), (*rows, problem.kv_group, problem.topk), device=device).int(),
        problem.d_v,
        softmax_scale,
    )


def _count(hints: Hints) -> int:
    """Return how many configurations to consider; without a query there is nothing to time."""
    return SHORT_LIST if inductor.is_max_autotune() and hints.rows > 0 else 1


def _fastest(
    candidates: Sequence[_Choice], device: torch.device, prepare: Callable[[], Callable[[_Choice], Any]]
) -> _Choice:
    if len(candidates) == 1:
        return candidates[0]
    from triton.testing import do_bench

    def time_all() -> dict[_Choice, float]:
        launch = prepare()
        return {choice: do_bench(lambda: launch(choice), return_mode="median") for choice in candidates}  # noqa: B023

    with inductor.real_tensors():
        times = launch_on(device, time_all)
    _log.info("timed, in ms: %s", times)
    return min(times, key=times.__getitem__)

"""dkv by atomic sums where it does not fit the cache: in launches of few queries that go through the keys together.

A row of dkv that is not in the L2 cache is read from memory and written back by every addition to it. Programs that
start together and take the keys in order are at about the same keys at a time, so what they read and add to is cached.
At 576/512 with 64 heads and 65,536 random keys a backward takes 11.9 instead of 20.1 ms on an H100. Where a query
shares 80 % of its keys with the query before, the shared keys are cached anyway: 9.4 instead of 9.1 ms
(benchmarks/results/*-h100-key-order.json).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, HopperBwdConfig, program_count, wave_programs

# Narrower rows gain less from it than the indices cost to sort.
MIN_D_TOTAL = 256
# Waves of programs in a launch: with one, more time is lost at its end; with four, programs drift apart in it.
WAVES = 2
# Slots that are sorted at a time. Besides the result each takes 12 bytes, or 25 if `indices` are int64 and have
# lengths, and more where a query has more slots than torch sorts in place.
SORTED_SLOTS = 1 << 23


def rows_per_launch(
    config: BwdConfig | HopperBwdConfig, problem: SparseAttnProblem, hints: Hints, traits: DeviceTraits
) -> int | None:
    """Return how many queries a launch takes, or None: all of them, with their keys in the order of the slots.

    None where kv and dkv of a batch element fit the cache, and where a launch comes to a key less than twice.
    """
    key_bytes = problem.kv_group * problem.d_total * (problem.dtype.itemsize + 4)  # of a row of kv and of fp32 dkv
    if problem.d_total < MIN_D_TOTAL or hints.seq_kv * key_bytes <= traits.l2_bytes:
        return None
    programs_per_row = program_count(1, problem.heads, problem.kv_group, config.block_h)
    rows = max(1, WAVES * wave_programs(config, traits.num_sms) // max(1, programs_per_row))
    return rows if rows * problem.topk >= 2 * hints.seq_kv else None


def add_in_key_order(
    call: SparseAttnCall, run_rows: Callable[[SparseAttnCall, int, int], None], launch_rows: int
) -> None:
    """Call `run_rows(ordered, first_row, num_rows)` for `launch_rows` queries at a time.

    `ordered` is the call with the indices of every query in descending order, so that negative ones, which also stand
    for slots past `topk_length`, come last.
    """
    indices, topk_length = call.indices, call.topk_length
    topk = indices.shape[-1]
    ordered = indices.new_empty(indices.shape)
    flat, flat_ordered = indices.flatten(0, -3), ordered.flatten(0, -3)
    rows, row_slots = len(flat), flat.shape[1:].numel()
    slab_rows = max(1, SORTED_SLOTS // (row_slots * launch_rows)) * launch_rows
    for first in range(0, rows, slab_rows):
        slab = slice(first, first + slab_rows)
        part = flat[slab]
        if topk_length is not None:
            has_slot = torch.arange(topk, device=indices.device) < topk_length.flatten()[slab, None, None]
            part = part.where(has_slot, -1)
        flat_ordered[slab] = part.sort(-1, descending=True).values
        for row in range(first, min(first + slab_rows, rows), launch_rows):
            run_rows(call._replace(indices=ordered), row, min(launch_rows, rows - row))

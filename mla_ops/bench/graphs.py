"""Functions timed as CUDA graphs that take turns: a change of clocks meets all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

_Name = TypeVar("_Name", bound=Hashable)


def microseconds(functions: dict[_Name, Callable[[], Any]], *, rounds: int, turn_us: float = 0.0) -> dict[_Name, float]:
    """Return the median time of a replay of each function as a CUDA graph.

    Args:
        functions: what is captured, after one call of it.
        rounds: turns of each that count; one more before them does not.
        turn_us: how long a turn is; replays are repeated that long, but one is made at least.
    """
    graphs = {}
    for name, function in functions.items():
        function()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            function()
    times: dict[_Name, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 1):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            repeats = 1 if turn == 0 else max(1, int(turn_us / times[name][0]))
            start.record()
            for _ in range(repeats):
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / repeats)
    return {name: statistics.median(each[1:]) for name, each in times.items()}

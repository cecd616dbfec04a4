"""FLOP formulas of the operators, for torch's counter.

That counter's module imports triton, which was 0.18 s of the 2.2 s of `import mla_ops` (2-core CPU), and copies its
registry into every counter it makes. So the formulas wait until somebody imports that module: they are in its registry
before any counter can be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_waiting: dict[torch._ops.OpOverloadPacket, Callable[..., int]] = {}


def register_flop_formulas(formulas: Mapping[torch._ops.OpOverloadPacket, Callable[..., int]]) -> None:
    """Give each operator its formula, called with shapes in place of tensors: now, or when the counter is imported."""
    if _COUNTER in sys.modules:
        _register(formulas)
        return
    if not _waiting:
        sys.meta_path.insert(0, _CounterFinder())
    _waiting.update(formulas)


class _CounterFinder(MetaPathFinder):
    """Finds the counter's module as Python does, and sees that the waiting formulas are registered once it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(_waiting)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(formulas: Mapping[Any, Callable[..., int]]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in formulas.items():
        register_flop_formula(operator)(formula)

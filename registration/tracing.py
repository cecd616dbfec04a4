"""What every fake does first: tell parts of torch that are loaded late more than a schema says.

Importing torch loads neither DTensor nor Inductor, and neither may this package. DTensor runs a fake, for the shapes of
the results, before it looks a sharding rule up; a trace runs one before anything is lowered. So both are told then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_sharding_rules: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def add_sharding_rule(op: torch._ops.OpOverload, rule: Callable[..., Any]) -> None:
    """Give DTensor a rule for `op`, when this process has loaded DTensor."""
    _sharding_rules[op] = rule


def prepare() -> None:
    """Hand over the sharding rules if DTensor is loaded, and install the lowerings if a graph is being traced."""
    if _sharding_rules and "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.experimental import register_sharding

        while _sharding_rules:
            op, rule = _sharding_rules.popitem()
            register_sharding(op)(rule)
    if torch._guards.TracingContext.try_get() is not None:
        from mla_ops import lowering

        lowering.prepare()

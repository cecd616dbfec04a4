"""The one `Library` that owns every operator of this package, and how an operator is declared in it."""

from __future__ import annotations

import torch

# Kept in a module global: torch drops every registration of a Library object when that object dies.
LIBRARY = torch.library.Library("mla", "DEF")

# needs_exact_strides: the strides a compiled caller traced with are the strides the kernels see.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# Every operator that `define` has declared, in that order.
OPERATORS: list[torch._ops.OpOverload] = []


def define(schema: str) -> torch._ops.OpOverload:
    """Declare an operator of the namespace `mla` by its schema, written by hand, and return it.

    Widths are SymInt in every schema, so a graph can carry them as symbols; optional tensors are positional because
    `register_autograd` and `register_vmap` refuse keyword-only tensors. Callers bind the result once: an attribute walk
    through torch.ops costs more than the call's own argument parsing.
    """
    LIBRARY.define(schema, tags=_TAGS)
    operator: torch._ops.OpOverload = getattr(torch.ops.mla, schema[: schema.index("(")]).default
    OPERATORS.append(operator)
    return operator

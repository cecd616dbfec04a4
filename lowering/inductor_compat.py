"""Every private name of Inductor that the lowering needs, behind one version gate.

What is not public in torch is here and nowhere else. A torch outside of `TESTED` gets no lowering: the operators stay
extern calls, which are correct everywhere, and one warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

# The first torch whose Inductor this was tested with, and the first with which it was not.
TESTED = ((2, 11), (2, 15))

# Of Inductor: a `TensorBox`, a sympy expression. Its types are as private as its functions.
Node = Any
Expr = Any


@cache
def is_supported() -> bool:
    """Return whether this torch's Inductor is a tested one; the first time that it is not, warn."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    first, end = TESTED
    if first <= version < end:
        return True
    warnings.warn(
        f"mla_ops.lowering is tested with torch >= {first[0]}.{first[1]}, < {end[0]}.{end[1]} and this is "
        f"{torch.__version__}: compiled graphs call mla::sparse_attn as an extern kernel, slower to launch and "
        "otherwise the same; look for a newer mla_ops, or call mla_ops.lowering.disable() to silence this",
        stacklevel=2,
    )
    return False


def register(op: torch._ops.OpOverload, lower: Callable[..., Any]) -> None:
    """Make Inductor lower `op` with `lower`, which gets the operator's arguments with tensors as nodes."""
    from torch._inductor.lowering import register_lowering

    register_lowering(op, type_promotion_kind=None)(lower)


def extern_call(op: torch._ops.OpOverload, args: Sequence[Any]) -> Any:
    """Lower a call of `op` to a call of `op`, as Inductor does without a lowering."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def inline(function: Callable[..., Any], args: Sequence[Node | None]) -> Any:
    """Trace `function` on fake tensors like `args` and lower what it did as if it had stood in the graph.

    Sizes that a guard has made constant are Python integers in the trace; other symbolic sizes stay symbolic.
    """
    from torch._inductor.codegen.subgraph import inline_subgraph_to_ir_nodes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    present = [_with_fixed_layout(arg) for arg in args if arg is not None]

    def on_present(*tensors: torch.Tensor) -> Any:
        remaining = iter(tensors)
        return function(*(None if arg is None else next(remaining) for arg in args))

    with V.fake_mode:
        fakes = [_fake_like(node) for node in present]
        graph = make_fx(on_present, decomposition_table=select_decomp_table(), tracing_mode="symbolic")(*fakes)
    return inline_subgraph_to_ir_nodes(graph, present, "mla_ops")


def _with_fixed_layout(node: Node) -> Node:
    """Return `node` with strides that no later decision of Inductor can change: those it has, else contiguous ones."""
    from torch._inductor.ir import ExternKernel, FlexibleLayout

    strides = node.maybe_get_stride() or FlexibleLayout.contiguous_strides(node.get_size())
    return ExternKernel.require_exact_strides(node, strides)


def _fake_like(node: Node) -> torch.Tensor:
    from torch._inductor.utils import convert_shape_to_symint
    from torch._inductor.virtualized import V

    # Not Inductor's ir_node_to_tensor: a symbol that a guard has replaced by a number would stay a SymInt.
    simplify = V.graph.sizevars.simplify
    size, strides = ([simplify(expr) for expr in exprs] for exprs in (node.get_size(), node.get_stride()))
    return torch.empty_strided(
        convert_shape_to_symint(size),
        convert_shape_to_symint(strides),
        dtype=node.get_dtype(),
        device=node.get_device(),
    )


def is_symbolic(expr: Expr) -> bool:
    """Return whether a size is not known to the graph that is being compiled."""
    return bool(_symbols(expr))


def is_data_dependent(expr: Expr) -> bool:
    """Return whether a size comes from the values of a tensor, so that it has no hint and takes no guard."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return bool(_symbols(expr)) and bool(free_unbacked_symbols(_simplified(expr)))


def is_marked_dynamic(expr: Expr) -> bool:
    """Return whether the user asked for this size to stay dynamic, so that a guard on its value would be an error."""
    from torch._inductor.virtualized import V

    if not _symbols(expr):
        return False
    if is_ahead_of_time():
        return True  # an exported graph has no guards: what is symbolic there was declared so
    marked: set[Any] = set()
    for tracked in V.graph.sizevars.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            if constraint is not None and not constraint.warn_only and isinstance(size, torch.SymInt):
                marked |= size.node.expr.free_symbols
    return not marked.isdisjoint(_symbols(expr))


def hint(expr: Expr) -> int:
    """Return the value of a size in the call that is being compiled for, without a guard."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(_simplified(expr)))


def guard(expr: Expr) -> int:
    """Return the value of a size and make it a condition of the compiled graph."""
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.guard_int(_simplified(expr)))


def upper_bound(expr: Expr) -> float:
    """Return the largest value that a size may have, infinity if it has no bound."""
    from torch._inductor.virtualized import V

    upper = V.graph.sizevars.shape_env.bound_sympy(_simplified(expr)).upper
    return int(upper) if upper.is_Integer else float("inf")


def _simplified(expr: Expr) -> Expr:
    from torch._inductor.virtualized import V

    return V.graph.sizevars.simplify(expr.node.expr if isinstance(expr, torch.SymInt) else expr)


def _symbols(expr: Expr) -> set[Any]:
    return set(_simplified(expr).free_symbols)


def is_ahead_of_time() -> bool:
    """Return whether an AOTInductor package is being built: it runs without Python, and without guards."""
    from torch._inductor.virtualized import V

    return bool(V.graph.aot_mode)


def is_max_autotune() -> bool:
    """Return whether the graph is compiled under `mode="max-autotune"` and timings may decide what is in it."""
    from torch._inductor import config

    return bool(config.max_autotune) and not config.deterministic


@contextmanager
def real_tensors() -> Iterator[None]:
    """Leave the fake tensors of a compilation; random numbers drawn inside are not missed outside."""
    from torch._dynamo.utils import preserve_rng_state
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with preserve_rng_state(), unset_fake_temporarily(), torch.no_grad():
        yield

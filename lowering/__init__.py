"""The Inductor lowering's switch: whether compiled graphs contain the kernels or call the operators.

Nothing depends on it: with the lowering off, a compiled graph calls the operators as extern kernels, which computes the
same bits. It is on by default and installed while a graph is traced, so `import mla_ops` does not import Inductor.

    mla_ops.lowering.disable()          # graphs compiled from now on
    with mla_ops.lowering.disable():    # graphs compiled inside the block
        ...
"""

if __name__ != "mla_ops.lowering":
    raise ImportError(f"import mla_ops.lowering, not {__name__}: a second copy would have a switch of its own")

from types import TracebackType
from weakref import WeakKeyDictionary

import torch

from mla_ops.ops.sparse_attn.configs.tuned import read_once
from mla_ops.registration.cache_key import tag_compile_caches
from mla_ops.settings import Settings, current

__all__ = ["disable", "enable", "is_enabled"]

# Of the process, not of a thread: a backward may be compiled by the thread that runs it.
_enabled = True


class _Switched:
    """What a switch returns: as a context manager it puts the earlier state back."""

    def __init__(self, *, to: bool) -> None:
        self._before = _enabled
        _set(to)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _set(self._before)


def enable() -> _Switched:
    """Inline kernels into the graphs that are compiled from now on, or inside a `with` block. Idempotent.

    Graphs that exist already stay what they are. The lowering is installed at once, which imports Inductor: packaging a
    program that `torch.export.load` read has no trace to install it in, and needs this call.
    """
    switched = _Switched(to=True)
    prepare()
    return switched


def disable() -> _Switched:
    """Call the operators as extern kernels in the graphs that are compiled from now on, or inside a `with` block."""
    return _Switched(to=False)


def is_enabled() -> bool:
    """Return whether graphs that are compiled now get kernels inlined."""
    return _enabled


def prepare() -> None:
    """Make the compilation that is going on see the lowerings, and its caches see which; called while tracing."""
    _tag_compile_caches(is_lowered=_enabled)
    context = torch._guards.TracingContext.try_get()
    if context is not None:
        _settings_of_traces.setdefault(context, current())
    if not _enabled:
        return
    from mla_ops.lowering import inductor_compat

    if inductor_compat.is_supported():
        from mla_ops.lowering import attn_mass, index_scores, index_topk, sparse_attn

        for operator in (sparse_attn, index_topk, index_scores, attn_mass):
            operator.install()


# A backward is compiled when it first runs, in the tracing context of its forward, perhaps in a thread of autograd's.
_settings_of_traces: WeakKeyDictionary[torch._guards.TracingContext, Settings] = WeakKeyDictionary()


def settings_of_trace() -> Settings:
    """Return the settings that were current where the graph that is compiled now was traced."""
    context = torch._guards.TracingContext.try_get()
    return current() if context is None else _settings_of_traces.get(context, current())


def _set(enabled: bool) -> None:
    global _enabled
    _tag_compile_caches(is_lowered=enabled)  # first: a setting that can't be read leaves the switch as it was
    _enabled = enabled


def _tag_compile_caches(*, is_lowered: bool) -> None:
    tuned_rows = current().tuned_rows
    tag_compile_caches(is_lowered=is_lowered, inlined=read_once(tuned_rows).digest if tuned_rows else "")

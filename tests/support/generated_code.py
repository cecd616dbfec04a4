"""What Inductor writes for a function, read before anything of it is compiled: C++ takes longer than all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch


class _IsWritten(Exception):
    pass


def generated_code(function: Callable[..., Any], *arguments: Any) -> str:
    """Return the wrapper, with its kernels, that `torch.compile` makes of `function`; nothing runs."""
    from torch._inductor.graph import GraphLowering

    written: list[str] = []

    def keep(code: str) -> None:
        written.append(code)
        raise _IsWritten("the code is written")

    with (
        mock.patch.object(GraphLowering, "save_output_code", staticmethod(keep)),
        # A graph that an earlier test compiled would be taken from a cache, written by nobody.
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        pytest.raises(Exception, match="the code is written"),
    ):
        torch.compile(function, fullgraph=True)(*arguments)
    (code,) = written
    return code

"""Fixtures of the suite: where a test runs, and memory that is never zero by luck."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mla_ops import dispatch, launching, row_sums
from mla_ops.device import traits_of
from mla_ops.ops.index_topk.triton import launch as index_topk
from mla_ops.ops.sparse_attn import backends
from mla_ops.ops.sparse_attn.triton import backward, forward, portable

# What cuBLAS needs to be deterministic, which the eager backend's matmuls on CUDA rely on; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Inductor's pool of compile workers can keep a process without a GPU waiting for minutes at its end.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@dataclass(frozen=True)
class Target:
    """A device and the backend that serves it; the whole contract is tested on each."""

    device: str
    backend: str


TARGETS = [
    pytest.param(Target("cpu", "auto"), id="cpu"),
    pytest.param(Target("cuda", "eager"), id="cuda-eager", marks=pytest.mark.gpu),
    pytest.param(Target("cuda", "auto"), id="cuda-triton", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = "needs a CUDA device: torch.cuda.is_available() is False on this machine"
    if torch.cuda.device_count() < 2:
        skips["gpu2"] = f"needs two CUDA devices, torch.cuda.device_count() is {torch.cuda.device_count()}"
    for item in items:
        for marker, reason in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan every call anew: plans of earlier tests know nothing of what this one patches, nor later ones of this."""
    monkeypatch.setattr(backends, "_plans", dispatch.Plans())


@pytest.fixture
def nothing_warm(monkeypatch: pytest.MonkeyPatch, no_plans: None) -> None:
    """Forget what this process has launched."""
    monkeypatch.setattr(launching, "_records", {})


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask torch for reproducible results: atomics may reorder fp32 sums otherwise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_hopper() -> None:
    """Skip where the warp-specialised kernels cannot run."""
    traits = traits_of(torch.device("cuda"))
    if traits.arch != 90:
        pytest.skip(f"needs compute capability 9.0, this device has {traits.arch / 10}")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch leaves uninitialised, so that a result nobody wrote is seen."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocate_and_fill

    uninitialised = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    uninitialised += [(module, "unfilled") for module in (forward, backward, portable, row_sums, index_topk)]
    for owner, name in uninitialised:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def mla_ops_here(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of `mla-ops` in this process, which spares the three seconds that importing torch takes."""
    from mla_ops.cli.main import main

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        try:
            status = main(args)
        except SystemExit as stop:  # argparse's
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(args, status, printed.out, printed.err)

    return run


@pytest.fixture
def fresh_dynamo() -> None:
    """Start without compiled frames or counters of earlier tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], bool]:
    """Tell whether the lowering has said something in its log."""
    caplog.set_level(logging.INFO, logger="mla_ops.lowering")
    return lambda text: any(text in record.getMessage() for record in caplog.records)

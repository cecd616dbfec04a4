"""The kernel tests under Triton's interpreter, in a process of its own: the switch is read when a kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (
    "test_kernels_gpu.py",
    "test_scaled_kernels_gpu.py",
    "test_sparse_attn_paged_kernels.py",
    "test_row_codec_kernels.py",
)


def test_kernels_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    folder = Path(__file__).parent
    tests = [str(folder / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, env=environment, cwd=folder.parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]

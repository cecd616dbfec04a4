"""What every stored figure carries: where, with what and by which command it was measured."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mla_ops
from mla_ops.device import traits_of

RESULTS = Path(__file__).parent / "results"


def header(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and command of this run."""
    return {
        "device": str(traits_of(device)) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "mla_ops": mla_ops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv)]),
    }


def write(what: str, device: torch.device, records: list[dict[str, Any]], **extra: Any) -> Path:
    """Write `results/<date>-<device>-<what>.json` and return its path."""
    top = header(device)
    name = "cpu" if device.type == "cpu" else traits_of(device).name.removeprefix("NVIDIA ").split()[0].lower()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{top['date']}-{name}-{what}.json"
    path.write_text(json.dumps({"header": top, **extra, "records": records}, indent=1) + "\n")
    return path


def _commit() -> str:
    """The checkout's commit; BENCHMARK_COMMIT names it where the sources travelled without their history."""
    if "BENCHMARK_COMMIT" in os.environ:
        return os.environ["BENCHMARK_COMMIT"]

    def git(*args: str) -> str:
        result = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=True)
        return result.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":!results")
    return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()

"""What every stored figure carries: where, with what and by which command it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mla_ops
from mla_ops.device import traits_of


def header(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Return device, versions, commit and command of this run; `commit` names it where history did not travel along."""
    return {
        "device": str(traits_of(device)) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "mla_ops": mla_ops.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": _command(),
    }


def device_label(device: torch.device) -> str:
    """Return the short name of a device that result files carry: "cpu", "h100"."""
    return "cpu" if device.type == "cpu" else traits_of(device).name.removeprefix("NVIDIA ").split()[0].lower()


def write(
    folder: Path,
    what: str,
    device: torch.device,
    records: list[dict[str, Any]],
    commit: str | None = None,
    **extra: Any,
) -> Path:
    """Write `<folder>/<date>-<device>-<what>.json` and return its path."""
    top = header(device, commit)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{top['date']}-{device_label(device)}-{what}.json"
    path.write_text(json.dumps({"header": top, **extra, "records": records}, indent=1) + "\n")
    return path


def _command() -> str:
    program, *arguments = (Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
    return " ".join(["mla-ops" if program in ("__main__.py", "mla-ops") else f"python {program}", *arguments])


def _commit() -> str:
    """Return the checkout's commit, marked when tracked files differ from it; "unknown" outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()

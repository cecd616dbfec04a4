"""`mla-ops doctor`: what this machine has, and which backend runs on each of its devices or why it does not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

import mla_ops
from mla_ops import settings
from mla_ops.device import devices, traits_of
from mla_ops.ops.sparse_attn.backends import backend_names, select
from mla_ops.ops.sparse_attn.call import SparseAttnProblem

# What is asked of every backend on every device: training at the widths of a small and of a large model.
PROBES = (
    SparseAttnProblem(d_total=128, d_v=64, topk=256, heads=28, kv_group=1, dtype=torch.bfloat16, needs_grad=True),
    SparseAttnProblem(d_total=576, d_v=512, topk=2048, heads=128, kv_group=1, dtype=torch.bfloat16, needs_grad=True),
)


def run_doctor(*, as_json: bool) -> int:
    """Print the report; the exit status is 0 when `backend="auto"` runs every probe on every device, else 1."""
    report = _report()
    print(json.dumps(report, indent=2) if as_json else _text(report))
    return 0 if all(probe["auto"] for device in report["devices"] for probe in device["probes"]) else 1


def _report() -> dict[str, Any]:
    return {
        "versions": {
            "mla_ops": mla_ops.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "cxx_compiler": settings.cxx_compiler(),
        "settings": asdict(settings.current()),
        "devices": [_device_report(device) for device in devices()],
    }


def _device_report(device: torch.device) -> dict[str, Any]:
    traits = traits_of(device)
    probes = []
    for problem in PROBES:
        chosen = select(problem, traits).backend
        named = {name: select(problem, traits, name).verdicts[0].reasons for name in backend_names()}
        probes.append(
            {
                "problem": str(problem),
                "auto": None if chosen is None else chosen.name,
                "backends": {name: list(reasons) for name, reasons in named.items()},
            }
        )
    return {"device": str(device), "traits": str(traits), "probes": probes}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name:14}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines.append(f"{'C++ compiler':14}{report['cxx_compiler'] or 'not found: torch.compile on the CPU needs one'}")
    for device in report["devices"]:
        lines += ["", f"{device['device']}: {device['traits']}"]
        for probe in device["probes"]:
            lines += [f"  {probe['problem']}", f"    auto: {probe['auto'] or 'no backend'}"]
            for name, reasons in probe["backends"].items():
                lines.append(f"    {name}: {'; '.join(reasons) if reasons else 'usable'}")
    return "\n".join(lines)

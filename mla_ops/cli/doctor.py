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
from mla_ops.errors import InvalidSettingError
from mla_ops.ops.sparse_attn.backends import backend_names, select
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.tuned import read_rows

# What is asked of every backend on every device: training at the widths of a small and of a large model.
PROBES = (
    SparseAttnProblem(d_total=128, d_v=64, topk=256, heads=28, kv_group=1, dtype=torch.bfloat16, needs_grad=True),
    SparseAttnProblem(d_total=576, d_v=512, topk=2048, heads=128, kv_group=1, dtype=torch.bfloat16, needs_grad=True),
)
PROBE_SIZES = Hints(batch=1, seq_q=4096, seq_kv=8192)


def run_doctor(*, as_json: bool) -> int:
    """Print the report; the exit status is 1 if a setting is wrong or `backend="auto"` fails on a probe, else 0."""
    report = _report()
    print(json.dumps(report, indent=2) if as_json else _text(report))
    is_served = all(probe["auto"] for device in report["devices"] for probe in device["probes"])
    return 0 if is_served and report["settings_problem"] is None else 1


def _report() -> dict[str, Any]:
    in_force, problem = _settings()
    return {
        "versions": {
            "mla_ops": mla_ops.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
        },
        "cxx_compiler": settings.cxx_compiler(),
        "settings": in_force,
        "settings_problem": problem,
        "devices": [_device_report(device, is_planned=problem is None) for device in devices()],
    }


def _settings() -> tuple[dict[str, Any] | None, str | None]:
    """Return the settings in force, None if they can't be read, and what is wrong with them, if anything."""
    in_force = None
    try:
        in_force = asdict(settings.current())
        if in_force["tuned_rows"]:
            read_rows(in_force["tuned_rows"])
    except InvalidSettingError as error:
        return in_force, str(error)
    return in_force, None


def _device_report(device: torch.device, *, is_planned: bool) -> dict[str, Any]:
    """Return who runs the probes on a device, and with which kernels unless a setting that decides so is wrong."""
    traits = traits_of(device)
    probes = []
    for problem in PROBES:
        decision = select(problem, traits, hints=PROBE_SIZES if is_planned else None)
        chosen = decision.backend
        named = {name: select(problem, traits, name).verdicts[0].reasons for name in backend_names()}
        probes.append(
            {
                "problem": str(problem),
                "auto": None if chosen is None else chosen.name,
                "backends": {name: list(reasons) for name, reasons in named.items()},
                "launch": [line.split("; not warm")[0] for line in decision.launch],
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
    if report["settings_problem"] is not None:
        lines.append(f"{'settings':14}{report['settings_problem']}")
    for device in report["devices"]:
        lines += ["", f"{device['device']}: {device['traits']}"]
        for probe in device["probes"]:
            lines += [f"  {probe['problem']}", f"    auto: {probe['auto'] or 'no backend'}"]
            for name, reasons in probe["backends"].items():
                lines.append(f"    {name}: {'; '.join(reasons) if reasons else 'usable'}")
            lines += [f"    {line}" for line in probe["launch"]]
    return "\n".join(lines)

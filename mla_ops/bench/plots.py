"""Plots of `mla-ops bench`'s sweeps, drawn from a results file alone."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from mla_ops.bench.requirements import require
from mla_ops.bench.shapes import SWEEPS, Shape


def plot_sweeps(results: Path) -> Path:
    """Draw TFLOP/s and the floor over each size that `results` sweeps; returns the PNG beside the data."""
    require("matplotlib", "mla-ops bench --sweeps")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = json.loads(results.read_text())
    points: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for record in data["records"]:
        sweep, _, value = record["shape"].partition("=")
        if value and "ms" in record:
            points.setdefault(sweep, []).append((int(value), record))
    figure, axes = pyplot.subplots(
        1, len(points), figsize=(4.5 * len(points), 3.6), layout="constrained", squeeze=False
    )
    for axis, (sweep, records) in zip(axes[0], points.items(), strict=True):
        for direction, label, color in (("fwd", "forward", "tab:blue"), ("bwd", "backward", "tab:orange")):
            series = [
                (value, r["tflops"], _floor_tflops(r, data["matmul_flops_per_s"]))
                for value, r in records
                if r["direction"] == direction
            ]
            values, speeds, floors = zip(*series, strict=True)
            axis.plot(values, speeds, "o-", color=color, label=label)
            axis.plot(values, floors, ":", color=color, label=f"{label}, hardware's floor")
        axis.set(xscale="log", yscale="log", xlabel=SWEEPS[sweep][0], ylabel="TFLOP/s")
        axis.set_xticks([value for value, r in records if r["direction"] == "fwd"], minor=False)
        axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    header = data["header"]
    figure.suptitle(f"{header['device'].split(',')[0]}), bf16, torch {header['torch']}, {header['date']}", fontsize=9)
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _floor_tflops(record: dict[str, Any], matmul: float) -> float:
    """Return the speed at the hardware's floor; the rounded ratio of a record is 0 where a shape is small."""
    shape = Shape(**{field.name: record[field.name] for field in fields(Shape)})
    return shape.flops(record["direction"]) / shape.floor_seconds(record["direction"], matmul) / 1e12

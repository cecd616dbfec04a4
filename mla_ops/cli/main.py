"""Argument parsing of `mla-ops`; each command's work lives in its own module, imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mla_ops.errors import MlaOpsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors of this package print as one line and return 2."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except MlaOpsError as error:
        print(f"mla-ops: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mla-ops", description="Sparse MLA for PyTorch, any d_total / d_v.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="train a small sparse-MLA language model on real text, compiled and eager, and report"
    )
    demo.add_argument("--out", type=Path, default=Path("mla-ops-demo"), help="folder for report.json and loss.png")
    demo.add_argument("--steps", type=_positive, default=240, help="training steps of each run (default 240)")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say what this machine has and which backends run on it")
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser("explain", help="say which backend runs a problem on this machine, and why")
    explain.add_argument("--d-total", type=_positive, required=True)
    explain.add_argument("--d-v", type=_positive, required=True)
    explain.add_argument("--topk", type=_positive, required=True)
    explain.add_argument("--heads", type=_positive, required=True)
    explain.add_argument("--kv-group", type=_positive, default=1)
    explain.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16")
    explain.add_argument("--inference", action="store_true", help="no gradient needed")
    explain.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    explain.add_argument("--backend", default="auto")
    explain.set_defaults(run=_explain)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from mla_ops.cli.demo import run_demo

    return run_demo(out=arguments.out, steps=arguments.steps, device=arguments.device, seed=arguments.seed)


def _doctor(arguments: argparse.Namespace) -> int:
    from mla_ops.cli.doctor import run_doctor

    return run_doctor(as_json=arguments.json)


def _explain(arguments: argparse.Namespace) -> int:
    from mla_ops.cli.explain import run_explain

    return run_explain(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())

"""Argument parsing of `mla-ops`; each command's work lives in its own module, imported when it runs."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from mla_ops import __version__
from mla_ops.bench.peers import PEERS
from mla_ops.bench.shapes import SHAPES, SWEEPS
from mla_ops.errors import MlaOpsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Errors of this package and of files print as a line and return 2. An interrupt returns 130 and a reader that is
    gone 141, as a shell has it for processes that SIGINT and SIGPIPE end.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks is written as an escape
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print("mla-ops: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # whoever read stdout is gone; what it still holds must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (MlaOpsError, OSError) as error:
        print(f"mla-ops: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments))
    finally:
        sys.stdout.flush()  # here a reader that is gone can be handled, at the interpreter's end it can't


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mla-ops", description="Sparse MLA for PyTorch, any d_total / d_v.")
    parser.add_argument("--version", action="version", version=f"mla-ops {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", help="train a small sparse-MLA language model on real text, compiled and eager, and report"
    )
    demo.add_argument("--out", type=Path, default=Path("mla-ops-demo"), help="folder for report.json and loss.png")
    demo.add_argument("--steps", type=_positive, default=240, help="training steps of each run (default 240)")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is CUDA if there is any")
    demo.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the sample (default 0)")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", help="say what this machine has and which backends run on it")
    doctor.add_argument("--json", action="store_true", help="print the same as JSON")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="time forward and backward on this GPU beside other formulations")
    bench.add_argument(
        "--shapes", type=_names(SHAPES), default=list(SHAPES), help=f"some of {','.join(SHAPES)}; or none"
    )
    bench.add_argument("--sweeps", type=_names(SWEEPS), default=[], help=f"some of {','.join(SWEEPS)}; or all, none")
    bench.add_argument("--peers", type=_names(PEERS), default=list(PEERS), help=f"some of {','.join(PEERS)}; or none")
    bench.add_argument("--flash-libraries", type=Path, help="folder with FlashMLA's and FlashAttention-3's libraries")
    bench.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    bench.add_argument("--name", default="sparse-attn", help="what the results file is called after date and device")
    bench.add_argument("--commit", help="what to record as the commit, where history is not at hand")
    bench.set_defaults(run=_bench)

    tune = commands.add_parser("tune", help="find the fastest launch configurations of one problem on this GPU")
    _add_widths(tune)
    _add_lengths(tune)
    tune.add_argument("--out", type=Path, default=Path("mla-ops-tuned.json"), help="file of rows; others in it stay")
    tune.add_argument("--jobs", type=_positive, default=8, help="processes that compile (default 8)")
    tune.set_defaults(run=_tune)

    explain = commands.add_parser("explain", help="say which backend runs a problem on this machine, and why")
    _add_widths(explain)
    explain.add_argument("--kv-group", type=_positive, default=1, help="KV heads (default 1, as in MLA)")
    _add_lengths(explain)
    explain.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16", help="default bf16")
    explain.add_argument("--inference", action="store_true", help="no gradient needed")
    explain.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is CUDA if there is any"
    )
    explain.add_argument("--backend", default="auto", help="a named one never falls back (default auto)")
    explain.set_defaults(run=_explain)
    return parser


def _add_widths(command: argparse.ArgumentParser) -> None:
    command.add_argument("--d-total", type=_positive, required=True, help="width of a query and of a KV row")
    command.add_argument("--d-v", type=_positive, required=True, help="leading channels of a row that are its value")
    command.add_argument("--heads", type=_positive, required=True, help="query heads")
    command.add_argument("--topk", type=_positive, required=True, help="selected rows per query")


def _add_lengths(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch", type=_positive, default=1, help="sequences (default 1)")
    command.add_argument("--seq-q", type=_positive, default=4096, help="queries of a sequence (default 4096)")
    command.add_argument("--seq-kv", type=_positive, default=8192, help="KV rows of a sequence (default 8192)")


def _demo(arguments: argparse.Namespace) -> int:
    from mla_ops.cli.demo import run_demo

    return run_demo(out=arguments.out, steps=arguments.steps, device=arguments.device, seed=arguments.seed)


def _doctor(arguments: argparse.Namespace) -> int:
    from mla_ops.cli.doctor import run_doctor

    return run_doctor(as_json=arguments.json)


def _bench(arguments: argparse.Namespace) -> int:
    from mla_ops.bench.bench import run_bench

    return run_bench(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    from mla_ops.bench.tune import run_tune

    return run_tune(arguments)


def _explain(arguments: argparse.Namespace) -> int:
    from mla_ops.cli.explain import run_explain

    return run_explain(arguments)


def _names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names out of `known`, or "all", or "none"."""

    def parse(text: str) -> list[str]:
        names = {"all": list(known), "none": []}.get(text, text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
        return names

    return parse


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())

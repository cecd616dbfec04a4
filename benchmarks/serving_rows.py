"""`mla::append_rows` and `mla::read_rows` in CUDA graphs, taking turns with a copy of the same bytes and with torch.

    python benchmarks/serving_rows.py [CASE ...] [--sweep]

writes results/<date>-<device>-serving-rows.json and prints it. `--sweep` times other configurations too.

A graph holds a call for each of a few sets of inputs: each its own rows, distinct and random in a pool that exceeds the
L2 cache, and its own latent rows, which exceed it together where there are thousands. Graphs of a case take turns,
ROUNDS times, and the median over the rounds is recorded. The copy moves as many bytes as the call reads and writes. A
case is timed after its rows match those that torch quantises.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mla_ops.bench.graphs import microseconds
from mla_ops.bench.provenance import write
from mla_ops.device import traits_of
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.ops.append_rows.triton.launch import AppendConfig, launch_append, plan_append
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem
from mla_ops.ops.read_rows.triton.launch import ReadConfig, launch_read, plan_read
from mla_ops.row_formats import RowLayout, row_format

ROUNDS = 7
DEVICE = torch.device("cuda")
POOL_BYTES = 256 << 20
PAGE_SIZE = 64
BYTES_OF_SETS = 96 << 20
MAX_SETS = 16


class Case(NamedTuple):
    """A call of an operator on so many rows."""

    operator: Literal["append", "read"]
    row_format: str
    d_total: int
    d_v: int
    rows: int
    rule: str = "pow2"
    has_torch: bool = False  # compiled, which takes half a minute

    @property
    def layout(self) -> RowLayout:
        """Which bytes of a row are what."""
        return row_format(self.row_format).layout(self.d_total, self.d_v)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads and writes, padding left out."""
        form, layout = row_format(self.row_format), self.layout
        if form.payload == "none":
            return self.rows * 4 * self.d_total
        scale_bytes = {"fp32": 4, "ue8m0": 1, "none": 0}[form.scale] * layout.num_scales
        return self.rows * (2 * self.d_total + layout.d_payload + scale_bytes + 2 * layout.d_tail16)

    @property
    def sets(self) -> int:
        """Sets of inputs in a graph."""
        return max(2, min(MAX_SETS, BYTES_OF_SETS // self.num_bytes))


FORMATS = {
    "fp8": (576, 512), "fp8_all": (576, 512), "fp8_cache": (576, 512), "model1": (512, 512), "mxfp8": (512, 512),
    "dense": (576, 512), "narrow fp8": (128, 64), "narrow fp8_all": (128, 64),
}  # fmt: skip
CASES: dict[str, Case] = {}
for _name, (_d_total, _d_v) in FORMATS.items():
    _format = _name.removeprefix("narrow ")
    for _rows in (1, 128, 8192):
        _has_torch = _name == "fp8" and _rows > 1
        CASES[f"append {_name} {_rows}"] = Case("append", _format, _d_total, _d_v, _rows, has_torch=_has_torch)
    _case = Case("read", _format, _d_total, _d_v, 2048 * 16, has_torch=_name == "fp8")
    CASES[f"read {_name} {_case.rows}"] = _case
CASES["append fp8 amax 128"] = Case("append", "fp8", 576, 512, 128, "amax")
CASES["append fp8 amax 8192"] = Case("append", "fp8", 576, 512, 8192, "amax")


def make_pool(case: Case) -> Tensor:
    """Return pages of random bytes."""
    layout = case.layout
    page_bytes = layout.page_bytes(PAGE_SIZE)
    pool = torch.randint(0, 120, (POOL_BYTES // page_bytes, page_bytes), dtype=torch.uint8, device=DEVICE)
    pages = pool[:, : PAGE_SIZE * layout.row_bytes]
    pages = pages.view(torch.bfloat16) if case.row_format == "dense" else pages
    return pages.unflatten(1, (PAGE_SIZE, 1, -1))


def draw_rows(case: Case, pages: Tensor) -> Tensor:
    """Return distinct row numbers."""
    return torch.randperm(pages.shape[0] * PAGE_SIZE, device=DEVICE)[: case.rows].int()


def torch_append(latent: Tensor, rows: Tensor, pool: Tensor) -> None:
    """Quantise and store rows of "fp8" with scales that are powers of two; `pool` is `[rows, 656]`."""
    tiles = latent[:, 0, :512].float().unflatten(-1, (4, 128))
    scales = (tiles.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-4).log2().ceil().exp2()
    codes = (tiles / scales).to(torch.float8_e4m3fn).flatten(1)
    parts = codes, scales.flatten(1), latent[:, 0, 512:].contiguous()
    pool.index_copy_(0, rows, torch.cat([part.view(torch.uint8) for part in parts], -1))


def torch_read(pool: Tensor, rows: Tensor) -> Tensor:
    """Return rows of "fp8" in bf16; `pool` is `[rows, 656]`."""
    stored = pool[rows]
    codes = stored[:, :512].view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128))
    numbers = (codes * stored[:, 512:528].contiguous().view(torch.float32).unsqueeze(-1)).flatten(1)
    return torch.cat([numbers.bfloat16(), stored[:, 528:].contiguous().view(torch.bfloat16)], -1)


class Run:
    """Everything of a case: pool, inputs, what is checked and what is timed."""

    def __init__(self, case: Case) -> None:
        self.case, self.pages, self.traits = case, make_pool(case), traits_of(DEVICE)
        self.scale = torch.tensor([0.01], device=DEVICE) if case.row_format == "fp8_cache" else None
        self.rows = [draw_rows(case, self.pages) for _ in range(case.sets)]
        shape = (case.rows, 1, case.d_total)
        self.latents = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in self.rows]

    def append(self, **chosen: Any) -> Callable[[], None]:
        """Return what appends every set, planned once."""
        name, d_v, rule = self.case.row_format, self.case.d_v, self.case.rule
        calls = [
            AppendRowsCall(latent, None, rows, self.pages, d_v, name, rule, self.scale)
            for latent, rows in zip(self.latents, self.rows, strict=True)
        ]
        plan = plan_append(calls[0], AppendRowsProblem.of(calls[0]), self.traits, **chosen)

        def run() -> None:
            for call in calls:
                launch_append(call, plan)

        return run

    def read(self, **chosen: Any) -> Callable[[], list[Tensor]]:
        """Return what reads every set, planned once."""
        name, d_total, d_v = self.case.row_format, self.case.d_total, self.case.d_v
        calls = [ReadRowsCall(self.pages, rows, d_total, d_v, name, torch.bfloat16, self.scale) for rows in self.rows]
        plan = plan_read(calls[0], ReadRowsProblem.of(calls[0]), self.traits, **chosen)
        return lambda: [launch_read(call, plan) for call in calls]

    def own(self, **chosen: Any) -> Callable[[], Any]:
        """Return the call that is timed."""
        return self.append(**chosen) if self.case.operator == "append" else self.read(**chosen)

    def check(self) -> float:
        """Write a set, read it back, and return the largest error of a channel against its row; raise above e4m3's."""
        self.append()()
        read, latent = self.read()()[-1].float(), self.latents[-1].float()
        error = float(((read - latent).abs() / latent.abs().amax(-1, keepdim=True)).max())
        if not error <= (0.0 if self.case.row_format == "dense" else 1 / 16):
            raise AssertionError(f"rows are off by {error:.2e} of their largest channel at {self.case}")
        return error

    def peers(self) -> dict[str, Callable[[], Any]]:
        """Return what else moves or computes the same, by its name."""
        half = self.case.num_bytes // 2
        pairs = [torch.randint(0, 255, (2, half), dtype=torch.uint8, device=DEVICE) for _ in self.rows]
        functions: dict[str, Callable[[], Any]] = {
            "copy of the same bytes": lambda: [target.copy_(source) for target, source in pairs]
        }
        if self.case.has_torch:
            pool = self.pages.view(-1, self.case.layout.row_bytes)
            if self.case.operator == "append":
                compiled = torch.compile(torch_append, dynamic=False)
                functions["torch compiled"] = lambda: [
                    compiled(latent, rows, pool) for latent, rows in zip(self.latents, self.rows, strict=True)
                ]
            else:
                compiled_read = torch.compile(torch_read, dynamic=False)
                functions["torch compiled"] = lambda: [compiled_read(pool, rows) for rows in self.rows]
        return functions


def alternatives(case: Case) -> dict[str, dict[str, Any]]:
    """Return other configurations of a case, by what they are called."""
    sizes = [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (8, 4), (8, 8), (16, 8)]
    if case.operator == "read":
        return {str(config): {"config": config} for config in (ReadConfig(*size) for size in sizes)}
    found: dict[str, dict[str, Any]] = {}
    for config in (AppendConfig(*size) for size in (sizes if case.rows > 1 else sizes[:3])):
        for is_claimed in (False, True):
            found[f"{config} claimed={is_claimed}"] = {"config": config, "is_claimed": is_claimed}
    return found


def measure(name: str, case: Case, is_swept: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    run = Run(case)
    error = run.check()
    functions = {"mla_ops": run.own()}
    others = alternatives(case) if is_swept else {}
    functions |= {what: run.own(**chosen) for what, chosen in others.items()} if is_swept else run.peers()
    records = []
    times = {what: time / case.sets for what, time in microseconds(functions, rounds=ROUNDS, turn_us=3e3).items()}
    for what, us in times.items():
        records.append({
            "case": name, **case._asdict(), "impl": what, "us": round(us, 2), "error": error,
            "tb_per_s": round(case.num_bytes / us / 1e6, 3), "speed_of_mla_ops_over": round(us / times["mla_ops"], 2),
        })  # fmt: skip
        print(f"{name:26}{what:50}{us:8.2f} us {case.num_bytes / us / 1e6:7.2f} TB/s", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all of them by default")
    parser.add_argument("--sweep", action="store_true", help="time other configurations too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    records = []
    for name in arguments.cases or CASES:
        records += measure(name, CASES[name], arguments.sweep)
        torch.cuda.empty_cache()
        write(arguments.out, "serving-rows" + "-sweep" * arguments.sweep, DEVICE, records, arguments.commit)


if __name__ == "__main__":
    main()

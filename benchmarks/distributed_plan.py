"""The cases of distributed.py, in the order they run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

from distributed_ways import Shape

SHAPES = {
    "DS": Shape(8192, 65536, 128, 576, 512, 2048),
    "NAM28": Shape(8192, 65536, 28, 128, 64, 256),
    "NAM128": Shape(8192, 65536, 128, 128, 64, 256),
}
# Way, shape and keys, the most important first. What shares a problem stands together: it is drawn once.
PLAN = [
    ("tp", "DS", 65536),
    ("cp", "DS", 65536),
    ("cp", "DS", 524288),
    ("mesh", "DS", 65536),
    ("cp", "DS", 131072),
    ("tp", "NAM128", 65536),
    ("cp", "NAM128", 65536),
    ("tp", "NAM28", 65536),
    ("cp", "NAM28", 65536),
    ("cp-causal", "DS", 65536),
    ("cp-spread", "DS", 65536),
]


@dataclass(frozen=True)
class Case:
    """One way to run one problem, in one mode."""

    way: str
    shape: str
    keys: int
    mode: str

    def __str__(self) -> str:
        return f"{self.way}/{self.shape}/{self.keys}/{self.mode}"

    @property
    def problem(self) -> tuple[str, str, int]:
        """What cases share whose tensors are the same."""
        kind = {"mesh": "layer", "cp-causal": "causal", "cp-spread": "causal"}.get(self.way, "attention")
        return kind, self.shape, self.keys

    def sizes(self, on_gpu: bool) -> Shape:
        """At this number of keys; on a CPU, the toy ones."""
        shape = replace(SHAPES[self.shape], Skv=self.keys)
        return shape if on_gpu else shape.toy()

    def refusal(self, shape: Shape, ranks: int) -> str | None:
        """Why this number of ranks cannot run it."""
        if self.way == "mesh" and ranks % 2:
            return f"{ranks} ranks have no halves"
        cut, what = (shape.Sq, "queries") if self.way.startswith("cp") else (shape.H, "heads")
        parts = ranks // 2 if self.way == "mesh" else ranks
        return f"{cut} {what} are not cut evenly over {parts} ranks" if cut % parts else None


def planned(patterns: list[str], keys: list[int] | None) -> list[Case]:
    """Cases that match one of the patterns, or whose way does; `keys` instead of the plan's, if given."""
    plan = (
        PLAN if keys is None else [(way, shape, n) for way, shape in dict.fromkeys(p[:2] for p in PLAN) for n in keys]
    )
    cases = [Case(*row, mode) for row in plan for mode in ("compiled", "eager")]
    return [case for case in cases if any(fnmatch(str(case), p) or case.way == p for p in patterns)]

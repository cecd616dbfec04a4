"""Named problem sizes. A new head-dim family gets a case here and nothing else in the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """Sizes of one call; `batch=None` means the 3-D form without a batch dimension."""

    d_total: int
    d_v: int
    topk: int = 16
    heads: int = 4
    kv_group: int = 1
    batch: int | None = 2
    seq_q: int = 5
    seq_kv: int = 24

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading sizes of every tensor: `(batch,)`, or `()` in the 3-D form."""
        return () if self.batch is None else (self.batch,)

    @property
    def softmax_scale(self) -> float:
        """A scale that spreads the logits of the N(0, 1) / 10 inputs over a few units."""
        return 100.0 / math.sqrt(self.d_total)

    def __str__(self) -> str:
        batch = "3d" if self.batch is None else f"B{self.batch}"
        return (
            f"{batch}-Sq{self.seq_q}-Skv{self.seq_kv}-H{self.heads}-G{self.kv_group}-{self.d_total}x{self.d_v}"
            f"-topk{self.topk}"
        )


# Every width the contract names, and the shapes where peers are known to break: few and odd head counts, groups,
# a topk beyond seq_kv, single tokens.
CONTRACT_CASES = (
    Case(d_total=128, d_v=64),
    Case(d_total=576, d_v=512),
    Case(d_total=192, d_v=64, heads=3),
    Case(d_total=320, d_v=256, batch=None),
    Case(d_total=512, d_v=512, topk=5),
    Case(d_total=72, d_v=64, heads=28),
    Case(d_total=144, d_v=80, topk=33),
    Case(d_total=100, d_v=96, heads=1),
    Case(d_total=24, d_v=16, heads=6, kv_group=3),
    Case(d_total=40, d_v=40, heads=4, kv_group=2, batch=None),
    Case(d_total=1, d_v=1, topk=1, seq_q=1, seq_kv=1, batch=1),
    Case(d_total=128, d_v=64, seq_q=1, heads=16, topk=64, seq_kv=100),
)

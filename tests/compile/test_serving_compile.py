"""Pools of pages under torch.compile and torch.export: whole graphs, one for all sizes, no copy of a pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generated_code import generated_code
from torch._dynamo.testing import CompileCounterWithBackend

import mla_ops

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

BF16 = torch.bfloat16
# Sizes that differ: equal ones would share a symbol.
SIZES = {"d_total": 128, "d_v": 64, "num_pages": 6, "page_size": 7, "batch": 2, "seq_q": 3, "heads": 4, "topk": 5}


def make_step(name: str = "fp8", **changes: int) -> tuple[Any, ...]:
    """Return what a step of decoding takes: rows to write, their numbers, the pool, queries, positions, table, d_v."""
    s = {**SIZES, **changes}
    gen = torch.Generator().manual_seed(0)
    row = mla_ops.bytes_per_row(name, s["d_total"], s["d_v"])
    dtype = torch.uint8
    if name == "dense":
        row, dtype = s["d_total"], BF16
    pages = torch.zeros(s["num_pages"], s["page_size"], 1, row, dtype=dtype)
    num_rows = s["num_pages"] * s["page_size"]
    latent = torch.randn(num_rows - 1, 1, s["d_total"], generator=gen).to(BF16)
    rows = torch.randperm(num_rows, generator=gen)[: num_rows - 1]
    q = torch.randn(s["batch"], s["seq_q"], s["heads"], s["d_total"], generator=gen).to(BF16)
    table = torch.stack([torch.randperm(s["num_pages"], generator=gen) for _ in range(s["batch"])])
    positions = torch.randint(num_rows + 3, (s["batch"], s["seq_q"], 1, s["topk"]), generator=gen)
    return latent, rows, pages, q, positions, table, s["d_v"]


def step_of(name: str) -> Any:
    def step(latent: Any, rows: Any, pages: Any, q: Any, positions: Any, table: Any, d_v: int) -> Any:
        mla_ops.append_rows(latent, rows, pages, d_v=d_v, row_format=name)
        out, lse = mla_ops.sparse_attn_paged(
            q, pages, positions, d_v=d_v, softmax_scale=0.1, row_format=name, block_table=table
        )
        return out, lse, mla_ops.read_rows(
            pages, rows[:4], d_total=q.shape[-1], d_v=d_v, row_format=name, dtype=BF16
        )  # fmt: skip

    return step


def check(step: Any, compiled: Any, arguments: tuple[Any, ...]) -> None:
    twin = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)
    for got, want in zip(compiled(*arguments), step(*twin), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(arguments[2], twin[2])
    assert (arguments[2] != 0).any()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["dense", "fp8", "fp8_all"])
def test_a_step_is_one_graph_and_bitwise_eager(name: str, dynamic: bool) -> None:
    step = step_of(name)
    check(step, torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager"), make_step(name))


def test_one_graph_serves_all_sizes() -> None:
    counter, step = CompileCounterWithBackend("aot_eager"), step_of("fp8")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for changes in ({}, {"d_total": 576, "d_v": 512}, {"num_pages": 9}, {"page_size": 53}, {"topk": 40}, {"heads": 6}):
        check(step, compiled, make_step(**changes))
    assert counter.frame_count == 1


def test_rows_of_another_size_are_refused_by_the_graph() -> None:
    step = step_of("fp8")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    check(step, compiled, make_step())
    latent, rows, _, q, positions, table, d_v = make_step()
    with pytest.raises(RuntimeError, match="a row of pages must have"):
        compiled(latent, rows, torch.zeros(6, 7, 1, 224, dtype=torch.uint8), q, positions, table, d_v)


def copies_of(code: str, pages: torch.Tensor) -> list[str]:
    """Return the lines that allocate as much as the pool, or call a copy."""
    shape = f"({', '.join(map(str, pages.shape))})"
    lines = code.split("def call(")[1].split("\n")
    return [line for line in lines if ("empty_strided" in line and shape in line) or "copy_" in line or "clone" in line]


@pytest.mark.parametrize("kind", ["whole", "layer of one pool", "padded pages"])
def test_writing_and_attending_copies_no_pool(kind: str) -> None:
    """Neither once nor twice, with a read between."""
    latent, rows, pages, q, positions, table, d_v = make_step()
    step = step_of("fp8")
    pool = {
        "whole": pages,
        "layer of one pool": torch.stack([pages, pages]),
        "padded pages": torch.nn.functional.pad(pages, (0, 0, 0, 0, 0, 1)),
    }[kind]

    def twice(pool: torch.Tensor) -> Any:
        view = {"whole": pool, "layer of one pool": pool[1], "padded pages": pool[:, :7]}[kind]
        first = step(latent, rows, view, q, positions, table, d_v)
        return first, step(latent + 1, rows, view, q, positions, table, d_v)

    code = generated_code(twice, pool)
    assert code.count("torch.ops.mla.append_rows.default(") == 2
    assert copies_of(code, pages) == []
    assert copies_of(generated_code(lambda pool: twice(pool.clone()), pool), pool) != []


def test_export_keeps_the_sizes_symbolic() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Any, pages: Any, positions: Any, table: Any) -> Any:
            return mla_ops.sparse_attn_paged(
                q, pages, positions, d_v=64, softmax_scale=0.1, row_format="fp8", block_table=table
            )

    auto = torch.export.Dim.DYNAMIC
    _, _, pages, q, positions, table, _ = make_step()
    exported = torch.export.export(
        Module(),
        (q, pages, positions, table),
        dynamic_shapes=({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto, 3: auto}, {0: auto, 1: auto}),
    )
    latent, rows, pages, q, positions, table, _ = make_step(num_pages=9, page_size=5, batch=3, seq_q=1, topk=8)
    mla_ops.append_rows(latent, rows, pages, d_v=64, row_format="fp8")
    arguments = (q, pages, positions, table)
    for got, want in zip(exported.module()(*arguments), Module()(*arguments), strict=True):
        assert torch.equal(got, want)

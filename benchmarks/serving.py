"""`mla::sparse_attn_paged` decoding from a pool of pages, beside `mla::sparse_attn` and what else reads such rows.

    python benchmarks/serving.py [--widths 576/512 ...] [--heads 16 ...] [--batch 128 ...] [--formats fp8 ...]

writes results/<date>-<device>-serving.json and prints it.

Rows come from HBM: the pool is beyond the L2 cache, a request owns PAGES_PER_REQUEST scattered pages of it, and every
call in a CUDA graph has selections of its own. The same rows are selected in all formats, by row number and by table.
Graphs take turns, ROUNDS times; the median time of a call is recorded. A call is timed after its result matches an fp32
gather of the dequantised rows. A floor is the larger of the bytes read and written at HBM_BYTES_PER_S and the products
at MMA_FLOPS_PER_S, as measured on an H100.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mla_ops  # noqa: F401  # registers the operators
from mla_ops.bench.graphs import microseconds
from mla_ops.bench.peers import flash_libraries, flash_peers
from mla_ops.bench.provenance import write
from mla_ops.bench.shapes import SOFTMAX_SCALE, Shape
from mla_ops.row_formats import row_format

ROUNDS = 5
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
PAGE_SIZE = 64
PAGES_PER_REQUEST = 256
MAX_BATCH = 128
FORMATS = ("dense", "fp8", "fp8_all")
HBM_BYTES_PER_S, MMA_FLOPS_PER_S = 3.0e12, 772e12
# A graph of calls touches more than this, twice the L2 cache of an H100, but has no more calls than MAX_CALLS.
COLD_BYTES, MAX_CALLS = 100 << 20, 40
CHECKED_REQUESTS = 4
# Of the operator's two ways to name a row.
ROWS, TABLE = "rows", "table"


class Case(NamedTuple):
    """One query of each request, at these sizes."""

    d_total: int
    d_v: int
    heads: int
    batch: int
    topk: int

    def row_bytes(self, name: str) -> int:
        """Return the bytes of a row."""
        return row_format(name).layout(self.d_total, self.d_v).row_bytes

    def floor_us(self, name: str) -> float:
        """Return the time that bytes or products take at least."""
        queries = self.batch * self.heads
        moved = self.batch * self.topk * self.row_bytes(name) + 2 * queries * (self.d_total + self.d_v)
        flops = 2 * queries * self.topk * (self.d_total + self.d_v)
        return 1e6 * max(moved / HBM_BYTES_PER_S, flops / MMA_FLOPS_PER_S)


# Everything that is timed: all sizes of the widest rows, some of the others.
CASES = tuple(
    [Case(576, 512, heads, batch, 2048) for heads in (128, 16, 64, 8) for batch in (1, 16, 64, 128)]
    + [Case(d_total, d_v, heads, 128, 2048) for d_total, d_v in ((512, 512), (320, 256)) for heads in (16, 128)]
    + [Case(128, 64, 28, batch, 256) for batch in (1, 64, 128)]
)


# What plain torch is compiled for: a compile takes longer than all else that is timed of a case.
PLAIN = "gather, dequantise, torch.compile"
PLAIN_CASE = Case(576, 512, 16, 128, 2048)


class Selection(NamedTuple):
    """Queries of a call and the rows they select, named both ways."""

    q: Tensor  # [batch, 1, heads, d_total]
    rows: Tensor  # [batch, 1, 1, topk]
    positions: Tensor
    table: Tensor  # [batch, PAGES_PER_REQUEST]


def make_pools(d_total: int, d_v: int, formats: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the pool of MAX_BATCH requests in every format, written from the same random latents."""
    torch.manual_seed(0)
    num_pages = MAX_BATCH * PAGES_PER_REQUEST
    dense = torch.empty(num_pages, PAGE_SIZE, 1, d_total, dtype=DTYPE, device=DEVICE)
    pools = {}
    for name in formats:
        row = row_format(name).layout(d_total, d_v).row_bytes
        pools[name] = torch.empty(num_pages, PAGE_SIZE, 1, row, dtype=torch.uint8, device=DEVICE)
    pools |= {"dense": dense}
    for first in range(0, num_pages, 2048):
        latent = torch.randn(2048 * PAGE_SIZE, 1, d_total, dtype=DTYPE, device=DEVICE)
        rows = first * PAGE_SIZE + torch.arange(len(latent), device=DEVICE)
        for name, pages in pools.items():
            torch.ops.mla.append_rows(latent, None, rows, pages, d_v, name)
    return pools


def draw(case: Case) -> Selection:
    """Return random queries, and distinct rows of each request's pages."""
    q = torch.randn(case.batch, 1, case.heads, case.d_total, dtype=DTYPE, device=DEVICE)
    order = torch.randperm(MAX_BATCH * PAGES_PER_REQUEST, device=DEVICE)[: case.batch * PAGES_PER_REQUEST]
    table = order.view(case.batch, PAGES_PER_REQUEST).int()
    context = PAGES_PER_REQUEST * PAGE_SIZE
    positions = torch.rand(case.batch, context, device=DEVICE).topk(case.topk).indices
    rows = table.gather(1, positions // PAGE_SIZE) * PAGE_SIZE + positions % PAGE_SIZE
    shape = (case.batch, 1, 1, case.topk)
    return Selection(q, rows.int().view(shape), positions.int().view(shape), table)


def paged(case: Case, name: str, named_by: str, pages: Tensor, selection: Selection) -> Tensor:
    """Call the operator and return `out`."""
    q, rows, positions, table = selection
    indices, block_table = (rows, None) if named_by == ROWS else (positions, table)
    out: Tensor = torch.ops.mla.sparse_attn_paged(q, pages, indices, case.d_v, SOFTMAX_SCALE, name, block_table)[0]
    return out


def dense_attention(case: Case, pages: Tensor, selection: Selection) -> Tensor:
    """Call `mla::sparse_attn` on the pool as one sequence, whose queries are the requests."""
    q, rows = selection.q[:, 0][None], selection.rows[:, 0][None]
    out: Tensor = torch.ops.mla.sparse_attn(q, pages.flatten(0, 1)[None], rows, case.d_v, SOFTMAX_SCALE)[0]
    return out[0][:, None]


def plain(case: Case, name: str, pages: Tensor, selection: Selection) -> Tensor:
    """Dequantise the selected rows, then attend to them: what one writes first. To be compiled."""
    q, rows = selection.q[:, 0], selection.rows[:, 0, 0].long()
    raw = pages.flatten(0, 2)[rows]
    if name != "dense":
        layout = row_format(name).layout(case.d_total, case.d_v)
        payload = raw[..., : layout.d_payload].view(torch.float8_e4m3fn).float()
        scales = raw[..., layout.scale_offset :][..., : 4 * layout.num_scales].view(torch.float32)
        payload = payload * scales.repeat_interleave(128, -1)[..., : layout.d_payload]
        tail = raw[..., layout.tail_offset :][..., : 2 * layout.d_tail16].view(DTYPE)
        raw = torch.cat([payload.to(DTYPE), tail], -1)
    logits = torch.einsum("bhd,bkd->bhk", q, raw) * SOFTMAX_SCALE
    return torch.einsum("bhk,bkd->bhd", logits.float().softmax(-1).to(q.dtype), raw[..., : case.d_v])[:, None]


def flash_mla_decode(case: Case, pages: Tensor, selection: Selection) -> Tensor:
    """FlashMLA's decode of FP8 rows, heads padded to the 64 or 128 that it takes."""
    heads = 64 if case.heads <= 64 else 128
    q = torch.nn.functional.pad(selection.q, (0, 0, 0, heads - case.heads))
    decode = torch.ops._flashmla_C.sparse_decode_fwd
    pages = pages.view(torch.float8_e4m3fn)
    none = (None, None, None, None)
    result = decode(q, pages, selection.rows[:, :, 0], *none, None, None, None, case.d_v, SOFTMAX_SCALE)
    return result[0][:, :, : case.heads]  # type: ignore[no-any-return]


def expected(case: Case, name: str, pages: Tensor, selection: Selection) -> Tensor:
    """Return `out` of the first requests in fp32, from rows as `mla::read_rows` defines them."""
    rows = selection.rows[:CHECKED_REQUESTS, 0, 0]
    read = torch.ops.mla.read_rows(pages, rows.flatten(), case.d_total, case.d_v, name, DTYPE)
    # Scales are powers of two: rows are exact in bf16.
    kv = read[:, 0].float().view(*rows.shape, case.d_total)
    logits = torch.einsum("bhd,bkd->bhk", selection.q[:CHECKED_REQUESTS, 0].float(), kv) * SOFTMAX_SCALE
    return torch.einsum("bhk,bkd->bhd", logits.softmax(-1), kv[..., : case.d_v])[:, None]


Call = Callable[[Selection], Tensor]
Named = dict[tuple[str, str, str], Call]  # by implementation, row format, and how rows are named


def implementations(case: Case, pools: dict[str, Tensor], libraries: list[str]) -> Named:
    """Return everything that runs a case."""
    found: Named = {("mla::sparse_attn", "dense", ROWS): partial(dense_attention, case, pools["dense"])}
    for name, pages in pools.items():
        for named_by in (ROWS, TABLE):
            found["mla::sparse_attn_paged", name, named_by] = partial(paged, case, name, named_by, pages)
        if case == PLAIN_CASE and name != "fp8_all":
            torch.compiler.reset()
            compiled = torch.compile(partial(plain, case, name, pages), dynamic=False)
            found[PLAIN, name, ROWS] = compiled
    heads = case.heads if case.heads > 64 else 64
    shape = Shape(1, case.batch, pools["dense"].shape[0] * PAGE_SIZE, heads, case.d_total, case.d_v, case.topk)
    for peer, function in flash_peers(shape, libraries).items():
        found[peer, "dense", ROWS] = partial(flash_dense, case, function, heads, pools["dense"])
    has_decode = "FlashMLA" in libraries and hasattr(torch.ops._flashmla_C, "sparse_decode_fwd")
    if has_decode and "fp8" in pools and (case.d_total, case.d_v) == (576, 512):
        found["FlashMLA decode", "fp8", ROWS] = partial(flash_mla_decode, case, pools["fp8"])
    return found


def flash_dense(case: Case, function: Callable[..., Tensor], heads: int, pages: Tensor, selection: Selection) -> Tensor:
    """Call a peer's kernel for bf16 rows, with the requests as the queries of one sequence."""
    q = torch.nn.functional.pad(selection.q[:, 0][None], (0, 0, 0, heads - case.heads))
    out = function(q, pages.flatten(0, 1)[None], selection.rows[:, 0][None], case.d_v)
    return out[0][:, None, : case.heads]


def measure(case: Case, pools: dict[str, Tensor], libraries: list[str]) -> Iterator[dict[str, Any]]:
    """Check and time everything that runs a case."""
    moved = case.batch * case.topk * min(case.row_bytes(name) for name in pools)
    selections = [draw(case) for _ in range(min(MAX_CALLS, -(-COLD_BYTES // moved)))]
    calls, errors = {}, {}
    for key, call in implementations(case, pools, libraries).items():
        try:
            out = call(selections[0])[:CHECKED_REQUESTS].float()
        except (RuntimeError, TypeError) as reason:
            if key[0].startswith("mla::"):
                raise
            print(f"without {key[0]} at {case}: {str(reason).splitlines()[0]}")
            continue
        wanted = expected(case, key[1], pools[key[1]], selections[0])
        errors[key] = float((out - wanted).norm() / wanted.norm())
        # Plain torch rounds logits to bf16. A comparison with NaN is false.
        if not errors[key] < (2e-2 if key[0] == PLAIN else 1e-2):
            raise AssertionError(f"{key} is off by {errors[key]:.2e} at {case}; nothing is timed that is wrong")
        calls[key] = lambda call=call: [call(selection) for selection in selections]
    for (impl, name, named_by), total in microseconds(calls, rounds=ROUNDS).items():
        us, floor = total / len(selections), case.floor_us(name)
        read = case.batch * case.topk * case.row_bytes(name)
        yield {
            "impl": impl, "row_format": name, "named_by": named_by, **case._asdict(), "us": round(us, 2),
            "tb_per_s": round(read / us / 1e6, 3), "floor_us": round(floor, 2), "floor_ratio": round(floor / us, 3),
            "error": errors[impl, name, named_by],
        }  # fmt: skip


def compile_ahead(cases: list[Case], formats: tuple[str, ...]) -> None:
    """Launch every kernel once in processes side by side: they find what the others compiled in Triton's cache."""
    kinds = {(case[:3], case.batch): case for case in cases}
    workers = min(len(kinds), max(1, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(launch_once, formats), kinds.values(), chunksize=1))


def launch_once(formats: tuple[str, ...], case: Case) -> None:
    """Launch the operators' kernels of a case on pools of the real size, whatever they hold."""
    selection = draw(case)
    for name in ("dense", *formats):
        width = case.d_total if name == "dense" else case.row_bytes(name)
        dtype = DTYPE if name == "dense" else torch.uint8
        pages = torch.empty(MAX_BATCH * PAGES_PER_REQUEST, PAGE_SIZE, 1, width, dtype=dtype, device=DEVICE)
        for named_by in (ROWS, TABLE):
            paged(case, name, named_by, pages, selection)
        if name == "dense":
            dense_attention(case, pages, selection)
        del pages
        torch.cuda.empty_cache()  # one pool a process: as many as there are processes fit the device
    torch.cuda.synchronize()


def main() -> None:
    """Parse the command line, measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="*", help="such as 576/512; all by default, like the next two")
    parser.add_argument("--heads", nargs="*", type=int)
    parser.add_argument("--batch", nargs="*", type=int)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--flash-libraries", type=Path, help="folder of FlashMLA's and FlashAttention-3's libraries")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="recorded in the results, where history did not travel along")
    arguments = parser.parse_args()
    libraries = flash_libraries(arguments.flash_libraries) if arguments.flash_libraries else []
    cases = [
        case
        for case in CASES
        if (not arguments.widths or f"{case.d_total}/{case.d_v}" in arguments.widths)
        and (not arguments.heads or case.heads in arguments.heads)
        and (not arguments.batch or case.batch in arguments.batch)
    ]
    formats = tuple(name for name in arguments.formats if name != "dense")
    compile_ahead(cases, formats)
    records: list[dict[str, Any]] = []
    widths: tuple[int, int] | None = None
    for case in cases:
        if widths != case[:2]:
            widths = case[:2]
            pools: dict[str, Tensor] = {}  # freed before the next are made
            pools = make_pools(*widths, formats)
        for record in measure(case, pools, libraries):
            records.append(record)
            print(*record.values(), flush=True)
        write(arguments.out, "serving", DEVICE, records, arguments.commit)


if __name__ == "__main__":
    main()

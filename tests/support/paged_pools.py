"""Pools of pages in every row format with what their rows mean, and calls on them with an fp64 answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mla_ops.ops.sparse_attn.call import SparseAttnCall
from mla_ops.ops.sparse_attn.reference import sparse_attn_reference
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.row_formats import row_format

ScaleRule = Literal["pow2", "any"]


@dataclass(frozen=True)
class PagedCase:
    """A call on a pool in which only every second row is one; the others are NaN in every part."""

    row_format: str
    d_total: int
    d_v: int
    heads: int = 4
    topk: int = 63
    batch: int = 2
    seq_q: int = 2
    kv_group: int = 1
    num_pages: int = 6
    page_size: int = 53
    padded_rows: int = 0  # rows by which pages are further apart than they are long
    rule: ScaleRule = "any"
    dtype: torch.dtype = torch.bfloat16
    index_dtype: torch.dtype = torch.int32
    has_lengths: bool = True
    has_sink: bool = True
    softmax_scale: float = 0.5


@dataclass(frozen=True)
class PagedInputs:
    """A call by row number, the same call by table, and what both answer."""

    by_row: SparseAttnPagedCall
    by_table: SparseAttnPagedCall
    out: torch.Tensor  # fp64
    lse: torch.Tensor
    largest_logit: float


def make_paged_inputs(case: PagedCase, device: str = "cpu", seed: int = 0) -> PagedInputs:
    """Draw a pool, queries and selections that name its rows, rows of no page, negative numbers, and rows twice."""
    gen = torch.Generator(device).manual_seed(seed)
    num_rows = case.num_pages * case.page_size
    dense, pages, cache_scale = make_pool(case, gen, device)
    rows = torch.arange(0, num_rows, 2, device=device)
    shape = (case.batch, case.seq_q, case.kv_group, case.topk)
    # Every request owns all pages, in an order of its own, but the last, which no table names.
    orders = [torch.randperm(case.num_pages, generator=gen, device=device) for _ in range(case.batch)]
    table = torch.stack(orders).to(torch.int32)
    table[:, -1] = -1
    positions = torch.empty(shape, dtype=torch.int64, device=device)
    chosen = rows[torch.randint(len(rows), shape, generator=gen, device=device)]
    for b in range(case.batch):
        page_of = torch.argsort(orders[b])  # where a page stands in the table
        positions[b] = page_of[chosen[b] // case.page_size] * case.page_size + chosen[b] % case.page_size
    end = table.shape[1] * case.page_size
    noise = torch.rand(shape, generator=gen, device=device)
    no_key = torch.tensor([-1, -2, end, 2**31 - 1], device=device)
    no_key = no_key[torch.randint(4, shape, generator=gen, device=device)]
    positions = torch.where(noise < 0.1, no_key, positions)
    seq_lens = torch.full((case.batch,), end - 2, device=device, dtype=torch.int32)
    seq_lens[-1] = end // 2
    is_key = (positions >= 0) & (positions < seq_lens.view(-1, 1, 1, 1)) & (positions < end - case.page_size)
    indices = torch.where(is_key, chosen, torch.where(noise < 0.05, -1, num_rows))

    q = torch.randn(case.batch, case.seq_q, case.heads, case.d_total, generator=gen, device=device).to(case.dtype)
    lengths = sink = None
    if case.has_lengths:
        lengths = torch.randint(0, case.topk + 2, (case.batch, case.seq_q), generator=gen, device=device)
        lengths[0, 0], lengths[-1, -1] = case.topk, 0
    if case.has_sink:
        sink = torch.randn(case.heads, generator=gen, device=device)
    by_row = SparseAttnPagedCall(
        *(q, pages, indices.to(case.index_dtype), case.d_v, case.softmax_scale, case.row_format),
        topk_length=lengths, attn_sink=sink, cache_scale=cache_scale,
    )  # fmt: skip
    by_table = by_row._replace(indices=positions.to(case.index_dtype), block_table=table, seq_lens=seq_lens)
    kv = dense.expand(case.batch, -1, -1, -1)
    lowest = torch.where(is_key, chosen, -1)
    call = SparseAttnCall(q.double(), kv, lowest, case.d_v, case.softmax_scale, lengths, sink)
    out, lse = sparse_attn_reference(*call)
    logits = torch.einsum("bshd,ngd->bshn", q.double(), dense[rows]) * case.softmax_scale
    return PagedInputs(by_row, by_table, out, lse, float(logits.abs().max()))


def make_pool(
    case: PagedCase, gen: torch.Generator, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return every row in fp64 `[rows, kv_group, d_total]`, NaN where no row is, the pages, and the cache's scale."""
    form = row_format(case.row_format)
    layout = form.layout(case.d_total, case.d_v, case.dtype.itemsize)
    shape = (case.num_pages, case.page_size, case.kv_group)
    latent = torch.randn(*shape, case.d_total, generator=gen, device=device) / 10
    # Rows differ in size, and so do their scales.
    latent *= torch.exp2(torch.randint(-3, 1, (*shape, 1), generator=gen, device=device))
    is_row = torch.zeros(case.num_pages * case.page_size, dtype=torch.bool, device=device)
    is_row[::2] = True
    is_row = is_row.view(shape[:2])
    apart = case.page_size + case.padded_rows
    if case.row_format == "dense":
        pool = torch.full((case.num_pages, apart, *shape[2:], case.d_total), torch.nan, dtype=case.dtype, device=device)
        pages = pool[:, : case.page_size]
        pages[is_row] = latent[is_row].to(case.dtype)
        return pages.double().flatten(0, 1), pages, None

    tile = form.tile or case.d_total
    payload, tail = latent[..., : layout.d_payload], latent[..., layout.d_payload :].to(case.dtype)
    num_tiles = -(-layout.d_payload // tile)
    padding = num_tiles * tile - layout.d_payload
    tiles = torch.nn.functional.pad(payload, (0, padding)).unflatten(-1, (num_tiles, tile))
    cache_scale = None
    if form.scale == "none":
        cache_scale = (latent.abs().max() / 448).view(1)
        scales = cache_scale.view(1, 1, 1, 1, 1)
    else:
        scales = tiles.abs().amax(-1, keepdim=True) / 448
        if form.scale == "ue8m0" or case.rule == "pow2":
            scales = torch.exp2(torch.log2(scales).ceil())
    codes = (tiles / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    dense = (codes.double() * scales.double()).flatten(-2)[..., : layout.d_payload]
    dense = torch.cat([dense, tail.double()], -1)
    dense[~is_row] = torch.nan

    def put(part: torch.Tensor, values: torch.Tensor) -> None:
        part[is_row] = values.contiguous().view(torch.uint8)[is_row]

    scales = scales.squeeze(-1).float()
    codes = codes.flatten(-2)[..., : layout.d_payload]
    # 0xFF in every byte is NaN in e4m3, ue8m0, fp32, bf16 and fp16.
    if layout.scale_bytes:
        pool = torch.full((case.num_pages, layout.page_bytes(apart)), 0xFF, dtype=torch.uint8, device=device)
        ends = case.page_size * layout.data_bytes, case.page_size * layout.row_bytes
        data = pool[:, : ends[0]].unflatten(1, (case.page_size, 1, layout.data_bytes))
        at_end = pool[:, ends[0] : ends[1]].unflatten(1, (case.page_size, 1, layout.scale_bytes))
        put(at_end[..., :num_tiles], (torch.log2(scales) + 127).round().to(torch.uint8))
        pages = pool[:, : ends[1]].unflatten(1, (case.page_size, 1, layout.row_bytes))
    else:
        pool = torch.full((case.num_pages, apart, case.kv_group, layout.row_bytes), 0xFF, dtype=torch.uint8).to(device)
        pages = data = pool[:, : case.page_size]
        if form.scales_at == "row":
            put(data[..., layout.scale_offset : layout.scale_offset + 4 * num_tiles], scales)
    put(data[..., : layout.d_payload], codes)
    put(data[..., layout.tail_offset : layout.tail_offset + 2 * layout.d_tail16], tail)
    return dense.flatten(0, 1), pages, cache_scale

"""Writing rows: the bytes of each writer's rule, what is skipped, what stays untouched, and the rest of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from row_writers import NAN_CODE, code_of, fp32, tile_bytes, value_of

import mla_ops
from mla_ops.row_formats import RowLayout, row_format

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
BF16 = torch.bfloat16
UNTOUCHED = 0xA5


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def layout_of(name: str, d_total: int, d_v: int) -> RowLayout:
    return row_format(name).layout(d_total, d_v)


def byte_pool(
    name: str, d_total: int, d_v: int, *, num_pages: int = 3, page_size: int = 5, kv_group: int = 1, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a pool of untouched bytes with padding behind every page, and its pages."""
    layout = layout_of(name, d_total, d_v)
    row_bytes = layout.row_bytes
    apart = layout.page_bytes(page_size * kv_group) + 48
    pool = torch.full((num_pages, apart), UNTOUCHED, dtype=torch.uint8, device=device)
    pages = pool[:, : page_size * kv_group * row_bytes].unflatten(1, (page_size, kv_group, row_bytes))
    return pool, pages


def odd_rows(d_total: int) -> torch.Tensor:
    """Return rows that rules differ about: zeros, one huge number among zeros, tiny ones, the largest, ties."""
    gen = torch.Generator().manual_seed(0)
    rows = [torch.randn(d_total, generator=gen) * 10.0**exponent for exponent in (-30, -7, -4, -2, 0, 3, 20)]
    rows += [torch.zeros(d_total), -torch.zeros(d_total)]
    lonely = torch.zeros(d_total)
    lonely[d_total // 3] = -3e38
    ties = torch.arange(d_total) % 97 * 8.0 + 4.0
    subnormal = torch.full((d_total,), 2.0**-133)
    wide = torch.exp2(torch.randint(-20, 20, (d_total,), generator=gen).float())
    boundary = torch.tensor([448.0, 449.0, 447.0, 464.0, 0.02734375, 0.027]).repeat(d_total)[:d_total]
    return torch.stack([*rows, lonely, ties, subnormal, wide, boundary]).to(BF16)


def stored(row: torch.Tensor, name: str, layout: RowLayout, rule: str, cache_scale: float) -> Iterator[tuple[int, int]]:
    """Yield (place, byte) of everything that is stored of a row; scales at the end of a page at place 10000 + s."""
    form = row_format(name)
    numbers = row.float().tolist()
    tile = form.tile or layout.d_payload
    for t, start in enumerate(range(0, layout.d_payload, tile)):
        part = numbers[start : min(start + tile, layout.d_payload)]
        if form.scale == "none":
            codes = [code_of(fp32(number / cache_scale)) for number in part]
        else:
            codes, scale = tile_bytes(part, "ue8m0" if form.scale == "ue8m0" else rule)
        yield from enumerate(codes, start)
        if form.scale == "fp32":
            yield from enumerate(
                torch.tensor([scale]).view(torch.uint8).tolist(), -(-layout.d_payload // 16) * 16 + 4 * t
            )
        elif form.scale == "ue8m0":
            yield 10000 + t, 255 if math.isnan(scale) else int(math.log2(scale)) + 127
    yield from enumerate(row[layout.d_payload :].contiguous().view(torch.uint8).tolist(), layout.tail_offset)


RULES = [
    ("fp8", 576, 512, "pow2"), ("fp8", 100, 96, "amax"), ("fp8", 320, 256, "amax"), ("fp8_all", 576, 512, "amax"),
    ("fp8_all", 100, 96, "pow2"), ("fp8_cache", 72, 64, "pow2"), ("model1", 512, 512, "pow2"),
    ("mxfp8", 512, 512, "pow2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "d_total", "d_v", "rule"), RULES)
def test_bytes_are_those_of_the_rule(name: str, d_total: int, d_v: int, rule: str, device: str) -> None:
    layout, latent = layout_of(name, d_total, d_v), odd_rows(d_total)
    pool, pages = byte_pool(name, d_total, d_v, num_pages=4, device=device)
    expected = pool.cpu().clone()
    num_rows, page_size = 4 * 5, 5
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))[: len(latent)]
    rows[[2, 4, 6]] = torch.tensor([-1, num_rows, 2**31 - 1])
    cache_scale = torch.tensor([0.25], device=device) if name == "fp8_cache" else None
    for number, row in zip(rows.tolist(), latent, strict=True):
        if not 0 <= number < num_rows:
            continue
        page, offset = divmod(number, page_size)
        for place, byte in stored(row, name, layout, rule, 0.25):
            if place >= 10000:
                at = page_size * layout.data_bytes + offset * layout.scale_bytes + place - 10000
            else:
                at = offset * layout.data_bytes + place
            expected[page, at] = byte
    mla_ops.append_rows(
        latent.unsqueeze(1).to(device), rows.to(device), pages,
        d_v=d_v, row_format=name, scale_rule=rule, cache_scale=cache_scale,
    )  # fmt: skip
    differing = (pool.cpu() != expected).nonzero()
    assert not len(differing), differing[:10]


def test_the_row_of_576_is_that_of_flash_mla(device: str) -> None:
    """FlashMLA's page: 512 e4m3, 4 fp32 scales (powers of two of max(amax / 448, 1e-4)), 64 bf16; 656 bytes."""
    latent = odd_rows(576).to(device)
    pages = torch.zeros(len(latent), 1, 1, 656, dtype=torch.float8_e4m3fn, device=device)
    mla_ops.append_rows(latent[:, None], torch.arange(len(latent), device=device), pages, d_v=512, row_format="fp8")
    stored_bytes, latent = pages.view(torch.uint8).view(-1, 656).cpu(), latent.cpu()
    for t in range(4):
        tile = latent[:, 128 * t : 128 * (t + 1)].float()
        scale = torch.pow(2, torch.clamp_min(tile.abs().amax(1) / 448, 1e-4).log2().ceil())
        codes = (tile / scale.unsqueeze(1)).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(stored_bytes[:, 128 * t : 128 * (t + 1)], codes)
        assert torch.equal(stored_bytes[:, 512 + 4 * t : 516 + 4 * t].view(torch.float32)[:, 0], scale)
    assert torch.equal(stored_bytes[:, 528:].view(BF16), latent[:, 512:])


def test_every_code_and_every_tie_is_written_to_nearest_even(device: str) -> None:
    numbers = [value_of(code) for code in range(256) if code & 0x7F != NAN_CODE]
    ties = [(value_of(code) + value_of(code + 1)) / 2 for code in range(126)]
    for tile in (numbers[:127], numbers[127:], ties, [-tie for tie in ties]):
        tile = [*tile, 448.0]  # which makes the scale 1
        latent = torch.tensor(tile, dtype=BF16, device=device).view(1, 1, -1)
        assert latent.double().flatten().tolist() == tile
        _, pages = byte_pool("fp8", len(tile), len(tile), device=device)
        mla_ops.append_rows(
            latent, torch.tensor([4], device=device), pages, d_v=len(tile), row_format="fp8", scale_rule="amax"
        )
        assert pages[0, 4, 0, : len(tile)].tolist() == tile_bytes(tile, "amax")[0]
    # That what is written is what was meant, of the codes themselves.
    assert tile_bytes([*numbers[:127], 448.0], "amax")[0][:127] == list(range(127))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["fp8", "model1", "fp8_cache"])
def test_nan_and_infinity_make_their_tile_nan(name: str, poison: float, device: str) -> None:
    layout = layout_of(name, 512, 512)
    _, pages = byte_pool(name, 512, 512, device=device)
    latent = torch.randn(2, 1, 512, device=device, dtype=BF16)
    latent[0, 0, 70] = poison
    scale = torch.ones(1, device=device) if name == "fp8_cache" else None
    options = {"d_v": 512, "row_format": name, "cache_scale": scale}
    mla_ops.append_rows(latent, torch.tensor([3, 4], device=device), pages, **options)
    numbers = mla_ops.read_rows(pages, torch.tensor([3, 4], device=device), d_total=512, dtype=BF16, **options)
    is_nan = torch.zeros(2, 1, 512, dtype=torch.bool, device=device)
    tile = row_format(name).tile or 1
    is_nan[0, 0, 70 // tile * tile : 70 // tile * tile + tile] = True
    assert torch.equal(numbers.isnan(), is_nan)
    codes = pages.as_strided((512,), (1,), pages.storage_offset() + 3 * layout.data_bytes)
    assert (codes[70 // tile * tile :][:tile] == NAN_CODE).all()


@pytest.mark.parametrize("name", ["fp8", "fp8_all", "fp8_cache", "model1", "mxfp8", "dense"])
def test_of_equal_row_numbers_one_is_written_whole(name: str, device: str) -> None:
    n, d_total = 63, 128
    # A row is one number in all channels, which every format stores as it is.
    value = torch.tensor([value_of(0x20 + i) for i in range(n)], dtype=BF16, device=device)
    latent = value.view(n, 1, 1).expand(n, 1, d_total)
    rows = torch.arange(n, device=device) % 3
    pages = torch.zeros(3, 5, 1, d_total, device=device, dtype=BF16)
    if name != "dense":
        _, pages = byte_pool(name, d_total, 128, device=device)
    scale = torch.ones(1, device=device) if name == "fp8_cache" else None
    options = {"d_v": 128, "row_format": name, "cache_scale": scale}
    mla_ops.append_rows(latent, rows, pages, **options)
    numbers = mla_ops.read_rows(pages, torch.arange(3, device=device), d_total=d_total, dtype=BF16, **options)
    assert torch.equal(numbers, numbers[..., :1].expand_as(numbers))
    for row in range(3):
        assert numbers[row, 0, 0] in value[rows == row]


@pytest.mark.parametrize("name", ["dense", "fp8", "fp8_all", "fp8_cache"])
def test_a_tail_of_its_own_writes_what_the_joined_row_writes(name: str, device: str) -> None:
    latent = torch.randn(7, 2, 96, device=device, dtype=torch.float16)
    rows = torch.tensor([0, 14, -1, 3, 9, 99, 7], device=device)
    pools = []
    for tail in (None, latent[..., 64:]):
        pages = torch.full((3, 5, 2, 96), 7.0, device=device, dtype=torch.float16)
        if name != "dense":
            _, pages = byte_pool(name, 96, 64, kv_group=2, device=device)
        scale = torch.tensor([0.5, 0.03], device=device) if name == "fp8_cache" else None
        part = latent if tail is None else latent[..., :64]
        mla_ops.append_rows(part, rows, pages, d_v=64, row_format=name, tail=tail, cache_scale=scale)
        pools.append(pages)
    assert torch.equal(*pools)
    assert not torch.equal(pools[0][0, 0, 0], pools[0][0, 0, 1])


def test_nothing_to_write_writes_nothing(device: str) -> None:
    for num_pages, n in ((3, 0), (0, 4)):
        pool, pages = byte_pool("fp8", 72, 64, num_pages=num_pages, device=device)
        rows = torch.arange(n, device=device)
        mla_ops.append_rows(torch.ones(n, 1, 72, dtype=BF16, device=device), rows, pages, d_v=64, row_format="fp8")
        assert (pool == UNTOUCHED).all()


@pytest.mark.parametrize("name", ["latent", "tail", "pages"])
def test_a_gradient_is_refused_and_never_dropped(name: str) -> None:
    tensors = {
        "latent": torch.randn(2, 1, 64),
        "tail": torch.randn(2, 1, 8),
        "pages": torch.zeros(1, 4, 1, 72),
    }
    tensors[name].requires_grad_()
    rows = torch.tensor([0, 1])

    def write() -> None:
        mla_ops.append_rows(tensors["latent"], rows, tensors["pages"], d_v=64, row_format="dense", tail=tensors["tail"])

    with pytest.raises(mla_ops.NotDifferentiableError, match=rf"append_rows is not differentiable and {name} requires"):
        write()
    assert (tensors["pages"] == 0).all()
    with torch.no_grad():
        write()
    assert not (tensors["pages"][0, :2] == 0).all()


def test_autograd_sees_that_the_pool_was_written() -> None:
    pages = torch.zeros(1, 4, 1, 72)
    factor = torch.ones(1, requires_grad=True)
    product = factor * pages
    mla_ops.append_rows(torch.randn(2, 1, 72), torch.tensor([0, 1]), pages, d_v=64, row_format="dense")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_vmap_is_refused() -> None:
    latent, rows, pages = torch.ones(2, 3, 1, 72), torch.arange(6).view(2, 3), torch.zeros(1, 8, 1, 72)
    with pytest.raises(mla_ops.InvalidInputError, match=r"append_rows has no vmap rule: .*flatten the vmapped"):
        torch.vmap(lambda x, r: mla_ops.append_rows(x, r, pages, d_v=64, row_format="dense"))(latent, rows)
    assert (pages == 0).all()


@pytest.mark.parametrize("name", ["dense", "fp8", "model1"])
def test_opcheck(name: str) -> None:
    d_total = 128
    pages = torch.zeros(3, 5, 1, d_total, dtype=BF16)
    if name != "dense":
        # opcheck clones its arguments: 72 rows of 200 bytes fill a page of "model1" without padding.
        row = mla_ops.bytes_per_row(name, d_total, 128)
        pages = torch.zeros(1, 72, 1, row, dtype=torch.uint8)
    arguments = (torch.randn(4, 1, d_total, dtype=BF16), None, torch.tensor([0, 7, -1, 14]), pages, 128, name)
    torch.library.opcheck(torch.ops.mla.append_rows.default, arguments)

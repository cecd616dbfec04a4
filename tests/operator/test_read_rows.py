"""Reading rows: what every code and scale means, for every format and width, and the rest of torch."""

from __future__ import annotations

import pytest
import torch
from paged_pools import PagedCase, make_pool
from row_writers import value_of

import mla_ops
from mla_ops.errors import InvalidInputError
from mla_ops.reference import read_rows_reference

BF16 = torch.bfloat16
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = ["dense", "fp8", "fp8_all", "fp8_cache", "model1", "mxfp8"]
WIDTHS = [(576, 512), (512, 512), (320, 256), (128, 64), (72, 64), (100, 96)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def has_rows(name: str, d_total: int) -> bool:
    return name not in ("model1", "mxfp8") or (d_total % 16 == 0 and d_total > 64)


@pytest.mark.parametrize(
    ("name", "d_total", "d_v"), [(name, *widths) for name in FORMATS for widths in WIDTHS if has_rows(name, widths[0])]
)
def test_rows_are_payload_times_scale_then_the_tail(name: str, d_total: int, d_v: int, device: str) -> None:
    kv_group = 1 if name in ("model1", "mxfp8") else 2
    case = PagedCase(name, d_total, d_v, kv_group=kv_group, num_pages=3, page_size=5, padded_rows=1)
    numbers, pages, cache_scale = make_pool(case, torch.Generator(device).manual_seed(0), device)
    # Rows of even number are rows, the others are NaN in every byte; some twice, some outside of the pool.
    rows = torch.tensor([14, 0, 2, 2, 8, -1, 15, 2**31 - 1, -(2**31)], device=device)
    read = mla_ops.read_rows(
        pages, rows, d_total=d_total, d_v=d_v, row_format=name, dtype=BF16, cache_scale=cache_scale
    )
    assert read.is_contiguous()
    assert torch.equal(read[:5], numbers[rows[:5]].float().to(BF16))
    defined = read_rows_reference(pages, rows, d_total, d_v, name, BF16, cache_scale)
    assert torch.equal(defined[:5], numbers[rows[:5]])
    assert torch.equal(read[5:], defined[5:].to(BF16))
    assert (read[5:] == 0).all()
    odd = mla_ops.read_rows(
        pages, torch.tensor([7], device=device), d_total=d_total, d_v=d_v, row_format=name, dtype=BF16,
        cache_scale=cache_scale,
    )  # fmt: skip
    assert odd.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_every_code_has_its_value(dtype: torch.dtype, device: str) -> None:
    pages = torch.arange(256, device=device).to(torch.uint8).view(1, 1, 1, 256)
    for dtype_of_pages in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        read = mla_ops.read_rows(
            pages.view(dtype_of_pages), torch.zeros(1, dtype=torch.int64, device=device),
            d_total=256, d_v=256, row_format="fp8_cache", dtype=dtype, cache_scale=torch.ones(1, device=device),
        )  # fmt: skip
        expected = torch.tensor([value_of(code) for code in range(256)], dtype=dtype)
        assert torch.equal(read.flatten().cpu().nan_to_num(1e4), expected.nan_to_num(1e4))
        assert torch.equal(read.flatten().cpu().signbit()[:127], expected.signbit()[:127])


def test_every_one_byte_scale_has_its_value(device: str) -> None:
    """A byte is a power of two biased by 127; 0 is 2^-127, which is subnormal in fp32, and 255 is NaN."""
    pages = torch.zeros(1, 256, 1, 32 + 8, dtype=torch.uint8)
    page_bytes = -(-pages.numel() // 512) * 512
    pool = torch.zeros(1, page_bytes, dtype=torch.uint8)
    data, scales = pool[0, : 256 * 32].view(256, 32), pool[0, 256 * 32 : 256 * 40].view(256, 8)
    data[:] = 0x38  # 1.0
    scales[:, 0] = torch.arange(256)
    pages = pool.to(device).as_strided((1, 256, 1, 40), (page_bytes, 40, 40, 1))
    read = mla_ops.read_rows(
        pages, torch.arange(256, device=device), d_total=32, d_v=32, row_format="mxfp8", dtype=torch.float32
    )
    expected = torch.exp2(torch.arange(255, dtype=torch.float64) - 127)
    assert torch.equal(read[:255, 0, 5].cpu().double(), expected)
    assert read[255].isnan().all()


def test_any_fp32_scale_is_read_as_it_is(device: str) -> None:
    """No mantissa of a scale is cut, and products are rounded once."""
    pages = torch.zeros(1, 64, 1, 144, dtype=torch.uint8)
    gen = torch.Generator().manual_seed(0)
    pages[..., :128] = torch.randint(0, 127, (1, 64, 1, 128), generator=gen)
    scales = torch.rand(64, generator=gen) * 10.0 ** torch.randint(-20, 20, (64,), generator=gen)
    pages[0, :, 0, 128:132] = scales.view(64, 1).view(torch.uint8)
    numbers = pages[0, :, 0, :128].contiguous().view(torch.float8_e4m3fn).double() * scales.double().unsqueeze(1)
    rows = torch.arange(64, device=device)
    for dtype in (torch.float32, BF16):
        read = mla_ops.read_rows(pages.to(device), rows, d_total=128, d_v=128, row_format="fp8", dtype=dtype)
        assert torch.equal(read[:, 0].cpu(), numbers.float().to(dtype))


def test_no_rows_and_no_pages(device: str) -> None:
    options = {"d_total": 72, "d_v": 64, "row_format": "fp8", "dtype": BF16}
    pages = torch.zeros(0, 4, 2, 96, dtype=torch.uint8, device=device)
    read = mla_ops.read_rows(pages, torch.tensor([0, -1], device=device), **options)
    assert read.shape == (2, 2, 72)
    assert (read == 0).all()
    assert mla_ops.read_rows(pages, torch.zeros(0, dtype=torch.int32, device=device), **options).shape == (0, 2, 72)


def test_a_gradient_is_refused() -> None:
    pages = torch.zeros(1, 4, 1, 72, requires_grad=True)
    options = {"d_total": 72, "d_v": 64, "row_format": "dense", "dtype": torch.float32}
    with pytest.raises(mla_ops.NotDifferentiableError, match="read_rows is not differentiable and pages requires grad"):
        mla_ops.read_rows(pages, torch.tensor([0]), **options)
    with torch.no_grad():
        assert mla_ops.read_rows(pages, torch.tensor([0]), **options).shape == (1, 1, 72)


def test_vmap_reads_the_rows_of_all_elements_at_once() -> None:
    pages = torch.arange(40 * 72, dtype=torch.float32).view(5, 8, 1, 72)
    options = {"d_total": 72, "d_v": 64, "row_format": "dense", "dtype": torch.float32}
    rows = torch.tensor([[0, 39, -1], [7, 8, 40]])
    together = torch.vmap(lambda rows: mla_ops.read_rows(pages, rows, **options))(rows)
    assert torch.equal(together, torch.stack([mla_ops.read_rows(pages, r, **options) for r in rows]))
    with pytest.raises(InvalidInputError, match="pages or cache_scale has a vmapped dimension"):
        torch.vmap(lambda pages: mla_ops.read_rows(pages, rows[0], **options))(pages[None])


def test_opcheck() -> None:
    pages = torch.zeros(3, 5, 2, 96, dtype=torch.uint8)
    arguments = (pages, torch.tensor([0, 7, -1, 14]), 72, 64, "fp8", BF16)
    torch.library.opcheck(torch.ops.mla.read_rows.default, arguments)


@pytest.mark.parametrize(
    ("name", "d_total", "d_v", "row"),
    [
        ("dense", 576, 512, 1152), ("fp8", 576, 512, 656), ("fp8_all", 576, 512, 608), ("fp8_cache", 576, 512, 576),
        ("model1", 512, 512, 584), ("mxfp8", 512, 512, 528), ("fp8", 320, 256, 400), ("fp8_all", 320, 256, 336),
        ("fp8", 192, 128, 272), ("fp8", 128, 64, 208), ("fp8_all", 128, 64, 144), ("fp8_cache", 128, 64, 128),
        ("fp8", 72, 64, 96), ("fp8_all", 72, 64, 96),
    ],
)  # fmt: skip
def test_bytes_per_row(name: str, d_total: int, d_v: int, row: int) -> None:
    assert mla_ops.bytes_per_row(name, d_total, d_v) == row


def test_bytes_per_row_of_other_dtypes_and_of_no_format() -> None:
    assert mla_ops.bytes_per_row("dense", 72, 64, torch.float32) == 288
    with pytest.raises(InvalidInputError, match=r"row_format must be one of 'dense', 'fp8', .*got 'fp4'"):
        mla_ops.bytes_per_row("fp4", 72, 64)
    with pytest.raises(InvalidInputError, match="d_v must be at most d_total"):
        mla_ops.bytes_per_row("fp8", 64, 72)

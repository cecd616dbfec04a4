"""The codec of quantised rows and the kernels that write and read them, against torch and the eager backends.

Runs on a GPU, or without one under TRITON_INTERPRET=1 (see test_kernels_interpret.py), where CPU tensors stand in. The
interpreter's own conversions to e4m3 lose carries and its conversions from it lose NaN: there integers are tested.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.ops.append_rows import eager as append_eager
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.ops.append_rows.triton.launch import MAX_COMPARED, AppendConfig, launch_append, plan_append
from mla_ops.ops.read_rows import eager as read_eager
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem
from mla_ops.ops.read_rows.triton.launch import launch_read, plan_read
from mla_ops.row_formats import row_format

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from mla_ops.kernels.row_codec import e4m3_to_half, opaque, to_e4m3  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
A100 = DeviceTraits(type="cuda", arch=80, smem_bytes=166912, num_sms=108, l2_bytes=40 << 20)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
UNTOUCHED = 0xA5


def ways() -> list[DeviceTraits]:
    """Return the traits by which both ways to convert are taken, as far as the device has them."""
    if INTERPRETED:
        return [A100]
    own = traits_of(torch.device(DEVICE))
    return [own, DeviceTraits(**{**vars(own), "arch": 80})] if own.has_e4m3 else [own]


@triton.jit
def _decode_kernel(codes_ptr, out_ptr, DTYPE: tl.constexpr, IS_NATIVE: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, opaque(e4m3_to_half(tl.load(codes_ptr + at), DTYPE, IS_NATIVE).to(DTYPE)))


@triton.jit
def _decode_fp32_kernel(codes_ptr, out_ptr, IS_NATIVE: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, e4m3_to_half(tl.load(codes_ptr + at), tl.float32, IS_NATIVE))


@triton.jit
def _encode_kernel(numbers_ptr, codes_ptr, BLOCK: tl.constexpr, IS_NATIVE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes_ptr + at, to_e4m3(tl.load(numbers_ptr + at), IS_NATIVE))


class TestCodec:
    @pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
    def test_every_code_is_the_number_it_stands_for(self, dtype: torch.dtype) -> None:
        codes = torch.arange(256, dtype=torch.uint8)
        expected = codes.view(torch.float8_e4m3fn).to(dtype)
        for traits in ways():
            out = torch.full((256,), 7, dtype=dtype, device=DEVICE)
            if dtype == torch.float32:
                _decode_fp32_kernel[(1,)](codes.to(DEVICE), out, traits.has_e4m3)
            else:
                element = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
                _decode_kernel[(1,)](codes.to(DEVICE), out, element, traits.has_e4m3)
            torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
            is_number = ~expected.isnan()
            assert torch.equal(out.cpu().signbit()[is_number], expected.signbit()[is_number])

    def test_codes_are_the_nearest_and_even_at_ties(self) -> None:
        codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        ties = (codes[1:] + codes[:-1]) / 2
        above, below = ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))
        ends = torch.tensor([448.0, 449.0, 464.0, 464.1, 480.0, 3e38, torch.inf, 127.75, 2.0**-10, 1e-40, 0.0])
        numbers = torch.cat([codes, ties, above, below, ends])
        numbers = torch.cat([numbers, -numbers, torch.tensor([torch.nan])])
        expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 256))
        for traits in ways():
            out = torch.full(numbers.shape, 7, dtype=torch.uint8, device=DEVICE)
            _encode_kernel[(len(numbers) // 256,)](numbers.to(DEVICE), out, 256, traits.has_e4m3)
            assert torch.equal(out[: len(expected)].cpu(), expected)


class Case(NamedTuple):
    """A format at widths, and what of a call differs beside."""

    row_format: str
    d_total: int
    d_v: int
    rule: str = "pow2"
    has_tail: bool = False  # as a tensor of its own
    kv_group: int = 1
    index_dtype: torch.dtype = torch.int32

    def __str__(self) -> str:
        return f"{self.row_format}-{self.d_total}x{self.d_v}-{self.rule}{'-tail' if self.has_tail else ''}"


CASES = [
    Case("fp8", 576, 512),
    Case("fp8", 576, 512, "amax", has_tail=True, index_dtype=torch.int64),
    Case("fp8", 72, 64, kv_group=2),
    Case("fp8_all", 576, 512, "amax", has_tail=True),
    Case("fp8_all", 100, 96, kv_group=2),
    Case("fp8_cache", 128, 64, has_tail=True, kv_group=2),
    Case("fp8_cache", 320, 256),
    Case("model1", 512, 512),
    Case("mxfp8", 576, 512, index_dtype=torch.int64),
    Case("dense", 576, 512, has_tail=True),
    Case("dense", 100, 96, kv_group=3),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
PAGES, PAGE_SIZE = 3, 5
# Twice a row with an entry between, three times another; outside the pool on both sides, and far.
ROWS = [7, 0, 7, -1, 14, 3, 3, PAGES * PAGE_SIZE, 3, 11, -(2**31), 9]
FAR_ROW = 2**40


def hostile_rows(n: int, kv_group: int, width: int) -> torch.Tensor:
    """Return fp32 rows of all sizes: of zeros, with one large number, at the largest code, with NaN and infinity."""
    gen = torch.Generator().manual_seed(width)
    rows = torch.randn(n, kv_group, width, generator=gen)
    rows *= torch.exp2(torch.randint(-24, 8, (n, kv_group, 1), generator=gen))
    rows[1] = 0
    rows[4, :, 3:] = 0
    rows[5, :, ::2] *= 1e-3
    rows[8] = torch.tensor([448.0, 449.0, 464.0, 12.0, 12.5, -13.0, 0.5**6, 0.5**9, -(0.5**10), 0.0]).repeat(99)[:width]
    rows[9, :, width // 2] = torch.nan
    rows[11, :, 1] = -torch.inf
    return rows


def draw_append(case: Case, dtype: torch.dtype, rows: list[int] | None = None, padding: int = 1) -> AppendRowsCall:
    """Return a call on the CPU with a pool of untouched bytes whose pages are further apart than they are long."""
    rows = rows or [FAR_ROW if case.index_dtype == torch.int64 and row == -(2**31) else row for row in ROWS]
    numbers = hostile_rows(len(rows), case.kv_group, case.d_total).to(dtype)
    layout = row_format(case.row_format).layout(case.d_total, case.d_v, dtype.itemsize)
    page_bytes = layout.page_bytes(PAGE_SIZE) * case.kv_group + padding * 48
    pool = torch.full((PAGES, page_bytes), UNTOUCHED, dtype=torch.uint8)
    pages = pool[:, : PAGE_SIZE * case.kv_group * layout.row_bytes]
    pages = pages.view(dtype) if case.row_format == "dense" else pages
    pages = pages.unflatten(1, (PAGE_SIZE, case.kv_group, -1))
    latent, tail = numbers, None
    if case.has_tail:
        latent, tail = numbers[..., : case.d_v], numbers[..., case.d_v :]
    scale = torch.linspace(0.01, 0.3, case.kv_group) if case.row_format == "fp8_cache" else None
    return AppendRowsCall(
        latent, tail, torch.tensor(rows, dtype=case.index_dtype), pages, case.d_v, case.row_format, case.rule, scale
    )


def whole_pool(pages: torch.Tensor) -> torch.Tensor:
    """Return every byte of the memory behind a pool, on the CPU."""
    return torch.empty(0, dtype=torch.uint8, device=pages.device).set_(pages.untyped_storage()).cpu()


def on_device(call: Any) -> Any:
    """Return a call with its tensors on the device, strides as they are; the pool with all bytes behind it."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        storage = whole_pool(tensor).clone().to(DEVICE).untyped_storage()
        copy = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        return copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())

    return call._replace(**{
        name: moved(value) for name, value in call._asdict().items() if isinstance(value, torch.Tensor)
    })  # fmt: skip


def append(call: AppendRowsCall, traits: DeviceTraits, **choices: Any) -> None:
    launch_append(call, plan_append(call, AppendRowsProblem.of(call), traits, **choices))


def expected_pool(call: AppendRowsCall) -> torch.Tensor:
    """Write with the eager backend, on the CPU, and return all bytes."""
    append_eager.EagerBackend().run(call, None)
    return whole_pool(call.pages)


class TestAppendRows:
    @cases
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_pool_is_that_of_the_eager_backend(self, case: Case, dtype: torch.dtype) -> None:
        for traits in ways():
            call = draw_append(case, dtype)
            ours = on_device(call)
            append(ours, traits)
            torch.testing.assert_close(whole_pool(ours.pages), expected_pool(call), rtol=0, atol=0)

    @pytest.mark.parametrize("config", [AppendConfig(4, 4), AppendConfig(2, 1)], ids=str)
    @pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[8]], ids=str)
    def test_programs_of_several_rows_write_the_same(self, case: Case, config: AppendConfig) -> None:
        call = draw_append(case, DTYPES[0])
        ours = on_device(call)
        append(ours, ways()[0], config=config)
        torch.testing.assert_close(whole_pool(ours.pages), expected_pool(call), rtol=0, atol=0)

    def test_of_equal_rows_that_are_claimed_one_is_written_whole(self) -> None:
        case = Case("fp8", 576, 512)
        call = draw_append(case, DTYPES[0], rows=[4, 2, 4, 4, -1, 2, 8, 4, 99, 4, 2, 6])
        ours = on_device(call)
        append(ours, ways()[0], is_claimed=True)
        stored = ours.pages.cpu().flatten(0, 1)
        for row in range(PAGES * PAGE_SIZE):
            entries = (call.rows == row).nonzero().flatten().tolist()
            written = []
            for entry in entries:
                alone = draw_append(case, DTYPES[0], rows=call.rows.where(torch.arange(12) == entry, -1).tolist())
                expected_pool(alone)
                written.append(alone.pages.flatten(0, 1)[row])
            written = written or [torch.full_like(stored[row], UNTOUCHED)]
            assert any(torch.equal(stored[row], one) for one in written), row

    def test_inputs_of_any_strides_are_read_where_they_are(self) -> None:
        call = draw_append(Case("fp8", 72, 64, "amax", has_tail=True, kv_group=2), DTYPES[0])
        ours = on_device(call)
        wide = torch.full((2, len(ROWS), 150), 7, dtype=DTYPES[0], device=DEVICE)
        latent, tail = wide[:, :, 3:67].transpose(0, 1), wide[:, :, 101:109].transpose(0, 1)
        latent.copy_(call.latent)
        tail.copy_(call.tail)
        strided_rows = torch.stack([ours.rows, ours.rows.flip(0)], 1)[:, 0]
        append(ours._replace(latent=latent, tail=tail, rows=strided_rows), ways()[0])
        torch.testing.assert_close(whole_pool(ours.pages), expected_pool(call), rtol=0, atol=0)


def draw_read(case: Case, dtype: torch.dtype, out_dtype: torch.dtype | None = None) -> ReadRowsCall:
    """Return a call on the CPU for rows that were written, rows that were not, and numbers of none."""
    written = draw_append(case, dtype)
    append_eager.EagerBackend().run(written, None)
    rows = torch.cat([written.rows, torch.arange(PAGES * PAGE_SIZE, dtype=case.index_dtype)])
    return ReadRowsCall(
        written.pages, rows, case.d_total, case.d_v, case.row_format, out_dtype or dtype, written.cache_scale
    )


class TestReadRows:
    @pytest.mark.parametrize(
        ("case", "out_dtype"),
        [*((case, None) for case in CASES), (CASES[3], torch.float32), (CASES[5], torch.float32)],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rows_are_those_of_the_eager_backend(
        self, case: Case, out_dtype: torch.dtype | None, dtype: torch.dtype
    ) -> None:
        call = draw_read(case, dtype, out_dtype)
        expected = read_eager.EagerBackend().run(call, None)
        ours = on_device(call)
        for traits in ways():
            out = launch_read(ours, plan_read(ours, ReadRowsProblem.of(ours), traits))
            torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
            assert not out[call.rows.to(DEVICE) == -1].any()

    def test_a_row_outside_the_pool_is_zeros_whatever_the_scale_of_the_cache(self) -> None:
        call = draw_read(Case("fp8_cache", 128, 64, kv_group=2), DTYPES[0])
        ours = on_device(call._replace(cache_scale=torch.full((1,), torch.nan)))
        out = launch_read(ours, plan_read(ours, ReadRowsProblem.of(ours), ways()[0])).cpu()
        is_row = (call.rows >= 0) & (call.rows < PAGES * PAGE_SIZE)
        assert out[is_row].isnan().all()
        assert (out[~is_row] == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="it takes a device")
class TestOnAGpu:
    def test_a_replay_writes_and_reads_other_rows(self) -> None:
        case = Case("fp8", 576, 512)
        first, second = draw_append(case, torch.bfloat16), draw_append(case, torch.bfloat16, rows=[*ROWS[1:], 2])
        ours = on_device(first)
        wanted = torch.arange(PAGES * PAGE_SIZE, device=DEVICE)

        def step() -> torch.Tensor:
            torch.ops.mla.append_rows(*ours)
            return torch.ops.mla.read_rows(ours.pages, wanted, 576, 512, "fp8", torch.bfloat16)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            read = step()
        ours.pages.fill_(UNTOUCHED)
        for call in (first, second):
            ours.rows.copy_(call.rows)
            ours.latent.copy_(call.latent.flip(-1))
            graph.replay()
            replayed = call._replace(latent=call.latent.flip(-1), pages=first.pages)
            assert torch.equal(whole_pool(ours.pages), expected_pool(replayed))
            expected = read_eager.EagerBackend().run(
                ReadRowsCall(first.pages, wanted.cpu(), 576, 512, "fp8", torch.bfloat16), None
            )
            torch.testing.assert_close(read.cpu(), expected, rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("name", ["fp8", "dense"])
    def test_rows_beyond_32_bits_of_bytes(self, name: str) -> None:
        row_bytes = 656 if name == "fp8" else 1152
        num_pages = 2**31 // row_bytes // 64 + 2
        pages = torch.empty(num_pages, 64, 1, row_bytes, dtype=torch.uint8, device=DEVICE)
        pages = pages if name == "fp8" else pages.view(torch.bfloat16)
        rows = torch.tensor([num_pages * 64 - 1, 5, num_pages * 64], device=DEVICE)
        latent = torch.randn(3, 1, 576, device=DEVICE).to(torch.bfloat16)
        torch.ops.mla.append_rows(latent, None, rows, pages, 512, name)
        read = torch.ops.mla.read_rows(pages, rows, 576, 512, name, torch.bfloat16)
        near, rows = pages[:1].clone(), torch.tensor([0, 1, -1], device=DEVICE)
        torch.ops.mla.append_rows(latent, None, rows, near, 512, name)
        expected = torch.ops.mla.read_rows(near, rows, 576, 512, name, torch.bfloat16)
        assert torch.equal(read, expected)
        assert read[:2].any(-1).all()

    @pytest.mark.parametrize("entries", [1000, 5000])  # compared, claimed
    def test_many_equal_rows_are_written_whole(self, entries: int) -> None:
        pages = torch.zeros(4, 64, 1, 656, dtype=torch.uint8, device=DEVICE)
        numbers = torch.arange(entries, device=DEVICE) % 400 + 1
        latent = numbers.view(-1, 1, 1).expand(-1, 1, 576).to(torch.bfloat16)
        rows = torch.randint(0, 256, (entries,), device=DEVICE)
        torch.ops.mla.append_rows(latent, None, rows, pages, 512, "fp8")
        read = torch.ops.mla.read_rows(pages, torch.arange(256, device=DEVICE), 576, 512, "fp8", torch.bfloat16)
        # A tile of one number has the same number everywhere: codes of one entry with scales of another would not.
        payload, tail = read[..., :512].float(), read[..., 512:].float()
        assert (payload == payload[..., :1]).all()
        assert (tail == tail[..., :1]).all()
        assert ((payload[..., 0] - tail[..., 0]).abs() <= tail[..., 0] / 16).all()
        if entries <= MAX_COMPARED:
            last = torch.zeros(256, dtype=torch.int64)
            for entry, row in enumerate(rows.tolist()):
                last[row] = entry % 400 + 1
            assert torch.equal(tail[:, 0, 0].cpu(), last.to(torch.bfloat16).float())

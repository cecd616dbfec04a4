"""FlashMLA's decode and vLLM's cache writer as drop-ins, tested as FlashMLA's own decode suite tests its kernels.

Rows are quantised here by a plain statement of FlashMLA's rule, unused rows are poisoned with NaN, every page is padded
by a row, and results are held to fp64 on dequantised rows with that suite's tolerances.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch

import mla_ops
from mla_ops.adapters.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from mla_ops.adapters.vllm_cache import concat_and_cache_mla
from mla_ops.errors import UnsupportedFeatureError
from mla_ops.reference import sparse_attn_reference

TILE = 128
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def quantised(rows: torch.Tensor, d_v: int, *, pow2: bool) -> torch.Tensor:
    """Return rows `[n, d_total]` as bytes: payload, scales, tail; FlashMLA's rule, or vLLM's."""
    payload, scales = [], []
    for tile in rows[:, :d_v].float().split(TILE, dim=1):
        amax = tile.abs().amax(dim=1, keepdim=True)
        scale = amax / torch.tensor(448.0)
        scale = 2 ** scale.clamp_min(1e-4).log2().ceil() if pow2 else scale.clamp_min(2.0**-126)
        payload.append((tile / scale).to(torch.float8_e4m3fn).view(torch.uint8))
        scales.append(scale.view(torch.uint8))
    parts = [torch.cat(payload, dim=1), torch.cat(scales, dim=1), rows[:, d_v:].contiguous().view(torch.uint8)]
    return torch.cat([torch.nn.functional.pad(part, (0, -part.shape[1] % 16)) for part in parts], dim=1)


def dequantised(data: torch.Tensor, d_total: int, d_v: int) -> torch.Tensor:
    """Return bytes `[n, row]` as fp64 rows."""
    tiles = -(-d_v // TILE)
    scale_at = -(-d_v // 16) * 16
    tail_at = scale_at + -(-4 * tiles // 16) * 16
    payload = data[:, :d_v].contiguous().view(torch.float8_e4m3fn).double()
    scale = data[:, scale_at : scale_at + 4 * tiles].contiguous().view(torch.float32).double()
    tail = data[:, tail_at : tail_at + 2 * (d_total - d_v)].contiguous().view(torch.bfloat16).double()
    return torch.cat([payload * scale.repeat_interleave(TILE, dim=1)[:, :d_v], tail], dim=1)


@dataclass
class Decode:
    """A cache, some rows of which are in use, and a call on it."""

    q: torch.Tensor  # [b, s_q, h_q, d_total]
    cache: torch.Tensor  # [num_blocks, page_size, 1, row]
    rows: torch.Tensor  # [num_blocks * page_size, d_total], fp64, 0 where no index points
    indices: torch.Tensor  # [b, s_q, topk]

    def expected(
        self, d_v: int, scale: float, topk_length: torch.Tensor | None = None, attn_sink: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        b, s_q = self.q.shape[:2]
        length = None if topk_length is None else topk_length[:, None].expand(b, s_q)
        kv = self.rows[:, None].expand(b, -1, 1, -1)
        out, lse = sparse_attn_reference(self.q.double(), kv, self.indices.unsqueeze(2), d_v, scale, length, attn_sink)
        return out, lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2)


def draw(
    widths: tuple[int, int] = (576, 512),
    *,
    b: int = 2,
    s_q: int = 1,
    h_q: int = 6,
    topk: int = 20,
    page_size: int = 61,
    blocks: int = 4,
    pow2: bool = True,
    is_fp8: bool = True,
    seed: int = 0,
    device: str = "cpu",
) -> Decode:
    """Draw a call; its last request is empty, a fifth of all slots names no row, and no unused row may be read."""
    generator = torch.Generator().manual_seed(seed)
    d_total, d_v = widths
    blocks = max(blocks, -(-40 // page_size))
    size = blocks * page_size
    used = torch.randperm(size, generator=generator)[: size // 2]
    indices = used[torch.randint(0, len(used), (b, s_q, topk), generator=generator)]
    bad = torch.tensor([-1, -2, size, 2**31 - 1, -(2**31)])
    bad = bad[torch.randint(0, len(bad), indices.shape, generator=generator)]
    indices = torch.where(torch.rand(indices.shape, generator=generator) < 0.2, bad, indices)
    indices[-1] = -1
    rows = (torch.randn(size, d_total, generator=generator) / 10).bfloat16()
    data = quantised(rows, d_v, pow2=pow2) if is_fp8 else rows.view(torch.uint8)
    exact = dequantised(data, d_total, d_v) if is_fp8 else rows.double()
    is_used = torch.zeros(size, 1, dtype=torch.bool)
    is_used[indices[(indices >= 0) & (indices < size)]] = True
    # 0xFF: NaN as e4m3, as fp32 and as bf16. A page has a row more than is in use, so pages are not contiguous.
    pages = torch.full((blocks, page_size + 1, 1, data.shape[1]), 0xFF, dtype=torch.uint8)
    pages[:, :page_size, 0] = torch.where(is_used, data, 0xFF).view(blocks, page_size, -1)
    cache = pages.to(device)[:, :page_size]
    q = (torch.randn(b, s_q, h_q, d_total, generator=generator) / 10).bfloat16()
    return Decode(
        q.to(device),
        cache if is_fp8 else cache.view(torch.bfloat16),
        exact.where(is_used, 0).to(device),
        indices.int().to(device),
    )


def assert_within_bars(actual: torch.Tensor, expected: torch.Tensor, absolute: float, relative: float) -> None:
    assert actual.shape == expected.shape
    actual = actual.double()
    assert torch.equal(actual.isfinite(), expected.isfinite())
    error = (actual - expected).nan_to_num(0, 0, 0).abs()
    assert (error <= torch.clamp(expected.abs() * relative, min=absolute)).all(), error.max()


def check(out: torch.Tensor, lse: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert_within_bars(out, expected[0], 1e-3, 2.01 / 128)
    a, e = out.double(), expected[0]
    assert 1 - 2 * (a * e).sum() / (a.square() + e.square()).sum() < 5e-6
    assert_within_bars(lse, expected[1], 1e-6, 8.01 / 65536)
    assert (lse.dtype, lse.shape[1:]) == (torch.float32, (out.shape[2], out.shape[1]))
    # The last request is empty.
    assert (out[-1] == 0).all()
    assert (lse[-1] == torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("page_size", "s_q", "widths", "h_q", "topk"),
    [
        (2, 1, (576, 512), 6, 20),
        (53, 3, (576, 512), 64, 64),
        (61, 1, (576, 512), 1, 65),
        (64, 3, (576, 512), 8, 33),
        (69, 1, (128, 64), 28, 40),
        (64, 1, (512, 512), 5, 24),
    ],
)
@pytest.mark.parametrize("optional", [False, True], ids=["plain", "length+sink"])
def test_decode_of_quantised_rows(
    page_size: int, s_q: int, widths: tuple[int, int], h_q: int, topk: int, optional: bool, device: str
) -> None:
    # FlashMLA's suite knows powers of two only; narrow rows come with any scale here.
    pow2 = widths != (128, 64)
    case = draw(widths, page_size=page_size, s_q=s_q, h_q=h_q, topk=topk, pow2=pow2, device=device)
    d_v, scale = widths[1], 0.3
    length = torch.tensor([topk // 2, topk + 5], dtype=torch.int32, device=device) if optional else None
    sink = torch.randn(h_q, device=device) if optional else None
    meta, none = get_mla_metadata()
    assert none is None
    out, lse = flash_mla_with_kvcache(
        *(case.q, case.cache.view(torch.float8_e4m3fn), None, None, d_v, meta, None, scale, False, True),
        indices=case.indices,
        attn_sink=sink,
        topk_length=length,
        row_format="fp8" if widths == (512, 512) else None,  # 528 bytes may be "mxfp8" too
    )
    check(out, lse, case.expected(d_v, scale, length, sink))


@pytest.mark.parametrize("device", DEVICES)
def test_a_bf16_cache_the_default_scale_and_a_table_that_nobody_reads(device: str) -> None:
    case = draw((192, 128), is_fp8=False, device=device)
    dummy = torch.full((2, 1), -7, dtype=torch.int32, device=device)
    out, lse = flash_mla_with_kvcache(
        case.q, case.cache, dummy, dummy[:, 0], 128, get_mla_metadata(1, s_q=2)[0], indices=case.indices.long()
    )
    check(out, lse, case.expected(128, 192**-0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_two_caches_are_one_softmax_and_one_sink(device: str) -> None:
    first = draw((128, 64), b=4, page_size=7, blocks=5, device=device)
    second = draw((128, 64), b=4, page_size=2, topk=9, seed=1, device=device)
    first.indices[1] = second.indices[2] = -1  # one of the two has no keys
    sink = torch.randn(6, device=device)
    length, extra_length = torch.tensor([[11, 20, 5, 20], [4, 8, 2, 9]], dtype=torch.int32, device=device)
    out, lse = flash_mla_with_kvcache(
        *(first.q, first.cache, None, None, 64, get_mla_metadata()[0], None, 0.3, False, True),
        *(first.indices, sink, second.cache, second.indices, length, extra_length),
    )
    size = len(first.rows)

    def valid(case: Decode, length: torch.Tensor) -> torch.Tensor:
        inside = torch.arange(case.indices.shape[-1], device=device) < length[:, None, None]
        return case.indices.where(inside & (case.indices >= 0) & (case.indices < len(case.rows)), -(2**20))

    both = Decode(
        first.q,
        first.cache,
        torch.cat([first.rows, second.rows]),
        torch.cat([valid(first, length), valid(second, extra_length) + size], dim=-1),
    )
    check(out, lse, both.expected(64, 0.3, attn_sink=sink))


def test_signature_is_the_published_one() -> None:
    parameters = list(inspect.signature(flash_mla_with_kvcache).parameters.values())
    published = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    empty = inspect.Parameter.empty
    assert [(p.name, p.default) for p in published] == [
        ("q", empty),
        ("k_cache", empty),
        ("block_table", empty),
        ("cache_seqlens", empty),
        ("head_dim_v", empty),
        ("tile_scheduler_metadata", empty),
        ("num_splits", None),
        ("softmax_scale", None),
        ("causal", False),
        ("is_fp8_kvcache", False),
        ("indices", None),
        ("attn_sink", None),
        ("extra_k_cache", None),
        ("extra_indices_in_kvcache", None),
        ("topk_length", None),
        ("extra_topk_length", None),
    ]
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == ["row_format", "extra_row_format"]
    assert isinstance(get_mla_metadata(3, num_heads=1)[0], FlashMLASchedMeta)


def test_metadata_serves_calls_of_one_size_and_no_other() -> None:
    meta = get_mla_metadata()[0]

    def decode(case: Decode, length: torch.Tensor, meta: FlashMLASchedMeta) -> torch.Tensor:
        arguments = (case.q, case.cache, None, None, 64, meta, None, 0.3, False, True, case.indices)
        return flash_mla_with_kvcache(*arguments, topk_length=length)[0]

    case = draw((128, 64))
    long, short = torch.tensor([20, 20]), torch.tensor([3, 1])
    first = decode(case, long, meta)
    # FlashMLA's metadata would hold a plan for the lengths of the first call.
    assert torch.equal(decode(case, short, meta), decode(case, short, get_mla_metadata()[0]))
    assert torch.equal(decode(case, long, meta), first)
    with pytest.raises(mla_ops.InvalidInputError, match=r"same sizes: s_q was 1 and is 3, topk was 20 and is 21; take"):
        decode(draw((128, 64), s_q=3, topk=21), long, meta)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": None}, UnsupportedFeatureError, r"dense decoding \(indices=None\) is not what"),
        ({"causal": True}, UnsupportedFeatureError, "causal must be False beside indices"),
        ({"num_splits": 1}, mla_ops.InvalidInputError, "num_splits must be None, got int"),
        ({"tile_scheduler_metadata": None}, mla_ops.InvalidInputError, r"get_mla_metadata\(\) returns first, got None"),
        ({"is_fp8_kvcache": False}, mla_ops.InvalidInputError, "is_fp8_kvcache must be True for a k_cache of torch.u"),
        ({"extra_k_cache": torch.zeros(1)}, mla_ops.InvalidInputError, "extra_indices_in_kvcache must come together"),
        (
            {"q": torch.zeros(3, 4, 128)},
            mla_ops.InvalidInputError,
            r"q must have 4 dimensions, got shape \[3, 4, 128\]",
        ),
        (
            {"k_cache": torch.zeros(4, 61, 1, 200 + 16, dtype=torch.uint8)},
            mla_ops.InvalidInputError,
            r"rows of one of these bytes at widths 128/64: 208 \('fp8'\), 144 \('fp8_all'\).*; got 216",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_refused(changes: dict, error: type[Exception], message: str) -> None:
    case = draw((128, 64))
    arguments = {
        "q": case.q,
        "k_cache": case.cache,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 64,
        "tile_scheduler_metadata": get_mla_metadata()[0],
        "is_fp8_kvcache": True,
        "indices": case.indices,
    }
    with pytest.raises(error, match=message):
        flash_mla_with_kvcache(**{**arguments, **changes})


def test_rows_of_528_bytes_at_512_channels_have_two_readings() -> None:
    case = draw((512, 512))
    with pytest.raises(mla_ops.InvalidInputError, match=r"528 bytes at widths 512/512 .* may be 'fp8' and .*'mxfp8'"):
        flash_mla_with_kvcache(
            *(case.q, case.cache, None, None, 512, get_mla_metadata()[0], None, 0.3, False, True, case.indices)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("widths", [(576, 512), (72, 64)], ids=str)
def test_vllm_rows_are_its_bytes(widths: tuple[int, int], device: str) -> None:
    d_total, d_v = widths
    rows = torch.randn(5, d_total).bfloat16() * torch.tensor([1, 1e-3, 30, 0, 1]).bfloat16()[:, None]
    slots = torch.tensor([3, 7, -1, 0])  # the fifth token is padding of the batch
    expected = quantised(rows, d_v, pow2=False)
    cache = torch.full((3, 4, expected.shape[1]), 0xA5, dtype=torch.uint8, device=device)
    rows = rows.to(device)
    tail = rows[:, d_v:] if d_v == 64 else rows[:, d_v:].unsqueeze(1)  # vLLM has both shapes of k_pe
    concat_and_cache_mla(rows[:, :d_v], tail, cache, slots.to(device), "fp8_ds_mla", torch.ones(1, device=device))
    flat = cache.cpu().view(12, -1)
    for token, slot in ((0, 3), (1, 7), (3, 0)):
        # Padding between the parts is nobody's: compare what the bytes say and the bytes of payload and tail.
        assert torch.equal(flat[slot, :d_v], expected[token, :d_v])
        assert torch.equal(dequantised(flat[None, slot], *widths), dequantised(expected[None, token], *widths))
    untouched = [slot for slot in range(12) if slot not in (0, 3, 7)]
    assert (flat[untouched] == 0xA5).all()


def test_vllm_caches_that_are_not_fp8_ds_mla() -> None:
    rows, slots = torch.randn(2, 96).bfloat16(), torch.tensor([4, 1])
    dense = torch.zeros(2, 3, 96, dtype=torch.bfloat16)
    concat_and_cache_mla(rows[:, :64], rows[:, 64:], dense, slots, "auto", None)
    assert torch.equal(dense.view(6, 96)[slots], rows)
    one_scale, scale = torch.zeros(2, 3, 96, dtype=torch.uint8), torch.tensor([0.01])
    concat_and_cache_mla(rows[:, :64], rows[:, 64:], one_scale, slots, "fp8", scale)
    assert torch.equal(
        one_scale.view(6, 96)[slots].view(torch.float8_e4m3fn).float(),
        (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float(),
    )
    with pytest.raises(UnsupportedFeatureError, match=r"kv_cache_dtype must be one of 'auto', .*, got 'fp8_e5m2'"):
        concat_and_cache_mla(rows[:, :64], rows[:, 64:], one_scale, slots, "fp8_e5m2", scale)
    with pytest.raises(mla_ops.InvalidInputError, match=r"kv_cache must be \[num_blocks, block_size, row\]"):
        concat_and_cache_mla(rows[:, :64], rows[:, 64:], dense.unsqueeze(2), slots, "auto", None)


def test_decode_compiles_whole(fresh_dynamo: None) -> None:
    case = draw((128, 64))
    meta = get_mla_metadata()[0]

    def decode(q: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flash_mla_with_kvcache(*(q, case.cache, None, None, 64, meta, None, 0.3, False, True, indices))

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for actual, expected in zip(compiled(case.q, case.indices), decode(case.q, case.indices), strict=True):
            assert torch.equal(actual, expected)
    # The first call filled the metadata; later ones find it filled.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2

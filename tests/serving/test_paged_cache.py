"""Caches: rows and index keys stand where a plain list of each request's tokens says, whatever happened before."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mla_ops
from mla_ops.adapters.torch_layer import to_e4m3
from mla_ops.serving import IndexKeys, PagedCache, RowCache

D_TOTAL, D_V, SCALE = 24, 16, 0.2


def make_cache(device: str = "cpu", **changes: Any) -> PagedCache:
    sizes = {"layers": 2, "num_pages": 12, "page_size": 3, "max_requests": 4, "max_len": 14, "index_head_dim": 8}
    return PagedCache(
        **{**sizes, **changes}, d_total=D_TOTAL, d_v=D_V, row_format="dense", index_dtype=torch.float32, device=device
    )


def rows_of(cache: PagedCache, tokens: torch.Tensor, layer: int) -> torch.Tensor:
    """The latent row of a token is made of its number and its layer, `[..., 1, D_TOTAL]`."""
    channels = torch.arange(D_TOTAL, device=tokens.device)
    return ((tokens.unsqueeze(-1) * 7 + channels * (layer + 1)) % 31).unsqueeze(-2).bfloat16() / 16


def write(cache: PagedCache, tokens: torch.Tensor) -> None:
    """What a model's step does with its new tokens, `[max_requests, width]`."""
    width = tokens.shape[1]
    for layer in range(2):
        cache.pool(layer).append(rows_of(cache, tokens, layer), cache.new_rows(width))
        keys = tokens.float().view(*tokens.shape, 1, 1).expand(-1, -1, 1, 8) + layer
        cache.index_keys(layer).append(keys, cache.new_positions(width))


class Texts:
    """Every request's tokens as plain lists, grown beside a cache by the same calls."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache, self.tokens, self.next_token = cache, dict[int, list[int]](), 0

    def extend(self, counts: dict[int, int]) -> None:
        self.cache.extend(counts)
        new = torch.full((4, max(counts.values())), -9)
        for request, count in counts.items():
            new[request, :count] = torch.arange(self.next_token, self.next_token + count)
            self.tokens[request] += new[request, :count].tolist()
            self.next_token += count
        write(self.cache, new.to(self.cache.lens.device))

    def add(self) -> int:
        request = self.cache.add()
        self.tokens[request] = []
        return request

    def fork(self, request: int) -> int:
        twin = self.cache.fork(request)
        self.tokens[twin] = list(self.tokens[request])
        return twin

    def free(self, request: int) -> None:
        self.cache.free(request)
        del self.tokens[request]

    def check(self) -> None:
        cache = self.cache
        positions = torch.arange(14).expand(4, -1)
        table = cache.block_table.cpu()
        assert cache.seq_lens.tolist() == [len(self.tokens.get(request, ())) for request in range(4)]
        for layer in range(2):
            pool = cache.pool(layer)
            rows = pool.rows(table, positions)
            for request in range(4):
                tokens = torch.tensor(self.tokens.get(request, []), dtype=torch.long)
                here = rows[request, : len(tokens)]
                stored = pool.read(here.to(cache.lens.device)).cpu()
                assert torch.equal(stored, rows_of(cache, tokens, layer)), (layer, request)
                keys = cache.index_keys(layer).keys[request, : len(tokens), 0, 0].cpu()
                assert torch.equal(keys, tokens.float() + layer), (layer, request)


def test_rows_stand_where_plain_lists_say_through_any_history() -> None:
    texts = Texts(make_cache())
    cache, choose = texts.cache, random.Random(0)
    refused = forked = 0
    for _ in range(120):
        requests = list(texts.tokens)
        what = choose.choice(["add", "extend", "extend", "extend", "fork", "free"])
        before = (cache.free_pages, cache.block_table.tolist(), cache.lens.tolist())
        try:
            if what == "add":
                texts.add()
            elif requests and what == "fork":
                texts.fork(choose.choice(requests))
                forked += 1
            elif requests and what == "free":
                texts.free(choose.choice(requests))
            elif requests:
                chosen = choose.sample(requests, choose.randint(1, len(requests)))
                room = {request: 14 - len(texts.tokens[request]) for request in chosen}
                texts.extend(
                    {request: choose.randint(min(1, room[request]), min(5, room[request])) for request in chosen}
                )
        except mla_ops.OutOfPagesError:
            refused += 1
            assert (cache.free_pages, cache.block_table.tolist(), cache.lens.tolist()) == before
        texts.check()
    assert refused
    assert forked
    for request in list(texts.tokens):
        texts.free(request)
    assert cache.free_pages == cache.num_pages
    assert (cache.block_table == -1).all()


def test_a_fork_shares_pages_until_one_of_the_two_writes() -> None:
    texts = Texts(make_cache(num_pages=4))
    first = texts.add()
    texts.extend({first: 7})  # two full pages and one token
    assert texts.cache.free_pages == 1
    twin = texts.fork(first)
    assert texts.cache.free_pages == 1
    texts.extend({first: 1, twin: 1})  # the last page is copied once: the other one keeps the original
    assert texts.cache.free_pages == 0
    assert texts.cache.block_table[first, :2].tolist() == texts.cache.block_table[twin, :2].tolist()
    texts.check()
    texts.free(first)
    assert texts.cache.free_pages == 1
    texts.check()


def test_new_positions_are_those_of_the_last_step_alone() -> None:
    cache = make_cache()
    a, b = cache.add(), cache.add()
    cache.extend({a: 5, b: 2})
    cache.extend({b: 2})
    assert cache.new_positions(3).tolist() == [[-1, -1, -1], [2, 3, -1], [-1, -1, -1], [-1, -1, -1]]
    assert cache.new_rows(2).tolist() == [[-1, -1], [2 * 3 + 2, 3 * 3], [-1, -1], [-1, -1]]
    cache.fork(b)  # the twin has no step of its own yet
    assert cache.new_positions(2).tolist() == [[-1, -1], [2, 3], [-1, -1], [-1, -1]]
    cache.free(b)
    assert cache.new_positions(2).tolist() == [[-1, -1]] * 4
    assert cache.seq_lens.tolist() == [5, 0, 4, 0]


def test_attention_reads_each_request_and_rows_of_the_batch_without_one_get_zeros() -> None:
    cache = make_cache()
    texts = Texts(cache)
    a, b = texts.add(), texts.add()
    texts.extend({a: 5, b: 2})
    texts.extend({a: 1, b: 1})
    q = torch.randn(4, 1, 3, D_TOTAL).bfloat16()
    everything = torch.arange(14, dtype=torch.int32).expand(4, 1, 1, -1)  # positions beyond a request's end are no keys
    out, lse = cache.pool(1).attend(
        q, everything, softmax_scale=SCALE, block_table=cache.block_table, seq_lens=cache.seq_lens
    )
    for request in (a, b):
        kv = rows_of(cache, torch.tensor([texts.tokens[request]]), 1)
        alone = mla_ops.sparse_attn(q[request, None], kv, everything[:1], d_v=D_V, softmax_scale=SCALE)
        torch.testing.assert_close(out[request], alone.out[0], rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(lse[request], alone.lse[0], rtol=1e-5, atol=1e-5)
    assert (out[2:] == 0).all()
    assert (lse[2:] == -torch.inf).all()


def test_a_compiled_step_serves_every_state_of_the_cache(fresh_dynamo: None) -> None:
    cache = make_cache()
    texts = Texts(cache)
    addresses = [t.data_ptr() for t in (cache.block_table, cache.lens, cache.seq_lens, cache.pool(0).storage)]
    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    a, b = texts.add(), texts.add()
    texts.extend({a: 2, b: 4})
    texts.extend({a: 1})
    for counts in ({a: 1, b: 1}, {b: 1}, {a: 1, b: 1}):
        cache.extend(counts)
        tokens = torch.full((4, 1), -9)
        for request in counts:
            tokens[request] = texts.next_token
            texts.tokens[request].append(texts.next_token)
            texts.next_token += 1
        compiled(cache, tokens)
        texts.check()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert addresses == [t.data_ptr() for t in (cache.block_table, cache.lens, cache.seq_lens, cache.pool(0).storage)]


def test_row_numbers_of_positions() -> None:
    cache = RowCache(5, 3, D_TOTAL, D_V, "dense")
    table = torch.tensor([[4, 0], [2, -1], [5, 1]], dtype=torch.int32)
    positions = torch.tensor([[0, 2, 3, 5, 6, -1]]).expand(3, -1)
    assert cache.rows(table, positions).tolist() == [
        [12, 14, 0, 2, -1, -1],
        [6, 8, -1, -1, -1, -1],
        [-1, -1, 3, 5, -1, -1],  # page 5 is not in the pool
    ]
    assert cache.rows(table[:, :0], positions).tolist() == [[-1] * 6] * 3


@pytest.mark.parametrize("row_format", ["dense", "fp8", "fp8_all"])
def test_a_pool_keeps_rows_in_its_format_and_tells_their_bytes(row_format: str) -> None:
    cache = RowCache(4, 5, 128, 64, row_format)
    assert cache.bytes_per_token == {"dense": 256, "fp8": 208, "fp8_all": 144}[row_format]
    assert cache.pages.shape[:3] == (4, 5, 1)
    assert [name for name, _ in cache.named_buffers()] == ["storage"]
    assert cache.state_dict() == {}
    rows = torch.randn(3, 1, 128).bfloat16()
    cache.append(rows[..., :64], torch.tensor([7, -1, 19]), tail=rows[..., 64:])
    back = cache.read(torch.tensor([7, 19, 0, -1]))
    # e4m3 has 3 bits behind the point and a scale of its own keeps the largest of 128 channels.
    torch.testing.assert_close(back[:2], rows[[0, 2]], rtol=0 if row_format == "dense" else 2**-4, atol=4e-2)
    assert (back[2:] == 0).all()
    out, lse = cache.attend(torch.randn(2, 4, 128).bfloat16(), torch.tensor([[[7]], [[-1]]]), softmax_scale=SCALE)
    torch.testing.assert_close(out[0], back[0, :, :64].expand(4, -1))
    assert (lse[1] == -torch.inf).all()


def test_e4m3_index_keys_carry_their_scales() -> None:
    keys = IndexKeys(2, 6, 8, dtype=torch.float8_e4m3fn)
    assert keys.bytes_per_token == 8 + 4
    k_idx = torch.randn(2, 3, 1, 8)
    positions = torch.tensor([[0, 1, -2], [5, -1, 6]])
    quantised, scale = to_e4m3(k_idx)
    keys.append(quantised, positions, scale)
    assert torch.equal(keys.keys[0, :2].float(), quantised[0, :2].float())
    assert torch.equal(keys.scales[1, 5], scale[1, 0])
    assert (keys.keys[1, :5].float() == 0).all()
    assert (keys.keys[0, 2:].float() == 0).all()
    with pytest.raises(mla_ops.InvalidInputError, match="k_scale must come exactly where keys are e4m3"):
        keys.append(quantised, positions)
    with pytest.raises(mla_ops.InvalidInputError, match="k_idx must have the dtype of the cache"):
        keys.append(k_idx, positions, scale)


def filled(**sizes: int) -> tuple[PagedCache, int]:
    cache = make_cache(**sizes)
    request = cache.add()
    cache.extend({request: 4})
    return cache, request


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda c, r: make_cache(max_len=0),
            mla_ops.InvalidInputError,
            "PagedCache: max_len must be at least 1, got 0",
        ),
        (lambda c, r: make_cache(cache_scale=torch.ones(3)), ValueError, r"cache_scale must be \[2\], one for each"),
        (lambda c, r: RowCache(1, 0, 8, 8), mla_ops.InvalidInputError, "RowCache: page_size must be at least 1, got 0"),
        (lambda c, r: c.extend({r: 11}), mla_ops.InvalidInputError, r"must be 0 to 10 \(it has 4 of max_len=14 tokens"),
        (lambda c, r: c.extend({3: 1}), mla_ops.InvalidInputError, r"request must be one of \[0\], got 3"),
        (lambda c, r: c.free(2), mla_ops.InvalidInputError, r"request must be one of \[0\], got 2"),
        (lambda c, r: c.fork(2), mla_ops.InvalidInputError, r"request must be one of \[0\], got 2"),
        (lambda c, r: c.new_rows(3), mla_ops.InvalidInputError, r"width must be at least 4, .* got 3"),
        (lambda c, r: c.extend({r: 6}), mla_ops.OutOfPagesError, r"2 pages are needed and 1 of 3 are free; free a req"),
        (lambda c, r: [c.add() for _ in range(4)], MemoryError, r"no row of the batch is left, max_requests is 4"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Callable[[PagedCache, int], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(*filled(num_pages=3))


@pytest.mark.gpu
def test_a_captured_step_replays_after_any_change_of_requests() -> None:
    cache = make_cache("cuda")
    texts = Texts(cache)
    q = torch.randn(4, 1, 3, D_TOTAL, device="cuda").bfloat16()
    everything = torch.arange(14, dtype=torch.int32, device="cuda").expand(4, 1, 1, -1)
    tokens = torch.full((4, 1), -9, device="cuda")

    def step() -> list[torch.Tensor]:
        write(cache, tokens)
        return list(
            cache.pool(1).attend(
                q, everything, softmax_scale=SCALE, block_table=cache.block_table, seq_lens=cache.seq_lens
            )
        )

    def extend(*requests: int) -> None:
        cache.extend(dict.fromkeys(requests, 1))
        tokens.fill_(-9)
        for request in requests:
            tokens[request] = texts.next_token
            texts.tokens[request].append(texts.next_token)
            texts.next_token += 1

    a = texts.add()
    texts.extend({a: 5})
    extend(a)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
        with pytest.raises(mla_ops.InvalidInputError, match="outside of a CUDA-graph capture"):
            cache.extend({a: 1})

    def replay() -> None:
        for result in results:
            result.fill_(torch.nan)
        torch.cuda.set_sync_debug_mode("error")
        graph.replay()
        torch.cuda.set_sync_debug_mode("default")
        texts.check()
        got = [result.clone() for result in results]
        for actual, expected in zip(got, step(), strict=True):  # writes the same rows once more
            assert torch.equal(actual, expected)
        assert all(bool((got[1][r] == -torch.inf).all()) == (r not in texts.tokens) for r in range(4))

    extend(a)
    replay()
    b = texts.fork(a)
    extend(a, b)
    replay()
    c = texts.add()
    texts.extend({c: 4})
    extend(b, c)
    replay()
    texts.free(a)
    extend(b, c)
    replay()


@pytest.mark.gpu
def test_reduce_overhead_captures_a_step_because_pools_are_buffers(fresh_dynamo: None) -> None:
    from torch._dynamo.utils import counters

    cache = make_cache("cuda")
    texts = Texts(cache)
    q = torch.randn(4, 1, 3, D_TOTAL, device="cuda").bfloat16()
    everything = torch.arange(14, dtype=torch.int32, device="cuda").expand(4, 1, 1, -1)

    def step(cache: PagedCache, tokens: torch.Tensor) -> torch.Tensor:
        write(cache, tokens)
        tables = {"block_table": cache.block_table, "seq_lens": cache.seq_lens}
        return cache.pool(1).attend(q, everything, softmax_scale=SCALE, **tables).out

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    a, b = texts.add(), texts.add()
    texts.extend({a: 2, b: 4})
    for _ in range(6):
        cache.extend({a: 1, b: 1})
        tokens = torch.full((4, 1), -9, device="cuda")
        for request in (a, b):
            tokens[request] = texts.next_token
            texts.tokens[request].append(texts.next_token)
            texts.next_token += 1
        out = compiled(cache, tokens).clone()
        texts.check()
        assert torch.equal(out, step(cache, tokens))
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == 1

"""A cache of many requests: pages by reference count on the host, tables and lengths at fixed addresses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from mla_ops.errors import InvalidInputError, OutOfPagesError
from mla_ops.serving.index_keys import IndexKeys
from mla_ops.serving.row_cache import RowCache


class PagedCache(nn.Module):
    """The latent rows and index keys of every layer, for requests that come, grow, fork and go.

    Each layer has a pool (`pool(layer)`), and one that selects has index keys (`index_keys(layer)`). All pools have the
    same pages, so one table serves every layer. A request is a number, its row in the batch. A step is: `extend` on the
    host, then the model, which writes and reads through `block_table`, `seq_lens`, `new_positions` and `new_rows`.
    Those have fixed shapes and addresses and are read on the device only, so a captured model step replays after any
    `extend`, `add`, `fork` or `free`. A row of the batch without a request has length 0, table entries of -1 and no new
    position: it writes nothing, selects nothing and gets zeros.

    Args:
        layers: layers of the model.
        num_pages: pages of each pool.
        page_size: tokens of a page.
        d_total: width of a latent row.
        d_v: leading channels of it that are the value.
        row_format: how rows are stored; see `RowCache`.
        max_requests: requests at a time, the batch of a step.
        max_len: tokens of a request at most.
        index_head_dim: width of an index key, 0 for a model that selects without an indexer.
        index_layers: layers with an indexer of their own; None for all.
        index_dtype: of index keys, also `torch.float8_e4m3fn`.
        cache_scale: `[layers]` fp32, for a format with one scale for a whole pool ("fp8_cache").
        dtype: of the rows and queries that come.
        device: where everything lies.

    Raises:
        InvalidInputError: a size cannot be.
    """

    block_table: torch.Tensor  # [max_requests, ceil(max_len / page_size)] int32; -1: no page
    lens: torch.Tensor  # [2, max_requests] int32: tokens with the last step's and without

    def __init__(
        self,
        *,
        layers: int,
        num_pages: int,
        page_size: int,
        d_total: int,
        d_v: int,
        row_format: str = "fp8",
        max_requests: int,
        max_len: int,
        index_head_dim: int = 0,
        index_layers: Iterable[int] | None = None,
        index_dtype: torch.dtype = torch.bfloat16,
        cache_scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"layers": layers, "max_requests": max_requests, "max_len": max_len}
        bad = [f"{name} must be at least 1, got {size}" for name, size in sizes.items() if size < 1]
        if cache_scale is not None and list(cache_scale.shape) != [layers]:
            bad.append(f"cache_scale must be [{layers}], one for each layer, got shape {list(cache_scale.shape)}")
        if bad:
            raise InvalidInputError(f"PagedCache: {'; '.join(bad)}")
        self.num_pages, self.page_size, self.max_len = num_pages, page_size, max_len
        scales: Sequence[torch.Tensor | None] = (
            [None] * layers if cache_scale is None else cache_scale.to(device).split(1)
        )
        self.pools = nn.ModuleList(
            RowCache(num_pages, page_size, d_total, d_v, row_format, cache_scale=scale, dtype=dtype, device=device)
            for scale in scales
        )
        selecting = range(layers) if index_layers is None else index_layers
        self.keys_of_layer = nn.ModuleDict(
            {
                str(layer): IndexKeys(max_requests, max_len, index_head_dim, dtype=index_dtype, device=device)
                for layer in (selecting if index_head_dim else ())
            }
        )
        lens = torch.zeros(2, max_requests, dtype=torch.int32, device=device)
        self.register_buffer("lens", lens, persistent=False)
        # What the host knows. On the device stand copies of the table and of both lists of tokens.
        self._table = torch.full((max_requests, -(-max_len // page_size)), -1, dtype=torch.int32)
        self.register_buffer("block_table", self._table.to(device, copy=True), persistent=False)
        self._pages: dict[int, list[int]] = {}  # of each request, in the order of its tokens
        self._tokens = [0] * max_requests
        self._tokens_before = [0] * max_requests
        self._holders = [0] * num_pages  # requests that hold a page
        self._free = list(range(num_pages))[::-1]  # the next one is the last
        self._widest = 0  # tokens that the last step gives one request

    def extra_repr(self) -> str:
        """Return how full the cache is."""
        return (
            f"requests={len(self._pages)} of {len(self._table)}, free_pages={self.free_pages} of {self.num_pages}, "
            f"bytes_per_token={self.bytes_per_token}"
        )

    # What the host asks

    @property
    def requests(self) -> tuple[int, ...]:
        """The requests there are."""
        return tuple(self._pages)

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token in all layers, index keys included."""
        pools = sum(self.pool(layer).bytes_per_token for layer in range(len(self.pools)))
        return pools + sum(self.index_keys(int(layer)).bytes_per_token for layer in self.keys_of_layer)

    def tokens(self, request: int) -> int:
        """Return how many tokens a request has."""
        self._require(request)
        return self._tokens[request]

    def pool(self, layer: int) -> RowCache:
        """Return the pool of a layer."""
        pool = self.pools[layer]
        assert isinstance(pool, RowCache)
        return pool

    def index_keys(self, layer: int) -> IndexKeys:
        """Return the index keys of a layer that selects."""
        keys = self.keys_of_layer[str(layer)]
        assert isinstance(keys, IndexKeys)
        return keys

    # What changes the requests: on the host, between steps

    def add(self) -> int:
        """Take in a request without tokens and return its number.

        Raises:
            OutOfPagesError: every row of the batch has a request.
        """
        request = next((row for row in range(len(self._table)) if row not in self._pages), None)
        if request is None:
            raise OutOfPagesError(
                f"no row of the batch is left, max_requests is {len(self._table)}; free a request, or make a larger "
                "cache"
            )
        self._pages[request] = []
        return request

    def extend(self, counts: Mapping[int, int]) -> None:
        """Begin a step: give requests room for so many more tokens each. All of them, or none if pages run out.

        A page that requests share is copied before one of them writes into it. Host work and copies of a few kilobytes
        to the device; nothing is read from there.

        Args:
            counts: new tokens of each request; those that are not named get none in this step.

        Raises:
            InvalidInputError: a request is not there or would exceed `max_len`, or a CUDA graph is being captured.
            OutOfPagesError: there are not enough free pages; nothing was changed.
        """
        self._refuse_capture("extend")
        for request, count in counts.items():
            tokens = self.tokens(request)
            if not 0 <= count <= self.max_len - tokens:
                raise InvalidInputError(
                    f"counts of request {request} must be 0 to {self.max_len - tokens} (it has {tokens} of "
                    f"max_len={self.max_len} tokens), got {count}"
                )
        needed = self._pages_needed(counts)
        if needed > self.free_pages:
            raise OutOfPagesError(
                f"{needed} pages are needed and {self.free_pages} of {self.num_pages} are free; free a request, make a "
                "cache with more pages, or store rows in a smaller row_format"
            )
        self._tokens_before = list(self._tokens)
        for request, count in counts.items():
            self._grow(request, count)
        self._widest = max(counts.values(), default=0)
        self._send(with_table=needed > 0)

    def fork(self, request: int) -> int:
        """Take in a request that shares all pages of another one, and return its number.

        Full pages stay shared until they are freed; of the last one each keeps its own copy as soon as one of them
        writes into it.

        Raises:
            InvalidInputError: there is no such request, or a CUDA graph is being captured.
            OutOfPagesError: every row of the batch has a request.
        """
        self._refuse_capture("fork")
        self._require(request)
        twin = self.add()
        self._pages[twin] = list(self._pages[request])
        for page in self._pages[twin]:
            self._holders[page] += 1
        self._tokens[twin] = self._tokens_before[twin] = self._tokens[request]
        self._table[twin] = self._table[request]
        for layer in self.keys_of_layer:
            self.index_keys(int(layer)).copy(request, twin)
        self._send(with_table=True)
        return twin

    def free(self, request: int) -> None:
        """Let a request go; pages that nobody else holds are free again.

        Raises:
            InvalidInputError: there is no such request, or a CUDA graph is being captured.
        """
        self._refuse_capture("free")
        self._require(request)
        for page in self._pages.pop(request):
            self._release(page)
        self._tokens[request] = self._tokens_before[request] = 0
        self._table[request] = -1
        self._send(with_table=True)

    # What a step of the model reads: on the device

    @property
    def seq_lens(self) -> torch.Tensor:
        """`[max_requests]` int32: tokens of each request, those of this step included."""
        return self.lens[0]

    def new_positions(self, width: int) -> torch.Tensor:
        """Return where this step's tokens stand in their requests, `[max_requests, width]` int32; -1: no token.

        Args:
            width: tokens of a request at most. A captured step keeps its width: one for each is what decoding takes.

        Raises:
            InvalidInputError: the last `extend` gave a request more tokens than that.
        """
        if width < self._widest:
            raise InvalidInputError(
                f"width must be at least {self._widest}, which the last extend gave a request, got {width}"
            )
        positions = self.lens[1].unsqueeze(1) + torch.arange(width, dtype=torch.int32, device=self.lens.device)
        return positions.where(positions < self.lens[0].unsqueeze(1), -1)

    def new_rows(self, width: int) -> torch.Tensor:
        """Return the row numbers of this step's tokens, `[max_requests, width]` int64; -1: no token.

        Raises:
            InvalidInputError: as `new_positions`.
        """
        return self.pool(0).rows(self.block_table, self.new_positions(width))

    def _require(self, request: int) -> None:
        if request not in self._pages:
            raise InvalidInputError(f"request must be one of {list(self._pages)}, got {request!r}")

    def _refuse_capture(self, what: str) -> None:
        if self.lens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise InvalidInputError(
                f"{what} must run before a step, outside of a CUDA-graph capture, the current stream is capturing; "
                "a captured copy would replay today's tables"
            )

    def _pages_needed(self, counts: Mapping[int, int]) -> int:
        needed, holders = 0, dict[int, int]()
        for request, count in counts.items():
            pages, tokens = self._pages[request], self._tokens[request]
            needed += -(-(tokens + count) // self.page_size) - len(pages)
            if count and tokens % self.page_size:
                held = holders.setdefault(pages[-1], self._holders[pages[-1]])
                needed += held > 1
                holders[pages[-1]] -= 1
        return needed

    def _grow(self, request: int, count: int) -> None:
        pages, tokens = self._pages[request], self._tokens[request]
        if count and tokens % self.page_size and self._holders[pages[-1]] > 1:
            shared, pages[-1] = pages[-1], self._take()
            for layer in range(len(self.pools)):
                storage = self.pool(layer).storage
                storage[pages[-1]].copy_(storage[shared])
            self._release(shared)
            self._table[request, len(pages) - 1] = pages[-1]
        while len(pages) * self.page_size < tokens + count:
            pages.append(self._take())
            self._table[request, len(pages) - 1] = pages[-1]
        self._tokens[request] = tokens + count

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _send(self, *, with_table: bool) -> None:
        """Copy to the device what the host knows.

        From pageable memory, which the driver has read when the call returns: the host may run ahead of the device.
        """
        lens = torch.tensor([self._tokens, self._tokens_before], dtype=torch.int32)
        self.lens.copy_(lens, non_blocking=True)
        if with_table:
            self.block_table.copy_(self._table, non_blocking=True)

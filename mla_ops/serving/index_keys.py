"""The indexer's keys between calls: one run of them for each request, as `mla_ops.index_topk` reads them."""

from __future__ import annotations

import torch
from torch import nn

from mla_ops.errors import InvalidInputError


class IndexKeys(nn.Module):
    """The index keys of one layer, a run of `max_len` for each of `max_requests` requests.

    They are not paged: selection scores every key of a request, and keys that lie in a row need no gather before it. A
    key is narrow (256 bytes in bf16, 132 in e4m3 with its scale, at DeepSeek's width of 128), so what the unused end of
    a run costs is a fifth of what pages of latent rows of 656 bytes would lose.

    Args:
        max_requests: requests that have a place.
        max_len: tokens of a request.
        index_head_dim: width of an index key.
        dtype: of the keys; with `torch.float8_e4m3fn` each key has an fp32 scale.
        device: where they lie.
    """

    storage: torch.Tensor  # [max_requests, max_len + 1, 1, index_head_dim]
    scale_storage: torch.Tensor | None  # [max_requests, max_len + 1, 1], fp32

    def __init__(
        self,
        max_requests: int,
        max_len: int,
        index_head_dim: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.max_len = max_len
        # NOTE [A place for what is not kept]: one key more than a run holds, where keys without a position are written,
        # because a write that skips some of them would need a shape that depends on data.
        shape = (max_requests, max_len + 1, 1)
        self.register_buffer(
            "storage", torch.zeros(*shape, index_head_dim, dtype=dtype, device=device), persistent=False
        )
        has_scales = dtype == torch.float8_e4m3fn
        scales = torch.zeros(shape, dtype=torch.float32, device=device) if has_scales else None
        self.register_buffer("scale_storage", scales, persistent=False)

    @property
    def keys(self) -> torch.Tensor:
        """`[max_requests, max_len, 1, index_head_dim]`: the `k_idx` of `index_topk` and of `Indexer.select`."""
        return self.storage[:, : self.max_len]

    @property
    def scales(self) -> torch.Tensor | None:
        """`[max_requests, max_len, 1]` fp32, their `k_scale`; None unless keys are e4m3."""
        return None if self.scale_storage is None else self.scale_storage[:, : self.max_len]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's key and scale."""
        scale = 0 if self.scale_storage is None else self.scale_storage.itemsize
        return self.storage.shape[-1] * self.storage.itemsize + scale

    def append(self, k_idx: torch.Tensor, positions: torch.Tensor, k_scale: torch.Tensor | None = None) -> None:
        """Write the keys of tokens.

        Args:
            k_idx: `[max_requests, n, 1, index_head_dim]`, dtype of the cache.
            positions: `[max_requests, n]`, int32 or int64, of each token in its request; one outside `[0, max_len)`
                writes nothing.
            k_scale: `[max_requests, n, 1]` fp32, exactly with e4m3 keys: `append(keys, positions, scales)` takes what
                `to_e4m3` of `mla_ops.adapters.torch_layer` returns.

        Raises:
            InvalidInputError: a shape or dtype does not fit the cache.
        """
        requests, _, _, width = self.storage.shape
        wanted = [requests, positions.shape[-1], 1, width]
        if list(k_idx.shape) != wanted or positions.dim() != 2:
            raise InvalidInputError(
                f"k_idx must be {wanted}, one key for each of positions {list(positions.shape)}, got shape "
                f"{list(k_idx.shape)}"
            )
        if k_idx.dtype != self.storage.dtype:
            raise InvalidInputError(f"k_idx must have the dtype of the cache ({self.storage.dtype}), got {k_idx.dtype}")
        if (k_scale is None) != (self.scale_storage is None):
            got = "none" if k_scale is None else f"one of shape {list(k_scale.shape)}"
            raise InvalidInputError(f"k_scale must come exactly where keys are e4m3 ({self.storage.dtype}), got {got}")
        place = positions.where((positions >= 0) & (positions < self.max_len), self.max_len).long()
        row = torch.arange(requests, device=place.device).unsqueeze(1)
        storage, keys = self.storage, k_idx
        if k_scale is not None and self.scale_storage is not None:
            # As bytes: torch assigns no e4m3 numbers by index on every device.
            storage, keys = storage.view(torch.uint8), keys.view(torch.uint8)
            self.scale_storage[row, place] = k_scale
        storage[row, place] = keys

    def copy(self, source: int, target: int) -> None:
        """Give the request `target` the keys of the request `source`."""
        for storage in (self.storage, self.scale_storage):
            if storage is not None:
                storage[target].copy_(storage[source])

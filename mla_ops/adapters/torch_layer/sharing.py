"""Which layers own an indexer, and which attend to another layer's selection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from mla_ops.errors import MLAMetadataError


@dataclass(frozen=True, init=False)
class IndexSharing:
    """A schedule of selections: a layer without an indexer of its own reuses what the nearest owner below it selected.

    A kept indexer learns from all layers that it serves: add their `attn_mass` on the selected keys, and give the sum
    to `index_kl`. Layers that are split among pipeline stages have to send the selection along.

    Args:
        num_layers: layers of the model.
        owners: those with an indexer, in any order. Layer 0 is always one of them: nothing below it could serve it.

    Raises:
        MLAMetadataError: no layers, layer 0 owns no indexer, an owner is named twice or is no layer.
    """

    num_layers: int
    owners: tuple[int, ...]

    def __init__(self, num_layers: int, owners: Iterable[int]) -> None:
        owners = tuple(sorted(owners))
        bad = []
        if num_layers < 1:
            bad.append(f"num_layers must be at least 1, got {num_layers}")
        if outside := [layer for layer in owners if not 0 <= layer < num_layers]:
            bad.append(f"owners must be layers 0 to {num_layers - 1}, got {outside}")
        if len(set(owners)) < len(owners):
            bad.append(f"owners must be named once each, got {list(owners)}")
        if 0 not in owners:
            bad.append(f"layer 0 must own an indexer, because no layer below it could serve it; got {list(owners)}")
        if bad:
            raise MLAMetadataError(f"IndexSharing: {'; '.join(bad)}", bad=tuple(bad))
        object.__setattr__(self, "num_layers", num_layers)
        object.__setattr__(self, "owners", owners)

    @classmethod
    def periodic(cls, num_layers: int, *, every: int, first: int = 1) -> IndexSharing:
        """Let the `first` layers own an indexer each, and from the last of them on every `every`-th.

        GLM-5.2 is `periodic(78, every=4, first=3)`: layers 0, 1, 2, 6, 10 and so on to 74.
        """
        if every < 1 or first < 1:
            raise MLAMetadataError(
                f"IndexSharing: every and first must be at least 1, got every={every} and first={first}; layer 0 must "
                "own an indexer",
            )
        return cls(num_layers, {*range(min(first, num_layers)), *range(first - 1, num_layers, every)})

    def owner_of(self, layer: int) -> int:
        """Return the layer whose selection `layer` attends to: itself, or the nearest owner below it."""
        if not 0 <= layer < self.num_layers:
            raise MLAMetadataError(f"IndexSharing: layer must be 0 to {self.num_layers - 1}, got {layer}")
        return self.owners[bisect_right(self.owners, layer) - 1]

    def is_owner(self, layer: int) -> bool:
        """Return whether `layer` has an indexer of its own."""
        return self.owner_of(layer) == layer

    def served_by(self, owner: int) -> range:
        """Return the layers that attend to what `owner` selects, itself first."""
        if not self.is_owner(owner):
            raise MLAMetadataError(
                f"IndexSharing: layer {owner} owns no indexer, it is served by layer {self.owner_of(owner)}"
            )
        following = bisect_right(self.owners, owner)
        return range(owner, self.owners[following] if following < len(self.owners) else self.num_layers)

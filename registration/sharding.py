"""What the sharding rules of every operator share."""

from __future__ import annotations

import math
from typing import Any

# One acceptable sharding on one mesh dimension: placements of the results, placements of the arguments.
Sharding = tuple[list[Any], list[Any]]


def ranks_cutting(dim: int, *specs: Any) -> int:
    """Into how many pieces the mesh dimensions cut that shard `dim` of any of `specs`."""
    mesh = specs[0].mesh
    cutting = {i for spec in specs for i, placement in enumerate(spec.placements) if placement.is_shard(dim)}
    return math.prod(mesh.size(i) for i in cutting)

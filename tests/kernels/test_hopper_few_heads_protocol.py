"""The barriers of the forward for few heads, played through without a device: see `test_hopper_protocol.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from test_hopper_protocol import Copies, Machine, ProtocolError, Step, interleave_often, read, write


@dataclass(frozen=True)
class Work:
    """Tiles of every item, and how many tiles and queries shared memory holds."""

    items: tuple[int, ...]
    stages: int = 2
    q_buffers: int = 2

    def tiles(self) -> Iterator[tuple[int, int, int]]:
        """Yield (item, tile of the item, number of the tile)."""
        numbered = ((item, tile) for item, num_tiles in enumerate(self.items) for tile in range(num_tiles))
        yield from ((item, tile, count) for count, (item, tile) in enumerate(numbered))


def wait_for_queries(m: Machine, work: Work, item: int) -> Step:
    return m.wait(item // work.q_buffers & 1 ^ 1, "q_free", item % work.q_buffers)


def copy_queries(work: Work, copies: Copies, item: int) -> Iterator[Step]:
    yield copies.start(item, "q", item % work.q_buffers)
    copies.commit()


def gather(m: Machine, work: Work) -> Iterator[Step]:
    copies = Copies(m)
    count = 0
    for item, tile, count in work.tiles():
        stage = count % work.stages
        yield m.wait(count // work.stages & 1 ^ 1, "free", stage)
        yield copies.start(count, "k", stage)
        copies.commit()
        yield from write(m, count, "valid", stage)
        yield from copies.publish(1, count > 0, "full", (count - 1) % work.stages)
        if tile == 0:
            yield wait_for_queries(m, work, item)
            yield from copy_queries(work, copies, item)
    yield from copies.publish(0, True, "full", count % work.stages)


def convert(m: Machine, work: Work, parity: int) -> Iterator[Step]:
    copies = Copies(m)
    for item, tile, count in work.tiles():
        if tile == 0 and parity == 0:
            yield wait_for_queries(m, work, item)
            yield from copy_queries(work, copies, item)
            yield from copies.publish(0, True, "q_full", item % work.q_buffers)
        if count % 2 != parity:
            continue
        stage = count % work.stages
        yield m.wait(count // work.stages & 1 ^ 1, "free", stage)
        for buffer in ("k", "valid"):
            yield from write(m, count, buffer, stage)
        yield from copies.publish(0, True, "full", stage)


def attend(m: Machine, work: Work, *, has_q_full: bool) -> Iterator[Step]:
    for item, tile, count in work.tiles():
        stage, q_buffer = count % work.stages, item % work.q_buffers
        if tile == 0 and has_q_full:
            yield m.wait(item // work.q_buffers & 1, "q_full", q_buffer)
        yield m.wait(count // work.stages & 1, "full", stage)
        held = {("k", stage): count, ("valid", stage): count, ("q", q_buffer): item}
        for buffer, value in held.items():
            yield m.begin_read(value, *buffer)
        for buffer in held:
            yield m.end_read(*buffer)
        yield m.arrive("free", stage)
        if tile + 1 == work.items[item]:
            yield from write(m, ("out", item), "q", q_buffer)
            yield from read(m, ("out", item), "q", q_buffer)
            yield m.arrive("q_free", q_buffer)


def copying(m: Machine, work: Work) -> list[Iterator[Step]]:
    return [gather(m, work), attend(m, work, has_q_full=False)]


def converting(m: Machine, work: Work) -> list[Iterator[Step]]:
    # A group without a tile has nothing to do.
    groups = [convert(m, work, parity) for parity in range(min(2, sum(work.items)))]
    return [*groups, attend(m, work, has_q_full=True)]


Roles = Callable[[Machine, Work], list[Iterator[Step]]]
either = pytest.mark.parametrize("roles", [copying, converting])


@either
@pytest.mark.parametrize(("stages", "q_buffers"), [(2, 1), (2, 2), (3, 2), (4, 2)])
@pytest.mark.parametrize("items", [(1,), (1, 1, 1, 1, 1), (3,), (2, 1, 4, 1, 1, 3)], ids=str)
def test_no_role_meets_a_buffer_that_is_not_its_own_and_all_of_them_end(
    items: tuple[int, ...], stages: int, q_buffers: int, roles: Roles
) -> None:
    interleave_often(roles, Work(items, stages, q_buffers))


@pytest.mark.parametrize(
    ("roles", "barrier"),
    [
        *((copying, barrier) for barrier in ("full", "free", "q_free")),
        *((converting, barrier) for barrier in ("full", "free", "q_full", "q_free")),
    ],
)
def test_every_barrier_is_needed(barrier: str, roles: Roles) -> None:
    with pytest.raises(ProtocolError):
        interleave_often(roles, Work((2, 1, 3, 1, 2)), skipped=barrier)


@pytest.mark.parametrize(("roles", "barrier"), [(copying, "full"), (converting, "q_full")])
def test_no_wait_for_copies_may_end_fewer_groups(barrier: str, roles: Roles) -> None:
    with pytest.raises(ProtocolError):
        interleave_often(roles, Work((2, 1, 3, 1, 2)), hasty=barrier)

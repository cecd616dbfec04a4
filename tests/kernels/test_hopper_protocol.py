"""The barrier protocols of `kernels/hopper_forward.py` and `hopper_backward.py`, emulated: roles at random paces.

The roles below wait, arrive and touch buffers in the order of the kernel's; a copy or a product that the hardware runs
on its own is a begin and an end. A buffer refuses a write while somebody reads or writes it, and a read of anything but
the tile that the reader means.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

Step = tuple[Callable[[], bool] | None, Callable[[], None]]  # (may it go on, what it does)
SIDES = (0, 1)
HALVES = (0, 1)


class ProtocolError(Exception):
    """A buffer was touched by two roles at a time, a stale tile was read, or no role could go on."""


@dataclass
class Machine:
    """Barriers that count arrivals, one a phase unless told otherwise, and buffers that know who touches them."""

    skipped: str = ""  # the name of a barrier that nobody waits for
    hasty: str = ""  # the name of a barrier whose wait for copies ends one group fewer
    arrivals_of_a_phase: dict[object, int] = field(default_factory=dict)  # by the name of the barrier
    arrivals: Counter[tuple[object, ...]] = field(default_factory=Counter)
    holds: dict[tuple[object, ...], object] = field(default_factory=dict)
    readers: Counter[tuple[object, ...]] = field(default_factory=Counter)
    writing: dict[tuple[object, ...], bool] = field(default_factory=lambda: defaultdict(bool))

    def wait(self, parity: int, *barrier: object) -> Step:
        # As mbarrier.try_wait.parity: true when the phase before the current one has this parity.
        count = self.arrivals_of_a_phase.get(barrier[0], 1)
        may_go_on = None if barrier[0] == self.skipped else lambda: self.arrivals[barrier] // count % 2 != parity
        return may_go_on, lambda: None

    def arrive(self, *barrier: object) -> Step:
        return None, lambda: self.arrivals.update([barrier])

    def begin_write(self, *buffer: object) -> Step:
        def step() -> None:
            if self.writing[buffer] or self.readers[buffer]:
                raise ProtocolError(f"{buffer} is written while in use")
            self.writing[buffer] = True

        return None, step

    def end_write(self, value: object, *buffer: object) -> Step:
        def step() -> None:
            self.writing[buffer], self.holds[buffer] = False, value

        return None, step

    def begin_read(self, value: object, *buffer: object) -> Step:
        def step() -> None:
            if self.writing[buffer] or self.holds.get(buffer) != value:
                raise ProtocolError(f"{buffer} is read for {value}, holds {self.holds.get(buffer)}")
            self.readers[buffer] += 1

        return None, step

    def end_read(self, *buffer: object) -> Step:
        return None, lambda: self.readers.subtract([buffer])


def write(machine: Machine, value: object, *buffer: object) -> Iterator[Step]:
    yield machine.begin_write(*buffer)
    yield machine.end_write(value, *buffer)


def read(machine: Machine, value: object, *buffer: object) -> Iterator[Step]:
    yield machine.begin_read(value, *buffer)
    yield machine.end_read(*buffer)


@dataclass(frozen=True)
class Forward:
    """Pairs of tiles of every item, and how many pairs shared memory holds."""

    items: list[int]
    pairs: int = 1

    def parity(self, pair: int) -> int:
        return pair // self.pairs & 1

    def stages(self, pair: int) -> tuple[int, int]:
        first = pair % self.pairs * 2
        return first, first + 1


@dataclass
class Copies:
    """Asynchronous copies in groups: a wait ends those of all groups but the last ones."""

    machine: Machine
    groups: list[list[tuple[object, ...]]] = field(default_factory=lambda: [[]])

    def start(self, value: object, *buffer: object) -> Step:
        self.groups[-1].append((value, *buffer))
        return self.machine.begin_write(*buffer)

    def commit(self) -> None:
        self.groups.append([])

    def publish(self, later: int, arrives: bool, *barrier: object) -> Iterator[Step]:
        later += barrier[0] == self.machine.hasty
        for group in self.groups[: -1 - later]:
            while group:
                yield self.machine.end_write(*group.pop(0))
        if arrives:
            yield self.machine.arrive(*barrier)


def copy_queries(m: Machine, copies: Copies, item: int) -> Iterator[Step]:
    yield copies.start(item, "q", 0)
    copies.commit()
    yield copies.start(item, "q", 1)
    copies.commit()


def gather(m: Machine, work: Forward) -> Iterator[Step]:
    copies = Copies(m)
    yield from copy_queries(m, copies, 0)
    pair = 0
    for item, num_pairs in enumerate(work.items):
        for i in range(num_pairs):
            stages = work.stages(pair)
            for s, stage in enumerate(stages):
                tile = ("rows", 2 * pair + s)
                for half in HALVES:
                    for side in SIDES:
                        yield m.wait(work.parity(pair) ^ 1, "free", stage, half, side)
                        yield copies.start(tile, "k", side, stage, half)
                        if (half, side) == (1, 0):
                            copies.commit()
                yield copies.start(tile, "tail", stage)
                copies.commit()
                yield from write(m, tile, "valid", stage)
                if work.pairs > 1 and s == 0:
                    before = work.stages(pair - 1)[1]
                    yield from copies.publish(3, pair > 0, "left_full", before)
                    yield from copies.publish(2, pair > 0, "rest_full", before)
                if s == 0 and i == 0 and item > 0:
                    yield m.wait((item & 1) ^ 1, "q_free")
                    yield from copy_queries(m, copies, item)
                elif s == 0:
                    copies.commit()
                    copies.commit()
                if work.pairs == 1:
                    yield from copies.publish(3 if s == 0 else 1, True, "left_full", stage)
                    yield from copies.publish(2 if s == 0 else 0, True, "rest_full", stage)
                    if s == 0:
                        yield from copies.publish(1, i == 0, "q_left_full")
                        yield from copies.publish(0, i == 0, "q_rest_full")
                elif s == 1:
                    yield from copies.publish(5, True, "left_full", stages[0])
                    yield from copies.publish(4, True, "rest_full", stages[0])
                    yield from copies.publish(3, i == 0, "q_left_full")
                    yield from copies.publish(2, i == 0, "q_rest_full")
            pair += 1
    if work.pairs > 1:
        last = work.stages(pair - 1)[1]
        yield from copies.publish(1, True, "left_full", last)
        yield from copies.publish(0, True, "rest_full", last)


def converting_gather(m: Machine, work: Forward) -> Iterator[Step]:
    """The gather of rows of e4m3: they arrive in the right side of their tile, and both sides are made of them."""
    copies = Copies(m)

    def ask(number: int) -> Iterator[Step]:
        pair = number // 2
        stage = work.stages(pair)[number % 2]
        for half in HALVES:
            for side in SIDES:
                yield m.wait(work.parity(pair) ^ 1, "free", stage, half, side)
        for half in HALVES:
            yield copies.start(("bytes", number), "k", 1, stage, half)
        yield copies.start(("rows", number), "tail", stage)
        copies.commit()

    yield from copy_queries(m, copies, 0)
    yield from ask(0)
    number = 0
    for item, num_pairs in enumerate(work.items):
        for i in range(num_pairs):
            for s, stage in enumerate(work.stages(number // 2)):
                if s == 0 and i == 0 and item > 0:
                    yield m.wait((item & 1) ^ 1, "q_free")
                    yield from copy_queries(m, copies, item)
                elif s == 0:
                    copies.commit()
                    copies.commit()
                yield from copies.publish(2 if s == 0 else 0, False, "bytes")
                for half in HALVES:
                    yield from read(m, ("bytes", number), "k", 1, stage, half)
                    yield from write(m, ("rows", number), "k", 0, stage, half)
                yield m.arrive("left_full", stage)
                yield from ask(number + 1)
                for half in HALVES:
                    yield from read(m, ("bytes", number), "k", 1, stage, half)
                    yield from write(m, ("rows", number), "k", 1, stage, half)
                yield from write(m, ("rows", number), "valid", stage)
                yield from copies.publish(1, True, "rest_full", stage)
                if s == 0 and i == 0:
                    yield m.arrive("q_left_full")
                    yield m.arrive("q_rest_full")
                number += 1
    yield from copies.publish(0, False, "bytes")


def scores(m: Machine, work: Forward) -> Iterator[Step]:
    pair = 0
    for item, num_pairs in enumerate(work.items):
        yield m.wait(item & 1, "q_left_full")
        for i in range(num_pairs):
            for s, stage in enumerate(work.stages(pair)):
                number = 2 * pair + s
                tile = ("rows", number)
                operands = [("k", side, stage, half) for side in SIDES for half in HALVES] + [("tail", stage)]
                yield m.wait(work.parity(pair), "left_full", stage)
                yield m.begin_read(item, "q", 0)
                for buffer in operands[:2]:
                    yield m.begin_read(tile, *buffer)
                yield m.wait(work.parity(pair), "rest_full", stage)
                if s == 0 and i == 0:
                    yield m.wait(item & 1, "q_rest_full")
                yield m.begin_read(item, "q", 1)
                for buffer in operands[2:]:
                    yield m.begin_read(tile, *buffer)
                yield from read(m, tile, "valid", stage)
                if s == 1:
                    yield m.arrive("turn", work.stages(pair)[0])
                elif i > 0:
                    yield m.arrive("turn", work.stages(pair - 1)[1])
                for buffer in [*operands, ("q", 0), ("q", 1)]:
                    yield m.end_read(*buffer)
                is_last = s == 1 and i + 1 == num_pairs
                if is_last:
                    yield m.arrive("q_free")
                yield from write(m, number, "alpha", stage)
                yield from write(m, ("weights", number), "tail", stage)
                yield m.arrive("weights", stage)
                if is_last:
                    yield m.arrive("turn", stage)
            pair += 1
        yield from write(m, item, "factor", item % work.pairs)
        yield m.arrive("factor_full", item % work.pairs)


def values(m: Machine, work: Forward, side: int, takes_turns: bool = True) -> Iterator[Step]:
    pair = 0
    for item, num_pairs in enumerate(work.items):
        for i in range(num_pairs):
            for s, stage in enumerate(work.stages(pair)):
                number = 2 * pair + s
                yield m.wait(work.parity(pair), "weights", stage)
                yield from read(m, number, "alpha", stage)
                for half in HALVES:
                    if half == 1 and takes_turns:
                        yield m.wait(work.parity(pair), "turn", stage)
                    yield m.begin_read(("weights", number), "tail", stage)
                    yield m.begin_read(("rows", number), "k", side, stage, half)
                    yield m.end_read("tail", stage)
                    yield m.end_read("k", side, stage, half)
                    if s == 0 or i + 1 < num_pairs:
                        yield m.arrive("free", stage, half, side)
            pair += 1
        yield m.wait(work.parity(item), "factor_full", item % work.pairs)
        yield from read(m, item, "factor", item % work.pairs)
        last = work.stages(pair - 1)[1]
        for half in HALVES:
            yield from write(m, ("out", item), "k", side, last, half)
        for half in HALVES:
            yield from read(m, ("out", item), "k", side, last, half)
        for half in HALVES:
            yield m.arrive("free", last, half, side)


def forward_roles(m: Machine, work: Forward) -> list[Iterator[Step]]:
    return [gather(m, work), scores(m, work), values(m, work, 0), values(m, work, 1)]


def converting_roles(m: Machine, work: Forward) -> list[Iterator[Step]]:
    return [converting_gather(m, work), scores(m, work), *(values(m, work, side, False) for side in SIDES)]


def backward_gather(m: Machine, num_tiles: int) -> Iterator[Step]:
    for t in range(num_tiles):
        yield m.wait((t & 1) ^ 1, "k_free")
        for side in SIDES:
            yield m.begin_write("k", side)
        yield from write(m, t, "positions", t & 1)
        for side in SIDES:
            yield m.end_write(t, "k", side)
        yield m.arrive("k_full")


def gradients(m: Machine, num_tiles: int, side: int) -> Iterator[Step]:
    def read_rows(t: int) -> Iterator[Step]:
        for part in SIDES:
            yield m.begin_read(t, "k", part)
        for part in SIDES:
            yield m.end_read("k", part)

    def read_weights(t: int) -> Iterator[Step]:
        for half in SIDES:
            yield m.begin_read(t, "weights", half)
        for half in SIDES:
            yield m.end_read("weights", half)

    if num_tiles > 0:
        yield m.wait(0, "k_full")
        yield from read_rows(0)  # S
    for t in range(num_tiles):
        yield from read_rows(t)  # dP
        yield from read(m, t, "positions", t & 1)
        yield m.wait((t & 1) ^ 1, "weights_free")
        yield from write(m, t, "weights", side)
        yield m.arrive("weights_full")
        yield m.wait(t & 1, "weights_full")
        yield m.begin_read(t, "k", side)  # dQ
        yield from read_weights(t)
        yield m.end_read("k", side)
        yield m.arrive("k_free")
        for _ in range(3):  # pieces of dKV
            yield from read_weights(t)
            yield from read(m, t, "positions", t & 1)
        yield m.arrive("weights_free")
        if t + 1 < num_tiles:
            yield m.wait((t & 1) ^ 1, "k_full")
            yield from read_rows(t + 1)  # S of the next tile
        yield from read(m, t, "positions", t & 1)
    yield from write(m, "dq", "k", side)
    yield from read(m, "dq", "k", side)


def backward_roles(m: Machine, num_tiles: int) -> list[Iterator[Step]]:
    m.arrivals_of_a_phase = {"k_free": 2, "weights_full": 2, "weights_free": 2}
    return [backward_gather(m, num_tiles), gradients(m, num_tiles, 0), gradients(m, num_tiles, 1)]


Roles = Callable[[Machine, Any], list[Iterator[Step]]]


def interleave_often(roles_of: Roles, work: Forward | int, **faults: Any) -> None:
    for seed in range(200):
        interleave(roles_of, work, seed, **faults)


def interleave(roles_of: Roles, work: Forward | int, seed: int, **faults: Any) -> None:
    """Run the roles in a random order until all have ended; some roles are much faster than others.

    Raises:
        ProtocolError: a role touched a buffer that was not its own yet, or none could go on.
    """
    choose = random.Random(seed)
    roles = roles_of(Machine(**faults), work)
    pending = {role: next(role) for role in roles}
    speed = {role: choose.choice([1, 4, 64]) for role in roles}
    while pending:
        ready = [role for role, (may_go_on, _) in pending.items() if may_go_on is None or may_go_on()]
        if not ready:
            raise ProtocolError("deadlock")
        (role,) = choose.choices(ready, [speed[role] for role in ready])
        pending.pop(role)[1]()
        following = next(role, None)
        if following is not None:
            pending[role] = following


FORWARDS = pytest.mark.parametrize("roles_of", [forward_roles, converting_roles], ids=["copied", "converted"])
GUARDS = ["left_full", "rest_full", "weights", "free", "q_left_full", "q_rest_full", "q_free", "factor_full"]


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("items", [[1], [1, 1, 1, 1, 1], [3], [2, 1, 4, 1, 1, 3]], ids=str)
def test_no_role_of_the_forward_meets_a_buffer_that_is_not_its_own_and_all_of_them_end(
    items: list[int], pairs: int
) -> None:
    interleave_often(forward_roles, Forward(items, pairs))


@pytest.mark.parametrize("pairs", [1, 2])
def test_the_converting_gather_meets_no_buffer_that_is_not_its_own(pairs: int) -> None:
    interleave_often(converting_roles, Forward([2, 1, 3], pairs))


@FORWARDS
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("barrier", GUARDS)
def test_every_barrier_of_the_forward_that_guards_a_buffer_is_needed(barrier: str, pairs: int, roles_of: Roles) -> None:
    if roles_of is converting_roles and barrier == "q_rest_full":
        pytest.skip("the converting gather announces the rest of the queries with the rest of their first tile")
    with pytest.raises(ProtocolError):
        interleave_often(roles_of, Forward([2, 1, 3], pairs), skipped=barrier)


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("barrier", ["left_full", "rest_full", "q_left_full", "q_rest_full"])
def test_no_wait_for_copies_may_end_fewer_groups(barrier: str, pairs: int) -> None:
    with pytest.raises(ProtocolError):
        interleave_often(forward_roles, Forward([2, 1, 3], pairs), hasty=barrier)


@pytest.mark.parametrize("pairs", [1, 2])
def test_turns_guard_nothing(pairs: int) -> None:
    interleave_often(forward_roles, Forward([2, 1, 3], pairs), skipped="turn")


@pytest.mark.parametrize("wait", ["bytes", "rest_full"])
def test_no_wait_of_the_converting_gather_may_end_fewer_groups(wait: str) -> None:
    with pytest.raises(ProtocolError):
        interleave_often(converting_roles, Forward([2, 1, 3]), hasty=wait)


def test_values_may_not_take_turns_where_rows_are_converted() -> None:
    def roles(m: Machine, work: Forward) -> list[Iterator[Step]]:
        return [converting_gather(m, work), scores(m, work), values(m, work, 0), values(m, work, 1)]

    with pytest.raises(ProtocolError, match="deadlock"):
        interleave_often(roles, Forward([2, 1, 3]))


@pytest.mark.parametrize("num_tiles", [1, 2, 3, 8])
def test_no_role_of_the_backward_meets_a_buffer_that_is_not_its_own_and_all_of_them_end(num_tiles: int) -> None:
    interleave_often(backward_roles, num_tiles)


@pytest.mark.parametrize("barrier", ["k_full", "k_free", "weights_full", "weights_free"])
def test_every_barrier_of_the_backward_is_needed(barrier: str) -> None:
    with pytest.raises(ProtocolError):
        interleave_often(backward_roles, 4, skipped=barrier)

"""Memory of a training step by itself: places that overlap nothing, and all of it given back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mnv2_fast.backends import cpu

PAGE = os.sysconf("SC_PAGE_SIZE")
Buffers = dict[int, tuple[Any, np.ndarray]]

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def buffers() -> Iterator[Any]:
    """The class. What other tests' tensors hold is not counted."""
    made = cpu.extension().TrainBuffer
    made.release()
    yield made
    made.release()


def take(buffers: Any, size: int, mark: int) -> tuple[Any, np.ndarray]:
    """A buffer and its bytes, all of which are `mark`."""
    buffer = buffers(size)
    values = np.frombuffer(buffer, np.uint8)
    assert len(values) == size
    values[:] = mark
    return buffer, values


def test_random_sizes_in_random_order(buffers: Any) -> None:
    """Each keeps what was written to it until it dies, whoever comes and goes beside it."""
    chance, live = random.Random(0), {}  # type: random.Random, Buffers
    used = buffers.used()
    for turn in range(3000):
        if live and chance.random() < 0.48:
            mark = chance.choice(list(live))
            assert (live.pop(mark)[1] == mark).all()
            continue
        mark = next(n for n in range(256) if n not in live) if len(live) < 256 else None
        if mark is not None:
            size = chance.choice((1, PAGE - 1, PAGE, PAGE + 1, chance.randrange(1, 1 << 20), 3 << 20))
            live[mark] = take(buffers, size, mark)
        if turn % 500 == 0:
            buffers.release()
    assert all((values == mark).all() for mark, (_, values) in live.items())
    held = sum(-(-len(values) // PAGE) * PAGE for _, values in live.values())
    assert buffers.used() == used + held
    live.clear()
    assert buffers.used() == used


def test_the_first_place_that_is_large_enough_is_taken_again(buffers: Any) -> None:
    places = [take(buffers, 10 * PAGE, n) for n in range(5)]
    at = [values.ctypes.data for _, values in places]
    assert at == list(range(at[0], at[0] + 50 * PAGE, 10 * PAGE))
    places[1] = places[2] = places[3] = (None, np.empty(0))  # three free pieces are one
    larger = take(buffers, 30 * PAGE, 9)
    assert larger[1].ctypes.data == at[1]
    assert (places[0][1] == 0).all()
    assert (places[4][1] == 4).all()


def test_given_back_memory_is_the_systems(buffers: Any) -> None:
    held, dead = take(buffers, 1 << 20, 1), take(buffers, 4 << 20, 2)
    del dead
    kept = buffers.kept()
    assert kept >= 4 << 20
    assert buffers.release() == kept
    assert buffers.kept() == 0
    assert (held[1] == 1).all()


def test_more_than_there_is(buffers: Any) -> None:
    used = buffers.used()
    for size in (1 << 60, (1 << 64) - 1):
        with pytest.raises(MemoryError):
            buffers(size)
    assert buffers.used() == used
    assert (take(buffers, PAGE, 7)[1] == 7).all()


def test_a_forked_child_has_its_own(buffers: Any) -> None:
    """It leaves alone what it shares with its parent, whose lock may have been held when it was born."""
    shared, freed = take(buffers, 1 << 20, 1), take(buffers, 1 << 20, 2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            del freed
            own = take(buffers, 3 << 20, 3)
            fine = (own[1] == 3).all() and (shared[1] == 1).all()
            del own
            status = 0 if fine and buffers.kept() == buffers.used() == buffers.release() == 0 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (shared[1] == 1).all()
    assert (freed[1] == 2).all()

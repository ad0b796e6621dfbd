"""How a call is timed: a turn of calls in a row, after some that do not count.

Engines' idle threads spin for a while and slow whoever runs next, so contenders never alternate call by call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CALLS = 20
WARM_CALLS = 5
WARM_MS = 40.0


@dataclass(frozen=True)
class Summary:
    """Median and 20% and 80% quantiles, in milliseconds a call."""

    median: float
    p20: float
    p80: float


def turn(
    call: Callable[[], object], calls: int = CALLS, warm_calls: int = WARM_CALLS, warm_ms: float = WARM_MS
) -> list[float]:
    """One turn: at least `warm_calls` calls and `warm_ms` ms that do not count, then `calls` that do.

    Returns:
        Milliseconds of each counted call.
    """
    clock = time.perf_counter_ns
    begin, warmed = clock(), 0
    while warmed < warm_calls or clock() - begin < warm_ms * 1e6:
        call()
        warmed += 1
    times = []
    for _ in range(calls):
        start = clock()
        call()
        times.append((clock() - start) / 1e6)
    return times


def summarize(times: Sequence[float]) -> Summary:
    """The summary of one contender's times over all its turns."""
    if len(times) < 2:
        raise ValueError(f"{len(times)} times make no quantiles")
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    return Summary(statistics.median(times), quantiles[0], quantiles[3])


def differ(a: float, b: float, tolerance: float = 0.10) -> bool:
    """Whether two medians differ by more than `tolerance` of the smaller."""
    return abs(a - b) > tolerance * min(a, b)

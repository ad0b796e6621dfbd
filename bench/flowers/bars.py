"""BARS: what we hold ourselves to in one run of bench.flowers, and the lines that say if we reached it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..bars import word
from ..results import Row
from ..training.contenders import OURS


@dataclass(frozen=True)
class Bar:
    """At least `top1` in the mean of so many `seeds`, averaged weights of the last epoch, each run in at most
    so many `seconds`."""

    top1: float
    seconds: float
    seeds: int


BAR = Bar(top1=0.91, seconds=300, seeds=3)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for the bar, and one for the ratios to torch in each arithmetic."""
    ours = [row for row in rows if row.contender == OURS]
    torchs = [row for row in rows if row.contender != OURS]
    if len(ours) < BAR.seeds:
        lines = [f"{OURS}: {len(ours)} of {BAR.seeds} seeds measured"]
    else:
        top1, slowest = mean(ours, "top1"), max(row.seconds or 0.0 for row in ours)
        lines = [
            f"{OURS}: top-1 {top1:.1%} in the mean of {len(ours)} seeds, asked {BAR.top1:.0%}: "
            f"{word(top1 >= BAR.top1)}; {slowest:.0f} s at most, asked {BAR.seconds:.0f}: "
            f"{word(slowest <= BAR.seconds)}"
        ]
    for dtype in sorted({row.dtype for row in torchs}):
        theirs = [row for row in torchs if row.dtype == dtype]
        same = {row.seed for row in theirs}
        mine = [row for row in ours if row.seed in same]
        if len(mine) == len(theirs):  # the last seed may have been cut off
            ratio = mean(theirs, "seconds") / mean(mine, "seconds")
            points = 100 * (mean(mine, "top1") - mean(theirs, "top1"))
            lines.append(
                f"{OURS} in {mine[0].dtype} {ratio:.2f}x {theirs[0].contender} in {dtype} in wall time, "
                f"top-1 {points:+.1f} points"
            )
    return lines


def mean(rows: Sequence[Row], name: str) -> float:
    """Of a column of some rows."""
    return statistics.fmean(getattr(row, name) for row in rows)

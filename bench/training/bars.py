"""BARS: what we hold ourselves to in one run of bench.training, and the lines that say if we reached it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bars import NOMINAL_GMACS, word
from ..results import Row
from .contenders import BATCH, CLASSIC, OURS, SIZE, STEP, THREADS


@dataclass(frozen=True)
class Bar:
    """At least `ratio` times as fast as torch's best of that precision; at least so many images a second, and
    at most this share of the memory of whoever of torch's needs least.
    """

    setting: str
    dtype: str
    ratio: float
    images_per_s: float | None = None
    memory: float | None = None


BARS = (
    Bar(STEP, "fp32", 2.2, images_per_s=75, memory=0.5),
    Bar(STEP, "bf16", 2.8, images_per_s=110, memory=0.5),
    Bar(CLASSIC, "fp32", 5.0),
)


def rivals(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Ours and torch's fastest of one setting in one precision."""
    torchs = [row for row in rows if row.contender != OURS]
    ours = next((row for row in rows if row.contender == OURS), None)
    return ours, min(torchs, key=lambda row: row.ms, default=None)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One line for each bar."""
    return [_verdict(bar, rows) for bar in BARS]


def _verdict(bar: Bar, rows: Sequence[Row]) -> str:
    where = f"{bar.setting}, {bar.dtype}, batch {BATCH}, {SIZE}x{SIZE}, {THREADS} threads"
    asked = (bar.setting, bar.dtype, BATCH, str(SIZE), THREADS)
    found = [row for row in rows if (row.name, row.dtype, row.batch, row.size, row.threads) == asked]
    ours, best = rivals(found)
    if ours is None or best is None:
        return f"{where}: {OURS} against torch: not measured"
    ratio = best.ms / ours.ms
    line = f"{where}: {ratio:.2f}x {best.contender}, asked {bar.ratio:.1f}x: {word(ratio >= bar.ratio)}"
    if bar.images_per_s is not None:
        line += f"; {_rate(bar.images_per_s, ours)}"
    if bar.memory is not None:
        line += f"; {_memory(bar.memory, ours, [row for row in found if row is not ours])}"
    return line


def _rate(asked: float, ours: Row) -> str:
    rate = ours.images_per_s or 0.0
    said = f"{rate:.1f} images/s, asked {asked:.0f}: {word(rate >= asked)}"
    if ours.gmacs_peak:
        # The figure is that of a core of so many GMAC/s; a step waits for memory, too.
        core = ours.gmacs_peak / ours.threads
        least = asked * core / NOMINAL_GMACS
        said += f" (at {core:.1f} GMAC/s a core, not {NOMINAL_GMACS}, {least:.0f}: {word(rate >= least)})"
    return said


def _memory(asked: float, ours: Row, torchs: Sequence[Row]) -> str:
    known = [row for row in torchs if row.peak_mb]
    if not known or not ours.peak_mb:
        return "memory not measured"
    least = min(known, key=lambda row: row.peak_mb or 0.0)
    share = ours.peak_mb / (least.peak_mb or 0.0)
    return f"{share:.2f} of the memory of {least.contender}, asked {asked}: {word(share <= asked)}"

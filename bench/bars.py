"""BARS: what we hold ourselves to in one run of bench.peers, and the lines that say whether we reached it.

A peer of a finer precision counts too: who wants bf16's speed may as well run a peer in fp32 where that is
faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .contenders import AUTOMATIC, COMPILE_AVX2, CONTENDERS, ENGINE, ENGINE_AVX2, OPENVINO_AVX2
from .results import Row

# Absolute figures were set on a core of this many GMAC/s in fp32; they are scaled by what a run measures.
NOMINAL_GMACS = 58.8
FINER = {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "int8": ("int8", "bf16", "fp32")}
PEERS = tuple(dict.fromkeys(row.name for row in CONTENDERS if not row.ours))


@dataclass(frozen=True)
class Bar:
    """At least `ratio` times as fast as the best of `against`; `ms` at most, or `images_per_s` at least."""

    dtype: str
    batch: int
    cores: int
    ratio: float
    ms: float | None = None
    images_per_s: float | None = None
    ours: str = ENGINE
    against: tuple[str, ...] = PEERS


@dataclass(frozen=True)
class AnswersBar:
    """At least this share of photos with the float network's first class, and above every peer if asked."""

    dtype: str
    agreement: float
    above_peers: bool = False


BARS = (
    Bar("fp32", 1, 1, 1.30, ms=5.9),
    Bar("fp32", 1, 2, 1.18),
    Bar("fp32", 16, 2, 1.30, images_per_s=335),
    Bar("bf16", 1, 1, 1.35, ms=3.4),
    Bar("bf16", 1, 2, 1.25),
    Bar("bf16", 16, 2, 1.40, images_per_s=600),
    Bar("int8", 1, 1, 1.75, ms=2.1),
    Bar("int8", 1, 2, 1.55),
    Bar("int8", 16, 2, 1.80, images_per_s=1000),
    Bar("fp32", 1, 1, 1.10, ours=ENGINE_AVX2, against=(COMPILE_AVX2,)),
    Bar("fp32", 1, 1, 1.00, ours=ENGINE_AVX2, against=(OPENVINO_AVX2,)),
)
ANSWERS = (AnswersBar("fp32", 1.0), AnswersBar("bf16", 0.99), AnswersBar("int8", 0.97, above_peers=True))
SCALING = 1.85  # one core to two, fp32, batch 1


def best(
    rows: Sequence[Row], names: Iterable[str], dtypes: Iterable[str], batch: int, cores: int
) -> Row | None:
    """The fastest row of these contenders at a batch and a number of cores, whatever the form."""
    found = [
        row
        for row in rows
        if row.name == "network"
        and row.contender in names
        and row.dtype in dtypes
        and (row.batch, row.threads) == (batch, cores)
    ]
    return min(found, key=lambda row: row.ms) if found else None


def verdicts(rows: Sequence[Row]) -> list[str]:
    """One line for each bar, and one for what the automatic path costs over the engine."""
    lines = [_speed(bar, rows) for bar in BARS]
    lines += [_answers(bar, rows) for bar in ANSWERS]
    one, two, automatic = (
        best(rows, (name,), ("fp32",), 1, cores) for name, cores in ((ENGINE, 1), (ENGINE, 2), (AUTOMATIC, 1))
    )
    if one and two:
        ratio = one.ms / two.ms
        lines.append(
            f"fp32, batch 1, one core to two: {ratio:.2f}x, asked {SCALING}x: {word(ratio >= SCALING)}"
        )
    if one and automatic:
        lines.append(f"the automatic path costs {(automatic.ms - one.ms) * 1e3:.0f} us over the engine")
    return lines


def _speed(bar: Bar, rows: Sequence[Row]) -> str:
    where = f"{bar.dtype}, batch {bar.batch}, {bar.cores} core(s)"
    ours = best(rows, (bar.ours,), (bar.dtype,), bar.batch, bar.cores)
    peer = best(rows, bar.against, FINER[bar.dtype], bar.batch, bar.cores)
    if ours is None or peer is None:
        who = bar.against[0] if len(bar.against) == 1 else "the best peer"
        return f"{where}: {bar.ours} against {who}: not measured"
    ratio = peer.ms / ours.ms
    line = (
        f"{where}: {bar.ours} ({ours.form}) {ratio:.2f}x {peer.contender} ({peer.dtype}, {peer.form}), "
        f"asked {bar.ratio:.2f}x: {word(ratio >= bar.ratio)}"
    )
    scale = (ours.gmacs_peak or NOMINAL_GMACS * bar.cores) / (NOMINAL_GMACS * bar.cores)
    if bar.ms is not None:
        limit = bar.ms / scale
        line += (
            f"; {ours.ms:.2f} ms, asked {limit:.2f} ({bar.ms} at {NOMINAL_GMACS} GMAC/s a core): "
            f"{word(ours.ms <= limit)}"
        )
    if bar.images_per_s is not None:
        least, rate = bar.images_per_s * scale, ours.images_per_s or 0.0
        line += (
            f"; {rate:.0f} images/s, asked {least:.0f} "
            f"({bar.images_per_s:.0f} at {NOMINAL_GMACS} GMAC/s a core): {word(rate >= least)}"
        )
    return line


def _answers(bar: AnswersBar, rows: Sequence[Row]) -> str:
    where = f"{bar.dtype}, first class of the float network"
    found = {
        row.contender: row.agreement
        for row in rows
        if row.name == "answers" and row.dtype == bar.dtype and row.agreement is not None
    }
    if ENGINE not in found:
        return f"{where}: {ENGINE}: not measured"
    ours = found[ENGINE]
    line = f"{where}: {ours:.1%}, asked {bar.agreement:.0%}: {word(ours >= bar.agreement)}"
    peers = {name: share for name, share in found.items() if name in PEERS}
    if bar.above_peers and peers:
        name = max(peers, key=peers.__getitem__)
        line += f"; above {name} with {peers[name]:.1%}: {word(ours > peers[name])}"
    return line


def word(reached: bool) -> str:
    """What is printed of a bar."""
    return "reached" if reached else "MISSED"

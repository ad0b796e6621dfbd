"""Table of fine-tuning, from the last run of bench.flowers; `bench.plot` writes it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..training.contenders import OURS
from .contenders import CONTENDERS
from .run import DEFAULTS

CsvRow = dict[str, str]


def table(rows: Sequence[CsvRow]) -> str:
    """Everyone's accuracy and time, as Markdown."""
    heads = ("top-1", "of each seed", "of its best epoch", "wall time, s", "at most, s", "images/s")
    lines = [f"| | | {' | '.join(heads)} |", "|---|---|---:|---|---:|---:|---:|---:|"]
    times = {}
    for who in CONTENDERS:
        mine = [row for row in rows if row["contender"] == who.name]
        if not mine:
            continue
        times[who.name] = _mean(mine, "seconds")
        cells = [
            f"{_mean(mine, 'top1'):.1%}",
            ", ".join(f"{float(row['top1']):.1%}" for row in mine),
            f"{_mean(mine, 'best_top1'):.1%}",
            f"{times[who.name]:.0f}",
            f"{max(float(row['seconds']) for row in mine):.0f}",
            f"{_mean(mine, 'images_per_s'):.1f}",
        ]
        lines.append(f"| {mine[0]['dtype']} | {who.name} | {' | '.join(cells)} |")
    first = rows[0]
    photos, _, options = first["note"].partition("; ")
    how = f"{DEFAULTS} of `mnv2 finetune`" if options == DEFAULTS else f"`mnv2 finetune {options}`"
    lines += [
        "",
        f"Fine-tuning from {first['weights']} on {photos}: {how}, {first['epochs']} epochs, the same recipe, "
        "photos and order for both. Top-1: averaged weights of the last epoch, means of the seeds. Wall time "
        f"of the whole command, on {first['threads']} cores of {first['processor']}; {first['versions']}; "
        f"commit {first['commit']}, {first['run'][:10]}. Tuned: the allocator is told to keep its memory.",
    ]
    if len(times) == len(CONTENDERS):
        ((other, theirs),) = ((name, seconds) for name, seconds in times.items() if name != OURS)
        lines[-1] += f" {OURS} is {theirs / times[OURS]:.2f} times as fast as {other}."
    return "\n".join(lines)


def _mean(rows: Sequence[CsvRow], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)

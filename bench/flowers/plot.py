"""Table of fine-tuning, from the last run of bench.flowers; `bench.plot` writes it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..training.contenders import OURS
from .run import DEFAULTS

CsvRow = dict[str, str]


def table(rows: Sequence[CsvRow]) -> str:
    """Everyone's accuracy and time, as Markdown."""
    heads = ("top-1", "of each seed", "of its best epoch", "wall time, s", "at most, s", "images/s")
    lines = [f"| | | {' | '.join(heads)} |", "|---|---|---:|---|---:|---:|---:|---:|"]
    times: dict[tuple[str, str], float] = {}
    everyone = {(row["contender"], row["dtype"]) for row in rows}
    for name, dtype in sorted(everyone, key=lambda who: (who[0] != OURS, who[1])):
        mine = [row for row in rows if (row["contender"], row["dtype"]) == (name, dtype)]
        times[name, dtype] = _mean(mine, "seconds")
        cells = [
            f"{_mean(mine, 'top1'):.1%}",
            ", ".join(f"{float(row['top1']):.1%}" for row in mine),
            f"{_mean(mine, 'best_top1'):.1%}",
            f"{times[name, dtype]:.0f}",
            f"{max(float(row['seconds']) for row in mine):.0f}",
            f"{_mean(mine, 'images_per_s'):.1f}",
        ]
        lines.append(f"| {dtype} | {name} | {' | '.join(cells)} |")
    first = rows[0]
    photos, _, options = first["note"].partition("; ")
    how = f"{DEFAULTS} of `mnv2 finetune`" if options == DEFAULTS else f"`mnv2 finetune {options}`"
    lines += [
        "",
        f"Fine-tuning from {first['weights']} on {photos}: {how}, {first['epochs']} epochs, the same recipe, "
        "photos and order for all. Top-1: averaged weights of the last epoch, means of the seeds. Wall time "
        f"of the whole command, on {first['threads']} cores of {first['processor']}; {first['versions']}; "
        f"commit {first['commit']}, {first['run'][:10]}. Tuned: the allocator is told to keep its memory.",
    ]
    ours = {dtype: seconds for (name, dtype), seconds in times.items() if name == OURS}
    theirs = {dtype: seconds for (name, dtype), seconds in times.items() if name != OURS}
    if ours and theirs:
        ((own, seconds),), best = ours.items(), min(theirs, key=lambda dtype: theirs[dtype])
        lines[-1] += (
            f" {OURS}, in {own} by its default on this processor, is {theirs[best] / seconds:.2f} times "
            f"as fast as torch's fastest, which is in {best}."
        )
    return "\n".join(lines)


def _mean(rows: Sequence[CsvRow], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)

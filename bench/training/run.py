"""`python -m bench.training`: one training step by everyone: speed and memory.

Contenders take turns, so that who disturbs the machine disturbs all alike. Each turn is a process of its own:
those whose allocator keeps its memory would together hold more than there is. The processes of a run share
the cache of torch.compile: what the first one compiles serves the others. `--losses` compares what is
learned, `--blocks` times single blocks. The CSV file is written as the rows come.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mnv2_fast import UserError

from .. import limits, results, timing
from ..contenders import environment
from ..workers import Worker, WorkerError
from . import blocks, losses
from .bars import rivals, verdicts
from .contenders import (
    BATCH,
    BEST,
    CONTENDERS,
    DTYPES,
    OURS,
    SETTINGS,
    SIZE,
    STEP,
    THREADS,
    Contender,
    Setting,
)

OUTPUT = results.FOLDER / "training.csv"
ROUNDS, STEPS, WARM_STEPS = 3, 5, 2


@dataclass(frozen=True)
class Turn:
    """One process: milliseconds of its first step and of each that counts; bytes; why our kernels did not
    serve it, empty where they did; the instruction set of our kernels."""

    first_ms: float
    ms: list[float]
    memory: float
    note: str
    isa: str


def take_turn(
    contender: Contender, dtype: str, setting: Setting, options: argparse.Namespace, folder: str
) -> Turn:
    """Start a contender, let it train, end it.

    Raises:
        WorkerError: it could not be started or died.
    """
    request = {
        "name": contender.name,
        "dtype": dtype,
        "setting": setting.name,
        "batch": setting.batch or options.batch,
        "size": options.size,
    }
    cores = limits.cores(options.threads)
    worker = Worker("training.loops", request, cores, environment(contender.env, folder))
    try:
        worker.ready()
        (first_ms,) = worker.turn(1, "step", warm_calls=0, warm_ms=0)
        worker.ask("restart")  # what torch.compile needs to compile is not a step's
        times = worker.turn(options.steps or STEPS, "step", warm_calls=WARM_STEPS, warm_ms=0)
        return Turn(first_ms, times, *(worker.ask(key) for key in ("memory", "why_not", "isa")))
    finally:
        worker.close()


def measure(
    chosen: Sequence[Contender], dtype: str, setting: Setting, options: argparse.Namespace, folder: str
) -> dict[Contender, list[Turn]]:
    """Everyone's turns; the order turns round. Who fails is named with the reason and has none."""
    turns: dict[Contender, list[Turn]] = {contender: [] for contender in chosen}
    for number in range(options.rounds):
        for contender in list(turns) if number % 2 == 0 else list(reversed(turns)):
            try:
                turns[contender].append(take_turn(contender, dtype, setting, options, folder))
            except WorkerError as error:
                print(f"left out: {setting.title}, {contender.name}, {dtype}: {error}", flush=True)
                del turns[contender]
    return turns


def row_of(
    contender: Contender,
    dtype: str,
    setting: Setting,
    turns: Sequence[Turn],
    *,
    options: argparse.Namespace,
    bounds: limits.Limits,
) -> results.Row:
    """What the turns of one contender come to. The first step is that of the first turn, which compiles."""
    summary = timing.summarize([ms for turn in turns for ms in turn.ms])
    medians = [statistics.median(turn.ms) for turn in turns]
    batch = setting.batch or options.batch
    return results.Row(
        bench="training",
        name=setting.name,
        contender=contender.name,
        dtype=dtype,
        isa=turns[0].isa,
        size=str(options.size),
        batch=batch,
        threads=options.threads,
        form="step",
        ms=summary.median,
        ms_p20=summary.p20,
        ms_p80=summary.p80,
        noisy=timing.differ(min(medians), max(medians)),
        images_per_s=1e3 * batch / summary.median,
        gmacs_peak=bounds.gmacs,
        gbs_copy=bounds.gbs,
        first_ms=turns[0].first_ms,
        peak_mb=statistics.median(turn.memory for turn in turns) / 1e6,
        weights="seeded",
        note=turns[0].note,
    )


def show(rows: Sequence[results.Row], title: str) -> None:
    """One setting's table in one precision, the fastest first."""
    first = rows[0]
    where = f"batch {first.batch}, {first.size}x{first.size}, {first.threads} thread(s)"
    print(f"\n{title}, {first.dtype}, {where}")
    print(f"{'':28} {'ms':>8} {'20%':>8} {'80%':>8}   {'img/s':>7} {'MB':>7} {'first, s':>9}")
    for one in sorted(rows, key=lambda row: row.ms):
        mark = "*" if one.noisy else " "
        first_s = (one.first_ms or 0.0) / 1e3
        print(
            f"{one.contender:28} {one.ms:8.1f} {one.ms_p20:8.1f} {one.ms_p80:8.1f} {mark} "
            f"{one.images_per_s:7.1f} {one.peak_mb:7.0f} {first_s:9.1f}  {one.note}".rstrip()
        )
    ours, best = rivals(rows)
    if ours and best:
        print(f"{ours.contender} {best.ms / ours.ms:.2f}x {best.contender}", flush=True)


def competitors(
    setting: Setting, dtype: str, chosen: Sequence[Contender], rows: Sequence[results.Row]
) -> list[Contender]:
    """Those of `chosen` who train a setting; `rows` are the run's so far and say which of torch's is best."""
    names = setting.contenders
    if not names:
        _, best = rivals([row for row in rows if (row.name, row.dtype) == (STEP, dtype)])
        names = (OURS, best.contender if best else BEST)
    return [contender for contender in chosen if contender.name in names]


def time_all(options: argparse.Namespace, folder: str) -> Iterator[list[results.Row]]:
    """The rows of each setting in each precision, printed."""
    bounds = limits.measure(options.threads)
    rows: list[results.Row] = []
    for setting in SETTINGS:
        for dtype in setting.dtypes:
            if setting.name not in options.setting or dtype not in options.dtype:
                continue
            turns = measure(competitors(setting, dtype, options.only, rows), dtype, setting, options, folder)
            found = [
                row_of(who, dtype, setting, took, options=options, bounds=bounds)
                for who, took in turns.items()
            ]
            if found:
                show(found, setting.title)
                rows += found
                yield found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `only` comes as contenders."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--losses", action="store_true", help="train 50 steps and compare the losses instead")
    what.add_argument("--blocks", action="store_true", help="time each block alone instead")
    names, settings = [one.name for one in CONTENDERS], [one.name for one in SETTINGS]
    parser.add_argument("--batch", type=int, default=BATCH, help="images a step (%(default)s)")
    parser.add_argument("--size", type=int, default=SIZE, help="their height and width (%(default)s)")
    parser.add_argument("--threads", type=int, default=THREADS, help="and cores of each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each contender (%(default)s)")
    parser.add_argument(
        "--steps", type=int, help=f"that count in a turn ({STEPS}), or that --losses learns ({losses.STEPS})"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=names, default=names, help="; ".join(names)
    )
    parser.add_argument("--setting", nargs="+", choices=settings, default=settings, help="these only")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="these precisions only")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help=f"labelled photos to learn in --losses ({losses.WHERE})"
    )
    parser.add_argument("--output", type=Path, help="CSV file that the rows are added to")
    options = parser.parse_args(arguments)
    for name in ("batch", "size", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.steps is not None and options.steps < 2:
        parser.error("--steps must be at least 2")
    usable = len(os.sched_getaffinity(0))
    if options.threads > usable:
        parser.error(f"--threads {options.threads}: {usable} cores may be used here")
    options.only = [one for one in CONTENDERS if one.name in options.only]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and add the rows to the CSV file as they come."""
    options = parse(arguments)
    if options.blocks:
        blocks.show(options.batch, options.size, options.threads, options.steps or STEPS)
        return 0
    shared = results.context()
    print(f"{shared['processor']}, {shared['cores']} cores; {shared['versions']}", flush=True)
    rows: list[results.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.losses:
            try:
                return losses.main(options, folder, shared)
            except UserError as error:
                print(f"bench.training: error: {error}", file=sys.stderr)
                return 2
        for found in time_all(options, folder):
            rows += found
            results.save(options.output or OUTPUT, rows, shared)
    print("\n" + "\n".join(verdicts(rows)))
    if any(one.noisy for one in rows):
        print("* medians of its turns differ by more than 10%")
    return 0

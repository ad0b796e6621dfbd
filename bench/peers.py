"""`python -m bench.peers`: the network by everyone, in three precisions: speed, answers, size, memory.

Every contender runs in its own process; they take turns of 20 calls, and each is timed once more with all
the others stopped. A row whose two medians differ by more than 10% is marked. At batch 16 on two cores each
engine also runs as two one-thread streams, each with half of the batch, at once or image by image. The CSV
file is written as the rows come: a run that is cut off loses only what it was measuring.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mnv2_fast import arch

from . import bars, build, contenders, limits, material, results, timing
from .build import Built
from .contenders import Contender
from .workers import Worker, WorkerError, alone

OUTPUT = results.FOLDER / "peers.csv"
STREAMS = 2
ROUNDS = {1: 5, 16: 2}  # turns at each batch: a turn at 16 is as long as sixteen at 1
START_SECONDS, STARTS = 10.0, 3  # starts of a contender: three, or as many as fit
QUICK_PHOTOS = 32
MACS = sum(layer.macs for layer in arch.layers())


@dataclass(frozen=True)
class Setting:
    """A batch on a number of cores: as one session, or as streams that share it, at once or one by one."""

    batch: int
    cores: int
    streams: bool = False
    singly: bool = False

    @property
    def form(self) -> str:
        if not self.streams:
            return "session"
        return f"{STREAMS} streams" + (", one by one" if self.singly else "")

    @property
    def key(self) -> str:
        """What a process is asked for."""
        share = self.batch // STREAMS if self.streams else self.batch
        return f"{share} singly" if self.singly else str(share)


SETTINGS = (
    Setting(1, 1),
    Setting(16, 1),
    Setting(1, 2),
    Setting(16, 2),
    Setting(16, 2, streams=True),
    Setting(16, 2, streams=True, singly=True),
)


class Team:
    """One contender's processes on some cores: one, or one for each stream."""

    def __init__(self, built: Built, cores: int, streams: bool, keys: Sequence[str]) -> None:
        self.built = built
        self.workers: list[Worker] = []
        parts = STREAMS if streams else 1
        threads = cores // parts
        case = replace(built.case, threads=threads)
        request = {"title": built.contender.title, "case": asdict(case), "keys": list(keys)}
        env = contenders.environment(built.contender.env, case.material)
        for part in range(parts):
            self.workers.append(Worker("contenders", request, limits.cores(threads, part * threads), env))

    def ready(self) -> None:
        """Wait until it has started.

        Raises:
            WorkerError: it has not.
        """
        for worker in self.workers:
            worker.ready()

    def turn(self, key: str) -> list[float]:
        """Milliseconds a batch of each counted call; streams run together and share the batch."""
        for worker in self.workers:
            worker.begin(timing.CALLS, key)
        times = [worker.finish() for worker in self.workers]
        # Streams make part of the batch each: their rates add up.
        return [len(call) / sum(1 / ms for ms in call) for call in zip(*times, strict=True)]

    def close(self) -> None:
        """End its processes."""
        for worker in self.workers:
            worker.close()


def served(contender: Contender, setting: Setting) -> bool:
    """Whether the contender is timed there: slow ones at batch 1, and no form twice."""
    return (setting.batch == 1 or not contender.slow) and not (contender.singly and setting.singly)


def keyed(contender: Contender, setting: Setting) -> str:
    """The key of a setting for a contender."""
    if contender.singly and setting.batch > 1:
        return replace(setting, singly=True).key
    return setting.key


def time_all(
    built: Sequence[Built],
    chosen: Sequence[Setting],
    rounds: int | None,
    bounds: Mapping[int, limits.Limits],
    weights: str,
) -> Iterator[list[results.Row]]:
    """One precision: the rows of each setting in turn, printed; settings of as many cores share processes."""
    for cores, streams in dict.fromkeys((setting.cores, setting.streams) for setting in chosen):
        settings = [setting for setting in chosen if (setting.cores, setting.streams) == (cores, streams)]
        teams = _start(built, cores, streams, settings)
        try:
            for setting in settings:
                there = [team for team in teams if served(team.built.contender, setting)]
                if there:
                    times = measure(there, setting, rounds or ROUNDS[setting.batch], teams)
                    measured = [_row(team, facts, setting, bounds[cores], weights) for team, facts in times]
                    show(measured)
                    yield measured
        finally:
            for team in teams:
                team.close()


def _start(built: Sequence[Built], cores: int, streams: bool, settings: Sequence[Setting]) -> list[Team]:
    """The teams that start, all at once; the others are named with the reason."""
    starting = []
    for one in built:
        keys = [keyed(one.contender, setting) for setting in settings if served(one.contender, setting)]
        if keys:
            starting.append(Team(one, cores, streams, keys))
    teams = []
    for team in starting:
        try:
            team.ready()
            teams.append(team)
        except WorkerError as error:
            print(f"left out: {team.built.contender.title}: {error}", flush=True)
            team.close()
    return teams


def measure(
    teams: Sequence[Team], setting: Setting, rounds: int, everyone: Sequence[Team]
) -> list[tuple[Team, tuple[timing.Summary, float]]]:
    """Each one alone, then all in turns; the order turns round, so that nobody always follows the same."""
    processes = [worker for team in everyone for worker in team.workers]
    single, turns = [], [list[float]() for _ in teams]
    for team in teams:
        with alone(team.workers, processes):
            single.append(timing.summarize(team.turn(keyed(team.built.contender, setting))).median)
    for number in range(rounds):
        order = range(len(teams))
        for i in order if number % 2 == 0 else reversed(order):
            turns[i] += teams[i].turn(keyed(teams[i].built.contender, setting))
    facts = zip(map(timing.summarize, turns), single, strict=True)
    return list(zip(teams, facts, strict=True))


def _row(
    team: Team,
    facts: tuple[timing.Summary, float],
    setting: Setting,
    bounds: limits.Limits,
    weights: str,
) -> results.Row:
    summary, ms_alone = facts
    rate = setting.batch / summary.median * 1e3
    gmacs = rate * MACS / 1e9
    contender = team.built.contender
    return results.Row(
        bench="peers",
        name="network",
        contender=contender.name,
        dtype=contender.dtype,
        isa=team.workers[0].isa if contender.ours else "",
        batch=setting.batch,
        threads=setting.cores,
        form=setting.form,
        ms=summary.median,
        ms_p20=summary.p20,
        ms_p80=summary.p80,
        ms_alone=ms_alone,
        noisy=timing.differ(summary.median, ms_alone),
        images_per_s=rate,
        gmacs=gmacs,
        gmacs_peak=bounds.gmacs,
        own_peak=bounds.peak(contender.dtype),
        gmacs_share=gmacs / bounds.peak(contender.dtype),
        gbs_copy=bounds.gbs,
        weights=weights,
        note=team.built.note,
    )


def show(rows: Sequence[results.Row]) -> None:
    """One setting's table."""
    first = rows[0]
    print(
        f"\n{first.dtype}, batch {first.batch}, {first.threads} core(s), {first.form}: "
        f"{first.dtype} peak {first.own_peak:.1f} GMAC/s"
    )
    print(f"{'':24} {'ms':>8} {'20%':>8} {'80%':>8} {'alone':>8}   {'img/s':>7} {'of peak':>7}")
    for row in sorted(rows, key=lambda row: row.ms):
        mark = "*" if row.noisy else " "
        print(
            f"{row.contender:24} {row.ms:8.3f} {row.ms_p20:8.3f} {row.ms_p80:8.3f} "
            f"{row.ms_alone:8.3f} {mark} {row.images_per_s:7.1f} {row.gmacs_share:7.1%}  {row.note}".rstrip(),
            flush=True,
        )


def judge(built: Sequence[Built], folder: str, weights: str) -> results.Row:
    """How right the answers are: over all photos; int8's over those that did not calibrate it, both ways."""
    import numpy as np

    exact = np.load(material.path(folder, material.EXACT))
    labels_file = material.path(folder, material.LABELS)
    labels = np.load(labels_file) if labels_file.exists() else None
    agreement, top1, error = [], [], 0.0
    for one in built:
        logits = np.load(one.logits)
        judged = slice(1 - one.case.calibration, None, 2) if one.contender.dtype == "int8" else slice(None)
        first = logits.argmax(1)[judged]
        agreement.append(float((first == exact.argmax(1)[judged]).mean()))
        if labels is not None:
            top1.append(float((first == labels[judged]).mean()))
        error = max(error, float(np.abs(logits - exact).max()))
    contender = built[0].contender
    return results.Row(
        bench="peers",
        name="answers",
        contender=contender.name,
        dtype=contender.dtype,
        # Noise has no classes to agree on.
        agreement=statistics.mean(agreement) if labels is not None else None,
        top1=statistics.mean(top1) if top1 else None,
        logit_error=error if contender.dtype != "int8" else None,
        file_mb=built[0].bytes / 1e6,
        weights=weights,
        note=built[0].note,
    )


def start(one: Built, once: bool) -> dict[str, float]:
    """Medians of a few fresh processes, on one core.

    Raises:
        BuildError: one failed.
    """
    order = {"title": one.contender.title, "case": asdict(one.case)}
    found: list[dict[str, float]] = []
    while not found or (
        not once and len(found) < STARTS and sum(f["start_ms"] for f in found) < 1e3 * START_SECONDS
    ):
        env = contenders.environment(one.contender.env, one.case.material)
        found.append(build.run("start", order, env))
    return {key: statistics.median(f[key] for f in found) for key in found[0]}


def describe(
    everyone: Mapping[Contender, Sequence[Built]], folder: str, weights: str, once: bool
) -> Iterator[results.Row]:
    """Answers, sizes, starts and memory: a row for each contender, printed."""
    print(
        f"\n{'':30} {'agree':>7} {'top-1':>6} {'error':>8} {'MB':>6} "
        f"{'start ms':>9} {'first ms':>9} {'peak MB':>8}"
    )
    for contender, built in everyone.items():
        row = judge(built, folder, weights)
        try:
            found = start(built[0], once)
            row = replace(
                row,
                start_ms=found["start_ms"],
                first_ms=found["first_ms"],
                peak_mb=found["memory"] / 1e6,
            )
        except build.BuildError as error:
            print(f"does not start alone: {contender.title}: {error}", flush=True)
        cells = (
            _cell(row.agreement, "7.1%"),
            _cell(row.top1, "6.1%"),
            _cell(row.logit_error, "8.1e"),
            _cell(row.file_mb, "6.2f"),
            _cell(row.start_ms, "9.0f"),
            _cell(row.first_ms, "9.0f"),
            _cell(row.peak_mb, "8.1f"),
        )
        print(f"{contender.title:30}", *cells, f" {row.note}".rstrip(), flush=True)
        yield row


def _cell(value: float | None, form: str) -> str:
    width = int(form.split(".", maxsplit=1)[0])
    return " " * width if value is None else format(value, form)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"under two minutes: batch 1, one round, {QUICK_PHOTOS} photos, nobody slow; no CSV by default",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders only")
    parser.add_argument("--dtype", nargs="+", choices=contenders.DTYPES, help="these precisions only")
    parser.add_argument("--batch", type=int, nargs="+", help="these batches only (1, 16)")
    parser.add_argument("--cores", type=int, nargs="+", help="these numbers of cores only (1, 2)")
    parser.add_argument(
        "--rounds", type=int, help="turns of each contender (default: 5 at batch 1, 2 at batch 16)"
    )
    parser.add_argument(
        "--photos",
        type=Path,
        default=material.default_photos(),
        help=f"folder of photos WNID_name.JPEG, {material.WNIDS} beside it ({material.WHERE})",
    )
    parser.add_argument("--output", type=Path, help="CSV file that the rows are added to")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if unknown := sorted(set(options.only or ()) - set(contenders.names())):
        parser.error(f"no contender {unknown[0]!r}: one of {', '.join(contenders.names())}")
    return options


def settings(options: argparse.Namespace) -> list[Setting]:
    """The settings asked for that this machine has the cores for."""
    usable = len(os.sched_getaffinity(0))
    batches = options.batch or ([1] if options.quick else None)
    chosen = [
        setting
        for setting in SETTINGS
        if (not batches or setting.batch in batches) and (not options.cores or setting.cores in options.cores)
    ]
    for cores in sorted({setting.cores for setting in chosen if setting.cores > usable}):
        print(f"left out: {cores} cores, {usable} may be used here")
    return [setting for setting in chosen if setting.cores <= usable]


def contestants(options: argparse.Namespace) -> list[Contender]:
    """The rows asked for whose packages are installed; the others are named with the reason."""
    present = []
    for contender in contenders.CONTENDERS:
        if options.only and contender.name not in options.only:
            continue
        if options.dtype and contender.dtype not in options.dtype:
            continue
        if missing := contender.missing():
            print(f"left out: {contender.title}: not installed: {', '.join(missing)}; pip install '.[bench]'")
        elif not (options.quick and (contender.slow or contender.tedious)):
            present.append(contender)
    return present


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and add the rows to the CSV file as they come."""
    options = parse(arguments)
    output = options.output or (None if options.quick else OUTPUT)
    shared, chosen, places = results.context(), contestants(options), settings(options)
    weights = material.source()
    print(
        f"{shared['processor']}, {shared['cores']} cores; {shared['versions']}; weights: {weights}",
        flush=True,
    )
    rows: list[results.Row] = []

    def keep(found: Sequence[results.Row]) -> None:
        rows.extend(found)
        if output:
            results.save(output, rows, shared)

    with tempfile.TemporaryDirectory() as folder:
        build.shared(
            folder,
            options.photos,
            QUICK_PHOTOS if options.quick else None,
            onnx=any("onnx" in contender.makes for contender in chosen),
        )
        if not material.path(folder, material.LABELS).exists():
            print(f"no photos with known classes in {options.photos}: speed is of noise or of those there")
        halves = (0,) if options.quick else (0, 1)
        everyone = build.everyone(chosen, folder, halves, lambda line: print(line, flush=True))
        for row in describe(everyone, folder, weights, once=options.quick):
            keep([row])
        bounds: dict[int, limits.Limits] = {}
        for dtype in contenders.DTYPES:
            built = [found[0] for contender, found in everyone.items() if contender.dtype == dtype]
            again = not (options.quick and bounds)
            for cores in dict.fromkeys(setting.cores for setting in places if again):
                seen = limits.measure(cores)
                bounds[cores] = seen | bounds.get(cores, seen)
            rounds = options.rounds or (1 if options.quick else None)
            for measured in time_all(built, places, rounds, bounds, weights):
                keep(measured)
    print("\n" + "\n".join(bars.verdicts(rows)))
    if any(row.noisy for row in rows):
        print("* alone and in turns the medians differ by more than 10%")
    return 0


if __name__ == "__main__":
    sys.exit(main())

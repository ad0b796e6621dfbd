"""`python -m bench.model`: the whole network, ours and everyone's, by batch and threads.

Every contender runs in its own process; they take turns of 20 calls, and each is timed once more with all
the others stopped. A row whose two medians differ by more than 10% is marked. At batch 16 on two cores each
engine also runs as two one-thread streams, each with half of the batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mnv2_fast import arch

from . import limits, peers, results, timing
from .workers import Worker, WorkerError, alone

OUTPUT = results.FOLDER / "model.csv"
STREAMS = 2
ROUNDS = 5
MACS = sum(layer.macs for layer in arch.layers())


@dataclass(frozen=True)
class Setting:
    """A batch on a number of cores: as one session, or as streams that share the batch."""

    batch: int
    cores: int
    streams: bool = False

    @property
    def form(self) -> str:
        return f"{STREAMS} streams" if self.streams else "session"


SETTINGS = (Setting(1, 1), Setting(1, 2), Setting(16, 1), Setting(16, 2), Setting(16, 2, streams=True))


@dataclass(frozen=True)
class Bar:
    """What we hold ourselves to: at least `ratio` times as fast as the best of `against`, over all forms."""

    ours: str
    batch: int
    cores: int
    against: tuple[str, ...]
    ratio: float


_RUNTIMES = ("ONNX Runtime", "OpenVINO")
BARS = (
    Bar(peers.ENGINE, 1, 1, _RUNTIMES, 1.15),
    Bar(peers.ENGINE, 1, 2, _RUNTIMES, 1.1),
    Bar(peers.ENGINE, 16, 2, _RUNTIMES, 1.15),
    Bar(peers.ENGINE_AVX2, 1, 1, (peers.TORCH_COMPILE,), 1.0),
)


class Contender:
    """One peer in one setting: a process, or one for each stream."""

    def __init__(self, peer: peers.Peer, setting: Setting, folder: str) -> None:
        self.peer, self.setting = peer, setting
        self.workers: list[Worker] = []
        parts = STREAMS if setting.streams else 1
        threads = setting.cores // parts
        case = peers.Case(setting.batch // parts, threads, folder=folder)
        request = {"peer": peer.name, "case": asdict(case)}
        try:
            for part in range(parts):
                cores = limits.cores(threads, part * threads)
                self.workers.append(Worker("peers", request, cores, peers.environment(peer)))
        except WorkerError:
            self.close()
            raise

    def turn(self, calls: int) -> list[float]:
        """Milliseconds a batch of each counted call; streams run together and share the batch."""
        for worker in self.workers:
            worker.begin(calls)
        times = [worker.finish() for worker in self.workers]
        # Streams make part of the batch each: their rates add up.
        return [len(call) / sum(1 / ms for ms in call) for call in zip(*times, strict=True)]

    def close(self) -> None:
        """End its processes."""
        for worker in self.workers:
            worker.close()


def start(chosen: Iterable[peers.Peer], setting: Setting, folder: str) -> list[Contender]:
    """The contenders that start; the others are named with the reason."""
    contenders = []
    for peer in chosen:
        try:
            contenders.append(Contender(peer, setting, folder))
        except WorkerError as error:
            print(f"left out: {peer.name}: {error}", flush=True)
    return contenders


def measure(
    contenders: Sequence[Contender], rounds: int, bounds: limits.Limits, weights: str
) -> list[results.Row]:
    """Each one alone, then all in turns; the order turns round, so that nobody always follows the same."""
    everyone = [worker for contender in contenders for worker in contender.workers]
    single, turns = [], [list[float]() for _ in contenders]
    for contender in contenders:
        with alone(contender.workers, everyone):
            single.append(timing.summarize(contender.turn(timing.CALLS)).median)
    for number in range(rounds):
        order = range(len(contenders))
        for i in order if number % 2 == 0 else reversed(order):
            turns[i] += contenders[i].turn(timing.CALLS)
    return [
        _row(contender, timing.summarize(times), ms_alone, bounds, weights)
        for contender, times, ms_alone in zip(contenders, turns, single, strict=True)
    ]


def _row(
    contender: Contender, summary: timing.Summary, ms_alone: float, bounds: limits.Limits, weights: str
) -> results.Row:
    setting = contender.setting
    rate = setting.batch / summary.median * 1e3
    gmacs = rate * MACS / 1e9
    return results.Row(
        bench="model",
        name="network",
        contender=contender.peer.name,
        isa=contender.workers[0].isa,
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
        gmacs_share=gmacs / bounds.gmacs,
        gbs_copy=bounds.gbs,
        weights=weights,
    )


def show(rows: Sequence[results.Row]) -> None:
    """One setting's table."""
    first = rows[0]
    print(f"\nbatch {first.batch}, {first.threads} core(s), {first.form}: peak {first.gmacs_peak:.1f} GMAC/s")
    print(f"{'':24} {'ms':>8} {'20%':>8} {'80%':>8} {'alone':>8}   {'img/s':>7} {'of peak':>7}")
    for row in sorted(rows, key=lambda row: row.ms):
        mark = "*" if row.noisy else " "
        print(
            f"{row.contender:24} {row.ms:8.3f} {row.ms_p20:8.3f} {row.ms_p80:8.3f} "
            f"{row.ms_alone:8.3f} {mark} {row.images_per_s:7.1f} {row.gmacs_share:7.1%}",
            flush=True,
        )


def best(rows: Sequence[results.Row], names: Sequence[str], batch: int, cores: int) -> results.Row | None:
    """The fastest row of these contenders at a batch and a number of cores, whatever the form."""
    found = [row for row in rows if row.contender in names and (row.batch, row.threads) == (batch, cores)]
    return min(found, key=lambda row: row.ms) if found else None


def verdicts(rows: Sequence[results.Row]) -> list[str]:
    """One line for each bar, and one for what the automatic path costs over the engine."""
    lines = []
    for bar in BARS:
        ours, peer = (best(rows, names, bar.batch, bar.cores) for names in ((bar.ours,), bar.against))
        where = f"batch {bar.batch}, {bar.cores} core(s)"
        if ours is None or peer is None:
            lines.append(f"{where}: {bar.ours} against {' and '.join(bar.against)}: not measured")
            continue
        ratio = peer.ms / ours.ms
        lines.append(
            f"{where}: {bar.ours} ({ours.form}) {ratio:.2f}x {peer.contender} ({peer.form}), "
            f"asked {bar.ratio:.2f}x: {'reached' if ratio >= bar.ratio else 'MISSED'}"
        )
    engine, automatic = (best(rows, (name,), 1, 1) for name in (peers.ENGINE, peers.AUTOMATIC))
    if engine and automatic:
        lines.append(f"the automatic path costs {(automatic.ms - engine.ms) * 1e3:.0f} us over the engine")
    return lines


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one round, no slow contender, no CSV by default"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders only")
    parser.add_argument("--batch", type=int, nargs="+", help="these batches only")
    parser.add_argument("--cores", type=int, nargs="+", help="these numbers of cores only")
    parser.add_argument(
        "--rounds", type=int, default=None, help=f"turns of each contender (default {ROUNDS})"
    )
    parser.add_argument("--output", type=Path, help="CSV file that the rows are added to")
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def settings(options: argparse.Namespace) -> list[Setting]:
    """The settings asked for that this machine has the cores for."""
    usable = len(os.sched_getaffinity(0))
    chosen = [
        setting
        for setting in SETTINGS
        if (not options.batch or setting.batch in options.batch)
        and (not options.cores or setting.cores in options.cores)
    ]
    for setting in chosen:
        if setting.cores > usable:
            print(f"left out: {setting.cores} cores, {usable} may be used here")
    return [setting for setting in chosen if setting.cores <= usable]


def contestants(options: argparse.Namespace) -> list[peers.Peer]:
    """The rows asked for whose packages are installed."""
    chosen = [peers.by_name(name) for name in options.only] if options.only else list(peers.PEERS)
    present = []
    for peer in chosen:
        if missing := peer.missing():
            print(f"left out: {peer.name}: not installed: {', '.join(missing)}")
        elif not (options.quick and peer.slow):
            present.append(peer)
    return present


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and add the rows to the CSV file."""
    options = parse(arguments)
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    shared, rows, bounds = results.context(), list[results.Row](), dict[int, limits.Limits]()
    chosen = contestants(options)
    weights = peers.weights_source()
    print(
        f"{shared['processor']}, {shared['cores']} cores; {shared['versions']}; weights: {weights}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        if any(peer.onnx for peer in chosen):
            peers.export_onnx(folder)
        for setting in settings(options):
            seen = limits.measure(setting.cores)
            bounds[setting.cores] = seen | bounds.get(setting.cores, seen)
            contenders = start(
                [peer for peer in chosen if setting.batch == 1 or not peer.slow], setting, folder
            )
            try:
                measured = measure(contenders, rounds, bounds[setting.cores], weights)
            finally:
                for contender in contenders:
                    contender.close()
            show(measured)
            rows += measured
    if options.output or not options.quick:
        results.append(options.output or OUTPUT, rows, shared)
    print("\n" + "\n".join(verdicts(rows)))
    if any(row.noisy for row in rows):
        print("* alone and in turns the medians differ by more than 10%")
    return 0


if __name__ == "__main__":
    sys.exit(main())

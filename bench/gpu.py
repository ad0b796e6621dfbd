"""The GPU kernels against float64, against the memory's speed and against torch: `python -m bench.gpu`.

Runs from a bare checkout: torch >= 2.11 and triton >= 3.6, no extension, no installation. Within eight
minutes; what has no time left is left out and named. Checks come first, handed out to processes, which
compile; only what was checked and is right is timed. Rows are saved whatever happens on the way.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import results
from bench.gpu_children import Answer, answers, program, serve

if TYPE_CHECKING:
    from bench.gpu_checks import Check
    from bench.gpu_race import Verdict as Races
    from bench.gpu_report import Report

OUTPUT = results.FOLDER / "gpu.csv"
BUDGET_S = 440.0
TUNE_S = 440.0
# The most of what time is left that a part may take.
CHECKS, NETWORKS, KERNELS, COMPILED = 0.38, 0.35, 0.4, 0.6
# A measurement that takes longer hangs; a network is captured first.
NETWORK_S, KERNEL_S = 45.0, 20.0
# Processes that check; the races and the program have the other cores.
WORKERS, OTHERS = 11, 5
# Kept for saving and the tables.
LAST_S = 5.0
# Failures that say nothing about the kernel.
NO_MEMORY = ("MemoryError", "OutOfMemoryError")


@dataclass
class Verdicts:
    """What the checks have found, a line each; `subjects`: whether a form or a network is right."""

    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    subjects: dict[str, bool] = field(default_factory=dict)

    def take(self, check: Check, answer: Answer | None) -> None:
        """Keep the answer to one check; None where there is none."""
        why = "no time left" if answer is None else answer.failed or answer.found
        known = answer is not None and not answer.failed.startswith(NO_MEMORY)
        if why:
            (self.wrong if known else self.unchecked).append(f"{check.name}: {why}")
        self.mark(check.subject, not why)

    def mark(self, subject: str, right: bool) -> None:
        """Say of a subject whether it is right; it stays wrong once it was."""
        self.subjects[subject] = right and self.subjects.get(subject, True)

    def right(self, subject: str) -> bool:
        """Whether it was checked, and nothing is wrong with it."""
        return self.subjects.get(subject, False)


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Returns 0; 1 where an answer is wrong or was not checked; 2 where it cannot run here."""
    options = _options(argv)
    started = time.monotonic()
    if reason := unavailable(needs_gpu=not options.resources):
        print(f"bench.gpu: {reason}", file=sys.stderr)
        return 2
    if options.resources:
        from bench.gpu_resources import print_resources

        print_resources()
        return 0
    if options.serve:
        return serve(server(options.serve))
    if options.once:
        from bench.gpu_race import once

        for name in options.once:
            once(name)
        return 0
    print_versions()
    if options.tune:
        from bench.gpu_tune import tune

        print(f"the table is {tune(options.budget or TUNE_S)}")
        return 0
    return run(options.output, started + (options.budget or BUDGET_S) - LAST_S)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="CSV file that the rows are added to (%(default)s)"
    )
    parser.add_argument("--budget", type=float, help=f"seconds in all ({BUDGET_S:.0f})")
    parser.add_argument(
        "--resources",
        action="store_true",
        help="only compile for sm_80 and sm_90: registers and spills",
    )
    parser.add_argument(
        "--tune", action="store_true", help="only choose tiles, and write this GPU's table of them"
    )
    parser.add_argument(
        "--once",
        nargs="+",
        metavar="FORM",
        help="only launch forms, as the checks name them, once: to be run by compute-sanitizer",
    )
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def unavailable(needs_gpu: bool = True) -> str:
    """Why the benchmark cannot run here, in one line that names the cure; empty where it can."""
    for package, version in (("torch", "2.11"), ("triton", "3.6")):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: install {package}>={version}"
    import torch

    if needs_gpu and not torch.cuda.is_available():
        return "torch finds no CUDA device: run it on a machine with an NVIDIA GPU (sm_80 or newer)"
    return ""


def print_versions() -> None:
    """One line on the software, one on the GPU."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    print(f"{results.versions()}; CUDA {torch.version.cuda}; cuDNN {torch.backends.cudnn.version()}")
    target, units, memory = f"sm_{gpu.major}{gpu.minor}", gpu.multi_processor_count, gpu.total_memory >> 30
    print(f"{gpu.name}, {target}, {units} SMs, {memory} GiB")


def server(name: str) -> Callable[[int], Any]:
    """What a child answers to a number: to that of a check, a measurement, a batch or a tile."""
    if name == "checks":
        from bench.gpu_checks import checks

        all_checks = checks()
        return lambda number: all_checks[number].run()
    if name == "times":
        from bench.gpu_times import works

        all_works = works()
        return lambda number: all_works[number].run()
    if name == "compiled":
        from bench.gpu_times import time_torch

        return lambda batch: time_torch(batch, compiled=True)
    from bench.gpu_tune import check_try, time_try, tries

    all_tries = tries()
    if name == "tiles":
        return lambda number: check_try(all_tries[number])
    if name == "tile times":
        return lambda number: time_try(all_tries[number])
    raise ValueError(f"nothing is called {name!r}")


def run(output: Path, until: float) -> int:
    """Check, time and report until `until`, of the monotonic clock. Returns the program's code."""
    import torch

    from bench.gpu_report import Report

    def left() -> float:
        return until - time.monotonic()

    verdicts, report = Verdicts(), Report(torch.cuda.get_device_name())
    context = results.context()

    def save() -> None:
        results.save(output, report.rows, context)

    try:
        check(verdicts, left)
        measure(report, verdicts, left, save)
    finally:
        save()
        print(f"\n{len(report.rows)} rows added to {output}")
        print_verdicts(verdicts)
        for line in report.tables():
            print(line)
    return 1 if verdicts.wrong or verdicts.unchecked else 0


def print_verdicts(verdicts: Verdicts) -> None:
    """What is wrong, what was not checked, and one line on the whole."""
    for line in verdicts.wrong:
        print(f"WRONG {line}")
    for line in verdicts.unchecked:
        print(f"not checked: {line}")
    if not verdicts.subjects:
        print("nothing was checked")
    elif verdicts.wrong or verdicts.unchecked:
        print(f"{len(verdicts.wrong)} checks are WRONG, {len(verdicts.unchecked)} were not made")
    else:
        print("all kernels and networks against float64: within tolerance, NaN kept, every output written")


def check(verdicts: Verdicts, left: Callable[[], float]) -> None:
    """Every check, handed out to as many processes as there are cores, whose compiled kernels the cache on
    disk then has; the races meanwhile.
    """
    from bench.gpu_checks import checks
    from bench.gpu_race import check_races

    all_checks, seconds = checks(), CHECKS * left()
    workers = max(1, min(WORKERS, (os.cpu_count() or 1) - OTHERS))
    found: dict[int, Answer] = {}
    with ThreadPoolExecutor(1) as beside:
        races = beside.submit(check_races, seconds)
        try:
            for answer in answers(program("checks"), range(len(all_checks)), seconds, workers):
                found[answer.number] = answer
                if why := answer.failed or answer.found:
                    print(f"{all_checks[answer.number].name}: {why}")
        finally:
            for i, one in enumerate(all_checks):
                verdicts.take(one, found.get(i))
        print(f"{len(found)} of {len(all_checks)} checks made")
        take_races(verdicts, races.result())


def take_races(verdicts: Verdicts, races: Races | None) -> None:
    """Keep and print what racecheck has said; None where there is no such program, which is no fault."""
    if races is None:
        print("compute-sanitizer is not on PATH: races are not checked")
        return
    for name, hazard in races.wrong.items():
        verdicts.wrong.append(f"{name}: racecheck: {hazard}")
        verdicts.mark(name, False)
    print(f"racecheck: {len(races.clean)} forms without hazards, {len(races.wrong)} with")
    verdicts.unchecked += [f"{name}: racecheck did not come to it" for name in races.unchecked]


def measure(report: Report, verdicts: Verdicts, left: Callable[[], float], save: Callable[[], None]) -> None:
    """Every measurement of what is right, each part within its share of the time, saved one by one."""
    from bench.gpu_times import works

    all_works = works()
    right = [
        i for i, work in enumerate(all_works) if i and (not work.subject or verdicts.right(work.subject))
    ]

    def take(numbers: Sequence[int], seconds: float, answer_s: float) -> None:
        told = set()
        for answer in answers(program("times"), numbers, seconds, answer_s=answer_s):
            report.take(all_works[answer.number], answer)
            told.add(answer.number)
            save()
        for work in (all_works[number] for number in numbers if number not in told):
            print(f"no time for {work.name}, {work.contender}, batch {work.batch}")

    # The copy comes first, since shares are of it.
    take([0, *(i for i in right if all_works[i].form is None)], NETWORKS * left(), NETWORK_S)
    take([i for i in right if all_works[i].form is not None], KERNELS * left(), KERNEL_S)
    for batch, answer in time_compiled(left):
        report.compiled(batch, answer)
        save()


def time_compiled(left: Callable[[], float]) -> Iterator[tuple[int, Answer]]:
    """torch.compile's networks, each in its process, which may take a share of what is left, the last all."""
    from bench.gpu_times import BATCHES

    for batch in BATCHES:
        seconds = max(left() * (COMPILED if batch != BATCHES[-1] else 1), 0.0)
        found = answers(program("compiled"), [batch], seconds, answer_s=seconds)
        none = Answer(batch, None, f"not compiled within {seconds:.0f} s")
        yield batch, next(iter(found), none)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.flowers --data DIR`: fine-tuning to an accuracy, ours beside torch's.

For each seed everyone trains once, alone on the machine, in an order that turns round. What is timed is the
whole command: start, decoding, training, validation, charts. What counts is top-1 of the averaged weights of
the last epoch; the best epoch's, which the validation photos have chosen, is shown beside it. Options that
are not said here are those of `mnv2 finetune`, for everyone; the default ones are what a user gets.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mnv2_fast import UserError, env, files, flowers, photos, weights
from mnv2_fast.recipe import Recipe
from mnv2_fast.runs import RESULTS, Run, top1_of

from .. import limits, results
from ..contenders import environment
from ..training.contenders import THREADS
from .bars import verdicts
from .contenders import CONTENDERS, Contender
from .contenders import parse as parse_finetune

OUTPUT = results.FOLDER / "flowers.csv"
SEEDS = 3
WEIGHTS = "IMAGENET1K_V1"
DEFAULTS = "default options"
SET_HERE = ("--weights", "--model", "--out", "--seed", "--resume", "--overwrite", "--amp")


def finetune(contender: Contender, words: Sequence[str], cores: Sequence[int], folder: str) -> float:
    """Run a contender's command; its seconds. `folder` is for what compilers keep.

    Raises:
        UserError: it failed; with the last line that it said.
    """
    there = env.weights_folder()
    own = {**contender.env, env.WEIGHTS.name: str(there.resolve()) if there else ""}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # which its process has from this one
    try:
        begin = time.perf_counter()
        done = subprocess.run(
            contender.command(words),
            cwd=results.ROOT,
            env={**environment(own, folder), "OMP_NUM_THREADS": str(len(cores))},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
    finally:
        os.sched_setaffinity(0, before)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{contender.name}: {said[-1]}")
    return seconds


def train(contender: Contender, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, in a folder that is gone afterwards: columns of its row."""
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        run = Run(f"{beside}/run")
        words = ["--data", os.path.abspath(options.data), "--weights", WEIGHTS, "--out", str(run.folder)]
        words += [*options.more, "--seed", str(seed)]
        seconds = finetune(contender, words, limits.cores(options.threads), beside)
        with (run.folder / RESULTS).open(newline="", encoding="utf-8") as file:
            history = [{name: float(text) for name, text in row.items()} for row in csv.DictReader(file)]
        tops = [top1_of(row) for row in history]
        return {
            "contender": contender.name,
            "dtype": "bf16" if run.args()["amp"] == "bf16" else "fp32",
            "seed": seed,
            "epochs": len(history),
            "top1": tops[-1],
            "best_top1": max(tops),
            "seconds": seconds,
            "images_per_s": statistics.harmonic_mean([row["images_per_second"] for row in history]),
        }


def runs(options: argparse.Namespace, folder: Path, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every run's figures, those that `folder` keeps without doing them again.

    Raises:
        UserError: what it keeps was asked otherwise, or a run fails.
    """
    for seed in range(options.seeds):
        turn = seed % len(CONTENDERS)
        for contender in (*CONTENDERS[turn:], *CONTENDERS[:turn]):
            kept = folder / f"{contender.key}-{seed}.json"
            if kept.exists():
                found = json.loads(kept.read_text(encoding="utf-8"))
                if found["asked"] != asked:
                    raise UserError(f"{kept} is of other photos, options or versions: give another --keep")
            else:
                found = {"asked": asked, "run": train(contender, seed, options, folder)}
                files.write_text(kept, json.dumps(found, indent=1))
            yield found["run"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `more` are the words for `mnv2 finetune`, `given` what they say."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.flowers", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="photos; flowers: fetch them")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each (%(default)s)")
    parser.add_argument("--threads", type=int, default=THREADS, help="and cores of each (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where done runs are kept, to go on from")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file that the rows are added to")
    options, more = parser.parse_known_args(arguments)
    options.more = more
    taken = sorted({word.partition("=")[0] for word in more} & set(SET_HERE))
    if taken:
        parser.error(f"{', '.join(taken)}: bench.flowers sets it itself, leave it out")
    _, options.given = parse_finetune(["--out", "run", *options.more])
    for name in ("seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    usable = len(os.sched_getaffinity(0))
    if options.threads > usable:
        parser.error(f"--threads {options.threads}: {usable} cores may be used here")
    return options


def show(row: results.Row) -> str:
    """A run as a line, under `HEAD`."""
    return (
        f"{row.seed:4} {row.contender:28} {row.dtype:5} {row.epochs:6} {row.top1:7.1%} {row.best_top1:7.1%} "
        f"{row.seconds:8.1f} {row.images_per_s:9.1f}"
    )


HEAD = f"{'seed':>4} {'':28} {'':5} {'epochs':>6} {'top-1':>7} {'best':>7} {'seconds':>8} {'images/s':>9}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print, and add the rows to the CSV file as they come."""
    options = parse(arguments)
    shared = results.context()
    print(f"{shared['processor']}, {shared['cores']} cores; {shared['versions']}", flush=True)
    rows: list[results.Row] = []
    try:
        for row in measure(options, shared):
            print(show(row) if rows else f"{HEAD}\n{show(row)}", flush=True)
            rows.append(row)
            results.save(options.output, rows, shared)
    except UserError as error:
        print(f"bench.flowers: error: {error}", file=sys.stderr)
        return 2
    print("\n" + "\n".join(verdicts(rows)))
    return 0


def measure(options: argparse.Namespace, shared: dict[str, str]) -> Iterator[results.Row]:
    """The rows as they come.

    Raises:
        UserError: there are no such photos, no weights, or as `runs`.
    """
    recipe = Recipe.of(options.given)
    if flowers.meant(options.data):
        options.data = flowers.fetch()
    folder = photos.find(options.data, recipe.val_share, recipe.split_seed)
    asked = {
        "photos": folder.digest(),
        "options": [*options.more, f"threads {options.threads}"],
        **{name: shared[name] for name in ("processor", "commit", "versions")},
    }
    note = f"{len(folder.train)} photos, {len(folder.val)} to validate; {' '.join(options.more) or DEFAULTS}"
    weights.find_weights(WEIGHTS)  # a download is no one's time
    bounds = limits.measure(options.threads)
    with contextlib.ExitStack() as stack:
        if options.keep is None:
            keep = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-flowers.")))
        else:
            keep = stack.enter_context(files.output_folder(options.keep))
        for run in runs(options, keep, asked):
            yield results.Row(
                bench="flowers",
                name="finetune",
                batch=recipe.batch_size,
                threads=options.threads,
                form="command",
                gmacs_peak=bounds.gmacs,
                gbs_copy=bounds.gbs,
                weights=WEIGHTS,
                note=note,
                **run,
            )

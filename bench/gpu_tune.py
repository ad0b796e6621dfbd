"""Writes a GPU's tile table: `python -m bench.gpu --tune`.

Every row of the default table has a few candidates (`gpu_candidates`). Each is tried on the network's own
shapes that use the row: first by children at once, which compile it, and drop it where it fails, spills or
answers wrongly; then one after the other for its time. Rows come in stages, of which the later ones run on
what the earlier ones have chosen. What there is no time for keeps the default row.
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_candidates import Setting, candidates
from bench.gpu_checks import check_form, forget_kernels, spilled
from bench.gpu_children import Answer, answers, program
from bench.gpu_forms import DTYPES, Form, forms, usable
from bench.gpu_times import three, timed_launches
from bench.gpu_training_forms import training_forms
from kernels.common import CONFIGS, arithmetic, slug

# The kind that a row's arithmetic is timed in, the most wanted first.
KINDS = ("fp16", "tf32", "fp32")
# Images, by the size in a row's name; the others are for large batches.
BATCHES = {"large": 256, "small": 1}
# Tables in the order in which they are tuned, and the most of what time is left that a stage may take. The
# last ones measure one kernel beside the two that it replaces, whose tiles are chosen by then.
STAGES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (
        0.44,
        (
            *("block", "stem", "depthwise", "pointwise", "head"),
            *("depthwise_input_s2", "depthwise_weight", "pointwise_gradient"),
        ),
    ),
    (0.67, ("train_pointwise", "train_depthwise", "train_stem", "norm")),
    (1.0, ("depthwise_project", "train_pointwise_both")),
)
# Tables whose rows are for every shape: three are tried, for the kernels of each take seconds to compile.
ON_THREE = ("train_depthwise", "norm")
# Tables of a forward kernel that makes a gradient, too.
SHARED = ("depthwise", "pointwise")
# How the children's time and the timing's are shared.
CHECKING = 0.5
# Processes that check, at most; one of an H200's 16 cores is the program's.
WORKERS = 15
# Ms of calls that a try is timed for: a stage has time for some hundreds of them.
TRY_MS = 20
# A row of one shape's own must win by this much of the time.
MARGIN = 0.02

Table = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Try:
    """One candidate for one row on one form; `shape`: of the row of its own that it may get, or ""."""

    table: str
    row: str
    shape: str
    form: Form
    kind: str
    batch: int
    tile: Setting


def default_table() -> Table:
    """configs/default.json, whose rows every other table has, too."""
    table: Table = json.loads((CONFIGS / "default.json").read_text())
    return table


def tries() -> list[Try]:
    """All that is to be tried, in an order that parent and children share: fp16 and whole blocks first."""
    found, tried = list[Try](), _tried()
    for kind in KINDS:
        rows: dict[tuple[str, str], list[Form]] = collections.defaultdict(list)
        for form in tried:
            for row in form.rows if kind in form.kinds() else ():
                name = row.format(arithmetic(*DTYPES[kind]))
                if kind == KINDS[0] or name != row:  # a row of every kind is settled by the first one
                    rows[form.table, name].append(form)
        for (table, row), some in rows.items():
            found += _of_row(table, row, three(some) if table in ON_THREE else some, kind)
    return found


def _tried() -> list[Form]:
    """The forms that tiles are tried on; of 1x1 layers each gradient by itself, too, so that stage 3 has both
    in one kernel beside the best of two. The gradients of single operators do with the tiles of the forward.
    """
    all_forms = (*forms(), *training_forms(all_apart=True))
    shared = [form for form in all_forms if form.name.endswith("input gradient") and form.table in SHARED]
    found = [form for form in all_forms if form.table and usable(form) and form not in shared]
    return sorted(found, key=_worth)


def _of_row(table: str, row: str, some: Sequence[Form], kind: str) -> Iterator[Try]:
    """Tile by tile on all forms of a row, what the default table has for them first: whenever the time ends,
    what was tried has a time on each of them, and can win.
    """
    batch, rows = BATCHES.get(row.partition("_")[0], BATCHES["large"]), default_table()[table]
    of_forms = [candidates(table, row, form.shape, rows) for form in some]
    own = [tiles_of_form[0] for tiles_of_form in of_forms]
    for tile in dict.fromkeys((*own, *itertools.chain(*of_forms))):
        for form, tiles_of_form in zip(some, of_forms, strict=True):
            if tile in tiles_of_form:
                yield Try(table, row, form.shape, form, kind, batch, tile)


def _worth(form: Form) -> tuple[int, int, tuple[str, ...]]:
    """What is tuned first: whole blocks, then inference, then gradients, then training by its tables."""
    if form.name.startswith("train"):
        return 3, [name for _, tables in STAGES for name in tables].index(form.table), form.rows
    return 0 if form.whole_block else 2 if "gradient" in form.name else 1, 0, ()


def check_try(one: Try) -> str:
    """Why a candidate is dropped, or ""."""
    forget_kernels()
    if why := check_form(one.form, one.kind, dict(one.tile)):
        return why
    spills = spilled()
    return f"{spills} registers spilled" if spills else ""


def time_try(one: Try) -> tuple[float, str]:
    """Its median time, ms, and why what was timed is no graph."""
    times, why = timed_launches(one.form.make(one.batch, one.kind, dict(one.tile)).run, TRY_MS)
    return times[0], why


def tune(seconds: float, folder: Path = CONFIGS) -> Path:
    """Try candidates for so many seconds, and write the GPU's table stage by stage. Returns its file."""
    all_tries, table, until = tries(), default_table(), time.monotonic() + seconds
    path = folder / f"{slug(torch.cuda.get_device_name())}.json"
    for share, tables in STAGES:
        stage = [i for i, one in enumerate(all_tries) if one.table in tables]
        now = time.monotonic()
        times = _times(all_tries, stage, now + max(share * (until - now), 0.0))
        table = chosen(all_tries, times, table)
        write(path, table)
    return path


def _times(all_tries: Sequence[Try], numbers: Iterable[int], until: float) -> Iterator[Answer]:
    """Times of the tries that are right, of these numbers, as they come, until then."""
    now, workers = time.monotonic(), max(1, min(WORKERS, (os.cpu_count() or 1) - 1))
    numbers, right = list(numbers), []
    for answer in answers(program("tiles"), numbers, CHECKING * (until - now), workers):
        why = answer.failed or answer.found
        one = all_tries[answer.number]
        if why:
            print(f"dropped: {one.table} {one.row} {dict(one.tile)} on {one.form}: {why}")
        else:
            right.append(answer.number)
    print(f"{len(right)} of {len(numbers)} candidates compile, answer rightly and do not spill")
    return answers(program("tile times"), sorted(right), until - time.monotonic())


def chosen(all_tries: Sequence[Try], times: Iterable[Answer], start: Table) -> Table:
    """A table with the winners among what was timed, told as they are found.

    A row's winner has the least time over all shapes that use it, each as often as the network has it, of
    the candidates that have a time for each of them. A shape gets a row of its own where it is faster by
    `MARGIN` with another one.
    """
    measured: dict[tuple[str, str], dict[str, dict[Setting, float]]]
    measured = collections.defaultdict(lambda: collections.defaultdict(dict))
    for answer in times:
        one = all_tries[answer.number]
        if answer.failed:
            print(f"not timed: {one.table} {one.row} {dict(one.tile)} on {one.form}: {answer.failed}")
            continue
        ms, why = answer.found
        if why:
            print(f"called, not replayed: {one.table} {one.row} {dict(one.tile)} on {one.form}: {why}")
        measured[one.table, one.row][str(one.form)][one.tile] = ms
    users: dict[tuple[str, str], dict[str, Form]] = collections.defaultdict(dict)
    for one in all_tries:
        users[one.table, one.row][str(one.form)] = one.form
    table = {name: dict(rows) for name, rows in start.items()}
    for (name, row), by_form in measured.items():
        base = _winner(list(users[name, row].values()), by_form)
        if base is not None:
            table[name][row] = dict(base)
            print(f"{name} {row}: {table[name][row]}")
        shapes: dict[str, list[Form]] = collections.defaultdict(list)
        for form in users[name, row].values():
            shapes[form.shape].append(form)
        for shape, some in shapes.items():
            if shape and (best := _winner(some, by_form)) is not None:
                _give_shape(table[name], row, shape, best, functools.partial(_cost, some, by_form))
    return table


def _cost(
    some: Sequence[Form],
    by_form: Mapping[str, Mapping[Setting, float]],
    tile: Setting,
) -> float:
    """ms of all these forms with one tile; infinite where one has no time."""
    return sum(form.count * by_form.get(str(form), {}).get(tile, math.inf) for form in some)


def _winner(some: Sequence[Form], by_form: Mapping[str, Mapping[Setting, float]]) -> Setting | None:
    tiles = {tile: None for found in by_form.values() for tile in found}
    best = min(tiles, key=lambda tile: _cost(some, by_form, tile), default=None)
    return None if best is None or math.isinf(_cost(some, by_form, best)) else best


def _give_shape(
    rows: dict[str, dict[str, int]],
    row: str,
    shape: str,
    best: Setting,
    cost: Callable[[Setting], float],
) -> None:
    """A row of the shape's own where the common one would cost more; where it does not, none."""
    common = cost(tuple(rows[row].items()))
    if cost(best) < (1 - MARGIN) * common:
        rows[f"{row}_{shape}"] = dict(best)
    else:
        rows.pop(f"{row}_{shape}", None)


def write(path: Path, table: Table) -> None:
    """A tile table, one row a line in an order of its own, written beside and renamed."""
    kernels = []
    for kernel, rows in table.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n  }")
    beside = path.with_name(f".{path.name}.new")
    beside.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    os.replace(beside, path)

"""Writes a GPU's tile table: `python -m bench.gpu --tune`.

Every row of the default table has a few candidates. Each is tried on the network's own shapes that use the
row: first by children at once, which compile it, and drop it where it fails, spills or answers wrongly; then
one after the other for its time. What there is no time for keeps the default row.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu_checks import check_form, forget_kernels, spilled
from bench.gpu_children import Answer, answers, program
from bench.gpu_forms import DTYPES, Form, forms, usable
from bench.gpu_times import timed
from kernels.common import CONFIGS, arithmetic, slug

# The kind that a row's arithmetic is timed in, the most wanted first.
KINDS = ("fp16", "tf32", "fp32")
# Images, by the size in a row's name; the others are for large batches.
BATCHES = {"large": 256, "small": 1}
# How the children's time and the timing's are shared.
CHECKING = 0.55
# A row of one shape's own must win by this much of the time.
MARGIN = 0.02

Setting = tuple[tuple[str, int], ...]  # a tile's names and numbers
Table = dict[str, dict[str, dict[str, int]]]

_PRODUCTS = [
    {"m": m, "n": n, "warps": warps, "stages": stages}
    for m, n, warps, stages in (
        (128, 128, 8, 3),
        (128, 64, 4, 4),
        (128, 64, 8, 3),
        (64, 64, 4, 3),
        (64, 128, 4, 3),
        (256, 64, 8, 3),
        (128, 32, 4, 3),
        (64, 32, 4, 4),
    )
]
_SMALL_PRODUCTS = [
    {"m": m, "n": n, "warps": warps, "stages": stages}
    for m, n, warps, stages in (
        (16, 32, 1, 4),
        (16, 64, 2, 4),
        (32, 64, 4, 4),
        (64, 32, 4, 3),
        (64, 64, 4, 3),
    )
]
_PATCHES = [
    {"rows": rows, "cols": cols, "block": block, "warps": warps}
    for rows, cols, block, warps in (
        (7, 2, 256, 2),
        (7, 2, 256, 4),
        (7, 1, 512, 4),
        (7, 1, 256, 4),
        (4, 2, 512, 4),
        (2, 2, 512, 4),
        (7, 2, 1024, 8),
        (4, 1, 256, 2),
    )
]
_SMALL_PATCHES = [
    {"rows": rows, "cols": cols, "block": block, "warps": warps}
    for rows, cols, block, warps in ((1, 1, 128, 1), (1, 2, 128, 2), (2, 1, 256, 2), (2, 2, 256, 4))
]
# By table and, where it matters, size: what is changed of the default row.
CHANGES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "stem": [{"m": m, "warps": warps} for m, warps in ((64, 2), (64, 4), (128, 8), (256, 8), (256, 4))],
    "depthwise large": _PATCHES,
    "depthwise small": _SMALL_PATCHES,
    "pointwise large": [*_PRODUCTS, {"k": 32}, {"k": 32, "stages": 4}],
    "pointwise small": [*_SMALL_PRODUCTS, {"k": 32}],
    "head": [*_PRODUCTS, {"images": 2}, {"images": 8}, {"images": 1}],
    "depthwise_input_s2 large": [
        {"rows": rows, "block": block, "warps": warps}
        for rows, block, warps in ((2, 512, 4), (4, 256, 2), (7, 512, 4), (4, 512, 8), (1, 512, 4))
    ],
    "depthwise_input_s2 small": [
        {"rows": 1, "block": 128, "warps": 1},
        {"rows": 2, "block": 256, "warps": 2},
    ],
    "depthwise_weight": _PATCHES,
    "pointwise_gradient": [*_PRODUCTS[:7], {"k": 32}, {"k": 128, "stages": 2}],
    "block": [{"slab": 32}, {"slab": 64}, {"slab": 32, "warps": 4}, {"slab": 64, "warps": 4}],
}


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


def candidates(table: str, row: str, shape: str, rows: Mapping[str, Mapping[str, int]]) -> list[Setting]:
    """Of one row on one shape, each once: what the default table has for them, and the row's changes."""
    size = row.partition("_")[0]
    changes = CHANGES.get(f"{table} {size}", CHANGES.get(table, []))
    # Products in full float32 are made on CUDA cores: a wide tile has no registers left.
    if row.endswith("ieee"):
        changes = changes[2:6]
    base = rows[row]
    made = [rows.get(f"{row}_{shape}", base), base]
    made += [{**base, **change} for change in changes if change.keys() <= base.keys()]
    return list(dict.fromkeys(tuple(tile.items()) for tile in made))


def tries() -> list[Try]:
    """All that is to be tried, in an order that parent and children share: fp16 and whole blocks first."""
    found, known = [], default_table()
    tuned = [form for form in forms() if form.table not in ("", "depthwise_project")]
    usable_forms = [form for form in tuned if usable(form)]
    for kind in KINDS:
        for form in sorted(usable_forms, key=_worth):
            if kind not in form.kinds():
                continue
            for row in form.rows:
                name = row.format(arithmetic(*DTYPES[kind]))
                if kind != KINDS[0] and name == row:
                    continue  # a row of every kind, which the first one settles
                batch = BATCHES.get(row.partition("_")[0], BATCHES["large"])
                found += [
                    Try(form.table, name, form.shape, form, kind, batch, tile)
                    for tile in candidates(form.table, name, form.shape, known[form.table])
                ]
    return found


def _worth(form: Form) -> int:
    """What is tuned first: whole blocks, then inference, then gradients."""
    return 0 if form.whole_block else 2 if "gradient" in form.name else 1


def check_try(one: Try) -> str:
    """Why a candidate is dropped, or ""."""
    forget_kernels()
    if why := check_form(one.form, one.kind, dict(one.tile)):
        return why
    spills = spilled()
    return f"{spills} registers spilled" if spills else ""


def time_try(one: Try) -> float:
    """Its median time, ms."""
    return timed(one.form.make(one.batch, one.kind, dict(one.tile)).run, rep=40)[0]


def tune(seconds: float, folder: Path = CONFIGS) -> Path:
    """Try all candidates within so many seconds, and write the GPU's table. Returns its file."""
    all_tries = tries()
    workers = max(1, min(12, (os.cpu_count() or 1) - 1))
    verdicts = answers(program("tiles"), range(len(all_tries)), CHECKING * seconds, workers)
    right = []
    for answer in verdicts:
        why = answer.failed or answer.found
        one = all_tries[answer.number]
        if why:
            print(f"dropped: {one.table} {one.row} {dict(one.tile)} on {one.form}: {why}")
        else:
            right.append(answer.number)
    print(f"{len(right)} of {len(all_tries)} candidates compile, answer rightly and do not spill")
    times = answers(program("tile times"), sorted(right), (1 - CHECKING) * seconds)
    table = chosen(all_tries, times)
    path = folder / f"{slug(torch.cuda.get_device_name())}.json"
    write(path, table)
    return path


def chosen(all_tries: Sequence[Try], times: Iterator[Answer]) -> Table:
    """The default table with the winners among what was timed, told as they are found.

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
        measured[one.table, one.row][str(one.form)][one.tile] = answer.found
    users: dict[tuple[str, str], dict[str, Form]] = collections.defaultdict(dict)
    for one in all_tries:
        users[one.table, one.row][str(one.form)] = one.form
    table = default_table()
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

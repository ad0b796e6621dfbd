"""`python -m bench.plot`: charts from the last runs of bench.peers, bench.kernels and bench.training, and the
table of bench.flowers.

With `--readme` the measured tables of README.md, each between its two markers, are written from the same
rows, so that no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import charts, contenders, kernels, peers, results
from .charts import OTHERS, OURS
from .contenders import CONTENDERS, Contender
from .flowers import plot as flowers
from .flowers import run as flowers_run
from .training import losses, run
from .training import plot as training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

README = results.ROOT / "README.md"
# What stands before and after a measured table, by what it is of.
MARKERS = {
    "peers": ("<!-- bench.plot: begin -->", "<!-- bench.plot: end -->"),
    "training": ("<!-- bench.plot training: begin -->", "<!-- bench.plot training: end -->"),
    "flowers": ("<!-- bench.plot flowers: begin -->", "<!-- bench.plot flowers: end -->"),
}

_CHART = "The same as a chart"

CsvRow = dict[str, str]

# Columns of speed: heading, batch, cores, whether images a second are shown instead of milliseconds.
_SPEEDS = (
    ("1 image, 1 core, ms", 1, 1, False),
    ("1 image, 2 cores, ms", 1, 2, False),
    ("16 images, 2 cores, images/s", 16, 2, True),
)


def fastest(rows: Sequence[CsvRow], who: Contender, batch: int, cores: int) -> CsvRow | None:
    """The contender's best form at a batch and a number of cores."""
    wanted = ("network", who.name, who.dtype, str(batch), str(cores))
    found = [r for r in rows if (r["name"], r["contender"], r["dtype"], r["batch"], r["threads"]) == wanted]
    return min(found, key=lambda row: float(row["ms"])) if found else None


def answers(rows: Sequence[CsvRow], who: Contender) -> CsvRow | None:
    """What is known of the contender's answers, file, start and memory."""
    wanted = ("answers", who.name, who.dtype)
    return next((r for r in rows if (r["name"], r["contender"], r["dtype"]) == wanted), None)


def last_run(path: Path) -> list[CsvRow]:
    """The rows of the last run of bench.peers.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was cut off before the first time was taken.
    """
    rows = results.read_last_run(path)
    if not any(row["name"] == "network" for row in rows):
        raise ValueError(
            f"the last run in {path} was cut off before it timed anything: run bench.peers again"
        )
    return rows


def present(rows: Sequence[CsvRow]) -> list[Contender]:
    """Everyone in the rows, in the order of `CONTENDERS`."""
    titles = {(row["contender"], row["dtype"]) for row in rows}
    return [who for who in CONTENDERS if (who.name, who.dtype) in titles]


def table(rows: Sequence[CsvRow]) -> str:
    """The rows as Markdown. A * marks rows whose medians alone and in turns differ by more than 10%."""
    timed = [row for row in rows if row["name"] == "network"]
    headings = [heading for heading, *_ in _SPEEDS]
    headings += ["float's first class", "file, MB", "first answer, ms", "memory, MB"]
    lines = ["| | | " + " | ".join(headings) + " |", "|---|---|" + "---:|" * len(headings)]
    dtype = ""
    for who in present(rows):
        cells = [_speed(rows, who, *speed[1:]) for speed in _SPEEDS]
        lines.append(
            f"| {who.dtype if who.dtype != dtype else ''} | {who.name} | "
            + " | ".join([*cells, *_facts(answers(rows, who))])
            + " |"
        )
        dtype = who.dtype
    first = timed[0]
    peak = ", ".join(
        f"{float(row['gmacs_peak']):.0f} on {row['threads']} core(s)"
        for row in {row["threads"]: row for row in timed}.values()
    )
    lines += [
        "",
        f"Medians in turns on {first['processor']}, {first['cores']} cores, fp32 peak {peak} GMAC/s; "
        f"{first['versions']}; weights {first['weights']}; commit {first['commit']}, {first['run'][:10]}. "
        "16 images on two cores: the best of one two-thread session, two one-thread streams (s), and these "
        "image by image (i). First class: of the float network, on photos that int8 was not "
        "calibrated on. First answer: of a fresh process, without imports. Memory: the most at one image "
        "over what the process held before loading.",
    ]
    if any(row["noisy"] == "True" for row in timed):
        lines[-1] += " \\*: the median with all others stopped differs by more than 10%."
    notes: dict[str, list[str]] = {}
    for who in present(rows):
        row = answers(rows, who)
        if row is not None and row["note"]:
            notes.setdefault(row["note"], []).append(who.title)
    lines[-1] += "".join(f" {' and '.join(titles)}: {note}." for note, titles in notes.items())
    return "\n".join(lines)


def _speed(rows: Sequence[CsvRow], who: Contender, batch: int, cores: int, rate: bool) -> str:
    row = fastest(rows, who, batch, cores)
    if row is None:
        return ""
    text = f"{float(row['images_per_s']):.0f}" if rate else f"{float(row['ms']):.2f}"
    form = {"session": "", "2 streams": " (s)"}.get(row["form"], " (i)")
    return text + ("\\*" if row["noisy"] == "True" else "") + form


def _facts(row: CsvRow | None) -> list[str]:
    """Agreement, file, first answer and memory, empty where not measured."""
    if row is None:
        return [""] * 4
    forms = (("agreement", "{:.1%}"), ("file_mb", "{:.1f}"), ("first_ms", "{:.0f}"), ("peak_mb", "{:.0f}"))
    return [form.format(float(row[name])) if row[name] else "" for name, form in forms]


def write_readme(text: str, readme: Path, name: str = "peers") -> None:
    """Put `text` between the markers of that name.

    Raises:
        ValueError: the file does not have the two markers in order.
    """
    first, last = MARKERS[name]
    page = readme.read_text(encoding="utf-8")
    begin, end = page.find(first), page.find(last)
    if begin < 0 or end < begin:
        raise ValueError(f"{readme} has no {first} followed by {last}: put them where the table belongs")
    readme.write_text(page[: begin + len(first)] + "\n" + text + "\n" + page[end:], encoding="utf-8")


def draw_peers(rows: Sequence[CsvRow], path: Path) -> None:
    """A panel for each speed and one for the answers; a line for each contender, by precision and speed."""
    plt = charts.pyplot()
    # The scalar kernels are there to be correct: their bar would flatten all the others.
    shown = [who for who in present(rows) if who.name != contenders.ENGINE_SCALAR]
    shown = [who for who in shown if fastest(rows, who, 1, 1)]
    groups = {who.title: f"{who.dtype}, AVX2" if who.name.endswith("avx2") else who.dtype for who in shown}
    order = list(dict.fromkeys(sorted(groups.values(), key=lambda g: contenders.DTYPES.index(g[:4]))))
    shown.sort(key=lambda who: (order.index(groups[who.title]), _value(rows, who, 1, 1, False) or 0.0))
    titles = [groups[who.title] for who in shown]
    places = charts.places(titles)
    figure, panels = plt.subplots(
        1,
        4,
        sharey=True,
        figsize=(14, 0.3 * len(places) + 1.8),
        layout="constrained",
        width_ratios=(3, 3, 3, 2),
    )
    colours = [OURS if who.ours else OTHERS for who in shown]
    for axes, (heading, batch, cores, rate) in zip(panels, _SPEEDS, strict=False):
        values = [_value(rows, who, batch, cores, rate) for who in shown]
        charts.bars(axes, places, values, colours, form="{:.0f}" if rate else "{:.2f}", cut=not rate)
        axes.set_title(f"{heading}\n({'more' if rate else 'less'} is better)", fontsize=10)
    agreements = [row["agreement"] if (row := answers(rows, who)) else "" for who in shown]
    _dots(panels[-1], places, [100 * float(text) if text else None for text in agreements], colours)
    charts.label(panels[0], [who.name for who in shown], titles)
    figure.suptitle(f"MobileNetV2 1.0, 224x224, {rows[0]['processor']}", fontsize=11)
    charts.save(figure, path)


def _value(rows: Sequence[CsvRow], who: Contender, batch: int, cores: int, rate: bool) -> float | None:
    row = fastest(rows, who, batch, cores)
    return float(row["images_per_s" if rate else "ms"]) if row else None


def _dots(axes: Axes, places: Sequence[int], values: Sequence[float | None], colours: Sequence[str]) -> None:
    """Shares of photos in percent, on a scale that shows what the last few lose."""
    known = [(p, v, c) for p, v, c in zip(places, values, colours, strict=True) if v is not None]
    low = min((value for _, value, _ in known), default=90.0) - 3
    for place, value, colour in known:
        axes.hlines(place, low, value, color=colour, linewidth=1)
        axes.scatter([value], [place], s=30, color=colour)
        axes.text(value + 0.4, place, f"{value:.1f}", va="center", fontsize=8)
    axes.set_xlim(low, 102)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.set_title("float's first class, %\n(more is better)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_kernels(rows: Sequence[CsvRow], path: Path) -> None:
    """Time of each layer by all its occurrences, ours beside torch's, and our share of the measured peak."""
    plt = charts.pyplot()
    mine, torchs = (
        {
            row["name"]: row
            for row in rows
            if row["contender"] == who and not row["name"].startswith("network")
        }
        for who in (kernels.OURS, kernels.TORCH)
    )
    names = list(mine)
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 0.24 * len(names) + 1.5), layout="constrained", width_ratios=(3, 1)
    )
    times = [
        [float(side[n]["ms"]) * int(side[n]["form"].removeprefix("x")) for n in names]
        for side in (mine, torchs)
    ]
    left.hlines(range(len(names)), *times, color=OTHERS, linewidth=1)
    for values, who, colour in zip(times, (kernels.OURS, kernels.TORCH), (OURS, OTHERS), strict=True):
        left.scatter(values, range(len(names)), s=25, color=colour, label=who, zorder=2)
    left.set_yticks(range(len(names)), labels=[f"{n} {mine[n]['form']}" for n in names], fontsize=7)
    left.invert_yaxis()
    left.margins(y=0.02)
    left.grid(axis="x", alpha=0.3)
    left.set(xscale="log", xlabel="ms in the network (log)")
    left.legend(fontsize=8, loc="lower right")
    right.barh(range(len(names)), [100 * float(mine[n]["gmacs_share"]) for n in names], color=OURS)
    right.set(xlim=(0, 100), xlabel="% of the measured FMA peak")
    first = next(iter(mine.values()))
    what = f"batch {first['batch']}, {first['threads']} thread(s), {first['isa']}"
    figure.suptitle(f"Layers, fp32, {what}, {first['processor']}", fontsize=10)
    charts.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what there are rows for; write the README's tables where asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, default=peers.OUTPUT, help="CSV file of bench.peers")
    parser.add_argument("--kernels", type=Path, default=kernels.OUTPUT, help="CSV file of bench.kernels")
    parser.add_argument("--training", type=Path, default=run.OUTPUT, help="CSV file of bench.training")
    parser.add_argument("--losses", type=Path, default=losses.OUTPUT, help="that of bench.training --losses")
    parser.add_argument("--flowers", type=Path, default=flowers_run.OUTPUT, help="that of bench.flowers")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="where the pictures go")
    parser.add_argument("--readme", action="store_true", help="write the tables and charts into README.md")
    options = parser.parse_args(arguments)
    files = (options.peers, options.kernels, options.training, options.losses, options.flowers)
    if not any(file.exists() for file in files):
        parser.error(f"none of {', '.join(map(str, files))} is there: run a benchmark first")

    def picture(name: str) -> Path:
        path: Path = options.folder / f"{name}.png"
        return path

    def insert(name: str, text: str, **charts: str) -> None:
        """A table and charts, each with its title, where the README has its markers."""
        if options.readme:
            links = (
                f"![{title}]({os.path.relpath(picture(n), README.parent)})" for n, title in charts.items()
            )
            write_readme("\n\n".join([text, *links]), README, name)
            print(f"written: the table of {name} in {README}")

    try:
        if options.kernels.exists():
            draw_kernels(results.read_last_run(options.kernels), picture("kernels"))
        if options.peers.exists():
            draw_peers(last_run(options.peers), picture("peers"))
            insert("peers", table(last_run(options.peers)), peers=_CHART)
        learned = {}
        if options.losses.exists():
            training.draw_losses(results.read_last_run(options.losses), picture("losses"))
            learned = {"losses": "Losses of the same steps by each"}
        if options.training.exists():
            runs = training.last_runs(options.training)
            training.draw(runs[0], picture("training"))
            insert("training", training.table(*runs), training=_CHART, **learned)
        if options.flowers.exists():
            insert("flowers", flowers.table(results.read_last_run(options.flowers)))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.plot`: charts from the last runs of bench.model and bench.kernels.

With `--readme` the measured table of README.md, between its two markers, is written from the same rows, so
that no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import kernels, model, peers, results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

README = results.ROOT / "README.md"
BEGIN, END = "<!-- bench.plot: begin -->", "<!-- bench.plot: end -->"
OURS, OTHERS = "#1f6f4a", "#9aa5b1"

CsvRow = dict[str, str]


def fastest(rows: Sequence[CsvRow], contender: str, batch: int, cores: int) -> CsvRow | None:
    """The contender's best form at a batch and a number of cores."""
    found = [
        r for r in rows if (r["contender"], r["batch"], r["threads"]) == (contender, str(batch), str(cores))
    ]
    return min(found, key=lambda row: float(row["ms"])) if found else None


def contenders(rows: Sequence[CsvRow]) -> list[str]:
    """Everyone in the rows, in the order of `peers.PEERS`."""
    present = {row["contender"] for row in rows}
    return [peer.name for peer in peers.PEERS if peer.name in present]


# Columns of the table: heading, batch, cores, whether images a second are shown instead of milliseconds.
_COLUMNS = (
    ("batch 1, 1 core, ms", 1, 1, False),
    ("batch 1, 2 cores, ms", 1, 2, False),
    ("batch 16, 1 core, images/s", 16, 1, True),
    ("batch 16, 2 cores, images/s", 16, 2, True),
)


def table(rows: Sequence[CsvRow]) -> str:
    """The rows as Markdown. A * marks rows whose medians alone and in turns differ by more than 10%."""
    columns = [
        column for column in _COLUMNS if any(_cell(rows, name, *column[1:]) for name in contenders(rows))
    ]
    first = rows[0]
    lines = [
        "| fp32, 224x224 | " + " | ".join(column[0] for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name in contenders(rows):
        lines.append(f"| {name} | " + " | ".join(_cell(rows, name, *column[1:]) for column in columns) + " |")
    peak = ", ".join(
        f"{float(row['gmacs_peak']):.0f} GMAC/s on {row['threads']} core(s)"
        for row in {row["threads"]: row for row in rows}.values()
    )
    lines += [
        "",
        f"Medians in turns on {first['processor']}, {first['cores']} cores, measured peak {peak}; "
        f"{first['versions']}; weights {first['weights']}; commit {first['commit']}, {first['run'][:10]}. "
        "At batch 16 on two cores: the better of one two-thread session and two one-thread streams.",
    ]
    if any(row["noisy"] == "True" for row in rows):
        lines[-1] += " \\*: the median with all others stopped differs by more than 10%."
    return "\n".join(lines)


def _cell(rows: Sequence[CsvRow], name: str, batch: int, cores: int, rate: bool) -> str:
    row = fastest(rows, name, batch, cores)
    if row is None:
        return ""
    text = f"{float(row['images_per_s']):.0f}" if rate else f"{float(row['ms']):.2f}"
    form = f" ({row['form']})" if row["form"] != "session" else ""
    return text + ("\\*" if row["noisy"] == "True" else "") + form


def write_readme(text: str, readme: Path) -> None:
    """Put `text` between the markers.

    Raises:
        ValueError: the file does not have the two markers in order.
    """
    page = readme.read_text(encoding="utf-8")
    begin, end = page.find(BEGIN), page.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"{readme} has no {BEGIN} followed by {END}: put them where the table belongs")
    readme.write_text(page[: begin + len(BEGIN)] + "\n" + text + "\n" + page[end:], encoding="utf-8")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str, digits: int) -> None:
    colours = [OURS if name.startswith(peers.ENGINE) else OTHERS for name in names]
    bars = axes.barh(range(len(names)), values, color=colours)
    axes.bar_label(bars, labels=[f"{value:.{digits}f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), labels=list(names), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def draw_model(rows: Sequence[CsvRow], path: Path) -> None:
    """One panel for each column of the table."""
    plt = _pyplot()
    columns = [c for c in _COLUMNS if any(fastest(rows, name, c[1], c[2]) for name in contenders(rows))]
    figure, panels = plt.subplots(
        (len(columns) + 1) // 2, min(2, len(columns)), figsize=(10, 5.5), layout="constrained", squeeze=False
    )
    for axes, (heading, batch, cores, rate) in zip(panels.flat, columns, strict=False):
        found = [(name, fastest(rows, name, batch, cores)) for name in contenders(rows)]
        # The scalar kernels are there to be correct: their bar would flatten all the others.
        shown = [(name, row) for name, row in found if row is not None and name != peers.ENGINE_SCALAR]
        values = [float(row["images_per_s" if rate else "ms"]) for _, row in shown]
        order = sorted(range(len(shown)), key=values.__getitem__, reverse=rate)
        better = "more is better" if rate else "less is better"
        _bars(
            axes,
            [shown[i][0] for i in order],
            [values[i] for i in order],
            f"{heading} ({better})",
            0 if rate else 2,
        )
    for axes in panels.flat[len(columns) :]:
        axes.set_visible(False)
    figure.suptitle(f"MobileNetV2 1.0, 224x224, fp32, {rows[0]['processor']}", fontsize=10)
    _save(figure, path)


def draw_kernels(rows: Sequence[CsvRow], path: Path) -> None:
    """Time of each layer by all its occurrences, ours beside torch's, and our share of the measured peak."""
    plt = _pyplot()
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
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    print(f"drawn: {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what there are rows for; write the README's table where asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=model.OUTPUT, help="CSV file of bench.model")
    parser.add_argument("--kernels", type=Path, default=kernels.OUTPUT, help="CSV file of bench.kernels")
    parser.add_argument("--folder", type=Path, default=results.FOLDER, help="where the pictures go")
    parser.add_argument("--readme", action="store_true", help="write the table and the chart into README.md")
    options = parser.parse_args(arguments)
    drawn = 0
    for path, draw, name in (
        (options.model, draw_model, "model.png"),
        (options.kernels, draw_kernels, "kernels.png"),
    ):
        if path.exists():
            draw(results.read_last_run(path), options.folder / name)
            drawn += 1
    if not drawn:
        parser.error(
            f"neither {options.model} nor {options.kernels} is there: run bench.model or bench.kernels"
        )
    if options.readme:
        chart = os.path.relpath(options.folder / "model.png", README.parent)
        try:
            text = table(results.read_last_run(options.model))
            write_readme(f"{text}\n\n![The same as a chart]({chart})", README)
        except (FileNotFoundError, ValueError) as error:
            parser.error(str(error))
        print(f"written: the table of {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

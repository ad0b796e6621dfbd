"""Charts as PNG files: learning curves, confusion, mistakes, reliability, bars with spread.

Each file appears whole or not at all. Figures are drawn without pyplot, so that nothing of the process's own
matplotlib is changed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from . import data
from .errors import UserError
from .files import replacing
from .metrics import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One dictionary an epoch, as in results.csv: "epoch", and figures whose names end in "loss" or "top1".
History = Sequence[Mapping[str, Any]]
Values = Sequence[Sequence[float]]  # of each step, one for each seed

MOST_CLASSES = 30  # in a confusion matrix; of more, the most confused ones
MOST_MISTAKES = 20

GREEN, GREY, RED = "#1f6f4a", "#9aa5b1", "#b3402e"
# Okabe and Ito's, which differ for the colour-blind too; black last.
COLOURS = ("#009e73", "#d55e00", "#0072b2", "#e69f00", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f", "#000000")

# Figures of results.csv, less their kind, in words.
_FIGURES = {"train": "training", "val": "validation", "ema_val": "validation, averaged weights"}

_DPI = 130
_COLUMNS = 5  # of photos in a row
_BOX = (256, 200)  # pixels for each: most photos lie
_LONGEST = 26  # characters of a name
# For scripts that matplotlib's own font lacks; those that are installed are used.
_MORE_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic", "Noto Sans")


def check() -> None:
    """Make sure that charts can be drawn; imports nothing.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("charts need matplotlib: pip install 'mnv2-fast[train]'")


def run_plots(folder: str | os.PathLike[str], history: History, evaluation: Evaluation) -> None:
    """The charts of a training run: curves.png, confusion.png and mistakes.png in its folder.

    Args:
        folder: of the run; it is there.
        history: the rows of its results.csv.
        evaluation: of the final network on the validation photos.

    Raises:
        UserError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    place = Path(folder)
    curves(place / "curves.png", {"": [history]})
    evaluation_plots(place, evaluation)


def evaluation_plots(folder: Path, evaluation: Evaluation) -> None:
    """confusion.png and mistakes.png in a folder."""
    confusion(folder / "confusion.png", evaluation.classes, evaluation.confusion)
    mistakes(folder / "mistakes.png", evaluation)


def curves(path: Path, runs: Mapping[str, Sequence[History]], columns: Sequence[str] | None = None) -> None:
    """Loss and accuracy over epochs.

    Args:
        path: of the PNG file.
        runs: name -> the histories of its seeds. Of several the mean is drawn, in a band from the least to
            the most. One name has a colour for each figure, several a colour each.
        columns: which figures; by default all that end in "loss" or "top1".
    """
    first = next((row for seeds in runs.values() for history in seeds for row in history), {})
    names = columns or [name for name in first if name.endswith(("loss", "top1"))]
    with _drawing() as new_figure:
        figure = new_figure(14 if len(runs) > 1 else 11, 4.4)
        for axes, kind, factor in zip(figure.subplots(1, 2), ("loss", "top1"), (1, 100), strict=True):
            drawn = [name for name in names if name.endswith(kind)]
            for i, (run, seeds) in enumerate(runs.items()):
                for j, name in enumerate(drawn):
                    what = name.removesuffix(f"_{kind}")
                    what = _FIGURES.get(what, what.replace("_", " "))
                    label = what if len(runs) == 1 else f"{run}, {what}" if len(drawn) > 1 else run
                    colour = COLOURS[(i if len(runs) > 1 else j) % len(COLOURS)]
                    style = "--" if len(runs) > 1 and j > 0 else "-"
                    _curve(axes, seeds, name, factor, color=colour, label=label, linestyle=style)
            unit = "top-1, %" if kind == "top1" else "loss"
            only = drawn[0].removesuffix(f"_{kind}") if len(drawn) == 1 else ""
            _tidy_curves(axes, f"{_FIGURES.get(only, only.replace('_', ' '))} {unit}".strip())
            if len(runs) == 1 and axes.lines:
                axes.legend(frameon=False)
        if len(runs) > 1:
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
        _save(figure, path)


def _tidy_curves(axes: Axes, heading: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epoch", ylabel=heading)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Axes, seeds: Sequence[History], column: str, factor: float, **line: Any) -> None:
    by_epoch: dict[float, list[float]] = {}
    for history in seeds:
        for row in history:
            value = row.get(column)
            if value not in (None, "") and math.isfinite(float(value)):
                by_epoch.setdefault(float(row["epoch"]), []).append(factor * float(value))
    epochs = sorted(by_epoch)
    values = [by_epoch[epoch] for epoch in epochs]
    marker = "o" if len(epochs) < 30 else ""
    axes.plot(epochs, [float(np.mean(found)) for found in values], marker=marker, markersize=3, **line)
    if len(seeds) > 1:
        least, most = [min(found) for found in values], [max(found) for found in values]
        axes.fill_between(epochs, least, most, color=line["color"], alpha=0.15, lw=0)


def confusion(path: Path, classes: Sequence[str], confused: Tensor) -> None:
    """The confusion matrix: counts, coloured by the share of the true class.

    Of more than `MOST_CLASSES` classes those that are most often taken for each other are shown.

    Args:
        path: of the PNG file.
        classes: C names.
        confused: int64 [C, C], as `Evaluation.confusion`.
    """
    shown, counts = list(range(len(classes))), confused.numpy()
    if len(shown) > MOST_CLASSES:
        wrong = counts - np.diag(np.diag(counts))
        worst = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MOST_CLASSES]
        shown = sorted(worst.tolist())
    cells = counts[np.ix_(shown, shown)]
    shares = cells / np.maximum(counts[shown].sum(1, keepdims=True), 1)
    names = [shorten(classes[i]) for i in shown]
    n = len(shown)
    title = f"top-1 {np.trace(counts) / counts.sum():.1%} of {counts.sum()} photos"
    if n < len(classes):
        title += f"\nthe {n} of {len(classes)} classes most often confused"
    with _drawing() as new_figure:
        margin = 0.7 + 0.075 * max(map(len, names))
        side = max(3.2, 0.42 * n)
        figure = new_figure(side + margin + 1.1, side + margin)
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
        axes.set_title(title, fontsize=11)
        size = 9 if n <= 12 else 7
        _name_cells(axes, names, size)
        for i, j in np.argwhere(cells).tolist():
            text = str(cells[i, j])
            colour = "white" if shares[i, j] > 0.55 else "black"
            fits = size + 1 if len(text) < 4 else size - 2
            axes.text(j, i, text, ha="center", va="center", fontsize=fits, color=colour)
        bar = figure.colorbar(image, ax=axes, shrink=0.6, format=lambda value, _: f"{value:.0%}")
        bar.set_label("share of the true class")
        bar.outline.set_visible(False)
        _save(figure, path)


def _name_cells(axes: Axes, names: Sequence[str], size: float) -> None:
    """The names of rows and columns, and lines between the cells."""
    between = np.arange(len(names) + 1) - 0.5
    axes.set_xticks(
        range(len(names)), labels=names, fontsize=size, rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(names)), labels=names, fontsize=size)
    axes.set_xticks(between, minor=True)
    axes.set_yticks(between, minor=True)
    axes.grid(which="minor", color="#e4e7ea", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="predicted", ylabel="true class")
    axes.spines[:].set_visible(False)


def mistakes(path: Path, evaluation: Evaluation, most: int = MOST_MISTAKES) -> None:
    """The photos taken for another class with their true one, those with the highest score first."""
    wrong = evaluation.mistakes()
    shown = wrong[:most] if evaluation.paths else []
    columns = min(_COLUMNS, max(3, len(shown)))
    rows = -(-len(shown) // columns)
    title = f"photos taken for another class: {len(wrong)} of {len(evaluation)}"
    if 0 < len(shown) < len(wrong):
        title += f"; here the {len(shown)} with the highest score"
    if shown:
        title += "\nblack: the true class; red: the predicted one and its score"
    with _drawing() as new_figure:
        figure = new_figure(2.3 * columns, 2.25 * rows + 0.7)
        figure.suptitle(title, fontsize=11)
        for place, i in enumerate(shown):
            axes = figure.add_subplot(rows, columns, place + 1)
            axes.imshow(_thumbnail(evaluation.paths[i]))
            axes.set_axis_off()
            true, taken = (
                shorten(evaluation.classes[int(of[i])]) for of in (evaluation.targets, evaluation.predicted)
            )
            axes.set_title(f"{true}\n", fontsize=9, pad=3)
            score = _percent(evaluation.scores[i].item())
            where = {"xy": (0.5, 1), "xycoords": "axes fraction", "xytext": (0, 3), "ha": "center"}
            axes.annotate(f"{taken} {score}", **where, textcoords="offset points", fontsize=9, color=RED)
        _save(figure, path)


def _thumbnail(path: Path) -> Image.Image:
    """The whole photo at the top of a white box; a grey box where it cannot be read any more."""
    try:
        photo = data.read_image(path).copy()
    except (UserError, OSError):
        return Image.new("RGB", _BOX, GREY)
    photo.thumbnail(_BOX)
    box = Image.new("RGB", _BOX, "white")
    box.paste(photo, ((_BOX[0] - photo.width) // 2, 0))
    return box


def reliability(path: Path, evaluation: Evaluation) -> None:
    """Share of right answers against their score, and how many answers have which score."""
    bins = evaluation.reliability()
    places, width = [(row.low + row.high) / 2 for row in bins], bins[0].high - bins[0].low
    with _drawing() as new_figure:
        figure = new_figure(5.2, 6)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], "--", color=GREY, label="score = share right")
        filled = [(place, row) for place, row in zip(places, bins, strict=True) if row.photos]
        above.bar(
            [place for place, _ in filled],
            [row.accuracy for _, row in filled],
            0.92 * width,
            color=GREEN,
            label="share right",
        )
        above.scatter(
            [place for place, _ in filled],
            [row.confidence for _, row in filled],
            s=16,
            color=RED,
            zorder=3,
            label="mean score",
        )
        for place, row in filled:
            above.vlines(place, *sorted((row.accuracy, row.confidence)), color=RED, linewidth=1)
        above.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share right")
        above.legend(frameon=False, fontsize=9, loc="upper left")
        below.bar(places, [row.photos for row in bins], 0.92 * width, color=GREY)
        below.set(xlabel="score of the predicted class", ylabel="photos")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
        error = evaluation.calibration_error()
        figure.suptitle(f"expected calibration error {100 * error:.1f} points, {len(bins)} bins", fontsize=11)
        _save(figure, path)


def lines(path: Path, panels: Mapping[str, Mapping[str, Values]], ticks: Sequence[str], heading: str) -> None:
    """Lines over a few steps, such as strengths, one panel beside another with the same lines and scale.

    Args:
        path: of the PNG file.
        panels: heading -> name -> values of each step. Of several the mean is drawn, in a band from the least
            to the most.
        ticks: names of the steps.
        heading: of what is measured.
    """
    with _drawing() as new_figure:
        figure = new_figure(2.7 * len(panels) + 2.6, 3.4)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
            for i, (name, values) in enumerate(rows.items()):
                colour = COLOURS[i % len(COLOURS)]
                means = [float(np.mean(found)) for found in values]
                axes.plot(range(len(ticks)), means, color=colour, label=name, marker="o", markersize=4)
                least, most = [min(found) for found in values], [max(found) for found in values]
                axes.fill_between(range(len(ticks)), least, most, color=colour, alpha=0.15, lw=0)
            axes.set_title(title, fontsize=10)
            axes.set_xticks(range(len(ticks)), labels=ticks, fontsize=9)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_ylabel(heading)
        handles, names = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
        _save(figure, path)


class Bar(NamedTuple):
    """A bar: the mean of its values, with each value as a dot where there are several."""

    label: str
    values: Sequence[float]
    colour: str = GREEN


def bars(path: Path, panels: Mapping[str, Sequence[Bar]]) -> None:
    """Horizontal bars, one panel beside another, with the same labels in the same order.

    Args:
        path: of the PNG file.
        panels: heading -> its bars. A bar without values is said to be missing.
    """
    labels = [shorten(bar.label, 40) for bar in next(iter(panels.values()))]
    with _drawing() as new_figure:
        wide = 0.08 * max(map(len, labels), default=0)
        figure = new_figure(wide + 3.6 * len(panels), 0.36 * len(labels) + 1.2)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (heading, rows) in zip(all_axes, panels.items(), strict=True):
            most = max((max(bar.values) for bar in rows if bar.values), default=1.0) or 1.0
            for i, bar in enumerate(rows):
                mean = float(np.mean(bar.values)) if bar.values else 0.0
                end = max(bar.values, default=0.0)
                axes.barh(i, mean, color=bar.colour, height=0.7)
                if len(bar.values) > 1:
                    axes.hlines(i, min(bar.values), end, color="black", linewidth=1)
                    axes.scatter(bar.values, [i] * len(bar.values), s=9, color="black", zorder=3)
                text = f"{mean:.1f}" if bar.values else "none"
                axes.text(end + 0.02 * most, i, text, va="center", fontsize=9)
            axes.set_xlim(0, 1.2 * most)
            axes.set_title(heading, fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_yticks(range(len(labels)), labels=labels, fontsize=9)
        all_axes[0].invert_yaxis()
        _save(figure, path)


def shorten(name: str, longest: int = _LONGEST) -> str:
    """A name in one line of at most so many characters."""
    text = " ".join(name.split())
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"


def _percent(share: float) -> str:
    """A share without a 100% that is none."""
    return f"{min(share, 0.999):.1%}" if 0.995 <= share < 1 else f"{share:.0%}"


@contextlib.contextmanager
def _drawing() -> Iterator[Any]:
    """Gives what makes a figure of so many inches; names are drawn as they are, whatever is in them."""
    check()
    from matplotlib import font_manager, rc_context
    from matplotlib.figure import Figure

    there = set(font_manager.get_font_names())
    settings: Any = {
        "font.family": ["DejaVu Sans", *(name for name in _MORE_FONTS if name in there)],
        "text.parse_math": False,  # "$" in a class name
        "axes.unicode_minus": False,
    }
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # a box is drawn in its place
        yield lambda width, height: Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=_DPI, format="png", bbox_inches="tight", pad_inches=0.1)

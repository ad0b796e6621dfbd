"""What every chart of bar rows shares: colours, bars with their values, titles of groups, the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS = "#1f6f4a", "#9aa5b1"


def pyplot() -> Any:
    """matplotlib's, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    print(f"drawn: {path}")


def places(groups: Sequence[str]) -> list[int]:
    """Where each row of a chart stands: one below the other, with a gap above each group for its title.

    Args:
        groups: of each row; rows of a group follow each other.
    """
    order = list(dict.fromkeys(groups))
    return [i + order.index(group) for i, group in enumerate(groups)]


def label(axes: Axes, names: Sequence[str], groups: Sequence[str]) -> None:
    """The rows' names and the groups' titles, on the leftmost axes."""
    rows = places(groups)
    axes.set_yticks(rows, labels=names, fontsize=9)
    for group in dict.fromkeys(groups):
        axes.text(
            -0.02,
            rows[groups.index(group)] - 0.9,
            group,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=11,
            weight="bold",
        )
    axes.set_ylim(rows[-1] + 0.7, -1.5)


def bars(
    axes: Axes,
    rows: Sequence[int],
    values: Sequence[float | None],
    colours: Sequence[str],
    *,
    form: str,
    cut: bool = False,
) -> None:
    """Bars with their values in `form`; with `cut` those far longer than the rest are cut off and say so."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return
    end = 1.25 * known[-1]
    if cut:
        end = min(end, 3.2 * known[len(known) // 2])
    drawn = [0.0 if value is None else min(value, 0.8 * end) for value in values]
    axes.barh(rows, drawn, color=colours)
    for row, value, width in zip(rows, values, drawn, strict=True):
        text = "not timed" if value is None else form.format(value)
        if value is not None and value > width:
            text += " »"
        axes.text(width + 0.015 * end, row, text, va="center", fontsize=8)
    axes.set_xlim(0, end)
    axes.spines[["top", "right"]].set_visible(False)

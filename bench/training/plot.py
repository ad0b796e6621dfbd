"""Table and charts of training, from the last runs of bench.training; `bench.plot` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import charts, results
from .contenders import CONTENDERS, DTYPES, OURS, SETTINGS, STEP, find
from .losses import CURVES

CsvRow = dict[str, str]

_COLOURS = dict(zip(CURVES, ("black", charts.OTHERS, charts.OURS), strict=True))


def last_runs(path: Path) -> list[list[CsvRow]]:
    """The rows of the last run of bench.training on each processor, the newest one first.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the newest one timed no training step in its setting `step`.
    """
    runs = results.read_last_runs(path)
    rows = runs[0]
    if not any(row["name"] == STEP for row in rows):
        raise ValueError(
            f"the last run in {path} has no row of the setting {STEP!r}: run bench.training again"
        )
    return runs


def steps(rows: Sequence[CsvRow], dtype: str) -> list[CsvRow]:
    """The rows of a training step in a precision, in the order of `CONTENDERS`."""
    found = {row["contender"]: row for row in rows if (row["name"], row["dtype"]) == (STEP, dtype)}
    return [found[who.name] for who in CONTENDERS if who.name in found]


def pairs(rows: Sequence[CsvRow]) -> list[tuple[str, CsvRow, CsvRow]]:
    """(title, ours, torch's fastest) of every setting and precision that has both."""
    found = []
    for setting in SETTINGS:
        for dtype in setting.dtypes:
            there = [row for row in rows if (row["name"], row["dtype"]) == (setting.name, dtype)]
            ours = [row for row in there if row["contender"] == OURS]
            torchs = [row for row in there if row["contender"] != OURS]
            if ours and torchs:
                found.append((setting.title, ours[0], min(torchs, key=lambda row: float(row["ms"]))))
    return found


def table(rows: Sequence[CsvRow], *elsewhere: Sequence[CsvRow]) -> str:
    """A step by everyone, then ours beside torch's best in every setting, as Markdown.

    `elsewhere`: runs on other processors, of which there is the second table alone.
    """
    lines = _head(("", ""), ("images/s", "a step, ms", "memory, MB", "the first step, s"))
    for dtype in DTYPES:
        for i, row in enumerate(steps(rows, dtype)):
            cells = [_rate(row), f"{float(row['ms']):.0f}", _memory(row)]
            cells += [f"{float(row['first_ms']) / 1e3:.1f}"]
            lines.append(f"| {'' if i else dtype} | {row['contender']} | {' | '.join(cells)} |")
    lines += ["", *_beside_best(rows)]
    lines += [
        "",
        "A step: zero_grad, forward, cross entropy, backward, optimizer. Medians in turns, each a fresh "
        f"process, on {_where(rows)}. bf16: under autocast. Tuned: the allocator is told to keep its memory. "
        "Memory: the most over what the process held with model, optimizer and images made. The first step "
        "of torch.compile compiles. The classic script: NCHW from a DataLoader, Adam, nothing tuned.",
    ]
    if any(row["noisy"] == "True" for run in (rows, *elsewhere) for row in run):
        lines[-1] += " \\*: the medians of its turns differ by more than 10%."
    lines[-1] += _reasons(rows)
    for other in filter(pairs, elsewhere):
        lines += ["", f"The same on {_where(other)}.{_reasons(other)}", "", *_beside_best(other)]
    return "\n".join(lines)


def _where(rows: Sequence[CsvRow]) -> str:
    """What was measured, and by what."""
    first = rows[0]
    # A setting with a batch of its own says so in its title.
    batch = next((row["batch"] for row in rows if row["name"] == STEP), first["batch"])
    return (
        f"{first['processor']}, {first['cores']} cores, {first['threads']} threads; {batch} images where no "
        f"batch is named, {first['size']}x{first['size']}; {first['versions']}; commit {first['commit']}, "
        f"{first['run'][:10]}"
    )


def _reasons(rows: Sequence[CsvRow]) -> str:
    """Why ours ran on torch's kernels, where it did."""
    found = dict.fromkeys((row["dtype"], row["note"]) for row in rows if row["note"])
    return "".join(f" {OURS}, {dtype}, on torch's kernels: {note}." for dtype, note in found)


def _beside_best(rows: Sequence[CsvRow]) -> list[str]:
    """Ours beside torch's best in every setting, as lines of Markdown."""
    numbers = (f"{OURS}, images/s", "torch, images/s", "ratio", f"{OURS}, MB", "torch, MB")
    lines = _head(("", "", "torch's best"), numbers)
    for title, ours, best in pairs(rows):
        ratio = f"{float(best['ms']) / float(ours['ms']):.2f}x"
        cells = [_rate(ours), _rate(best), ratio, _memory(ours), _memory(best)]
        lines.append(f"| {title} | {ours['dtype']} | {best['contender']} | {' | '.join(cells)} |")
    return lines


def _head(texts: Sequence[str], numbers: Sequence[str]) -> list[str]:
    """A Markdown table's head, with columns of numbers to the right."""
    return [f"| {' | '.join([*texts, *numbers])} |", "|" + "---|" * len(texts) + "---:|" * len(numbers)]


def _rate(row: CsvRow) -> str:
    return f"{float(row['images_per_s']):.1f}" + ("\\*" if row["noisy"] == "True" else "")


def _memory(row: CsvRow) -> str:
    return f"{float(row['peak_mb']):.0f}"


def draw(rows: Sequence[CsvRow], path: Path) -> None:
    """Speed and memory of everyone, and our ratio to torch's best in every setting."""
    shown, compared = [row for dtype in DTYPES for row in steps(rows, dtype)], pairs(rows)
    figure, (speed, memory, ratio) = charts.pyplot().subplots(
        1,
        3,
        figsize=(14, 0.3 * max(len(shown), len(compared)) + 2.2),
        layout="constrained",
        width_ratios=(3, 3, 4),
    )
    groups = [row["dtype"] for row in shown]
    places = charts.places(groups)
    colours = [charts.OURS if find(row["contender"]).ours else charts.OTHERS for row in shown]
    charts.bars(speed, places, [float(row["images_per_s"]) for row in shown], colours, form="{:.1f}")
    charts.bars(memory, places, [float(row["peak_mb"]) for row in shown], colours, form="{:.0f}")
    memory.sharey(speed)
    memory.tick_params(labelleft=False)
    charts.label(speed, [row["contender"] for row in shown], groups)
    values = [float(best["ms"]) / float(ours["ms"]) for _, ours, best in compared]
    groups = [title for title, _, _ in compared]
    colours = [charts.OURS] * len(compared)
    charts.bars(ratio, charts.places(groups), values, colours, form="{:.2f}x")
    charts.label(ratio, [ours["dtype"] for _, ours, _ in compared], groups)
    ratio.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=0)
    for axes, title in (
        (speed, "images/s\n(more is better)"),
        (memory, "memory of a step, MB\n(less is better)"),
        (ratio, f"{OURS} over torch's best\n(more is better)"),
    ):
        axes.set_title(title, fontsize=10)
    first = shown[0]
    what = f"batch {first['batch']}, {first['size']}x{first['size']}, {first['threads']} threads"
    figure.suptitle(f"Training MobileNetV2 1.0, {what}, {first['processor']}", fontsize=11)
    charts.save(figure, path)


def draw_losses(rows: Sequence[CsvRow], path: Path) -> None:
    """Everyone's losses in each precision, and below them how far the others are from the first curve."""
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    figure, panels = charts.pyplot().subplots(
        2,
        len(dtypes),
        squeeze=False,
        sharex=True,
        sharey="row",
        figsize=(6 * len(dtypes), 6),
        layout="constrained",
        height_ratios=(2, 1),
    )
    for dtype, (above, below) in zip(dtypes, panels.T, strict=True):
        curves = {
            name: [float(row["loss"]) for row in rows if (row["contender"], row["dtype"]) == (name, dtype)]
            for name in CURVES
        }
        for name, values in curves.items():
            steps_done = range(1, len(values) + 1)
            above.plot(steps_done, values, color=_COLOURS[name], linewidth=1.2, label=name)
            reference = curves[CURVES[0]]
            if name != CURVES[0] and len(values) == len(reference):
                apart = [abs(a - b) for a, b in zip(values, reference, strict=True)]
                below.plot(steps_done, apart, color=_COLOURS[name], linewidth=1.2, label=name)
        above.set(title=dtype, ylabel="loss")
        below.set_yscale("log", nonpositive="mask")
        below.set_xlabel("step")
        below.set_ylabel(f"distance from\n{CURVES[0]}", fontsize=9)
        for axes in (above, below):
            axes.label_outer()
            axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=9)
    first = rows[0]
    what = f"{first['form']}, batch {first['batch']}, {first['size']}x{first['size']}, SGD"
    what += f", weights {first['weights']}\n{first['processor']}, commit {first['commit']}"
    figure.suptitle(f"Losses from one seed: {what}", fontsize=11)
    charts.save(figure, path)

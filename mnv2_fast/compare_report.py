"""A comparison as Markdown with charts. Every sentence is made of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from . import files, plots
from .compare import Comparison, Result
from .contenders import AUGMENT, AUGMENTED, PLAIN, Contender
from .corruptions import CORRUPTIONS
from .plots import Bar
from .report import REPORT, escape, percent, table

STRENGTHS = ("clean", "1", "2", "3")
_LENET, _MOBILENET = plots.GREY, plots.GREEN


def write(out: Path, found: Comparison, facts: Mapping[str, str]) -> None:
    """Charts, then report.md at last. Files there are replaced.

    Args:
        out: a folder that is there.
        found: what to tell.
        facts: of the machine and the software, for the report's head: name -> value.

    Raises:
        UserError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    plots.check()
    shown = [contender for contender in found.contenders if not contender.ablation]
    parts = ["# Comparison", _head(found, facts)]
    if shown:
        parts += _accuracy(out, found, shown)
        parts += _robustness(out, found, shown)
    parts += _augmentation(out, found)
    parts += _costs(found)
    parts += _recipes(found)
    if shown:
        parts += _curves(out, found, shown)
        parts += _confusions(out, found, shown)
    files.write_text(out / REPORT, "\n\n".join(parts) + "\n")


def _head(found: Comparison, facts: Mapping[str, str]) -> str:
    settings = found.settings
    seeds = max(map(len, found.results.values()))
    budget = f"{settings.epochs} epochs"
    if settings.seconds is not None:
        budget = f"whole epochs within {settings.seconds:g} s of training"
    rows = {
        "photos": f"{settings.train} to train on, {settings.val} to validate on; their names' SHA-256 is "
        f"{settings.photos[:16]}...",
        "classes": ", ".join(settings.classes),
        "each run": f"{budget}, {settings.batch_size} photos a step",
        "seeds": f"{seeds}, of weights, order and augmentation; the split is the same",
        "fine-tuned from": settings.weights,
        **facts,
    }
    if found.skipped:
        rows["left out"] = f"{found.skipped} photos that could not be used"
    return table(["", ""], [[name, escape(value)] for name, value in rows.items()])


def _accuracy(out: Path, found: Comparison, shown: Sequence[Contender]) -> list[str]:
    ranked = sorted(shown, key=lambda contender: -mean(_top1(found, contender)))
    panels = {
        "top-1, %": [Bar(c.title, _percents(_top1(found, c)), _colour(c)) for c in shown],
        f"top-1, %, mean of {len(CORRUPTIONS)} corruptions": [
            Bar(c.title, _percents(_corrupted(found, c)), _colour(c)) for c in shown
        ],
        "training, s": [Bar(c.title, _of(found, c, lambda r: r.seconds), _colour(c)) for c in shown],
    }
    plots.bars(out / "accuracy.png", panels)
    rows = [
        [
            c.title,
            _spread(_top1(found, c)),
            _spread(_corrupted(found, c)),
            f"{mean(_of(found, c, lambda r: r.loss)):.3f}",
            percent(mean(_of(found, c, lambda r: r.calibration_error))),
            _times(_of(found, c, lambda r: r.epochs)),
            _times(_of(found, c, lambda r: r.seconds)),
        ]
        for c in ranked
    ]
    heading = ["", "top-1", "top-1, corrupted", "loss", "calibration error", "epochs", "training, s"]
    said = [_apart(found, better, other) for better, other in pairwise(ranked)]
    return [
        "## Accuracy",
        "Of the final averaged weights on the validation photos: the mean over the seeds, ± their "
        "standard deviation, with the least and the most in brackets. Corrupted: the mean of all corruptions "
        "and strengths below.",
        table(heading, rows),
        "![Accuracy](accuracy.png)",
        "\n".join(f"- {line}" for line in said) if said else "One contender has nobody to be compared with.",
    ]


def _apart(found: Comparison, one: Contender, another: Contender) -> str:
    """How far two contenders' top-1 is apart, and whether the seeds alone move them as far."""
    better, other = sorted((one, another), key=lambda contender: -mean(_top1(found, contender)))
    first, second = _top1(found, better), _top1(found, other)
    if mean(first) == mean(second):
        return f"{better.title} and {other.title} are equal."
    text = f"{better.title} is {100 * (mean(first) - mean(second)):.1f} points above {other.title}"
    if len(first) < 2:
        return f"{text}, with one seed, which says nothing of chance."
    if min(first) > max(second):
        return f"{text}; its worst seed is above the other's best."
    return f"{text}; their seeds overlap, so that chance may turn it round."


def _robustness(out: Path, found: Comparison, shown: Sequence[Contender]) -> list[str]:
    panels = {
        corruption.name: {
            c.title: [_percents(values) for values in _by_strength(found, c, corruption.name)] for c in shown
        }
        for corruption in CORRUPTIONS
    }
    plots.lines(out / "robustness.png", panels, STRENGTHS, "top-1, %")
    rows, said = [], []
    for corruption in CORRUPTIONS:
        for c in shown:
            values = _by_strength(found, c, corruption.name)
            rows.append([corruption.name, c.title, *(percent(mean(step)) for step in values)])
        change = {}
        for c in shown:
            clean, *_, worst = map(mean, _by_strength(found, c, corruption.name))
            change[c.title] = round(100 * (worst - clean), 1) + 0.0  # no -0.0
        most, least = min(change, key=change.__getitem__), max(change, key=change.__getitem__)
        line = f"{corruption.name} of strength {STRENGTHS[-1]}: {most} changes by {change[most]:+.1f} points"
        said.append(line + (f", {least} by {change[least]:+.1f}." if least != most else "."))
    levels = [[c.name, c.unit, *(f"{level:g}" for level in c.levels)] for c in CORRUPTIONS]
    return [
        "## Robustness",
        "Top-1 on the validation photos made worse, the same copies for all: the mean over the seeds.",
        table(["", "", *STRENGTHS], rows),
        "![Robustness](robustness.png)",
        "\n".join(f"- {line}" for line in said),
        "The strengths:",
        table(["", "unit", *STRENGTHS[1:]], levels),
    ]


def _augmentation(out: Path, found: Comparison) -> list[str]:
    """What each augmentation does to LeNet-5: alone beside none, and taken away from all."""
    by_name = {contender.name: contender for contender in found.contenders}
    rows, bars = [], []
    for base, form in ((PLAIN, "lenet-with-{}"), (AUGMENTED, "lenet-without-{}")):
        there = [by_name[name] for name in map(form.format, AUGMENT) if name in by_name]
        if base not in by_name or not there:
            continue
        before = mean(_top1(found, by_name[base]))
        for c in (by_name[base], *there):
            change = 100 * (mean(_top1(found, c)) - before)
            rows.append([c.title, _spread(_top1(found, c)), "" if c.name == base else f"{change:+.1f}"])
            colour = _MOBILENET if c.name == base else _LENET
            bars.append(Bar(c.title, _percents(_top1(found, c)), colour))
    if not rows:
        return []
    plots.bars(out / "augmentation.png", {"top-1, %": bars})
    parts = [
        "## Augmentation",
        "LeNet-5 with each augmentation alone, beside none; then with all but each, beside all.",
        table(["", "top-1", "change, points"], rows),
        "![Augmentation](augmentation.png)",
    ]
    if {PLAIN, AUGMENTED} <= by_name.keys():
        pair = (by_name[PLAIN], by_name[AUGMENTED])
        parts.append(_apart(found, *pair))
        gaps = [mean(_of(found, c, lambda r: r.history[-1]["train_top1"] - r.top1)) for c in pair]
        parts.append(
            "Top-1 on the photos that it trains on, as they are augmented in the last epoch, less that on "
            f"the others: {100 * gaps[0]:+.1f} points without augmentation, {100 * gaps[1]:+.1f} with all of "
            "it."
        )
    return parts


def _costs(found: Comparison) -> list[str]:
    rows = []
    sizes = {c.network.title: found.results[c.name][0].file_bytes for c in found.contenders}
    for title, cost in found.costs.items():
        for i, (what, milliseconds) in enumerate(cost.milliseconds.items()):
            facts = [title, f"{cost.parameters:,}", f"{cost.macs / 1e6:.1f}", f"{sizes[title] / 1e6:.2f}"]
            time = "does not run here" if milliseconds is None else f"{milliseconds:.3f}"
            rows.append([*(facts if i == 0 else [""] * len(facts)), what, time])
    parts = [
        "## Costs",
        "Multiply-accumulates are of one image, in convolutions and linear layers; times are medians of one "
        "image on one core.",
        table(["", "parameters", "million MACs", "file, MB", "run by", "ms"], rows),
    ]
    if len(found.costs) > 1:
        ranked = sorted(found.costs, key=lambda title: found.costs[title].macs)
        small, large = (found.costs[title] for title in (ranked[0], ranked[-1]))
        quick, slow = (
            min(ms for ms in cost.milliseconds.values() if ms is not None) for cost in (small, large)
        )
        parts.append(
            f"{ranked[-1]} has {large.parameters / small.parameters:.0f} times the parameters of {ranked[0]} "
            f"and does {large.macs / small.macs:.0f} times its multiply-accumulates; an image takes it "
            f"{slow / quick:.1f} times as long."
        )
    return parts


def _recipes(found: Comparison) -> list[str]:
    """What differs from contender to contender in how they were trained, as the first seed's run has it."""
    rows = []
    for c in found.contenders:
        recipe = found.results[c.name][0].recipe
        rate, factor = recipe["lr"], recipe["head_lr_factor"]
        rows.append(
            [
                c.title,
                found.settings.weights if c.pretrained else "random",
                f"{rate:g}" if factor == 1 else f"{rate:g}, last layer {rate * factor:g}",
                str(recipe["train_size"]),
                ", ".join(recipe["augment"]) or "none",
                "bf16" if recipe["amp"] == "bf16" else "fp32",
            ]
        )
    heading = ["", "begins with", "learning rate", "pixels in training", "augmentation", "arithmetic"]
    options = found.results[found.contenders[0].name][0].recipe
    return [
        "## Recipes",
        f"{_threads(found)}All else is the same for all: {options['optimizer']}, "
        f"weight decay {options['weight_decay']:g}, label smoothing {options['label_smoothing']:g}, "
        f"weights averaged with decay {options['ema']:g}.",
        table(heading, [[escape(cell) for cell in row] for row in rows]),
    ]


def _threads(found: Comparison) -> str:
    """Who trains on other threads than torch's number of them."""
    said = {
        c.network.title: c.network.options["threads"]
        for c in found.contenders
        if "threads" in c.network.options
    }
    return "".join(
        f"{title} trains on {count} thread{'s' * (count > 1)}, which is faster. "
        for title, count in said.items()
    )


def _curves(out: Path, found: Comparison, shown: Sequence[Contender]) -> list[str]:
    runs = {c.title: [r.history for r in found.results[c.name]] for c in shown}
    plots.curves(out / "curves.png", runs, ("train_loss", "ema_val_top1"))
    return [
        "## Learning curves",
        "Loss in training, with its augmentation, and top-1 of the averaged weights on the validation "
        "photos: means, in bands from the least to the most of the seeds.",
        "![Learning curves](curves.png)",
    ]


def _confusions(out: Path, found: Comparison, shown: Sequence[Contender]) -> list[str]:
    parts = ["## Confusion matrices", "Of all seeds together."]
    for c in shown:
        counts = torch.tensor([r.confusion for r in found.results[c.name]]).sum(0)
        plots.confusion(out / f"confusion-{c.name}.png", found.settings.classes, counts)
        parts += [f"### {c.title}", f"![Confusion matrix of {c.title}](confusion-{c.name}.png)"]
    return parts


def _of(found: Comparison, contender: Contender, what: Callable[[Result], Any]) -> list[Any]:
    return [what(result) for result in found.results[contender.name]]


def _top1(found: Comparison, contender: Contender) -> list[float]:
    return _of(found, contender, lambda result: result.top1)


def _corrupted(found: Comparison, contender: Contender) -> list[float]:
    """Top-1 of each seed over all corruptions and strengths."""
    return _of(found, contender, lambda r: mean(value for of in r.robustness.values() for value in of))


def _by_strength(found: Comparison, contender: Contender, corruption: str) -> list[list[float]]:
    """Top-1 of each seed, of clean photos and then at each strength."""
    by_seed = _of(found, contender, lambda r: [r.top1, *r.robustness[corruption]])
    return [list(values) for values in zip(*by_seed, strict=True)]


def _percents(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _spread(shares: Sequence[float]) -> str:
    """The mean, and where there are several the least and the most."""
    if len(shares) == 1:
        return percent(shares[0])
    least, most, off = (100 * value for value in (min(shares), max(shares), stdev(shares)))
    return f"{percent(mean(shares))} ±{off:.1f} ({least:.1f} to {most:.1f})"


def _times(values: Sequence[float]) -> str:
    return f"{mean(values):.0f}"


def _colour(contender: Contender) -> str:
    return _MOBILENET if contender.network.make is None else _LENET

"""Figures of an evaluation as text, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files, plots
from .metrics import Evaluation

REPORT = "report.md"

_TOP_K = 5
_MOST_ROWS = 40  # classes that a terminal shows; of more, the worst ones
_WORST = 20
_PAIRS = 10
_LONGEST = 40  # characters of a name at a terminal


def figures(evaluation: Evaluation) -> dict[str, float]:
    """Name -> value of what is said of all photos; shares from 0 to 1. Top-5 where there are more classes."""
    found = {"top1": evaluation.top1}
    if len(evaluation.classes) > _TOP_K:
        found[f"top{_TOP_K}"] = evaluation.top_k(_TOP_K)
    return {
        **found,
        "balanced_accuracy": evaluation.balanced_accuracy,
        "calibration_error": evaluation.calibration_error(),
        "loss": evaluation.loss,
    }


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """All figures, ready for JSON; None where a share has nothing to be one of."""
    rows = [score._asdict() for score in evaluation.per_class()]
    return {
        "photos": len(evaluation),
        "skipped": evaluation.skipped,
        **figures(evaluation),
        "classes": [{k: _number(v) for k, v in row.items()} for row in rows],
        "most_confused": [pair._asdict() for pair in evaluation.most_confused(_PAIRS)],
    }


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def text(evaluation: Evaluation) -> str:
    """What a terminal shows."""
    shown = [score for score in evaluation.per_class() if score.support]
    lines = [_summary(evaluation), *(f"{name}: {value}" for name, value in _said(evaluation).items()), ""]
    if len(shown) > _MOST_ROWS:
        shown = sorted(shown, key=lambda score: score.f1)[:_WORST]
        lines.append(f"the {_WORST} classes with the lowest F1:")
    names = [plots.shorten(score.name, _LONGEST) for score in shown]
    width = max(len("class"), *map(len, names))
    lines.append(f"{'class':{width}}  precision  recall      F1  photos")
    for name, (_, *shares, support) in zip(names, shown, strict=True):
        precision, recall, f1 = map(percent, shares)
        lines.append(f"{name:{width}}  {precision:>9}  {recall:>6}  {f1:>6}  {support:6}")
    return "\n".join(lines)


def write(folder: Path, evaluation: Evaluation, facts: Mapping[str, str]) -> None:
    """A report in a folder: predictions.csv, three charts, and report.md at last. Files there are replaced.

    Args:
        folder: is there.
        evaluation: with paths.
        facts: what was evaluated, for the report's head: name -> value.

    Raises:
        UserError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    plots.check()
    files.write_text(folder / "predictions.csv", predictions(evaluation))
    plots.evaluation_plots(folder, evaluation)
    plots.reliability(folder / "reliability.png", evaluation)
    files.write_text(folder / REPORT, markdown(evaluation, facts))


def predictions(evaluation: Evaluation) -> str:
    """One line of CSV for each photo: path, class, predicted class, its score, that of the photo's class."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["path", "class", "predicted", "score", "score_of_class"])
    of_class = evaluation.probabilities.gather(1, evaluation.targets[:, None])[:, 0].tolist()
    for path, target, taken, score, own in zip(
        evaluation.paths,
        evaluation.targets.tolist(),
        evaluation.predicted.tolist(),
        evaluation.scores.tolist(),
        of_class,
        strict=True,
    ):
        names = (evaluation.classes[target], evaluation.classes[taken])
        table.writerow([os.fspath(path), *names, f"{score:.6f}", f"{own:.6f}"])
    return out.getvalue()


def markdown(evaluation: Evaluation, facts: Mapping[str, str]) -> str:
    """The text of report.md."""
    classes = [
        [escape(score.name), *map(percent, score[1:4]), str(score.support)]
        for score in evaluation.per_class()
        if score.support
    ]
    pairs = [[escape(p.true), escape(p.predicted), str(p.photos)] for p in evaluation.most_confused(_PAIRS)]
    parts = [
        "# Evaluation",
        table(["", ""], [[name, escape(value)] for name, value in facts.items()]),
        _summary(evaluation) + ".",
        table(list(_said(evaluation)), [list(_said(evaluation).values())]),
        "## Classes",
        "Precision: of the photos taken for a class, those that are of it. Recall: of its photos, those "
        "taken for it. F1: the harmonic mean of the two.",
        table(["class", "precision", "recall", "F1", "photos"], classes),
        "![Confusion matrix](confusion.png)",
        "## Mistakes",
        table(["true class", "taken for", "photos"], pairs) if pairs else "There are none.",
        "![Photos taken for another class](mistakes.png)",
        "## Calibration",
        "How far scores are from the share of right answers: the mean distance in "
        f"{len(evaluation.reliability())} bins of equal width, weighted by their photos (arXiv:1706.04599).",
        "![Reliability](reliability.png)",
        "Each photo's answer is in [predictions.csv](predictions.csv).",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(evaluation: Evaluation) -> str:
    with_photos = sum(1 for score in evaluation.per_class() if score.support)
    classes = (
        f"{with_photos} of {len(evaluation.classes)}"
        if with_photos < len(evaluation.classes)
        else with_photos
    )
    skipped = f"; {evaluation.skipped} more could not be used" if evaluation.skipped else ""
    return f"{len(evaluation)} photos of {classes} classes{skipped}"


def _said(evaluation: Evaluation) -> dict[str, str]:
    """The figures with the names and units that people read."""
    names = {
        "top1": "top-1",
        f"top{_TOP_K}": f"top-{_TOP_K}",
        "balanced_accuracy": "mean recall of the classes",
        "calibration_error": "expected calibration error",
        "loss": "mean loss",
    }
    return {
        names[name]: f"{value:.3f}" if name == "loss" else percent(value)
        for name, value in figures(evaluation).items()
    }


def percent(value: float) -> str:
    """A share in percent; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.1%}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, columns of numbers to the right."""
    columns = list(zip(*rows, strict=True)) or [()] * len(heading)
    numbers = [any(column) and all(re.match(r"$|-|[-+]?\d", cell) for cell in column) for column in columns]
    rule = ["---:" if right else "---" for right in numbers]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rows))


def escape(name: str) -> str:
    """A name in one line in which Markdown finds nothing to format."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(name.split()))

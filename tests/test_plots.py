"""Charts: what is drawn is what was measured, and each file is whole or not there."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import from_logits
from PIL import Image
from torch import nn

from mnv2_fast import UserError, plots
from mnv2_fast.metrics import Evaluation
from mnv2_fast.plots import Bar

ODD = ("花", "cost $5 and $6", "_hidden", "two\nlines", "x" * 300)


def answers(names: tuple[str, ...] = ODD, n: int = 60, paths: tuple[Path, ...] = ()) -> Evaluation:
    c = len(names)
    targets = torch.arange(n) % c
    logits = torch.randn(n, c) + 2 * nn.functional.one_hot(targets, c)
    return from_logits(names, targets, logits, paths)


def history(epochs: int = 3, shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "epoch": i + 1,
            "lr": 0.1,
            "train_loss": 1 / (i + 1),
            "val_loss": "",
            "val_top1": 0.5 + shift + i / 10,
        }
        for i in range(epochs)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, in their order."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_files_of_a_run(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 20), "red").save(photo)
    (tmp_path / "run").mkdir()
    plots.run_plots(tmp_path / "run", history(), answers(paths=(photo,) * 60))
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["confusion.png", "curves.png", "mistakes.png"]
    for name in found:
        with Image.open(tmp_path / "run" / name) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
    assert not recwarn.list


@pytest.mark.parametrize("count", [2, 5, 13, 30])
def test_confusion_has_every_count_inside_its_cell(tmp_path: Path, drawn: list[Any], count: int) -> None:
    found = answers(tuple(f"class number {i} of many" for i in range(count)), 5000)
    plots.confusion(tmp_path / "c.png", found.classes, found.confusion)
    axes = drawn[0].axes[0]
    cells = {text.get_position(): int(text.get_text()) for text in axes.texts}
    counts = found.confusion.tolist()
    assert cells == {(j, i): counts[i][j] for i in range(count) for j in range(count) if counts[i][j]}
    drawn[0].canvas.draw()
    width = axes.get_window_extent().width / count
    assert max(text.get_window_extent().width for text in axes.texts) < width
    labels = sorted((label.get_window_extent() for label in axes.get_yticklabels()), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(labels))


def test_confusion_of_many_classes_shows_the_most_confused(tmp_path: Path, drawn: list[Any]) -> None:
    targets = torch.arange(50)
    predicted = targets.clone()
    predicted[[7, 8, 41]] = torch.tensor([41, 41, 7])
    found = from_logits([str(i) for i in range(50)], targets, 9.0 * nn.functional.one_hot(predicted, 50))
    plots.confusion(tmp_path / "c.png", found.classes, found.confusion)
    axes = drawn[0].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == plots.MOST_CLASSES
    assert {"7", "8", "41"} <= set(names)
    assert "the 30 of 50 classes most often confused" in axes.get_title()
    cells = {(names[y], names[x]) for x, y in (text.get_position() for text in axes.texts)}
    assert {("7", "41"), ("8", "41"), ("41", "7")} <= cells


def test_mistakes_begin_with_the_highest_score(tmp_path: Path, drawn: list[Any]) -> None:
    paths = tuple(tmp_path / f"{i}.png" for i in range(4))
    for i, path in enumerate(paths[:3]):
        Image.new("RGB", (64, 48), (50 * i, 0, 0)).save(path)  # the last one is not there any more
    probabilities = torch.tensor([[0.1, 0.9], [0.999, 0.001], [0.4, 0.6], [0.3, 0.7]], dtype=torch.float64)
    found = Evaluation(("a", "b"), torch.tensor([0, 1, 1, 0]), probabilities, paths)
    plots.mistakes(tmp_path / "m.png", found)
    (figure,) = drawn
    assert [axes.get_title().strip() for axes in figure.axes] == ["b", "a", "a"]
    assert [texts(axes) for axes in figure.axes] == [["a 99.9%"], ["b 90%"], ["b 70%"]]
    colours = [np.asarray(axes.images[0].get_array())[5, 100].tolist() for axes in figure.axes]
    assert colours == [[50, 0, 0], [0, 0, 0], [0x9A, 0xA5, 0xB1]]
    assert "3 of 4" in figure.get_suptitle()

    plots.mistakes(tmp_path / "m.png", found, most=1)
    assert len(drawn[1].axes) == 1
    assert "here the 1 with" in drawn[1].get_suptitle()


def test_no_mistake(tmp_path: Path, drawn: list[Any]) -> None:
    certain = from_logits(("a", "b"), torch.tensor([0, 1]), 9 * torch.eye(2), [tmp_path / "x"] * 2)
    plots.mistakes(tmp_path / "m.png", certain)
    assert drawn[0].get_suptitle() == "photos taken for another class: 0 of 2"
    assert (tmp_path / "m.png").exists()


def test_reliability_has_a_bar_for_each_filled_bin(tmp_path: Path, drawn: list[Any]) -> None:
    found = answers(n=200)
    plots.reliability(tmp_path / "r.png", found)
    above, below = drawn[0].axes
    filled = [row for row in found.reliability() if row.photos]
    assert [bar.get_height() for bar in above.patches] == [row.accuracy for row in filled]
    assert sum(bar.get_height() for bar in below.patches) == 200
    assert f"{100 * found.calibration_error():.1f} points" in drawn[0].get_suptitle()


def test_curves_of_one_run(tmp_path: Path, drawn: list[Any]) -> None:
    plots.curves(tmp_path / "k.png", {"": [history()]})
    loss, top1 = drawn[0].axes
    (train, val) = loss.lines
    assert (train.get_label(), val.get_label()) == ("training", "validation")
    np.testing.assert_allclose(train.get_xydata(), [(1, 1), (2, 1 / 2), (3, 1 / 3)])
    assert not len(val.get_xdata())  # an empty cell is no number
    np.testing.assert_allclose(top1.lines[0].get_ydata(), [50, 60, 70])


def test_curves_of_several_runs_have_means_and_bands(tmp_path: Path, drawn: list[Any]) -> None:
    runs = {"one": [history(), history(2, 0.1)], "two": [history()]}
    plots.curves(tmp_path / "k.png", runs, ("train_loss", "val_top1"))
    _, axes = drawn[0].axes
    one, two = axes.lines
    np.testing.assert_allclose(one.get_ydata(), [55, 65, 70])  # the second seed stopped after two epochs
    np.testing.assert_allclose(two.get_ydata(), [50, 60, 70])
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().extents.tolist() == pytest.approx([1, 50, 3, 70])
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["one", "two"]
    assert axes.get_ylabel() == "validation top-1, %"


def test_bars_have_the_mean_and_each_value(tmp_path: Path, drawn: list[Any]) -> None:
    plots.bars(
        tmp_path / "b.png", {"top-1": [Bar("a", [1.0, 2.0, 6.0]), Bar("b", [])], "ms": [Bar("a", [4.0])]}
    )
    left, right = drawn[0].axes
    assert [bar.get_width() for bar in left.patches] == [3, 0]
    assert texts(left) == ["3.0", "none"]
    (_, dots) = left.collections
    assert dots.get_offsets().data[:, 0].tolist() == [1, 2, 6]
    assert texts(right) == ["4.0"]
    assert not right.collections


def test_lines_have_means_and_bands(tmp_path: Path, drawn: list[Any]) -> None:
    rows = {"a": [[1.0, 3.0], [4.0]], "b": [[5.0], [6.0]]}
    plots.lines(tmp_path / "l.png", {"noise": rows, "blur": {"a": [[0.0], [0.0]]}}, ["0", "1"], "top-1, %")
    left, right = drawn[0].axes
    assert [list(line.get_ydata()) for line in left.lines] == [[2, 4], [5, 6]]
    assert left.collections[0].get_paths()[0].get_extents().extents.tolist() == [0, 1, 1, 4]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
    assert (left.get_title(), right.get_title(), left.get_ylabel()) == ("noise", "blur", "top-1, %")
    assert left.get_ylim() == right.get_ylim()


CHARTS: dict[str, Callable[[Path], None]] = {
    "confusion": lambda path: plots.confusion(path, ODD, answers().confusion),
    "mistakes": lambda path: plots.mistakes(path, answers()),
    "reliability": lambda path: plots.reliability(path, answers()),
    "curves": lambda path: plots.curves(path, {"": [history()]}),
    "lines": lambda path: plots.lines(path, {"noise": {"a": [[1.0]]}}, ["0"], ""),
    "bars": lambda path: plots.bars(path, {"": [Bar("a", [1.0])]}),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_full_disk_leaves_the_old_chart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = tmp_path / "chart.png"
    path.write_bytes(b"old")

    def fail(figure: Figure, beside: Path, **options: Any) -> None:
        beside.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fail)
        with pytest.raises(OSError, match="No space left"):
            CHARTS[name](path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    CHARTS[name](path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mnv2-fast\[train\]'"):
        plots.confusion(tmp_path / "c.png", ODD, answers().confusion)
    assert not list(tmp_path.iterdir())

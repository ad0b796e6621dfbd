"""`mnv2 evaluate`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from colours import LABELS, picture, save_weights
from helpers import one_thread  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file

import mnv2_fast
from mnv2_fast import cli, cli_evaluate, flowers, machine, mobilenet_v2, photos, report
from mnv2_fast.metrics import Evaluation

pytestmark = pytest.mark.usefixtures("one_thread")

REPORT = ["confusion.png", "mistakes.png", "predictions.csv", "reliability.png", "report.md"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(tmp_path_factory.mktemp("weights") / "m.safetensors", 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photos of each colour; one in `black` is really white."""
    for i in range(10):
        path = tmp_path / "photos" / LABELS[i % 5] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(3 if i == 4 else i)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that has `photos`, as the current one."""
    monkeypatch.chdir(folder.parent)
    return folder.parent


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main(["evaluate", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_it_prints(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--model", weights, "--data", folder)
    assert (code, err) == (0, "")
    assert out.startswith("10 photos of 5 classes\ntop-1: 90.0%\nmean recall of the classes: 90.0%\n")
    rows = dict(re.findall(r"^(\w+) +([\d.%]+ +[\d.%]+ +[\d.%]+ +\d+)$", out, re.MULTILINE))
    assert rows["black"].split() == ["100.0%", "50.0%", "66.7%", "2"]
    assert rows["white"].split() == ["66.7%", "100.0%", "80.0%", "2"]
    assert set(rows) == set(LABELS)


def test_the_report(weights: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report"
    code, printed, err = run(capsys, "--model", weights, "--data", folder, "--out", out)
    assert (code, err) == (0, "")
    assert printed.endswith(f"{out / 'report.md'}\n")
    assert sorted(path.name for path in out.iterdir()) == REPORT
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| black | 100.0% | 50.0% | 66.7% | 2 |" in text
    assert "| black | white | 1 |" in text
    assert all((out / target).exists() for target in re.findall(r"\]\(([^)]+)\)", text))
    with open(out / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if row["class"] != row["predicted"]]
    assert len(rows) == 10
    assert [(row["path"], row["predicted"]) for row in wrong] == [(str(folder / "black" / "4.png"), "white")]
    assert float(wrong[0]["score"]) > 0.5 > float(wrong[0]["score_of_class"])
    # Again into the same folder: what is there is replaced, and nothing else is touched.
    (out / "mine.txt").write_text("mine")
    (out / "report.md").write_text("old")
    assert run(capsys, "--model", weights, "--data", folder, "--out", out)[0] == 0
    assert (out / "report.md").read_text(encoding="utf-8") == text
    assert (out / "mine.txt").read_text() == "mine"


def test_json(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--model", weights, "--data", folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["photos"], found["skipped"], found["dtype"], found["top1"]) == (10, 0, "fp32", 0.9)
    assert found["most_confused"] == [{"true": "black", "predicted": "white", "photos": 1}]
    assert {row["name"]: row["recall"] for row in found["classes"]} == {
        n: 1 - (n == "black") / 2 for n in LABELS
    }
    assert found["calibration_error"] >= 0
    assert "top5" not in found  # it would be 100% of five classes


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_saved_engine(
    dtype: str, weights: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mobilenet_v2(weights=weights).eval()
    engine = mnv2_fast.compile(model, dtype, calibration=folder if dtype == "int8" else None)
    engine.save(tmp_path / "e.safetensors")
    code, out, _ = run(capsys, "--model", tmp_path / "e.safetensors", "--data", folder, "--json")
    assert code == 0
    assert json.loads(out)["dtype"] == dtype
    assert json.loads(out)["top1"] >= 0.8


def test_calibrated_on_the_way(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", weights, "--data", folder, "--dtype", "int8", "--calibration", folder, "--json"]
    code, out, _ = run(capsys, *args)
    assert (code, json.loads(out)["dtype"]) == (0, "int8")


def test_only_what_training_left_out(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--model", weights, "--data", folder, "--val-share", 0.5, "--json"]
    tops = {}
    for seed in range(8):
        found = json.loads(run(capsys, *args, "--split-seed", seed)[1])
        assert found["photos"] == 5
        left_out = {photo.path for photo in photos.find(folder, 0.5, seed).val}
        tops[seed] = (found["top1"], folder / "black" / "4.png" in left_out)
    assert {top1 for top1, _ in tops.values()} == {0.8, 1.0}
    assert all((top1 == 0.8) == wrong for top1, wrong in tops.values())


def test_a_damaged_photo_is_one_line(weights: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "red" / "0.png").write_bytes(b"")
    code, out, err = run(capsys, "--model", weights, "--data", folder)
    assert code == cli.BAD_FILES
    assert out.startswith("9 photos of 5 classes; 1 more could not be used\n")
    assert err.count("\n") == 1
    assert err.startswith(f"mnv2: warning: photo skipped: {folder / 'red' / '0.png'} ")


def save_labelled(path: Path, weights: str, labels: list[str] | None) -> Path:
    save_file(load_file(weights), path, {} if labels is None else {"labels": json.dumps(labels)})
    return path


def test_labels_and_folders_that_differ(
    weights: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_labelled(tmp_path / "o.safetensors", weights, ["red", "green", "blue", "white", "noir"])
    code, out, err = run(capsys, "--model", other, "--data", folder, "--out", tmp_path / "report")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the model has no class for 'black', of 5 folders" in err
    assert not (tmp_path / "report").exists()

    (folder / "black").rename(folder / "noir")
    assert run(capsys, "--model", other, "--data", folder)[0] == 0
    (folder / "noir").rename(tmp_path / "noir")
    code, out, err = run(capsys, "--model", other, "--data", folder)
    assert (code, err) == (0, "mnv2: warning: 1 of the model's 5 classes have no folder: 'noir'\n")
    assert out.startswith("8 photos of 4 of 5 classes\n")
    assert "noir" not in out

    code, _, err = run(capsys, "--model", save_labelled(other, weights, None), "--data", folder)
    assert code == 2
    assert "the model has no labels, and 5 outputs for 4 folders: give" in err


def test_the_word_flowers_is_the_photos_of_it(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowers, "fetch", lambda: folder)
    by_name = run(capsys, "--model", weights, "--data", "flowers")
    assert by_name[0] == 0
    assert by_name == run(capsys, "--model", weights, "--data", folder)


def test_a_lack_of_memory_is_one_line(
    weights: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_SMALL", 0)
    monkeypatch.setattr(machine, "_available", lambda: iter([10**4]))
    code, out, err = run(capsys, "--model", weights, "--data", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mnv2: error: ")
    assert "use smaller batches or images" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data", "nowhere"], "'nowhere' does not exist"),
        (["--data", "empty"], "no photos in subfolders of empty"),
        (["--data", "photos", "--out", "file"], "'file' is a file or empty"),
        (["--data", "photos", "--out", "file/below"], "cannot write in file/below"),
        (["--data", "photos", "--out", "photos/report"], "out 'photos/report' is among the photos of photos"),
        (["--data", "photos", "--val-share", "2"], "give a number from 0 to 1"),
        (["--data", "photos", "--val-share", "0"], "val_share=0.0: give a number above 0"),
        (["--data", "photos", "--model", "none.safetensors"], "no weights file none.safetensors"),
        (["--data", "photos", "--dtype", "int8"], "needs calibration images"),
        ([], "required: --data"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], said: str, weights: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("file").write_text("mine")
    before = sorted(os.listdir())
    try:
        code, out, err = run(capsys, "--model", weights, *args)
    except SystemExit as stop:
        code, (out, err) = int(stop.code or 0), capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mnv2: error: ")
    assert said in err
    assert sorted(os.listdir()) == before


def test_a_full_disk_is_one_line(
    weights: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = run(capsys, "--model", weights, "--data", "photos", "--out", "report")
    cure = "make room, then start it again"
    assert (code, err) == (2, f"mnv2: error: cannot write a file (No space left on device): {cure}\n")
    assert not (here / "report").exists()


def test_ctrl_c_leaves_nothing_half_written(
    weights: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(model: object, data: object, *, progress: Callable[[int, int], object], **more: Any) -> None:
        progress(3, 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_evaluate, "evaluate", stop)
    code, out, err = run(capsys, "--model", weights, "--data", "photos", "--out", "report")
    assert (code, out) == (130, "")
    assert err == "mnv2: interrupted: 3 of 10 photos evaluated, no report is written\n"
    assert not (here / "report").exists()


def test_names_that_markdown_would_format() -> None:
    names = ("a|b", "*c*", "two\nlines", "[d](e)")
    certain = Evaluation(names, torch.arange(4), torch.eye(4, dtype=torch.float64))
    text = report.markdown(certain, {})
    assert r"| a\|b | 100.0%" in text
    assert r"| \*c\* | 100.0%" in text
    assert "| two lines | 100.0%" in text
    assert r"| \[d\](e) | 100.0%" in text
    assert "There are none." in text


def test_many_classes_at_a_terminal() -> None:
    names = tuple(f"{'very ' * 20}long name {i}" for i in range(60))
    probabilities = torch.eye(60, dtype=torch.float64)
    probabilities[7] = probabilities[8]
    lines = report.text(Evaluation(names, torch.arange(60), probabilities)).splitlines()
    assert "the 20 classes with the lowest F1:" in lines
    assert "top-5: 98.3%" in lines
    rows = lines[lines.index("the 20 classes with the lowest F1:") + 2 :]
    assert len(rows) == 20
    assert max(map(len, rows)) < 80
    assert [row.split()[-2] for row in rows[:2]] == ["0.0%", "66.7%"]

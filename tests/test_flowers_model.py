"""The flower classifier in the package: that its card tells the truth, and that it can be made again."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)
from safetensors.torch import save_file

from mnv2_fast import MobileNetV2, evaluate, load, photos, weights

sys.path.insert(0, str(ROOT / "tools"))  # not installed

import flowers_model

BOX = weights.boxed("flowers")
TINY = (
    "--epochs 1 --image-size 32 --batch-size 8 --threads 1 --workers 0 --augment none --freeze-bn --amp none "
    "--train-size 32"
)


def test_the_card_is_of_the_file_and_says_what_it_answers(flowers: Path) -> None:
    assert BOX is not None
    card = BOX.path.with_suffix(".md").read_text(encoding="utf-8")
    assert hashlib.sha256(BOX.path.read_bytes()).hexdigest() in card
    folder = photos.find(flowers)
    assert folder.digest() in card
    assert f"{len(folder.train)} to train on, {len(folder.val)} to validate" in card
    found = evaluate(load("flowers"), folder)
    assert found.classes == folder.classes
    assert f"| top-1 of int8, this file | {found.top1:.1%} |" in card
    for score in found.per_class():
        assert f"| {score.name} | {score.precision:.1%} | {score.recall:.1%} | {score.support} |" in card
    (agreement,) = re.findall(r"same first class \| ([\d.]+)% \|", card)
    assert float(agreement) >= 98


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for small photos, and published weights with nothing learned."""
    torch.manual_seed(0)
    colour_photos(tmp_path / "photos")
    for folder in ("weights", "out"):
        (tmp_path / folder).mkdir()
    save_file(MobileNetV2().state_dict(), tmp_path / "weights" / "mobilenet_v2-IMAGENET1K_V1.safetensors")
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)
    return ["--data", "photos", "--run", "run", "--out", "out", "--min-agreement", "0"]


@pytest.mark.usefixtures("one_thread", "native")
def test_the_model_is_made_once_with_its_card(made: list[str], tmp_path: Path) -> None:
    assert BOX is not None
    assert flowers_model.main([*made, *TINY.split()]) == 0
    engine = load(tmp_path / "out" / BOX.file)
    assert (engine.dtype, engine.labels) == ("int8", ["grün", "red", "sky blue"])
    card = (tmp_path / "out" / "flowers-int8.md").read_text(encoding="utf-8")
    for said in (
        "MobileNetV2 1.0, 32x32",
        "36 of the 3,670 photos of `tf_flowers`",
        "-out run --epochs 1 --batch-size 8 --freeze-bn --amp none --image-size 32 --train-size 32 "
        "--augment none\n",
        "augment none,",
        "int8 was calibrated on 15 of them",
        hashlib.sha256((tmp_path / "out" / BOX.file).read_bytes()).hexdigest(),
    ):
        assert said in card
    assert "{" not in card
    trained = (tmp_path / "run" / "final.safetensors").stat().st_mtime_ns
    assert flowers_model.main(made) == 0  # it is not trained again
    assert (tmp_path / "run" / "final.safetensors").stat().st_mtime_ns == trained
    links = sorted(path.readlink() for path in (tmp_path / "run" / "train").glob("*/*"))
    folder = photos.find(tmp_path / "photos")
    assert links == sorted(photo.path for photo in folder.train)


@pytest.mark.usefixtures("one_thread", "native")
def test_what_is_no_good_replaces_nothing(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flowers_model.main([*made, "--min-agreement", "1.01", *TINY.split()]) == 2
    assert "101.0% are asked: nothing in out is replaced" in capsys.readouterr().err
    assert flowers_model.main([*made, "--epochs", "2"]) == 2
    assert "run is trained already: leave --epochs 2 out" in capsys.readouterr().err
    (tmp_path / "photos" / "red" / "0.png").unlink()
    assert flowers_model.main(made) == 2
    assert "run was trained on other photos than photos" in capsys.readouterr().err
    assert flowers_model.main([*made[:-2], "--data", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []

"""What images can be calibrated on, and what is said of those that cannot."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2_fast import UserError, calibration, data
from mnv2_fast.calibration import MOST_IMAGES, read
from mnv2_fast.weights import Preprocessing

PREPROCESSING = Preprocessing(20, 16)
PIXELS = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FLOATS = data.normalize(PIXELS, PREPROCESSING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return tmp_path


@pytest.mark.parametrize(
    "source",
    [
        FLOATS,
        FLOATS.contiguous(),
        FLOATS.numpy(),
        PIXELS,
        PIXELS.numpy(),
        list(FLOATS),
        [FLOATS[:5], FLOATS[5:]],
        [(FLOATS[:5], torch.zeros(5)), (FLOATS[5:], torch.zeros(7))],
        [[PIXELS[:5], 0], [PIXELS[5:], 0]],
    ],
    ids=["floats", "nchw", "array", "bytes", "byte array", "images", "batches", "labelled", "labelled bytes"],
)
def test_every_form_gives_the_same(source: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (batch,) = read(source, PREPROCESSING)
    assert torch.equal(batch, FLOATS)


def test_a_loader_and_a_generator() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(FLOATS, torch.arange(12)), 5)
    for source in (loader, (image for image in FLOATS)):
        (batch,) = read(source, PREPROCESSING)
        assert torch.equal(batch, FLOATS)


def test_a_folder_is_a_list_of_its_photos(folder: Path) -> None:
    paths = sorted(folder.iterdir())
    arrays = [np.asarray(Image.open(path)) for path in paths]
    crops = np.stack([data.resize_and_crop(Image.open(path), PREPROCESSING) for path in paths])
    expected = data.normalize(torch.from_numpy(crops), PREPROCESSING)
    for source in (folder, str(folder), str(folder / "*.png"), paths, arrays, map(Image.open, paths)):
        (batch,) = read(source, PREPROCESSING)
        assert torch.equal(batch, expected)


def test_no_more_than_the_most_evenly_spread(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(calibration.spread, "__defaults__", (8,))
    monkeypatch.setattr(calibration, "MOST_IMAGES", 8)
    spread = [0, 1, 3, 4, 6, 7, 9, 10]
    (batch,) = read(FLOATS, PREPROCESSING)
    assert torch.equal(batch, FLOATS[spread])
    (batch,) = read(iter(FLOATS), PREPROCESSING)
    assert torch.equal(batch, FLOATS[:8])
    assert len(read(folder, PREPROCESSING)[0]) == 8


def test_an_endless_loader_ends() -> None:
    def forever() -> Any:
        while True:
            yield FLOATS

    assert sum(map(len, read(forever(), PREPROCESSING))) == MOST_IMAGES


def test_batches_of_several_sizes_stay_apart() -> None:
    other = torch.zeros(3, 3, 8, 8)
    assert [len(batch) for batch in read([FLOATS[:5], other, FLOATS[5:]], PREPROCESSING)] == [12, 3]


def test_damaged_photos_are_counted_and_left_out(folder: Path) -> None:
    (folder / "05.png").write_text("no photo")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"2 calibration photos cannot be used, the first: .*05\.png"):
        (batch,) = read(folder, PREPROCESSING)
    assert len(batch) == 10


def test_nothing_but_damaged_photos(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no photo")
    with pytest.raises(UserError, match=r"no calibration images are left: 1 .*a\.png"):
        read(tmp_path, PREPROCESSING)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(0, 3, 16, 16), "there are no calibration images"),
        ([], "there are no calibration images"),
        (iter([]), "there are no calibration images"),
        (torch.zeros(3, 16, 16), r"\[3, 16, 16\] are no batch"),
        (torch.zeros(2, 1, 16, 16), r"\[2, 1, 16, 16\]: give float32"),
        (torch.zeros(2, 16, 16, 3), r"\[2, 16, 16, 3\]: give float32"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"uint8 \[2, 3, 16, 16\]: give"),
        (torch.zeros(2, 3, 0, 16), r"\[2, 3, 0, 16\]"),
        (torch.zeros(2, 3, 16, 16).double(), r"torch.float64 .*\.float\(\)"),
        (torch.zeros(2, 3, 16, 16).half(), r"\.float\(\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), r"\.float\(\)"),
        (torch.full((2, 3, 16, 16), float("nan")), "NaN or infinite"),
        ([FLOATS, FLOATS / 0], "item 2 holds NaN or infinite"),
        ("nowhere/*.jpg", "no file matches"),
        ("nowhere", "no calibration images are left: 1 .*no file nowhere"),
        (["nowhere.jpg"], "no calibration images are left"),
        ("", "names no photo"),
    ],
)
def test_what_cannot_be_calibrated_on(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(source, PREPROCESSING)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [3, None, b"abc", {"x": FLOATS}, [{"x": FLOATS}], [1.5]])
def test_what_holds_no_images(source: Any) -> None:
    with pytest.raises(TypeError, match="give float32"):
        read(source, PREPROCESSING)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FLOATS[:1], r"1 calibration image\(s\) are few"),
        (torch.zeros(12, 3, 8, 9), "are 8 x 9, the model's preprocessing makes 16 x 16"),
        (PIXELS.float().permute(0, 3, 1, 2), "values up to 255: normalize"),
    ],
)
def test_what_works_and_is_rarely_meant(source: Any, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        batches = read(source, PREPROCESSING)
    assert len(batches[0]) == len(source)

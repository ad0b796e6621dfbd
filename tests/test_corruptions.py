"""Photos made worse: the same copies for every network, worse with each strength."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_thread  # noqa: F401
from PIL import Image
from torch import Tensor

from mnv2_fast import corruptions, imagecache
from mnv2_fast._torchvision import transforms_v2
from mnv2_fast.corruptions import CORRUPTIONS, SIDE, Corruption
from mnv2_fast.photos import Photo
from mnv2_fast.weights import Preprocessing

v2 = transforms_v2()
LARGE, SMALL = Preprocessing(SIDE, SIDE), Preprocessing(36, 32)
BY_NAME = {corruption.name: corruption for corruption in CORRUPTIONS}
pytestmark = pytest.mark.usefixtures("one_thread")
each = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption.name)


@pytest.fixture
def photos(tmp_path: Path) -> list[Photo]:
    """Six photos of squares."""
    found = []
    for i in range(6):
        blocks = np.random.default_rng(i).integers(40, 216, (8, 10, 3), dtype=np.uint8)
        path = tmp_path / f"{i}.png"
        Image.fromarray(blocks).resize((320, 256), Image.Resampling.NEAREST).save(path)
        found.append(Photo(path, 0))
    return found


def copies(photos: list[Photo], corruption: Corruption, level: float, seed: int = 0) -> Tensor:
    dataset = corruptions.dataset(photos, ["a"], LARGE, corruption, level, seed=seed)
    return torch.stack([dataset[i][0] for i in range(len(photos))])


def clean(photos: list[Photo]) -> Tensor:
    return copies(photos, Corruption("none", "", (0, 0, 0), lambda image, level: image), 0)


@each
def test_each_strength_is_worse(photos: list[Photo], corruption: Corruption) -> None:
    before = clean(photos).float()
    off = [
        (copies(photos, corruption, level).float() - before).abs().mean().item()
        for level in corruption.levels
    ]
    assert 1 < off[0] < off[1] < off[2]


@each
def test_copies_follow_from_seed_and_number(photos: list[Photo], corruption: Corruption) -> None:
    level = corruption.levels[0]
    first = copies(photos, corruption, level)
    torch.manual_seed(123)
    assert torch.equal(copies(photos, corruption, level), first)
    assert torch.equal(copies(photos[:3], corruption, level), first[:3])
    other = copies(photos, corruption, level, seed=1)
    assert torch.equal(other, first) == (corruption.name == "blur")  # in which nothing is random


def _noise(before: Tensor, after: Tensor, level: float) -> None:
    assert (after - before).std().item() == pytest.approx(255 * level, rel=0.05)
    assert (after - before).mean().abs() < 1


def _blur(before: Tensor, after: Tensor, level: float) -> None:
    """What a row of independent pixels has left of its variance: 1 / (4 pi sigma^2) in two dimensions."""
    pixels = torch.rand(3, 200, 200, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    left = BY_NAME["blur"].apply(pixels, level).float().var() / pixels.float().var()
    assert left.item() == pytest.approx(1 / (4 * torch.pi * level**2), rel=0.15)


def _rotation(before: Tensor, after: Tensor, level: float) -> None:
    middle = (..., slice(64, 192), slice(64, 192))  # what lay beside the crop does not come so far
    sides = []
    for image, turned in zip(before.to(torch.uint8), after, strict=True):
        off = [(_at_angle(image, angle) - turned)[middle].abs().mean().item() for angle in (-level, level)]
        assert min(off) < 2 < max(off)
        sides.append(off.index(min(off)))
    assert set(sides) == {0, 1}


def _at_angle(image: Tensor, degrees: float) -> Tensor:
    """By Pillow."""
    turned = Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(
        degrees, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )
    return torch.from_numpy(np.asarray(turned).copy()).permute(2, 0, 1).float()


def _brightness(before: Tensor, after: Tensor, level: float) -> None:
    bright = [bool(b.mean() < a.mean()) for b, a in zip(before, after, strict=True)]
    assert set(bright) == {False, True}
    for is_bright, b, a in zip(bright, before, after, strict=True):
        expected = (b * level if is_bright else b / level).clamp(0, 255)
        assert (a - expected).abs().max() <= 1


MEANT: dict[str, Callable[[Tensor, Tensor, float], None]] = {
    "noise": _noise,
    "blur": _blur,
    "rotation": _rotation,
    "brightness": _brightness,
}


@each
def test_each_does_what_it_says(photos: list[Photo], corruption: Corruption) -> None:
    level = corruption.levels[0]
    MEANT[corruption.name](clean(photos).float(), copies(photos, corruption, level).float(), level)


@each
def test_all_networks_see_the_same_copies(photos: list[Photo], corruption: Corruption) -> None:
    """What is made worse is the same to the bit; each network has it resized and cropped as it wants."""
    made: list[Tensor] = []

    def apply(image: Tensor, level: float) -> Tensor:
        made.append(corruption.apply(image, level))
        return made[-1]

    watched = replace(corruption, apply=apply)
    for preprocessing in (Preprocessing(), SMALL):
        dataset = corruptions.dataset(photos, ["a"], preprocessing, watched, corruption.levels[2])
        assert len(dataset) == len(photos)
        for i in range(len(photos)):
            seen, _ = dataset[i]
            side = preprocessing.resize
            expected = v2.functional.resize(made[-1], [side, side * 320 // 256])
            assert torch.equal(seen, v2.functional.center_crop(expected, [preprocessing.crop]))
    assert all(torch.equal(a, b) for a, b in zip(made[:6], made[6:], strict=True))


def test_a_cache_changes_no_bit(photos: list[Photo], tmp_path: Path) -> None:
    noise = BY_NAME["noise"]
    paths = [photo.path for photo in photos]
    cache = imagecache.open_cache(tmp_path / "cache", tmp_path, paths, corruptions.at_side(SMALL))
    with_cache = corruptions.dataset(photos, ["a"], SMALL, noise, 0.1, cache=cache)
    without = corruptions.dataset(photos, ["a"], SMALL, noise, 0.1)
    assert all(torch.equal(with_cache[i][0], without[i][0]) for i in range(len(photos)))


def test_a_dataset_can_be_sent_to_a_worker(photos: list[Photo]) -> None:
    dataset = corruptions.dataset(photos, ["a"], SMALL, BY_NAME["rotation"], 30)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3][0], dataset[3][0])

"""Reading photos, and the same pixels as torchvision's transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2_fast import UserError, data
from mnv2_fast._torchvision import torchvision
from mnv2_fast.weights import Preprocessing


def _noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("width", "height", "resize", "crop"),
    [
        (500, 375, 256, 224),
        (375, 500, 256, 224),
        (256, 256, 256, 224),
        (256, 300, 256, 224),
        (301, 257, 232, 224),
        (97, 33, 256, 224),
        (1, 1, 256, 224),
        (64, 48, 32, 57),
        (333, 64, 57, 57),
        (41, 41, 41, 64),
    ],
)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resize_and_crop_equals_torchvision(
    width: int, height: int, resize: int, crop: int, interpolation: str
) -> None:
    transforms = torchvision().transforms
    image = _noise(width, height)
    theirs = transforms.Compose(
        [transforms.Resize(resize, transforms.InterpolationMode(interpolation)), transforms.CenterCrop(crop)]
    )(image)
    ours = data.resize_and_crop(image, Preprocessing(resize, crop, interpolation=interpolation))
    assert ours.shape == (crop, crop, 3)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_a_real_photo_gives_the_tensor_of_the_published_preset(photos: list[Path]) -> None:
    presets = torchvision().models.MobileNet_V2_Weights
    for name, resize in (("IMAGENET1K_V1", 256), ("IMAGENET1K_V2", 232)):
        for path in photos[:6]:
            theirs = presets[name].transforms()(Image.open(path).convert("RGB"))
            preprocessing = Preprocessing(resize=resize)
            seen = torch.from_numpy(data.resize_and_crop(data.read_image(path), preprocessing).copy())
            ours = data.normalize(seen[None], preprocessing)
            assert ours.dtype == torch.float32
            assert ours.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(ours[0], theirs)


def test_an_image_too_long_to_resize_is_refused() -> None:
    with pytest.raises(data.ImageError, match="too long and thin"):
        data.resize_and_crop(Image.new("RGB", (500_000, 1)), Preprocessing())


def test_path_bytes_file_pil_array_and_tensor_are_the_same_image(tmp_path: Path) -> None:
    image = _noise(7, 5)
    path = tmp_path / "a.png"
    image.save(path)
    values = np.asarray(image)
    with path.open("rb") as file:
        from_file = np.asarray(data.read_image(file))
    sources = [path, str(path), path.read_bytes(), image, values, torch.from_numpy(values.copy())]
    for read in [from_file, *(np.asarray(data.read_image(source)) for source in sources)]:
        np.testing.assert_array_equal(read, values)


def test_arrays_with_other_strides_grey_and_alpha() -> None:
    values = np.asarray(_noise(8, 6))
    np.testing.assert_array_equal(np.asarray(data.read_image(values[:, ::-2])), values[:, ::-2])
    grey = values[..., 0]
    np.testing.assert_array_equal(np.asarray(data.read_image(grey)), np.stack([grey] * 3, 2))
    opaque = np.concatenate([values, np.full((6, 8, 1), 255, np.uint8)], 2)
    np.testing.assert_array_equal(np.asarray(data.read_image(opaque)), values)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 6), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
    ],
    ids=["float", "channels first", "batch", "empty", "five channels"],
)
def test_an_array_of_another_kind_is_refused(array: np.ndarray) -> None:
    with pytest.raises(data.ImageError, match=r"uint8 \[H, W, 3\].*channels last"):
        data.read_image(array)


def test_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="an image is a path"):
        data.read_image(3)


def test_expand_inputs_keeps_the_order_and_sorts_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.JPEG", "sub/c.png", "notes.txt", ".hidden.jpg", "sub/deep/d.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    missing = tmp_path / "missing.jpg"
    folder = [tmp_path / name for name in ("a.JPEG", "b.jpg", "sub/c.png", "sub/deep/d.webp")]
    assert data.expand_inputs([missing, tmp_path]) == [missing, *folder]
    assert data.expand_inputs([str(tmp_path / "*.jpg")]) == [tmp_path / "b.jpg"]
    assert data.expand_inputs([str(tmp_path / "**" / "*.??*g"), missing]) == [*folder[1:3], missing]
    assert data.expand_inputs([str(tmp_path / "sub*" / "**")]) == folder[2:]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "photo[1].jpg"
    path.touch()
    assert not data.is_many(path)
    assert data.expand_inputs([path]) == [path]


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no photos in"):
        data.expand_inputs([tmp_path])
    with pytest.raises(UserError, match=r"no file matches .*\*\.jpg"):
        data.expand_inputs([tmp_path / "*.jpg"])

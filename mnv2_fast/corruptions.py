"""Photos made worse on purpose, each in three strengths, to see which networks stand it.

All networks see the same copies: a photo is resized to `SIDE` pixels, made worse there, and then resized as
the network wants it. What is random follows from the photo's number and the dataset's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._torchvision import torchvision, transforms_v2
from .imagecache import ImageCache
from .loading import PhotoDataset, Transform
from .photos import Photo
from .weights import Preprocessing

SIDE = 256  # pixels of the shorter side


@dataclass(frozen=True)
class Corruption:
    """A way to make photos worse.

    name: what it is called. unit: of its levels. levels: one for each strength. apply: from uint8 [3, H, W]
    and a level to the same shape; draws from torch's global generator.
    """

    name: str
    unit: str
    levels: tuple[float, float, float]
    apply: Callable[[Tensor, float], Tensor]


def _noise(image: Tensor, sigma: float) -> Tensor:
    functional = transforms_v2().functional
    noisy = functional.gaussian_noise(functional.to_dtype(image, torch.float32, scale=True), sigma=sigma)
    return functional.to_dtype(noisy, torch.uint8, scale=True)


def _blur(image: Tensor, sigma: float) -> Tensor:
    size = 2 * round(3 * sigma) + 1  # holds 99.7% of the bell
    return transforms_v2().functional.gaussian_blur(image, [size, size], [sigma, sigma])


def _rotation(image: Tensor, degrees: float) -> Tensor:
    bilinear = torchvision().transforms.InterpolationMode("bilinear")
    grey = [128.0] * 3
    return transforms_v2().functional.rotate(image, _either(-degrees, degrees), bilinear, fill=grey)


def _brightness(image: Tensor, factor: float) -> Tensor:
    return transforms_v2().functional.adjust_brightness(image, _either(1 / factor, factor))


def _either(a: float, b: float) -> float:
    return a if torch.rand(()).item() < 0.5 else b


CORRUPTIONS: tuple[Corruption, ...] = (
    Corruption("noise", "standard deviation, of 1", (0.08, 0.16, 0.32), _noise),
    Corruption("blur", f"standard deviation, pixels of {SIDE}", (1.0, 2.0, 4.0), _blur),
    Corruption("rotation", "degrees, to either side", (15.0, 30.0, 60.0), _rotation),
    Corruption("brightness", "times as bright or as dark", (1.5, 2.0, 3.0), _brightness),
)


def dataset(
    photos: Sequence[Photo],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    corruption: Corruption,
    level: float,
    *,
    seed: int = 0,
    cache: ImageCache | None = None,
) -> PhotoDataset:
    """The photos, made worse, as a network sees them.

    Args:
        photos: of one side of a `LabelledFolder`.
        classes: its class names.
        preprocessing: of the network.
        corruption: how.
        level: how much.
        seed: of what is random in it.
        cache: of photos resized to `SIDE`, as `at_side` says.
    """
    transform = _view(corruption, level, preprocessing)
    return PhotoDataset(photos, classes, at_side(preprocessing), transform, seed=seed, cache=cache)


def at_side(preprocessing: Preprocessing) -> Preprocessing:
    """The same with photos resized to `SIDE`."""
    return replace(preprocessing, resize=SIDE)


def _view(corruption: Corruption, level: float, preprocessing: Preprocessing) -> Transform:
    v2 = transforms_v2()
    interpolation = torchvision().transforms.InterpolationMode(preprocessing.interpolation)
    steps = [v2.Resize(preprocessing.resize, interpolation), v2.CenterCrop(preprocessing.crop)]
    return v2.Compose([_Worse(corruption, level), *steps])


@dataclass(frozen=True)
class _Worse:
    """A corruption at one level; goes to another process."""

    corruption: Corruption
    level: float

    def __call__(self, image: Tensor) -> Tensor:
        return self.corruption.apply(image, self.level)

"""The images a network is quantized by: from a tensor, a loader, a folder or a list to float32 batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import data
from .errors import UserError
from .weights import Preprocessing

MOST_IMAGES = 256  # taken: bounds memory (a first block's tensor is 1.2 MB a photo) and time
_FEW_IMAGES = 8  # below it, chance decides the ranges

Skip = Callable[[Exception], object]

_CURE = (
    "give float32 [N, 3, H, W] (normalized) or uint8 [N, H, W, 3], batches of a loader, a folder of photos "
    "or a list of them"
)


def read(source: Any, preprocessing: Preprocessing) -> list[Tensor]:
    """Calibration images as float32 batches [N, 3, H, W], normalized; at most `MOST_IMAGES` of them.

    They are spread evenly over a tensor, a folder or a list of photos, and are the first ones of anything
    else. Photos that cannot be used are skipped, with one warning that counts them.

    Args:
        source: a tensor or array, float32 [N, 3, H, W], normalized as `preprocessing` says, or uint8
            [N, H, W, 3]; the path of a folder, of a photo, or a pattern; or something to iterate over, such
            as a `DataLoader` or a list, of such batches, of (batch, labels), of float32 images [3, H, W], or
            of photos, as `data.read_image` takes them.
        preprocessing: what photos and uint8 batches go through.

    Raises:
        UserError: there are no images, or they are of another type or shape, or not finite.
        TypeError: source is nothing that holds images.
    """
    skipped: list[Exception] = []
    batches = list(_batches(_items(source), preprocessing, skipped.append))
    count = sum(map(len, batches))
    if skipped:
        said = f"{len(skipped)} calibration photos cannot be used, the first: {skipped[0]}"
        if not count:
            raise UserError(f"no calibration images are left: {said}")
        warnings.warn(said, stacklevel=3)
    if not count:
        raise UserError(f"there are no calibration images: {_CURE}, about 100 images")
    by_size: dict[tuple[int, ...], list[Tensor]] = {}
    for batch in batches:
        by_size.setdefault(tuple(batch.shape[1:]), []).append(batch)
    batches = [torch.cat(alike) for alike in by_size.values()]
    _warn_of_odd(batches, count, preprocessing)
    return batches


def spread(items: Sequence[Any], count: int = MOST_IMAGES) -> list[Any]:
    """At most `count` of the items, evenly spread, in their order."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def photos(sources: Iterable[Any], preprocessing: Preprocessing, skip: Skip) -> Iterator[Tensor]:
    """Each photo as uint8 [1, crop, crop, 3]; those that cannot be used are left out and handed to `skip`."""
    for source in sources:
        try:
            image = data.resize_and_crop(data.read_image(source), preprocessing)
        except (UserError, OSError) as error:
            skip(error)
            continue
        yield torch.from_numpy(image.copy())[None]


def normalized(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """float32 [N, 3, H, W] of a checked batch: uint8 [N, H, W, 3], or normalized already."""
    return data.normalize(images, preprocessing) if images.dtype == torch.uint8 else images


def _items(source: Any) -> Iterable[Any]:
    """What `source` holds, photos and batches one after another."""
    if isinstance(source, str | Path):
        return spread(data.expand_inputs([source]))
    if isinstance(source, Tensor | np.ndarray):
        batch = torch.as_tensor(source)
        if batch.dim() != 4:
            raise UserError(f"calibration images of shape {list(batch.shape)} are no batch: {_CURE}")
        return [batch[torch.tensor(spread(range(len(batch))), dtype=torch.long)]]
    if isinstance(source, bytes | Image.Image | dict) or not isinstance(source, Iterable):
        raise TypeError(f"{type(source).__name__} holds no calibration images: {_CURE}")
    if isinstance(source, list | tuple) and not any(_is_batch(item) for item in source):
        return spread(source)
    return source


def _is_batch(item: Any) -> bool:
    return isinstance(item, list | tuple) or (isinstance(item, Tensor | np.ndarray) and item.ndim == 4)


def _batches(items: Iterable[Any], preprocessing: Preprocessing, skip: Skip) -> Iterator[Tensor]:
    left = MOST_IMAGES
    for i, item in enumerate(items):
        if left <= 0:
            return
        images = item[0] if isinstance(item, list | tuple) and item else item  # (images, labels)
        if isinstance(images, Tensor | np.ndarray) and not _is_photo(images):
            batch = _checked(torch.as_tensor(images).detach().cpu(), i)
        else:
            try:
                found = list(photos([images], preprocessing, skip))
            except TypeError as error:
                raise TypeError(f"calibration item {i + 1}: {error}; {_CURE}") from None
            if not found:
                continue
            batch = found[0]
        yield normalized(batch[:left], preprocessing)
        left -= len(batch)


def _is_photo(item: Tensor | np.ndarray) -> bool:
    return item.dtype in (torch.uint8, np.dtype("uint8")) and item.ndim in (2, 3)


def _checked(batch: Tensor, i: int) -> Tensor:
    """A batch of images, once it is one; one image [3, H, W] as a batch."""
    got = f"calibration item {i + 1} is {batch.dtype} {list(batch.shape)}"
    if batch.dtype not in (torch.float32, torch.uint8):
        raise UserError(f"{got}: convert it with .float(), or give uint8 [N, H, W, 3]")
    batch = batch[None] if batch.dim() == 3 else batch
    channels_at = 3 if batch.dtype == torch.uint8 else 1
    if batch.dim() != 4 or batch.shape[channels_at] != 3 or 0 in batch.shape[1:]:
        raise UserError(f"{got}: {_CURE}")
    if batch.is_floating_point() and not batch.isfinite().all():
        raise UserError(f"calibration item {i + 1} holds NaN or infinite values: clean the images")
    return batch


def _warn_of_odd(batches: Sequence[Tensor], count: int, preprocessing: Preprocessing) -> None:
    """Say what works, and is rarely meant."""
    odd = []
    if count < _FEW_IMAGES:
        odd.append(f"{count} calibration image(s) are few: ranges come out by chance, give about 100")
    sizes = {tuple(batch.shape[2:]) for batch in batches}
    crop = preprocessing.crop
    if (crop, crop) not in sizes:
        h, w = min(sizes)
        odd.append(f"calibration images are {h} x {w}, the model's preprocessing makes {crop} x {crop}")
    expected = max((1 - m) / s for m, s in zip(preprocessing.mean, preprocessing.std, strict=True))
    largest = max(float(batch.abs().max()) for batch in batches if len(batch))
    if largest > 10 * math.ceil(expected):
        odd.append(f"calibration images hold values up to {largest:.0f}: normalize them as the model expects")
    for said in odd:
        warnings.warn(said, stacklevel=4)

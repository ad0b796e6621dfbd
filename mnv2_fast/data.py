"""Photos: from a file, bytes, an array or a PIL image to the network's input.

Resizing and cropping give torchvision's `Resize` + `CenterCrop` on a PIL image bit for bit, without
torchvision.
"""

from __future__ import annotations

import glob
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import UserError
from .weights import Preprocessing

# Pillow's name -> suffixes. No other format is opened: some start a program (EPS runs Ghostscript).
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm"),
    "AVIF": (".avif",),
}
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)

_INTERPOLATION = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_ORIENTATION = 0x0112  # EXIF
_warnings_lock = threading.Lock()


class ImageError(UserError):
    """A photo that cannot be used."""


class MissingImageError(ImageError, FileNotFoundError):
    """A photo that is not there."""


def read_image(source: Any) -> Image.Image:
    """One photo, upright, as RGB; a PIL image that is both already is returned itself.

    Rotation by EXIF is applied. An animation gives its first frame. Transparent pixels lie on white. 16-bit
    grey keeps its upper 8 bits. CMYK, palette, grey and the other modes are converted by Pillow.

    Args:
        source: a path, the bytes of an image file, an open binary file, a PIL image (left as it is), or a
            uint8 array or tensor [H, W, 3], [H, W, 4] (RGBA) or [H, W]. Files are of one of `FORMATS`.

    Raises:
        ImageError: missing, empty, truncated, no image, of a mode without a known range (float or 32-bit
            TIFF), or of more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
        TypeError: `source` is none of these.
    """
    name, found = _resolve(source)
    try:
        if isinstance(found, Image.Image):
            return _rgb(found, name)
        with _open(found) as image:
            return _rgb(image, name)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"{name} is no image of a format read here: give one of {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(_too_large(name)) from None
    except PermissionError:
        raise ImageError(f"{name} may not be read: check its permissions") from None
    except Exception as error:  # Pillow's decoders fail on damaged data with whatever they stumble over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ImageError(f"{name} is truncated or damaged ({reason}): fetch it again") from error


def _resolve(source: Any) -> tuple[str, Path | BinaryIO | Image.Image]:
    """What to call an image in messages, and the image or the file to open."""
    if isinstance(source, Image.Image):
        return "the image", source
    if isinstance(source, np.ndarray | Tensor):
        return "the image", _from_array(source)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if not str(source).strip():
            raise ImageError(f"{str(source)!r} names no photo: give the path of a file")
        if path.is_dir():
            raise ImageError(f"{source} is a folder: give a photo in it")
        if not path.exists():
            raise MissingImageError(f"no file {source}: check the path")
        return str(source), path
    if isinstance(source, bytes | bytearray | memoryview):
        return "the image", io.BytesIO(source)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return str(getattr(source, "name", "the image")), source
    raise TypeError(
        f"an image is a path, bytes, a PIL image or a uint8 array [H, W, 3], not {type(source).__name__}"
    )


def _open(file: Path | BinaryIO) -> Image.Image:
    Image.init()  # returns at once after the first time
    formats = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF
    # Pillow warns of a size that `_rgb` refuses, which would say it twice. Warning filters are the process's:
    # two threads changing them at once would leave them changed.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=formats)


def _too_large(name: str) -> str:
    return (
        f"{name} has more than the {Image.MAX_IMAGE_PIXELS or 0:,} pixels allowed (a decompression bomb?): "
        "scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if it is trusted"
    )


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    shape = tuple(values.shape)
    good = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
    if values.dtype != np.uint8 or not good or 0 in shape:
        raise ImageError(
            f"an image array is uint8 [H, W, 3], [H, W, 4] or [H, W], not {values.dtype} {list(shape)}: "
            "scale it to 0..255 and put the channels last"
        )
    return Image.fromarray(np.ascontiguousarray(values))


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """`image` upright as RGB; the image given is not changed."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty ({width} x {height}): give one of at least 1 x 1")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(_too_large(f"{name} ({width} x {height})"))
    if image.getexif().get(_ORIENTATION, 1) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    image.load()
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        image = _eight_bits(image, name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if rgba.getchannel(3).getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The upper 8 of 16 bits; Pillow's convert() would clip everything above 255 to white."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{name} has pixels of 32 bits, whose range is not known: convert it to 8 bits first"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The part of an RGB image that the network sees, as uint8 [crop, crop, 3].

    Equal to torchvision's `Resize(resize)` and `CenterCrop(crop)` on the PIL image, bit for bit; a crop
    larger than what there is has black borders.

    Raises:
        ImageError: the image is so long and thin that it has too many pixels once its shorter side is
            resized.
    """
    return centre_crop(resize_shorter_side(image, preprocessing), preprocessing)


def resize_shorter_side(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """An RGB image whose shorter side has `resize` pixels: the first half of `resize_and_crop`.

    Raises:
        ImageError: as there.
    """
    size = preprocessing.resize
    width, height = image.size
    shorter = min(width, height)
    if shorter == size:
        return image
    longer = int(size * max(width, height) / shorter)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size * longer > limit:
        raise ImageError(
            f"an image of {width} x {height} is too long and thin to resize to {size}: crop it first"
        )
    resized = (size, longer) if width <= height else (longer, size)
    return image.resize(resized, _INTERPOLATION[preprocessing.interpolation])


def centre_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The middle of an RGB image as uint8 [crop, crop, 3]: the second half of `resize_and_crop`."""
    crop = preprocessing.crop
    width, height = image.size
    if width < crop or height < crop:
        x, y = max(crop - width, 0), max(crop - height, 0)
        image = ImageOps.expand(image, (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2))
        width, height = image.size
    left, top = round((width - crop) / 2.0), round((height - crop) / 2.0)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def normalize(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels as the network takes them, equal to torchvision's `ToTensor` + `Normalize`.

    Args:
        images: uint8 [N, H, W, 3], RGB.
        preprocessing: has the mean and standard deviation, for pixels in 0..1.

    Returns:
        float32 [N, 3, H, W] in channels_last.
    """
    n, h, w, channels = images.shape
    # By rows: torch does not vectorize along three channels.
    mean = torch.tensor(preprocessing.mean, dtype=torch.float32).repeat(w)
    std = torch.tensor(preprocessing.std, dtype=torch.float32).repeat(w)
    rows = images.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(n, h, w * channels)
    return rows.div_(255).sub_(mean).div_(std).view(n, h, w, channels).permute(0, 3, 1, 2)


def is_many(source: Any) -> bool:
    """Whether a path stands for several photos: a folder, or a pattern (`*`, `?`, `[`) that is no file."""
    if not isinstance(source, str | Path):
        return False
    path = Path(source).expanduser()
    if not str(source).strip():
        return False
    return path.is_dir() or (glob.has_magic(str(source)) and not path.exists())


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that some paths, folders and patterns stand for: `iterate_inputs` as a list."""
    return list(iterate_inputs(inputs))


def iterate_inputs(inputs: Iterable[str | Path]) -> Iterator[Path]:
    """The files that some paths, folders and patterns stand for, in their order.

    A folder gives its photos (by suffix; hidden ones are left out) and its subfolders', sorted by path. A
    pattern gives the files it matches, sorted; `**` crosses folders. Any other path is kept, also one that
    does not exist: reading it says so.

    Folders are read as the iteration comes to them: kept are the names in the one at hand and in those
    around it, and what patterns match.

    Raises:
        UserError: at once, for a folder without photos, a pattern that matches nothing, or an empty path.
    """
    return chain.from_iterable([_expand(item) for item in inputs])


def _expand(item: str | Path) -> Iterable[Path]:
    if not str(item).strip():
        raise UserError(f"{str(item)!r} names no photo: give a file, a folder or a pattern ('*.jpg')")
    path = Path(item).expanduser()
    if path.is_dir():
        photos = _photos_in(path)
        first = next(photos, None)
        if first is None:
            raise UserError(f"no photos in {path}: put some there ({', '.join(SUFFIXES)})")
        return chain([first], photos)
    if is_many(item):
        matches = map(Path, glob.glob(str(path), recursive=True))
        found = sorted(match for match in matches if not match.is_dir())
        if not found:
            raise UserError(f"no file matches {str(item)!r}: check the pattern")
        return found
    return [path]


def _photos_in(folder: Path) -> Iterator[Path]:
    names, folders = [], set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.add(name)
                elif name.startswith(".") or not name.lower().endswith(SUFFIXES) or entry.is_dir():
                    continue
                names.append(name)
    except OSError:  # gone, or not for this user
        return
    names.sort()
    for name in names:
        if name in folders:
            yield from _photos_in(folder / name)
        else:
            yield folder / name

"""Resized photos, decoded once and kept in one memory-mapped file.

The file: a magic, the offset of the index, pixels one photo after another (uint8 [height, width, 3]), and the
index as JSON. It is written beside its place and renamed, so that a run cut off leaves the old one or none,
and a process that has mapped the old one keeps it. Processes that want the same file take turns, and those
that waited find it made.

What a photo was decoded from is told by a digest of its file. As long as size and times of the file stand,
the file is not read again; times so recent that a later write could have left them alone are not believed.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from . import data, machine
from .data import ImageError
from .errors import UserError
from .weights import Preprocessing

MOST_BYTES = 4 * 10**9
_MAGIC = b"mnv2img1"
_START = len(_MAGIC) + 8  # of the pixels: the offset of the index is in between
_CLOCK_TICK_NS = 2 * 10**9  # the coarsest time stamps of a file system in use (FAT)
_AHEAD = 256  # photos decoded at a time: bounds what waits to be written

Progress = Callable[[int, int], object]


def load_resized(path: Path, preprocessing: Preprocessing, content: bytes | None = None) -> np.ndarray:
    """A photo as the cache keeps it: upright RGB, the shorter side resized, uint8 [H, W, 3].

    Args:
        path: of its file.
        preprocessing: its `resize` and `interpolation` count.
        content: the file's, where it has been read.

    Raises:
        ImageError: it cannot be used; the message names the path.
    """
    try:
        image = data.read_image(path if content is None else _named(content, path))
        return np.asarray(data.resize_shorter_side(image, preprocessing))
    except (UserError, OSError) as error:
        said = str(error)
        raise ImageError(said if str(path) in said else f"{path}: {said}") from error


def _named(content: bytes, path: Path) -> io.BytesIO:
    """An open file whose `name` tells `read_image` what to call it."""
    file = io.BytesIO(content)
    file.name = str(path)
    return file


class _Entry(NamedTuple):
    """A photo in the file; one that cannot be used has an error instead of pixels."""

    stat: list[int]
    digest: str
    offset: int = 0
    height: int = 0
    width: int = 0
    error: str = ""


@dataclass
class _Index:
    """What the file says of itself; where photos were left out, the bound and about what all need, else 0."""

    recipe: dict[str, Any]
    written_ns: int
    limit: int = 0
    need: int = 0
    entries: dict[str, _Entry] = field(default_factory=dict)


class ImageCache:
    """Read access to a cache file. Made by `open_cache`; may be handed to worker processes.

    A worker that has to open the file itself, and finds that another has taken its place, goes without.
    """

    def __init__(self, file: Path, index: _Index, preprocessing: Preprocessing) -> None:
        self.file = file
        self._entries = index.entries
        self._recipe = _recipe(preprocessing)
        self._map: np.ndarray | None = None
        self._identity: tuple[int, int, int] | None = None
        self._open()

    def get(self, path: Path) -> np.ndarray | None:
        """The resized photo, uint8 [H, W, 3], a view of the file that may not be written; None: not kept.

        Raises:
            ImageError: the photo is known to be unusable.
        """
        entry = self._entries.get(os.path.abspath(path))
        if entry is None:
            return None
        if entry.error:
            raise ImageError(entry.error)
        if self._map is None:
            try:
                opened = self._open()
            except OSError:
                opened = False
            if not opened:
                self._entries = {}
                return None
        assert self._map is not None
        size = entry.height * entry.width * 3
        return self._map[entry.offset : entry.offset + size].reshape(entry.height, entry.width, 3)

    def fits(self, preprocessing: Preprocessing) -> bool:
        """Whether photos were resized as `preprocessing` says."""
        return self._recipe == _recipe(preprocessing)

    def _open(self) -> bool:
        with open(self.file, "rb") as file:
            stat = os.fstat(file.fileno())
            identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._identity not in (None, identity):
                return False
            self._identity = identity
            self._map = np.memmap(file, np.uint8, "r")
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # numpy would send the pixels


def open_cache(
    folder: str | os.PathLike[str],
    root: Path,
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    most_bytes: int = MOST_BYTES,
    progress: Progress | None = None,
) -> ImageCache | None:
    """The cache of some photos, made or brought up to date first: what has not changed is not decoded again.

    Photos beyond `most_bytes` are left out, with a warning that says how much all of them need. Where the
    file cannot be written (no space, no permission), a warning says so and there is no cache.

    Args:
        folder: where caches are; made if it is not there. One file for each `root` and kind of resizing.
        root: the folder of the photos, by which the file is found again.
        paths: of the photos. Those that cannot be used are kept as such.
        preprocessing: its `resize` and `interpolation` count.
        most_bytes: of pixels.
        progress: called with the number of photos done and of all while photos are decoded.

    Raises:
        UserError: most_bytes is below 1.
    """
    if most_bytes < 1:
        raise UserError(f"image cache of {most_bytes} bytes: allow at least 1, or go without a cache")
    recipe = _recipe(preprocessing)
    place = json.dumps([os.path.abspath(root), recipe["resize"], recipe["interpolation"]])
    file = Path(folder).expanduser() / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.images"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however it ends
            index = _read_index(file)
            if index is not None and index.recipe != recipe:
                index = None
            current = _current(index, paths) if index else {}
            if index is None or not _complete(index, current, paths, most_bytes):
                index = _write(file, current, paths, preprocessing, most_bytes=most_bytes, progress=progress)
            cache = ImageCache(file, index, preprocessing)
    except OSError as error:
        warnings.warn(
            f"no image cache in {folder} ({error.strerror or error}): photos are decoded in every epoch; "
            "make room or choose another folder",
            stacklevel=2,
        )
        return None
    if index.limit:
        warnings.warn(
            f"the image cache keeps {len(index.entries)} of {len(paths)} photos within "
            f"{most_bytes / 1e6:.1f} MB, all need about {index.need / 1e6:.1f} MB: "
            "the others are decoded in every epoch",
            stacklevel=2,
        )
    return cache


def _recipe(preprocessing: Preprocessing) -> dict[str, Any]:
    """What decides the pixels besides the files."""
    return {
        "resize": preprocessing.resize,
        "interpolation": preprocessing.interpolation,
        "pillow": PIL.__version__,
        "most_pixels": Image.MAX_IMAGE_PIXELS,
    }


def _read_index(file: Path) -> _Index | None:
    """The index; None where there is no file, or one that is damaged or of another version."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(_START)
            if len(head) < _START or not head.startswith(_MAGIC):
                return None
            opened.seek(struct.unpack("<Q", head[len(_MAGIC) :])[0])
            fields = json.loads(opened.read())
        entries = {key: _Entry(*entry) for key, entry in fields.pop("entries").items()}
        return _Index(**fields, entries=entries)
    except (FileNotFoundError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _stat(path: str | Path) -> list[int]:
    """Size and times. Nothing but the system sets the second time, whatever a copy does to the first."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _current(index: _Index, paths: Sequence[Path]) -> dict[str, _Entry]:
    """The entries of those `paths` whose files are what they were."""

    def check(key: str) -> _Entry | None:
        entry = index.entries.get(key)
        if entry is None:
            return None
        try:
            stat = _stat(key)
            settled = bool(entry.digest) and max(stat[1:]) < index.written_ns - _CLOCK_TICK_NS
            if (stat == entry.stat and settled) or _digest(Path(key).read_bytes()) == entry.digest:
                return entry._replace(stat=stat)
        except OSError:
            return None if entry.digest else entry  # could not be read before either
        return None

    keys = [os.path.abspath(path) for path in paths]
    with ThreadPoolExecutor(machine.cores()) as pool:
        return {key: e for key, e in zip(keys, pool.map(check, keys), strict=True) if e is not None}


def _complete(index: _Index, current: dict[str, _Entry], paths: Sequence[Path], most_bytes: int) -> bool:
    """Whether making the file again would add nothing and free nothing that has to go."""
    missing = [key for key in map(os.path.abspath, paths) if key not in current]
    if any(key in index.entries for key in missing):  # has changed
        return False
    held = sum(e.height * e.width * 3 for e in index.entries.values())
    return held <= most_bytes and (not missing or 0 < most_bytes <= index.limit)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _write(
    file: Path,
    current: dict[str, _Entry],
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    most_bytes: int,
    progress: Progress | None,
) -> _Index:
    """Make the file anew; what `current` has is copied from the old one."""
    index = _Index(_recipe(preprocessing), time.time_ns())
    part = file.with_suffix(".part")  # whose name the lock makes ours
    old = np.memmap(file, np.uint8, "r") if current else None
    try:
        with open(part, "wb") as out:
            out.write(_MAGIC + bytes(8))
            for i, (key, entry, pixels) in enumerate(_entries(paths, preprocessing, current, old)):
                size = 0 if pixels is None else pixels.nbytes
                held = out.tell() - _START
                if held + size > most_bytes:
                    index.limit, index.need = most_bytes, (held + size) * len(paths) // (i + 1)
                    break
                index.entries[key] = entry._replace(offset=out.tell())
                if pixels is not None:
                    out.write(np.ascontiguousarray(pixels).data)
                if progress is not None:
                    progress(i + 1, len(paths))
            end = out.tell()
            out.write(json.dumps(vars(index)).encode())
            out.seek(len(_MAGIC))
            out.write(struct.pack("<Q", end))
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return index


def _entries(
    paths: Sequence[Path], preprocessing: Preprocessing, current: dict[str, _Entry], old: np.ndarray | None
) -> Iterator[tuple[str, _Entry, np.ndarray | None]]:
    """(Key, entry, pixels) of each photo, in order; decoded on all cores."""

    def one(path: Path) -> tuple[str, _Entry, np.ndarray | None]:
        key = os.path.abspath(path)
        entry = current.get(key)
        if entry is not None and old is not None:
            size = entry.height * entry.width * 3
            return key, entry, None if entry.error else old[entry.offset : entry.offset + size]
        stat, digest = [0, 0, 0], ""
        try:
            stat = _stat(path)
            content = path.read_bytes()
            digest = _digest(content)
            pixels = load_resized(path, preprocessing, content)
        except OSError as error:
            said = f"{path} cannot be read ({error.strerror or error}): check it"
            return key, _Entry(stat, digest, error=said), None
        except ImageError as error:
            return key, _Entry(stat, digest, error=str(error)), None
        return key, _Entry(stat, digest, 0, *pixels.shape[:2]), pixels

    with ThreadPoolExecutor(machine.cores()) as pool:
        for start in range(0, len(paths), _AHEAD):
            yield from pool.map(one, paths[start : start + _AHEAD])

"""A labelled folder of photos: which there are, of which classes, and on which side of the split."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import data
from .errors import UserError
from .recipe import VAL_SHARE

SIDES = ("train", "val")


class Photo(NamedTuple):
    """A file and the number of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class LabelledFolder:
    """The photos to train on and those to validate on; `classes[photo.label]` is a photo's class name.

    `split`: (val_share, seed) that `find` split it by; None where it came so.
    """

    root: Path
    classes: tuple[str, ...]
    train: tuple[Photo, ...]
    val: tuple[Photo, ...]
    split: tuple[float, int] | None = None

    def refuse_within(self, **folders: str | os.PathLike[str] | None) -> None:
        """Refuse to write where a class is looked for: the next training would take what is there for photos.

        Args:
            **folders: option -> the folder that it names, or None.

        Raises:
            UserError: one lies among those of the classes.
        """
        tops = set()
        for photo in (*self.train, *self.val):
            first = photo.path.relative_to(self.root).parts[0]
            tops.add(self.root if first == self.classes[photo.label] else self.root / first)
        tops = {top.resolve() for top in tops}
        for option, folder in folders.items():
            if folder is not None and any(top in Path(folder).expanduser().resolve().parents for top in tops):
                raise UserError(
                    f"{option} {os.fspath(folder)!r} is among the photos of {self.root}, where each folder "
                    "is a class: give one outside of it"
                )

    def digest(self) -> str:
        """Of the photos' names, labels, order and sides: 64 hexadecimal digits."""
        names = hashlib.sha256()
        for side in (self.train, self.val):
            for photo in side:
                name = photo.path.relative_to(self.root)
                names.update(f"{photo.label} {name}\n".encode(errors="surrogateescape"))
            names.update(b"\n")
        return names.hexdigest()


def find(folder: str | os.PathLike[str], val_share: float = 0.2, seed: int = 0) -> LabelledFolder:
    """The photos of a folder in torchvision's `ImageFolder` layout: one subfolder a class, named after it.

    A folder with `train/` and `val/` is taken as it is. Any other one is split: of each class `val_share`,
    rounded, goes to validation, and at least one photo to either side. Which ones follows from `seed`, the
    class's name and the order of its file names: a change to one class moves no photo of another, but a photo
    added to it deals its own anew.

    Classes are numbered in the order of their sorted names, as by torchvision. Photos are those that
    `data.expand_inputs` finds in a class's folder; hidden folders are no classes.

    Args:
        folder: with one subfolder a class, or with `train/` and `val/` that each have one.
        val_share: above 0 and at most 0.9; not used where there are `train/` and `val/`.
        seed: at least 0; likewise.

    Raises:
        UserError: there is no such folder, there are fewer than two classes, a class has no photo or, where
            it is to be split, only one, or `train/` and `val/` differ in their classes.
    """
    root = _root(folder)
    try:
        VAL_SHARE(val_share)
    except ValueError as error:
        raise UserError(f"val_share={val_share!r}: {error}") from None
    if seed < 0:
        raise UserError(f"seed={seed}: give a whole number of at least 0")
    there = [side for side in SIDES if (root / side).is_dir()]
    # One of photos alone is a class that happens to have a side's name.
    if not any(_subfolders(root / side) for side in there):
        return _split(root, val_share, seed)
    if len(there) == 1:
        (missing,) = set(SIDES) - set(there)
        raise UserError(
            f"{root} has {there[0]}/ and no {missing}/: add it, or give {root / there[0]} to split that"
        )
    return _as_given(root)


def find_labelled(folder: str | os.PathLike[str]) -> LabelledFolder:
    """The photos of a folder to judge a network by, as those to validate on; none to train on.

    They are those of `val/` where the folder has it, else all.

    Args:
        folder: with one subfolder a class, one class at least, or with a `val/` that has them.

    Raises:
        UserError: there is no such folder, it has `train/` and no `val/`, or a class has no photo.
    """
    root = _root(folder)
    train, val = (bool(_subfolders(root / side)) if (root / side).is_dir() else False for side in SIDES)
    if train and not val:
        raise UserError(f"{root} has train/ and no val/: add it, or give {root / 'train'} to judge by that")
    found = _by_class(root / "val" if val else root, least=1)
    return LabelledFolder(root, tuple(found), (), _labelled(found))


def _root(folder: str | os.PathLike[str]) -> Path:
    root = Path(folder).expanduser()
    if not os.fspath(folder) or not root.is_dir():
        what = "is a file" if root.is_file() else "does not exist"
        raise UserError(f"folder of photos {os.fspath(folder)!r} {what}: give one with a subfolder per class")
    return root


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"cannot read {folder} ({error.strerror}): check its permissions") from error


def _by_class(folder: Path, least: int = 2) -> dict[str, list[Path]]:
    """Class name -> its photos, both sorted."""
    names = _subfolders(folder)
    if not names:
        raise UserError(
            f"no photos in subfolders of {folder}: put those of each class into one that has its name"
        )
    if len(names) < least:
        raise UserError(f"{folder} has one class only, {names[0]!r}: add a folder for each other class")
    return {name: data.expand_inputs([folder / name]) for name in names}


def _as_given(root: Path) -> LabelledFolder:
    train, val = (_by_class(root / side) for side in SIDES)
    differ = [
        f"only {side}/ has {', '.join(map(repr, only))}"
        for side, only in zip(SIDES, (sorted(train.keys() - val), sorted(val.keys() - train)), strict=True)
        if only
    ]
    if differ:
        raise UserError(
            f"train/ and val/ in {root} differ in their classes, {'; '.join(differ)}: "
            "give both the same folders"
        )
    return LabelledFolder(root, tuple(train), _labelled(train), _labelled(val))


def _split(root: Path, val_share: float, seed: int) -> LabelledFolder:
    train, val = {}, {}
    for name, paths in _by_class(root).items():
        if len(paths) < 2:
            raise UserError(
                f"class {name!r} in {root} has one photo, and training and validation need one each: "
                "add photos, or remove its folder"
            )
        count = min(max(1, round(val_share * len(paths))), len(paths) - 1)
        order = np.random.default_rng([seed, *os.fsencode(name)]).permutation(len(paths))
        chosen = set(order[:count].tolist())
        val[name] = [path for i, path in enumerate(paths) if i in chosen]
        train[name] = [path for i, path in enumerate(paths) if i not in chosen]
    return LabelledFolder(root, tuple(train), _labelled(train), _labelled(val), (val_share, seed))


def _labelled(found: dict[str, list[Path]]) -> tuple[Photo, ...]:
    return tuple(Photo(path, label) for label, paths in enumerate(found.values()) for path in paths)

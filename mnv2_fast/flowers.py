"""The flower photos of TensorFlow's tutorials (`tf_flowers`): 3,670 photos of five classes, CC BY."""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
import tempfile
from pathlib import Path

import torch

from . import env, files
from .errors import UserError

URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
# As TensorFlow Datasets has it, tensorflow_datasets/datasets/tf_flowers/checksums.tsv.
SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"
WORD = "flowers"  # for these photos, on command lines
NAME = "flower_photos"  # of the folder in the archive


def meant(data: str | os.PathLike[str]) -> bool:
    """Whether `data` is the word for these photos, and not a folder that is here."""
    return os.fspath(data) == WORD and not os.path.isdir(data)


def folder() -> Path:
    """Where the photos are, once they are fetched."""
    return (env.data_folder() or Path(torch.hub.get_dir()) / "datasets") / NAME


def fetch(progress: bool = True) -> Path:
    """The folder with the photos, one subfolder a class; fetched and unpacked where it is not there yet.

    It is in the folder of `MNV2_DATA`, else in torch hub's cache. An archive there is not fetched again.

    Args:
        progress: draw a bar while downloading.

    Raises:
        UserError: the archive cannot be downloaded, is not the published one, or cannot be unpacked.
    """
    target = folder()
    archive = target.with_suffix(".tgz")
    if target.is_dir():
        return target
    if archive.exists():
        _check(archive)
    else:
        _download(archive, progress)
    _unpack(archive, target)
    return target


def _download(archive: Path, progress: bool) -> None:
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(archive), SHA256, progress)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", None) or error).strip().splitlines()[0]
        raise UserError(
            f"the flower photos cannot be downloaded from {URL} ({reason}): put {archive.name} in a folder "
            f"and set {env.DATA.name} to it, or give a folder of photos"
        ) from None


def _check(archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{archive} is not the published archive: remove it to fetch it again")


def _unpack(archive: Path, target: Path) -> None:
    """Unpack beside the target, then rename: nobody finds half of the photos."""
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            f"this Python is too old to unpack {archive} safely: update it to 3.11.4, or unpack it yourself"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=target.parent) as beside:
            with tarfile.open(archive, "r:gz") as found:
                found.extractall(beside, filter="data")  # refuses what would leave the folder
            try:
                os.replace(Path(beside) / NAME, target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno in files.FULL:
            raise UserError(f"there is no room in {target.parent} to unpack {archive}: make some") from error
        cure = "check permissions" if isinstance(error, PermissionError) else "remove it to fetch it again"
        raise UserError(f"{archive} cannot be unpacked ({error}): {cure}") from error

"""Files that appear whole or not at all, and folders to write them in."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; it takes the place of `path` when the block ends well.

    Raises:
        OSError: the folder is not there or may not be written.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}.", dir=path.parent) as folder:
        beside = Path(folder) / path.name
        yield beside
        os.replace(beside, path)


def output_folder(path: str | os.PathLike[str]) -> Path:
    """A folder that files can be written in; made, with those around it, where it is not there.

    Raises:
        UserError: it is a file, or may not be made or written.
    """
    folder = Path(path).expanduser()
    if not os.fspath(path) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{os.fspath(path)!r} is a file or empty: give the name of a folder to write in")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write in {folder} ({error.strerror or error}): give another folder, or check its "
            "permissions"
        ) from error
    return folder

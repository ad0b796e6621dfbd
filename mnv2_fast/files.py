"""Files that appear whole or not at all, and folders to write them in."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system says where there is no room


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


@contextlib.contextmanager
def output_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder that files can be written in; made, with those around it, where it is not there.

    One that was made here is taken away again where the block fails before anything is in it.

    Raises:
        UserError: it is a file, or may not be made or written.
    """
    folder = Path(path).expanduser()
    if not os.fspath(path) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{os.fspath(path)!r} is a file or empty: give the name of a folder to write in")
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write in {folder} ({error.strerror or error}): give another folder, or check its "
            "permissions"
        ) from error
    try:
        yield folder
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8; names of files that are none stay what they were.

    Raises:
        OSError: it cannot be written; the one before is left.
    """
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="surrogateescape")

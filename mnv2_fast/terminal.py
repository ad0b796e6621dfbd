"""What the verbs of `mnv2` share: exit codes, numbers on the command line, lines and bars at a terminal."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from . import files

OK, BAD_FILES, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, so that no line is cut in the middle."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    asked: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


def one_line(error: object) -> str:
    """A message without line breaks; what kind of error it is where it says nothing."""
    if isinstance(error, OSError) and error.errno in files.FULL:
        return f"cannot write {error.filename or 'a file'} ({error.strerror}): make room, then start it again"
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory: use smaller batches or images"
    return " ".join(str(error).split()) or type(error).__name__


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return number


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 0 to 1")
    return number


class Stages:
    """Counts the steps of some stages one after another, with a bar for each at a terminal."""

    def __init__(self) -> None:
        self.done = "nothing done"
        self.unusable = 0
        self._stage = ""
        self._bar: Any = None
        self._tqdm: Any = None
        if sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self._tqdm = tqdm

    def advance(self, stage: str, done: int, of: int) -> None:
        """`done` of `of` steps of a stage are done."""
        self.done = f"{done} of {of} {stage}"
        if self._tqdm is None:
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = self._tqdm(total=of, desc=stage, file=sys.stderr, dynamic_ncols=True, leave=False)
        self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line on stderr, above the bar."""
        if self._bar is None:
            print(text, file=sys.stderr)
        else:
            self._bar.write(text, file=sys.stderr)

    def warn(self, message: Warning | str, *where: object, **more: object) -> None:
        """Print a warning; in the place of `warnings.showwarning`."""
        self.say(f"mnv2: warning: {one_line(message)}")

    def skip(self, error: Exception) -> None:
        """Say of a photo that it cannot be used, and count it."""
        self.unusable += 1
        self.say(f"mnv2: {one_line(error)}")

    def count(self, of: int) -> None:
        """Say how many of the photos could not be used, if any."""
        if self.unusable:
            self.say(f"mnv2: {self.unusable} of {of} photos could not be used")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

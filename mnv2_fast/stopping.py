"""Ctrl-C and SIGTERM as a wish to stop, for work that has something to save first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the user wants to stop: `asked` is then the signal's number, else 0."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """The first signal within only sets `asked`; one more is a KeyboardInterrupt at once.

        Outside the main thread, where Python takes no signals, nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                if handler is not None:  # one that was not installed from Python stays away
                    signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        # A loader's worker that got the signal, too, ends, and torch's handler would raise an error for it
        # wherever this process is. Without it the error comes where the next batch is asked for.
        self._before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda number, frame: None)

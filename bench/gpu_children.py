"""Children of `bench.gpu` that answer numbers, one at a time: what one number breaks costs only itself.

A kernel may hang, crash its process, or spoil the CUDA context for every later call. So all that runs on the
GPU runs in children. One that ends, or takes too long, is told of its number; another one takes the rest.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench import results

MARK = "@ "
# A child begins by importing torch and making a CUDA context.
START_S = 90.0
# One number: the longest compiles every layer of a network.
ANSWER_S = 100.0


@dataclass(frozen=True)
class Answer:
    """What a child found of a number; or why it found nothing, in `failed`."""

    number: int
    found: Any
    failed: str = ""


class EndedError(Exception):
    """A child that ended, with its reason."""


class LateError(EndedError):
    """A child that took too long, and was killed."""


def serve(answer: Callable[[int], Any]) -> int:
    """The child's side: answer each number that comes. Returns 3 where the GPU serves it no more."""
    _say("ready")
    for line in sys.stdin:
        number, found, failed = int(line), None, ""
        try:
            found = answer(number)
        except Exception as error:
            failed = in_one_line(error)
        lost = context_lost()
        if lost:
            failed = failed or "its launch left an error"
            failed += "; nothing runs in its CUDA context any more"
        _say(number, found, failed, bool(lost))
        if lost:
            return 3
    return 0


def in_one_line(error: Exception) -> str:
    """An error's type and last line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def context_lost() -> bool:
    """Whether an error such as an illegal address has made every later call of this process fail."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return True
    return False


def _say(*values: object) -> None:
    print(MARK + json.dumps(values), flush=True)


class Child:
    """One process that serves `program`, killed with all that it started when its time is over."""

    def __init__(self, program: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            program,
            cwd=results.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
        )

    def ready(self, seconds: float) -> None:
        """Wait until it serves.

        Raises:
            EndedError: it does not.
        """
        self._next(seconds)

    def ask(self, number: int, seconds: float) -> tuple[Answer, bool]:
        """Its answer, and whether that is its last one.

        Raises:
            EndedError: it has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        of, found, failed, last = self._next(seconds)
        assert of == number
        return Answer(number, found, failed), last

    def kill(self) -> None:
        """End it, and what it started."""
        kill_all(self._process)

    def close(self) -> None:
        """End it and free what this process holds of it."""
        self.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()

    def _next(self, seconds: float) -> list[Any]:
        """The next marked line; others are of the libraries."""
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(max(seconds, 0.1), stop)
        timer.start()
        try:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return json.loads(line[len(MARK) :])
        finally:
            timer.cancel()
        if late.is_set():
            raise LateError(f"no answer within {seconds:.0f} s")
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or ["no message"]
        raise EndedError(f"its process ended with {code}: {lines[-1]}")


def kill_all(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def program(name: str) -> list[str]:
    """The command of a child that serves what `bench.gpu` calls `name`."""
    return [sys.executable, "-m", "bench.gpu", "--serve", name]


def answers(
    command: Sequence[str],
    numbers: Iterable[int],
    seconds: float,
    workers: int = 1,
    answer_s: float = ANSWER_S,
) -> Iterator[Answer]:
    """Answers as they come, for `seconds` at most, from so many children; each takes the next number.

    A number that takes over `answer_s` has failed; one that nobody took or finished within `seconds` has no
    answer.
    """
    pool = _Pool(command, numbers, time.monotonic() + seconds, answer_s)
    threads = [threading.Thread(target=pool.work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            yield from iter(pool.found.get, None)
    finally:
        pool.stop()
        for thread in threads:
            thread.join()


class _Pool:
    """Numbers that children of several threads take."""

    def __init__(self, command: Sequence[str], numbers: Iterable[int], until: float, answer_s: float) -> None:
        self.command, self.until, self.answer_s = command, until, answer_s
        self.found: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._waiting = collections.deque(numbers)
        self._children: list[Child] = []

    def stop(self) -> None:
        self.until = 0.0
        for child in list(self._children):
            child.kill()

    def work(self) -> None:
        """Take numbers until there is none or no time."""
        child: Child | None = None
        try:
            while self._waiting and self._left() > 0:
                if child is None:
                    child = self._start()
                    continue  # another thread may have taken the last number meanwhile
                try:
                    number = self._waiting.popleft()
                except IndexError:
                    break
                child = self._ask(child, number)
        except EndedError as ended:
            # None starts: the first of what is left is told, the others have no answer.
            if self._waiting and not (isinstance(ended, LateError) and self._left() <= 0):
                with contextlib.suppress(IndexError):
                    self.found.put(Answer(self._waiting.popleft(), None, str(ended)))
        finally:
            if child is not None:
                self._close(child)
            self.found.put(None)

    def _left(self) -> float:
        return self.until - time.monotonic()

    def _start(self) -> Child:
        child = Child(self.command)
        self._children.append(child)
        try:
            child.ready(min(START_S, self._left()))
        except EndedError:
            self._close(child)
            raise
        return child

    def _ask(self, child: Child, number: int) -> Child | None:
        """Put the answer; the child for the next number, or None for a new one."""
        try:
            answer, last = child.ask(number, min(self.answer_s, self._left()))
        except EndedError as ended:
            self._close(child)
            if self._left() > 0:
                self.found.put(Answer(number, None, str(ended)))
            return None
        self.found.put(answer)
        if not last:
            return child
        self._close(child)
        return None

    def _close(self, child: Child) -> None:
        child.close()
        if child in self._children:
            self._children.remove(child)

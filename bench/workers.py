"""Contenders in processes of their own, which take turns when told.

A process is pinned to its cores and given its environment before it imports anything. While others are
measured it waits in a read; `alone` stops every other process altogether (SIGSTOP), so that no thread of
theirs can spin.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from . import timing
from .results import ROOT


class WorkerError(RuntimeError):
    """A contender that could not be started or died. The message is the last line it printed."""


class Worker:
    """One contender in one process, which begins to start at once; `ready` waits for it.

    Args:
        module: the one in bench whose `serve(**request)` returns a function from a key to the call to time
            or to ask.
        request: JSON-able arguments of `serve`.
        cores: what the process is pinned to; torch gets as many threads.
        env: its whole environment.
    """

    def __init__(
        self, module: str, request: Mapping[str, Any], cores: Sequence[int], env: Mapping[str, str]
    ) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in `close`)
        order = json.dumps({"module": module, "request": request, "cores": list(cores)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.workers", order],
            cwd=ROOT,
            env={**env, "OMP_NUM_THREADS": str(len(cores))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.isa = ""

    def ready(self) -> Worker:
        """Wait until its calls are built. `isa` is then the instruction set of our kernels in it, if any.

        Raises:
            WorkerError: it could not be started.
        """
        try:
            self.isa = str(self._read()["isa"])
        except WorkerError:
            self.close()
            raise
        return self

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def begin(self, calls: int, key: str = "", **warming: float) -> None:
        """Start a turn; `finish` waits for it. Two workers begun together run together.

        `warming`: `warm_calls` and `warm_ms` of `timing.turn`, where its own are not meant.
        """
        self._write({"calls": calls, "key": key, "warming": warming})

    def finish(self) -> list[float]:
        """Milliseconds of each counted call of the turn begun."""
        times: list[float] = self._read()["ms"]
        return times

    def turn(self, calls: int, key: str = "", **warming: float) -> list[float]:
        """One turn, waited for."""
        self.begin(calls, key, **warming)
        return self.finish()

    def ask(self, key: str) -> Any:
        """What the call of that key returns, made once and not timed."""
        self._write({"ask": key})
        return self._read()["answer"]

    def _write(self, wanted: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._stderr.seek(0)
        printed = self._stderr.read().strip().splitlines()
        raise WorkerError(printed[-1] if printed else f"exit code {code}")

    def pause(self) -> None:
        """Stop the process: not one of its threads runs until `resume`."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()
        self._stderr.close()


@contextmanager
def alone(workers: Sequence[Worker], everyone: Sequence[Worker]) -> Iterator[None]:
    """Within, every process of `everyone` that is not one of `workers` is stopped."""
    stopped = [worker for worker in everyone if worker not in workers]
    for worker in stopped:
        worker.pause()
    try:
        yield
    finally:
        for worker in stopped:
            worker.resume()


def _serve(order: str) -> None:
    """The process's own part: build the calls, say so, then take a turn or answer for every line read."""
    asked = json.loads(order)
    os.sched_setaffinity(0, asked["cores"])
    # The answers have a channel that nothing the contender prints can reach.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    torch.set_num_threads(len(asked["cores"]))
    torch.set_grad_enabled(False)
    calls = importlib.import_module(f"bench.{asked['module']}").serve(**asked["request"])
    print(json.dumps({"isa": isa()}), file=answers)
    for line in sys.stdin:
        wanted = json.loads(line)
        if "ask" in wanted:
            print(json.dumps({"answer": calls(wanted["ask"])()}), file=answers)
            continue
        times = timing.turn(calls(wanted["key"]), wanted["calls"], **wanted["warming"])
        print(json.dumps({"ms": times}), file=answers)


def isa() -> str:
    """The instruction set of our kernels; empty where the process has not loaded them."""
    module = sys.modules.get("mnv2_fast._C")
    return "" if module is None else str(module.isa())


if __name__ == "__main__":
    _serve(sys.argv[1])

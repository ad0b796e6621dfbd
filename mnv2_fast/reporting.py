"""What a training says on stderr while it runs: a bar at a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_LINE_SECONDS = 60  # between two plain lines within an epoch,
_LINE_SHARE = 0.1  # which also are this share of its batches apart


class Reporter:
    """Says how far a training is.

    Args:
        shown: say anything at all.
        epochs: of the training.
        batches: of an epoch.
        done: batches of the whole training that were done before.
    """

    def __init__(self, shown: bool, epochs: int, batches: int, done: int = 0) -> None:
        self.shown, self.epochs, self.batches = shown, epochs, batches
        self._begun, self._at_begin = time.monotonic(), done
        self._said, self._said_at = time.monotonic(), done
        self._bar: Any = None
        if shown:
            self._bar = _bar(total=epochs * batches, initial=done, unit="batch")

    def say(self, text: str) -> None:
        """A line, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def batch(self, epoch: int, done: int, loss: float, top1: float, speed: float) -> None:
        """`done` batches of an epoch are done; loss and top-1 are their means, speed is in images/s."""
        at = (epoch - 1) * self.batches + done
        facts = f"loss {loss:.3f}, top-1 {top1:.1%}, {speed:.0f} images/s"
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(at - self._bar.n)
            return
        now = time.monotonic()
        waited = now - self._said >= _LINE_SECONDS and at - self._said_at >= _LINE_SHARE * self.batches
        if waited and done < self.batches:
            left = (now - self._begun) / (at - self._at_begin) * (self.epochs * self.batches - at)
            self.say(
                f"epoch {epoch}/{self.epochs}: batch {done}/{self.batches}, {facts}, {_duration(left)} left"
            )
            self._said, self._said_at = now, at

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done and validated."""
        skipped = f", {row['skipped']} photos could not be used" if row["skipped"] else ""
        averaged = f", averaged weights {row['ema_val_top1']:.1%}" if "ema_val_top1" in row else ""
        self.say(
            f"epoch {row['epoch']}/{self.epochs}: "
            f"loss {row['train_loss']:.3f}, top-1 {row['train_top1']:.1%}; "
            f"validation: loss {row['val_loss']:.3f}, top-1 {row['val_top1']:.1%}{averaged}; "
            f"{row['images_per_second']:.0f} images/s, {_duration(row['seconds'])}{skipped}"
        )
        self._said, self._said_at = time.monotonic(), row["epoch"] * self.batches

    @contextlib.contextmanager
    def warnings_above(self) -> Iterator[None]:
        """Warnings within do not cut the bar in two."""
        if self._bar is None:
            yield
            return
        show = warnings.showwarning

        def above(*args: Any, **keywords: Any) -> None:
            with self._bar.external_write_mode(file=sys.stderr):
                show(*args, **keywords)

        with warnings.catch_warnings():
            warnings.showwarning = above
            yield

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def counting(what: str, shown: bool) -> Callable[[int, int], None]:
    """A function that says how many photos are done, called with that and the number of all."""
    bar: Any = None
    said = time.monotonic()

    def count(done: int, of: int) -> None:
        nonlocal bar, said
        if done == 1:
            bar = _bar(total=of, unit="photo", desc=what)
        if bar is not None:
            bar.update(done - bar.n)
            if done == of:
                bar.close()
        elif time.monotonic() - said >= _LINE_SECONDS:
            print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)
            said = time.monotonic()

    return count if shown else lambda done, of: None


def _bar(**facts: Any) -> Any:
    """tqdm's bar at a terminal; None elsewhere, and where it is not installed."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            return tqdm(file=sys.stderr, dynamic_ncols=True, **facts)
    return None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""Processes that train together, as `torchrun` starts them; one alone makes the same calls, for nothing."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from .errors import UserError

T = TypeVar("T")

_FREES = 0.1  # seconds that gloo's threads have for the last tensors


class SaidElsewhereError(UserError):
    """An error that another process tells the user."""


class LostError(UserError):
    """Another process has ended without a word to this one."""


class Group:
    """All processes of a training: number `rank` of `world`, `here` of them on this machine.

    Each has to make the same calls in one order.

    A call that waits for the others is a `LostError` where one of them is gone.
    """

    def __init__(self, rank: int = 0, world: int = 1, here: int = 1) -> None:
        self.rank, self.world, self.here = rank, world, here

    @property
    def first(self) -> bool:
        """Whether this process writes and talks for all."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        with _talking():
            distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        values = [value] * self.world
        if self.world > 1:
            with _talking():
                distributed.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """What each process does by itself: where it fails in one, it ends in all.

        Args:
            work: must not talk to the other processes.

        Raises:
            Exception: as `work`, in the first process where it failed; elsewhere `SaidElsewhereError`.
        """
        failed: Exception | None = None
        try:
            result = work()
        except Exception as error:  # whatever it is, the others would wait for ever
            failed = error
        if not self.sum([failed is not None])[0]:
            return result
        said = self.gather(None if failed is None else str(failed))
        speaker = next(rank for rank, text in enumerate(said) if text is not None)
        if failed is not None and speaker == self.rank:
            raise failed
        raise SaidElsewhereError(said[speaker])

    def on_first(self, work: Callable[[], object]) -> None:
        """Let the first process do something; the others wait for it, and end where it fails.

        Raises:
            Exception: as `work`; elsewhere `SaidElsewhereError`.
        """
        self.together(work if self.first else lambda: None)

    def error(self, message: str) -> UserError:
        """What to raise where all processes have come upon the same mistake."""
        return UserError(message) if self.first else SaidElsewhereError(message)

    def copy(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, such as weights or running statistics, the first process's values."""
        if self.world > 1:
            with _talking():
                for tensor in tensors:
                    distributed.broadcast(tensor.detach(), 0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient the mean over all processes; one that a process lacks counts as zero there."""
        if self.world == 1:
            return
        asked = [p for p in parameters if p.requires_grad]
        has = torch.tensor([float(p.grad is not None) for p in asked])
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in asked]
        flat = torch.cat([has, *(g.reshape(-1) for g in mine)])
        with _talking():
            distributed.all_reduce(flat)
        flat /= self.world
        has, *means = flat.split([len(asked), *(p.numel() for p in asked)])
        for p, had, grad, mean in zip(asked, has.tolist(), mine, means, strict=True):
            if had:
                p.grad = grad.copy_(mean.view_as(grad))


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostError(
            "another process of this training has ended, or does not answer: see what it said, then go on "
            "with --resume"
        ) from error


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The processes that `torchrun` started, or that the caller has joined; else this one alone."""
    if not distributed.is_available():
        yield Group()
        return
    mine = not distributed.is_initialized() and distributed.is_torchelastic_launched()
    if mine:
        distributed.init_process_group("gloo")
    try:
        if distributed.is_initialized():
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun sets it
            yield Group(distributed.get_rank(), distributed.get_world_size(), here)
        else:
            yield Group()
    finally:
        if mine:
            # gloo's threads free a collective's tensors after it has returned, and need the interpreter's
            # lock to. One that still waits for it when the interpreter ends aborts the process ("terminate
            # called without an active exception"; every other time where a mistake ended it at once).
            time.sleep(_FREES)
            distributed.destroy_process_group()

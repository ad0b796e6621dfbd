"""Processes that train together, as `torchrun` starts them; one alone makes the same calls, for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed, nn

from .errors import UserError


class SaidElsewhereError(UserError):
    """An error that the first process tells the user."""


class Group:
    """All processes of a training: number `rank` of `world`. Each has to make the same calls in one order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this process writes and talks for all."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all processes."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        values = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(values, value)
        return values

    def on_first(self, work: Callable[[], object]) -> None:
        """Let the first process do something; the others wait for it, and fail where it fails.

        Raises:
            UserError, OSError: as `work`; elsewhere `SaidElsewhereError`.
        """
        failed: UserError | OSError | None = None
        if self.first:
            try:
                work()
            except (UserError, OSError) as error:
                failed = error
        message = self.gather(failed and str(failed))[0]
        if failed is not None:
            raise failed
        if message is not None:
            raise SaidElsewhereError(message)

    def error(self, message: str) -> UserError:
        """What to raise where all processes have come upon the same mistake."""
        return UserError(message) if self.first else SaidElsewhereError(message)

    def copy_buffers(self, module: nn.Module) -> None:
        """Give a module the first process's buffers, such as running statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients over all processes."""
        return model if self.world == 1 else nn.parallel.DistributedDataParallel(model)


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
            yield Group(distributed.get_rank(), distributed.get_world_size())
        else:
            yield Group()
    finally:
        if mine:
            distributed.destroy_process_group()

"""Two processes with torch's DistributedDataParallel on the training kernels of a GPU, interpreted."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from training_scenes import counted, model, play, weights_of

WORLD = 2
TIMEOUT = datetime.timedelta(seconds=180)


def network() -> nn.Module:
    return model([[1, 8, 1, 1]]).train()


def batches_of(rank: int) -> Sequence[Tensor]:
    """A process's half of two batches of four images."""
    images = torch.randn(2, 4, 3, 5, 4, generator=torch.Generator().manual_seed(2))
    return list(images[:, rank::WORLD])


def backward(of: nn.Module, x: Tensor) -> None:
    y = of(x)
    (y * weights_of(y).float()).sum().backward()


def gradients(of: nn.Module) -> list[Tensor]:
    """As they are now, of all parameters."""
    return [torch.full_like(p, torch.nan) if p.grad is None else p.grad.clone() for p in of.parameters()]


class Found(NamedTuple):
    """Gradients of the first batch and of both, added; running statistics after both."""

    first: list[Tensor]
    both: list[Tensor]
    buffers: list[Tensor]


def one_process(rank: int) -> Found:
    """A half, whose norms are of its own, by itself."""
    ours = network()
    found = []
    for images in batches_of(rank):
        backward(ours, images)
        found.append(gradients(ours))
    return Found(*found, list(ours.buffers()))


def wrong_under_ddp(rank: int, store: str, halves: Sequence[Found]) -> str:
    """What is wrong with the gradients of one process of two, which are to be the halves' mean to the bit."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=TIMEOUT
    )
    warnings.filterwarnings("error", message="Grad strides do not match bucket view strides")
    first, second = batches_of(rank)
    with counted() as nodes:
        plain = DistributedDataParallel(network())
        backward(plain, first)
        viewed = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        with viewed.no_sync():
            backward(viewed, first)
        local = gradients(viewed)
        backward(viewed, second)
    distributed.destroy_process_group()
    buffers = list(viewed.buffers()) if rank == 0 else halves[rank].buffers  # of which DDP sends the first's
    pairs = {
        "a step's gradients": (gradients(plain), mean([half.first for half in halves])),
        "a process's own gradients": (local, halves[rank].first),
        "gradients of two batches": (gradients(viewed), mean([half.both for half in halves])),
        "running statistics": (buffers, halves[rank].buffers),
    }
    wrong = [what for what, (ours, right) in pairs.items() if not all(map(torch.equal, ours, right))]
    if nodes != [4, 4, 4]:
        wrong.append(f"nodes of {nodes} layers")
    return ", ".join(wrong)


def mean(of_halves: Sequence[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(grads).mean(0) for grads in zip(*of_halves, strict=True)]


def second_process(answer: Any, store: str, halves: Sequence[Found]) -> None:
    try:
        answer.send(wrong_under_ddp(1, store, halves))
    except Exception:
        answer.send(traceback.format_exc())


@functools.cache
def both_processes() -> Sequence[str]:
    """What is wrong in each. The second is a fork of the first, whose kernels are then interpreted, too."""
    halves = [one_process(rank) for rank in range(WORLD)]
    fork = multiprocessing.get_context("fork")
    answer, sender = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        second = fork.Process(target=second_process, args=(sender, f"{folder}/store", halves))
        second.start()
        try:
            return wrong_under_ddp(0, f"{folder}/store", halves), answer.recv()
        finally:
            second.terminate()
            second.join()


SCENES = {
    "the first process": lambda: both_processes()[0],
    "the second process": lambda: both_processes()[1],
}


@pytest.mark.parametrize("scene", SCENES)
def test_interpreted(scene: str, verdicts: dict[str, str]) -> None:
    assert verdicts[scene] == ""


if __name__ == "__main__":
    play(SCENES)

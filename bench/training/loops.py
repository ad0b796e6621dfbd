"""The training loops that are timed, in a process of its own for each contender: an allocator's settings are
read when a process starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .. import memory
from ..workers import isa
from .contenders import CLASSES, Contender, find, setting_of

# Pretrained weights learn at it without a jump. At 0.01 rounding grows: the losses of torch's two layouts are
# 0.35 apart in the mean of 50 steps of 32 photos of 128 x 128, at this rate 0.03.
RATE = 0.001
CLASSIC_BATCHES = 4  # of the classic script's data set, which its loader shuffles again for every epoch


class Loop:
    """A model in train mode, its optimizer, and a step of both.

    Args:
        contender: whose model it is.
        dtype: "bf16" for autocast.
        freeze: as `Setting` has it.
        weights: safetensors file of the whole network; None: seeded ones.
    """

    def __init__(
        self,
        contender: Contender,
        dtype: str,
        freeze: Callable[[Any], None] | None = None,
        weights: str | None = None,
    ) -> None:
        self.contender, self.dtype = contender, dtype
        torch.manual_seed(0)
        self.model = contender.models.mobilenet_v2(num_classes=CLASSES).train()
        if weights:
            from safetensors.torch import load_file

            self.model.load_state_dict(load_file(weights))
        if freeze:
            freeze(self.model)
        if contender.channels_last:
            self.model.to(memory_format=torch.channels_last)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(learning, lr=RATE, momentum=0.9)
        self.run = torch.compile(self.model, dynamic=False) if contender.compiled else self.model

    def images(self, x: Tensor) -> Tensor:
        """A batch in the contender's layout."""
        layout = torch.channels_last if self.contender.channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One training step, and its loss."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            loss = nn.functional.cross_entropy(self.run(x), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def why_not(self, x: Tensor) -> str:
        """Why the kernels would not train with x, "" where they would."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16"):
            return _why_not(self.model, x)


def _why_not(model: Any, x: Tensor) -> str:
    """Why our training kernels do not serve such a batch; empty where they do, and of torch's model."""
    return getattr(model, "why_not", lambda _: "")(x) or ""


def serve(
    name: str, dtype: str, setting: str, batch: int, size: int
) -> Callable[[str], Callable[[], object]]:
    """For bench.workers: a step to time, and what to ask: see `_answers`."""
    torch.set_grad_enabled(True)  # a worker has them off
    torch.manual_seed(0)
    chosen, contender = setting_of(setting), find(name)
    if chosen.classic:
        model = contender.models.mobilenet_v2(num_classes=CLASSES)
        images = torch.randn(CLASSIC_BATCHES * batch, 3, size, size)
        steps = _classic(model, images, batch)
        return _answers(steps, lambda: _why_not(model, images[:batch])).__getitem__
    loop = Loop(contender, dtype, chosen.freeze)
    x = loop.images(torch.randn(batch, 3, size, size))
    steps = _repeat(loop, x, torch.randint(CLASSES, (batch,)))
    return _answers(steps, lambda: loop.why_not(x)).__getitem__


def _answers(steps: Iterator[float], why_not: Callable[[], str]) -> dict[str, Callable[[], object]]:
    """The calls of a process. `memory`: the most that it held since `restart`, over what it holds now, with
    model, optimizer and images made."""
    held = memory.resident()
    return {
        "step": lambda: next(steps),
        "restart": memory.restart_peak,
        "memory": lambda: memory.peak() - held,
        "why_not": why_not,
        "isa": isa,
    }


def _repeat(loop: Loop, x: Tensor, labels: Tensor) -> Iterator[float]:
    while True:
        yield float(loop.step(x, labels))


def _classic(model: Any, images: Tensor, batch: int) -> Iterator[float]:
    """The script that everybody has, whosever model it is; the loss of each step."""
    dataset = TensorDataset(images, torch.randint(CLASSES, (len(images),)))
    loader = DataLoader(dataset, batch_size=batch, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())
    criterion = nn.CrossEntropyLoss()
    model.train()

    def steps() -> Iterator[float]:
        while True:
            for batch_images, labels in loader:
                optimizer.zero_grad()
                loss = criterion(model(batch_images), labels)
                loss.backward()
                optimizer.step()
                yield loss.item()

    return steps()

"""Scenes of modules in train mode as on a GPU: tensors of the CPU in the GPU's place, kernels interpreted."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import pytest
import torch
import triton_interpreter
from gpu_stand_in import graph, launch_in_torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from mnv2_fast.kernels import train_depthwise

from mnv2_fast import MobileNetV2, training
from mnv2_fast.backends import chains, replay, triton, triton_train
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual, eager_only

IMAGES = (2, 3, 11, 8)
PIXELS = (2, 8, 3, 4)
BLOCKS = [[1, 8, 1, 1], [6, 8, 2, 2]]
Module = TypeVar("Module", bound=nn.Module)


def stand_in() -> None:
    """Have tensors on the CPU go the way of CUDA tensors, whose training kernels are interpreted.

    A module that declines in silence, which torch would serve as well, fails its scene: `lenient` lets it.
    """
    os.environ |= {"MNV2_BACKEND": "triton", "MNV2_STRICT": "1"}
    triton._device_reason = lambda device: None
    row = dataclasses.replace(chains.KERNELS["cuda"], unavailable=lambda: "")
    chains.KERNELS["cpu"] = row  # type: ignore[index]
    training._kernels = lambda x: triton_train
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    triton_train.empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    replay.capturing = lambda device: False
    replay.place = lambda x: 0
    replay.capture = graph
    launch_in_torch(pytest.MonkeyPatch(), [])
    # The interpreter takes time by the rows and columns of a tile, filled or not: so all scenes take half.
    # tests/test_triton_training.py has the tables' own tiles.
    tables = train_depthwise.tiles
    train_depthwise.tiles = lambda name, kernel: {  # type: ignore[assignment]
        row: {**tile, "rows": 3, "cols": 1} for row, tile in tables(name, kernel).items()
    }


@contextlib.contextmanager
def lenient() -> Iterator[None]:
    """Within it a call that no kernel serves is torch's and no error."""
    os.environ["MNV2_STRICT"] = "0"
    try:
        yield
    finally:
        os.environ["MNV2_STRICT"] = "1"


def model(setting: list[list[int]] = BLOCKS) -> MobileNetV2:
    torch.manual_seed(0)
    made = MobileNetV2(5, inverted_residual_setting=setting, width_mult=0.5, round_nearest=4, dropout=0.0)
    # The last layer's 1280 channels would take half of the time.
    made.features[-1] = ConvBNReLU6(made.features[-1][0].in_channels, 24, 1)
    made.classifier[1] = nn.Linear(24, 5)
    return spread(made)


def block() -> InvertedResidual:
    torch.manual_seed(0)
    return spread(InvertedResidual(8, 8, 1, 2)).train()


def spread(of: Module) -> Module:
    """A module whose norms have other weights, biases and running statistics for each channel."""
    for norm in norms(of):
        nn.init.normal_(norm.weight, 1, 0.2)
        nn.init.normal_(norm.bias, 1, 0.3)
        nn.init.normal_(norm.running_mean, 0, 0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return of


def between_bends(of: Module) -> Module:
    """A module whose norms keep nearly all values between the bends of ReLU6.

    Past a bend one value of few takes a gradient further than all roundings.
    """
    for norm in norms(of):
        nn.init.uniform_(norm.weight, 0.3, 0.7)
        nn.init.constant_(norm.bias, 3)
    return of


def norms(of: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in of.modules() if isinstance(module, nn.BatchNorm2d)]


def distance(ours: Tensor, right: Tensor, least: float = 0) -> float:
    """How far ours is off, beside the right one's size or the least one that matters."""
    return float((ours.detach().double() - right.detach()).norm() / max(float(right.detach().norm()), least))


def weights_of(y: Tensor) -> Tensor:
    """Of a loss, one for each value of an answer, the same ones for every device and dtype."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.device)


def step(of: nn.Module, x: Tensor, cast: torch.dtype | None = None, weights: Tensor | None = None) -> Tensor:
    """The answer, of which some weights, or those of `weights_of`, make the loss for the gradients."""
    of.zero_grad()
    with torch.autocast(x.device.type, cast, enabled=cast is not None):
        y: Tensor = of(x)
    (y.double() * (weights_of(y) if weights is None else weights)).sum().backward()
    return y


def scaled_step(ours: nn.Module, x: Tensor, scale: float) -> tuple[bool, float]:
    """Whether a step in float16 with a loss of such a scale is made, and the scale after it."""
    ours.zero_grad()
    optimizer = torch.optim.SGD(ours.parameters(), 1e-3)
    before = [p.detach().clone() for p in ours.parameters()]
    scaler = torch.amp.GradScaler(x.device.type, init_scale=scale)
    with torch.autocast(x.device.type, torch.float16):
        loss = ours(x).float().square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return not all(map(torch.equal, before, ours.parameters())), scaler.get_scale()


def errors(ours: nn.Module, x: Tensor, cast: torch.dtype | None = None) -> dict[str, float]:
    """How far each result of a step of ours is off the same network's in float64 and plain torch."""
    twin, wide = copy.deepcopy(ours).double(), x.detach().double().requires_grad_(x.requires_grad)
    y = step(ours, x, cast)
    with eager_only():
        right = step(twin, wide)
    off = {"answer": distance(y, right)}
    # Some are zero but for rounding: a bias before a convolution that batch norm follows.
    least = 1e-2 * max((float(q.grad.norm()) for q in twin.parameters() if q.grad is not None), default=0)
    pairs = [("the input", x, wide, 0), *((n, p, q, least) for (n, p), q in named(ours, twin, "parameters"))]
    for name, p, q, smallest in pairs:
        if p.grad is not None and q.grad is not None:
            off[name] = distance(p.grad, q.grad, smallest)
        elif (p.grad is None) != (q.grad is None):
            off[f"{name}, which has a gradient, or should,"] = math.inf
    for (name, b), c in named(ours, twin, "buffers"):
        off[name] = distance(b, c.double(), 1e-2)
    return off


def named(ours: nn.Module, twin: nn.Module, what: str) -> Iterator[tuple[tuple[str, Tensor], Tensor]]:
    """The "parameters" or "buffers" of ours with their names, each with its twin's."""
    return zip(getattr(ours, f"named_{what}")(), getattr(twin, what)(), strict=True)


def compare(ours: nn.Module, x: Tensor, bound: float, cast: torch.dtype | None = None) -> str:
    """What is wrong with a step of ours beside the same network's in float64 and plain torch."""
    off = errors(ours, x, cast).items()
    return ", ".join(f"{name} is off by {value:.2g}" for name, value in off if not value <= bound)


def compare_with_torch(ours: nn.Module, x: Tensor, eps: float, cast: torch.dtype | None = None) -> str:
    """What is wrong with a step of ours beside plain torch's in the same arithmetic, of such an epsilon.

    Twice as far from float64 in the median is allowed, four times in any one: a gradient that is small by
    cancellation is as far off for torch.
    """
    plain = copy.deepcopy(ours)
    mine = errors(ours, x, cast)
    with eager_only():
        torchs = errors(plain, x, cast)
    wrong = [
        f"{name} is off by {value:.2g}, torch's by {torchs.get(name, 0):.2g}"
        for name, value in mine.items()
        if not value <= 4 * torchs.get(name, 0) + 4 * eps
    ]
    medians = [statistics.median(off.values()) for off in (mine, torchs)]
    if not medians[0] <= 2 * medians[1]:
        wrong.append(f"the median is off by {medians[0]:.2g}, torch's by {medians[1]:.2g}")
    return ", ".join(wrong)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many layers each node of the training kernels has that is made within."""
    run, nodes = training.run, []

    def noted(x: Tensor, layers: list, tensors: list, residual: bool = False) -> Tensor:
        nodes.append(len(layers))
        return run(x, layers, tensors, residual)

    training.run = noted
    try:
        yield nodes
    finally:
        training.run = run


def play(scenes: Mapping[str, Callable[[], str]]) -> None:
    """Print what is wrong with each scene, an error's traceback too, so that the others are still played."""

    def verdict(scene: str) -> str:
        try:
            return scenes[scene]()
        except Exception:
            return traceback.format_exc()

    stand_in()
    triton_interpreter.print_verdicts(scenes, verdict)

"""One training step of each block, ours beside torch's in channels_last: `python -m bench.training --blocks`.

Both in this process, on the same modules and data: forward, backward to the input and every parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from mnv2_fast import arch
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual, Trained, eager_only

from .. import timing

Step = Callable[[], object]


def modules(size: int) -> list[tuple[Trained, int, int]]:
    """Every distinct element of `features` with the size of its input and how often the network has it.

    Args:
        size: height and width of the network's images.
    """
    found: list[tuple[Trained, int, int]] = [
        (ConvBNReLU6(3, arch.STEM_CHANNELS, stride=2), size, 1),
    ]
    channels, size = arch.STEM_CHANNELS, _strided(size, 2)
    for ratio, cout, repeats, stride in arch.SETTING:
        found.append((InvertedResidual(channels, cout, stride, ratio), size, 1))
        channels, size = cout, _strided(size, stride)
        if repeats > 1:
            found.append((InvertedResidual(channels, cout, 1, ratio), size, repeats - 1))
    found.append((ConvBNReLU6(channels, arch.LAST_CHANNELS, kernel_size=1), size, 1))
    return found


def _strided(size: int, stride: int) -> int:
    return -(-size // stride)


def steps(module: Trained, size: int, batch: int) -> tuple[Step, Step]:
    """A training step by the kernels and by torch."""
    first = module.train().train_chain().layers[0].spec
    stem = first.kind == "stem"
    x = torch.randn(batch, first.cin, size, size).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(not stem)
    theirs = copy.deepcopy(module)
    theirs.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def step(forward: Callable[[Tensor], Tensor], grad: Tensor) -> None:
        x.grad = None
        forward(x).backward(grad)

    with torch.no_grad():
        grad = torch.randn_like(theirs(x))

    def torchs() -> None:
        with eager_only():
            step(theirs, grad)

    return lambda: step(module, grad), torchs


def show(batch: int, size: int, threads: int, calls: int) -> None:
    """Print a line for each element of `features`, of images of size x size, and one for their sum."""
    torch.set_num_threads(threads)
    print(f"{'':>22} {'ours ms':>9} {'torch ms':>9} {'ratio':>6} {'GMAC/s':>7}")
    sums = [0.0, 0.0]
    for module, side, count in modules(size):
        specs = [layer.spec for layer in module.train_chain().layers]
        # Forward once, and once more for each gradient; an image has none.
        macs = sum(
            layer.macs * (2 if layer.spec.kind == "stem" else 3)
            for layer in arch.layers(size=side, specs=specs)
        )
        times = [
            timing.summarize(timing.turn(step, calls, warm_calls=2)).median
            for step in steps(module, side, batch)
        ]
        sums = [total + count * t for total, t in zip(sums, times, strict=True)]
        name = f"{specs[0].cin:>4} ->{specs[-1].cout:>5} @{side:>4} x{count}"
        speed = macs * batch / times[0] / 1e6
        print(
            f"{name:>22} {times[0]:9.1f} {times[1]:9.1f} {times[1] / times[0]:6.2f} {speed:7.1f}", flush=True
        )
    images = [1e3 * batch / total for total in sums]
    print(f"{'all of features':>22} {sums[0]:9.1f} {sums[1]:9.1f} {sums[1] / sums[0]:6.2f}")
    print(f"{'images/s':>22} {images[0]:9.1f} {images[1]:9.1f}")

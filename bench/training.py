"""One training step of each block, ours beside torch's in channels_last: `python -m bench.training`.

Both in this process, on the same modules and data: forward, backward to the input and every parameter.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import timing
from mnv2_fast import arch
from mnv2_fast.nn import ConvBNReLU6, InvertedResidual, Trained, eager_only

Step = Callable[[], object]


def modules() -> list[tuple[Trained, int, int]]:
    """Every distinct element of `features` with the size of its input and how often the network has it."""
    found: list[tuple[Trained, int, int]] = [
        (ConvBNReLU6(3, arch.STEM_CHANNELS, stride=2), 224, 1),
    ]
    channels, size = arch.STEM_CHANNELS, 112
    for ratio, cout, repeats, stride in arch.SETTING:
        found.append((InvertedResidual(channels, cout, stride, ratio), size, 1))
        channels, size = cout, size // stride
        if repeats > 1:
            found.append((InvertedResidual(channels, cout, 1, ratio), size, repeats - 1))
    found.append((ConvBNReLU6(channels, arch.LAST_CHANNELS, kernel_size=1), size, 1))
    return found


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


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each element of `features` and one for their sum."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=7, help="steps that are timed (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{'':>22} {'ours ms':>9} {'torch ms':>9} {'ratio':>6} {'GMAC/s':>7}")
    sums = [0.0, 0.0]
    for module, size, count in modules():
        specs = [layer.spec for layer in module.train_chain().layers]
        # Forward once, and once more for each gradient; an image has none.
        macs = sum(
            layer.macs * (2 if layer.spec.kind == "stem" else 3)
            for layer in arch.layers(size=size, specs=specs)
        )
        times = [
            timing.summarize(timing.turn(step, options.calls, warm_calls=2)).median
            for step in steps(module, size, options.batch)
        ]
        sums = [total + count * t for total, t in zip(sums, times, strict=True)]
        name = f"{specs[0].cin:>4} ->{specs[-1].cout:>5} @{size:>4} x{count}"
        speed = macs * options.batch / times[0] / 1e6
        print(
            f"{name:>22} {times[0]:9.1f} {times[1]:9.1f} {times[1] / times[0]:6.2f} {speed:7.1f}", flush=True
        )
    images = [1e3 * options.batch / total for total in sums]
    print(f"{'all of features':>22} {sums[0]:9.1f} {sums[1]:9.1f} {sums[1] / sums[0]:6.2f}")
    print(f"{'images/s':>22} {images[0]:9.1f} {images[1]:9.1f}")


if __name__ == "__main__":
    main()

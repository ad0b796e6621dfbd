"""The int8 kernels against `int8.reference`, bit for bit, on every instruction set that runs here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mnv2_fast import arch, int8
from mnv2_fast.arch import LayerSpec
from mnv2_fast.backends import cpu
from mnv2_fast.int8 import QuantizedLayer, QuantizedNetwork

ISAS = cpu.isas() if cpu.available() else []
# Channels that are no multiple of four, stride 2 on odd sizes, residuals that follow one another.
ODD = ((1, 5, 1, 1), (3, 7, 3, 2), (2, 9, 2, 1), (5, 17, 2, 2))


def layer_of(spec: LayerSpec, rng: torch.Generator, inputs: float, largest: int = 127) -> QuantizedLayer:
    """Random tensors whose outputs fill the range of their type. inputs: the usual size of an input."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(spec.cout).uniform_(low, high, generator=rng)

    weight = torch.randint(-largest, largest + 1, spec.weight_shape, generator=rng).to(torch.int8)
    spread = largest / 3**0.5 * inputs * int8.depth(spec) ** 0.5  # of the accumulators
    bias = (uniform(-0.5, 1) * spread).round().to(torch.int32)
    if not int8.is_linear(spec):
        return QuantizedLayer(weight, bias, uniform(60, 160) / spread)
    zero = torch.randint(0, 256, (spec.cout,), generator=rng).to(torch.uint8)
    return QuantizedLayer(weight, bias, uniform(0.5, 1.5) / spread, uniform(30, 80), zero)


def network_of(specs: Sequence[LayerSpec], seed: int = 0, largest: int = 127) -> QuantizedNetwork:
    """A random valid network."""
    rng = torch.Generator().manual_seed(seed)
    layers = []
    for spec in specs:
        inputs = 90.0 * (int8.feature_steps(spec.cin) if spec.kind == "linear" else 1)
        layers.append(layer_of(spec, rng, inputs, largest))
    scale = torch.empty(3).uniform_(40, 70, generator=rng)
    zero = torch.randint(90, 140, (3,), generator=rng).to(torch.uint8)
    return QuantizedNetwork(tuple(specs), tuple(layers), scale, zero)


def images(n: int, h: int, w: int, seed: int = 0) -> Tensor:
    """Noise around a colour of each image's own."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, h, w, generator=rng) + 1.5 * torch.randn(n, 3, 1, 1, generator=rng)


def check(network: QuantizedNetwork, x: Tensor, isas: Sequence[str] = ISAS) -> None:
    expected = int8.reference(network, x)
    for isa in isas:
        kernels = cpu.Int8Network(network, isa=isa)
        assert kernels.isa == isa
        for threads in (1, 2, 3):
            assert torch.equal(kernels.run(x, threads), expected), (isa, threads)


@pytest.mark.parametrize("isa", ISAS)
def test_odd_channels_and_sizes(isa: str) -> None:
    network = network_of(arch.network(11, 0.3, ODD, round_nearest=1))
    for n, h, w in [(1, 1, 1), (1, 2, 7), (3, 7, 2), (2, 8, 15), (1, 15, 8), (3, 33, 33), (1, 65, 64)]:
        check(network, images(n, h, w), [isa])


@pytest.mark.parametrize(("width", "classes"), [(0.35, 1), (0.5, 7), (0.75, 101), (1.0, 1000), (1.4, 10)])
def test_widths(width: float, classes: int) -> None:
    network = network_of(arch.network(classes, width), seed=int(100 * width))
    for n, h, w in [(1, 64, 47), (3, 33, 32)]:
        check(network, images(n, h, w), ISAS if width < 0.7 else [isa for isa in ISAS if isa != "scalar"])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_full_size(isa: str) -> None:
    network = network_of(arch.network())
    check(network, images(2, 224, 224), [isa])


def test_answers_depend_on_the_image() -> None:
    """The networks of these tests carry the signal through: equal answers prove something."""
    for specs in (arch.network(1000), arch.network(11, 0.3, ODD, round_nearest=1)):
        a, b = int8.reference(network_of(specs), images(2, 64, 64))
        assert (a != b).float().mean() > 0.9

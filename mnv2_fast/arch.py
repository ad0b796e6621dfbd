"""The shape of MobileNetV2: one table, and what follows from it.

Everything that needs to know the network's layers (model, engine, tests, benchmarks) asks here.
Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381, table 2;
names and rounding as in torchvision.models.MobileNetV2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# t: expansion factor, c: output channels, n: repeats, s: stride of the first repeat.
SETTING: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
LAST_CHANNELS = 1280

KINDS = ("stem", "depthwise", "pointwise", "linear")


@dataclass(frozen=True)
class LayerSpec:
    """One convolution (with its folded batch norm) or the classifier.

    `conv` and `bn` are the state_dict prefixes. `residual` counts the layers back to the one whose input is
    added to this layer's output (0: none). A `linear` layer takes the mean over H and W first.
    """

    kind: str
    conv: str
    bn: str
    cin: int
    cout: int
    stride: int = 1
    relu6: bool = False
    residual: int = 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight as torch stores it."""
        return {
            "stem": (self.cout, self.cin, 3, 3),
            "depthwise": (self.cout, 1, 3, 3),
            "pointwise": (self.cout, self.cin, 1, 1),
            "linear": (self.cout, self.cin),
        }[self.kind]


@dataclass(frozen=True)
class Layer:
    """A LayerSpec at one input size: `h`, `w` are its input's, `ho`, `wo` its output's."""

    spec: LayerSpec
    h: int
    w: int
    ho: int
    wo: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        taps = {"stem": 9 * self.spec.cin, "depthwise": 9}.get(self.spec.kind, self.spec.cin)
        return self.ho * self.wo * self.spec.cout * taps

    @property
    def elements(self) -> int:
        """Activation elements read and written for one image, a residual counted once more."""
        read = self.h * self.w * self.spec.cin
        written = self.ho * self.wo * self.spec.cout
        return read + written * (2 if self.spec.residual else 1)

    @property
    def weights(self) -> int:
        """Weight and bias elements."""
        return math.prod(self.spec.weight_shape) + self.spec.cout


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, never more than 10% below it (as in torchvision)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def network(
    num_classes: int = 1000,
    width_mult: float = 1.0,
    setting: Sequence[Sequence[int]] | None = None,
    round_nearest: int = 8,
) -> tuple[LayerSpec, ...]:
    """The layers of one network, first to last, with torchvision's key names."""
    channels = make_divisible(STEM_CHANNELS * width_mult, round_nearest)
    specs = [LayerSpec("stem", "features.0.0", "features.0.1", 3, channels, 2, True)]
    index = 1
    for t, c, n, s in SETTING if setting is None else setting:
        cout = make_divisible(c * width_mult, round_nearest)
        for repeat in range(n):
            specs += inverted_residual(f"features.{index}.conv", channels, cout, s if repeat == 0 else 1, t)
            channels, index = cout, index + 1
    last = make_divisible(LAST_CHANNELS * max(1.0, width_mult), round_nearest)
    specs.append(
        LayerSpec("pointwise", f"features.{index}.0", f"features.{index}.1", channels, last, 1, True)
    )
    specs.append(LayerSpec("linear", "classifier.1", "", last, num_classes))
    return tuple(specs)


def inverted_residual(prefix: str, cin: int, cout: int, stride: int, expand_ratio: int) -> list[LayerSpec]:
    """The two or three layers of one block; the input is added where stride is 1 and cin == cout."""
    hidden = round(cin * expand_ratio)
    specs = []
    if expand_ratio != 1:
        specs.append(LayerSpec("pointwise", f"{prefix}.0.0", f"{prefix}.0.1", cin, hidden, 1, True))
    at = len(specs)
    specs.append(LayerSpec("depthwise", f"{prefix}.{at}.0", f"{prefix}.{at}.1", hidden, hidden, stride, True))
    residual = at + 1 if stride == 1 and cin == cout else 0
    specs.append(
        LayerSpec("pointwise", f"{prefix}.{at + 1}", f"{prefix}.{at + 2}", hidden, cout, 1, False, residual)
    )
    return specs


def layers(
    width_mult: float = 1.0, size: int | tuple[int, int] = 224, specs: Sequence[LayerSpec] | None = None
) -> list[Layer]:
    """Every layer with its shapes for one image of `size` (H = W, or (H, W))."""
    h, w = (size, size) if isinstance(size, int) else size
    result = []
    for spec in network(width_mult=width_mult) if specs is None else specs:
        if spec.kind == "linear":
            h = w = 1
        ho, wo = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
        result.append(Layer(spec, h, w, ho, wo))
        h, w = ho, wo
    return result

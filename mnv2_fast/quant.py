"""Post-training quantization: float32 layers and some images become an `int8.QuantizedNetwork`.

The float network runs once over the images, which gives every tensor its range. Then layer after layer gets
integers, and the images go on through the network as far as it has them: what a layer is fitted to is what it
will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import int8
from .arch import LayerSpec
from .errors import UserError
from .int8 import QuantizedLayer, QuantizedNetwork, is_linear
from .weights import Preprocessing

Folded = Sequence[tuple[Tensor, Tensor]]
Progress = Callable[[int, int], object]

_CHUNK = 8  # images in float32 at a time
_PATCHES = 20_000  # inputs of a layer that its weights are rounded by
_DAMPING = 0.01  # added to the second moments of inputs, as a share of their mean
_MARGIN = 10  # over the number of images: how much farther than on them ReLU6 channels reach on others
_DEAD = 1e-3  # a channel that reaches no farther, as a share of the widest, takes part in nothing
_LARGEST_BIAS = 2**28  # in units of the accumulator: an eighth of an int32

# How far ranges may lie between one for the whole tensor (0) and one for each channel (1).
_EXPONENTS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0)


@dataclass
class _Statistics:
    """Of one layer in the float network: the mean of what each weight multiplies, and the values it gives.

    inputs: [K], of a depthwise layer [C, 9]. low, high, square: [cout]; square is the mean square.
    """

    inputs: Tensor
    low: Tensor
    high: Tensor
    square: Tensor


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def quantize(
    specs: Sequence[LayerSpec],
    folded: Folded,
    batches: Sequence[Tensor],
    preprocessing: Preprocessing,
    progress: Progress | None = None,
) -> QuantizedNetwork:
    """The integers that answer most like a float network. The same images give the same integers.

    Args:
        specs: its layers, from the stem to the classifier.
        folded: (weight, bias) of each, float32, batch norm folded in.
        batches: images to calibrate on, float32 [N, 3, H, W], N >= 1, each batch of a size of its own.
        preprocessing: how uint8 images are normalized.
        progress: called with (steps done, steps) as the work goes on.

    Raises:
        UserError: int8 cannot run these layers.
    """
    int8.check_specs(specs)
    chunks = [
        chunk.contiguous(memory_format=torch.channels_last)
        for batch in batches
        for chunk in batch.split(_CHUNK)
    ]
    steps = len(chunks) + len(specs)
    advance = progress or (lambda done, of: None)
    found = []
    for i, chunk in enumerate(chunks):
        found.append(_measure(specs, folded, chunk))
        advance(i + 1, steps)
    statistics = [_join(parts, list(map(len, chunks))) for parts in zip(*found, strict=True)]
    _check_finite(specs, statistics)
    quantizer = _Quantizer(specs, folded, statistics, chunks, preprocessing)
    for i in range(len(specs)):
        quantizer.add_layer(i)
        advance(len(chunks) + i + 1, steps)
    return quantizer.network()


def _check_finite(specs: Sequence[LayerSpec], statistics: Sequence[_Statistics]) -> None:
    for spec, of in zip(specs, statistics, strict=True):
        if not (of.low.isfinite() & of.high.isfinite()).all():
            raise UserError(
                f"{spec.conv} gives NaN or infinite values on the calibration images: check the weights"
            )


def _measure(specs: Sequence[LayerSpec], folded: Folded, x: Tensor) -> list[_Statistics]:
    """Of each layer, over images [N, 3, H, W]."""
    return [
        _Statistics(_mean_inputs(spec, x), y.amin((0, 2, 3)), y.amax((0, 2, 3)), y.square().mean((0, 2, 3)))
        for spec, x, y in walk(specs, folded, x)
    ]


@torch.no_grad()
def walk(specs: Sequence[LayerSpec], folded: Folded, x: Tensor) -> Iterator[tuple[LayerSpec, Tensor, Tensor]]:
    """Each layer of the float network with its input and its output, residual and ReLU6 included.

    Args:
        specs: the layers, from the stem to the classifier.
        folded: (weight, bias) of each.
        x: float32 [N, 3, H, W].
    """
    outputs: list[Tensor] = []
    for spec, (weight, bias) in zip(specs, folded, strict=True):
        if spec.kind == "linear":
            x = x.mean((2, 3), keepdim=True)
        padding, groups = _padding_and_groups(spec)
        kernel = weight if weight.dim() == 4 else weight[:, :, None, None]
        y = F.conv2d(x, kernel, bias, spec.stride, padding, groups=groups)
        if spec.relu6:
            y = y.clamp(0, 6)
        elif spec.residual:
            y = y + outputs[len(outputs) - spec.residual - 1]
        outputs.append(y if is_linear(spec) else y[:0])
        yield spec, x, y
        x = y


def _join(found: Sequence[_Statistics], images: Sequence[int]) -> _Statistics:
    """One layer's, over several chunks of images."""
    share = torch.tensor(images) / sum(images)
    return _Statistics(
        torch.stack([part.inputs for part in found], -1) @ share,
        torch.stack([part.low for part in found]).amin(0),
        torch.stack([part.high for part in found]).amax(0),
        torch.stack([part.square for part in found], -1) @ share,
    )


class _Quantizer:
    """The layers that have integers, and the calibration images behind the last of them."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        folded: Folded,
        statistics: Sequence[_Statistics],
        images: Sequence[Tensor],
        preprocessing: Preprocessing,
    ) -> None:
        self._specs, self._folded, self._statistics = specs, folded, statistics
        self._layers: list[QuantizedLayer] = []
        self._input_scale, self._input_zero = _image_grid(images, preprocessing)
        # The images as they are behind the last layer, whole numbers, and what these stand for:
        # (q - zero) * step, with a zero and a step for each channel.
        self._step, self._zero = 1 / self._input_scale, self._input_zero
        self._q = [_to_grid(x, self._input_scale, self._input_zero) for x in images]
        self._v: dict[int, list[Tensor]] = {}  # what linear layers gave, as long as a residual needs it

    def network(self) -> QuantizedNetwork:
        """What has been made."""
        zero = self._input_zero.to(torch.uint8)
        return QuantizedNetwork(tuple(self._specs), tuple(self._layers), self._input_scale, zero)

    def add_layer(self, i: int) -> None:
        """Quantize the next layer, and take the images through it."""
        spec = self._specs[i]
        if spec.kind == "linear":
            self._pool(spec)
        weight, bias, scale = self._integers(i)
        if spec.kind == "linear":
            self._layers.append(QuantizedLayer(weight, bias, scale))
            return
        if spec.relu6:
            reach = self._hidden_range(i)
            layer = QuantizedLayer(weight, bias, scale * 255 / reach)
            self._q = [self._convolve(spec, layer, q).round().clamp(0, 255).to(torch.uint8) for q in self._q]
            self._step, self._zero = reach / 255, torch.zeros(spec.cout)
        else:
            output_scale, output_zero = self._linear_grid(i)
            layer = QuantizedLayer(weight, bias, scale, output_scale, output_zero.to(torch.uint8))
            v = [self._convolve(spec, layer, q) for q in self._q]
            if spec.residual:
                v = [a + b for a, b in zip(v, self._v[i - spec.residual - 1], strict=True)]
            self._v[i] = v
            self._q = [_to_grid(x, output_scale, output_zero) for x in v]
            self._step, self._zero = 1 / output_scale, output_zero
        self._layers.append(layer)
        later = range(i + 1, len(self._specs))
        needed = {j - self._specs[j].residual - 1 for j in later if self._specs[j].residual}
        self._v = {j: v for j, v in self._v.items() if j in needed}

    def _pool(self, spec: LayerSpec) -> None:
        """The mean over H and W, in the steps that the classifier takes it in."""
        steps = int8.feature_steps(spec.cin)
        self._q = [(q.double().mean((2, 3), keepdim=True) * steps).round().to(torch.float32) for q in self._q]
        self._step = self._step / steps

    def _integers(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """int8 weight, int32 bias, and the float32 [cout] from their sums to real numbers."""
        spec, (weight, bias) = self._specs[i], self._folded[i]
        flat = weight.flatten(1)
        absorbed = flat * _taps(spec, self._step)
        scale = torch.maximum(absorbed.abs().amax(1) / 127, bias.abs() / _LARGEST_BIAS).clamp(min=1e-12)
        mean, moments = self._moments(spec)
        grid = absorbed / scale[:, None]
        if spec.kind == "linear":  # more columns than photos: moments gained nothing
            integers = grid.round()
        elif spec.kind == "depthwise":
            integers = round_weights(grid[:, None], moments)[:, 0]
        else:
            integers = round_weights(grid[None], moments)[0]
        # The mean output is the float network's: 22.8 dB instead of 22.2, simulated.
        wanted = bias + (flat * self._statistics[i].inputs).sum(1)
        shift = (wanted - scale * (integers * mean).sum(1)).double() / scale.double()
        of_zero = (integers * _taps(spec, self._zero)).double().sum(1)
        return (
            integers.reshape(spec.weight_shape).to(torch.int8),
            (shift.round() - of_zero).to(torch.int32),
            scale,
        )

    def _moments(self, spec: LayerSpec) -> tuple[Tensor, Tensor]:
        """Of what the weights multiply, q - zero: its mean [K] or [C, 9], and second moments [B, K, K]."""
        images = sum(len(q) for q in self._q)
        wanted = max(1, (_PATCHES if spec.kind != "depthwise" else _PATCHES // 10) // images)
        generator = torch.Generator().manual_seed(0)
        mean, second, rows = torch.zeros(()), torch.zeros(()), 0
        for q in self._q:
            x = q.to(torch.float32) - self._zero[:, None, None]
            mean = mean + _mean_inputs(spec, x) * (len(x) / images)
            patches = _patches(spec, x, wanted, generator)
            second = second + (patches.transpose(1, 2) @ patches).double()
            rows += patches.shape[1]
        return mean, second / rows

    def _convolve(self, spec: LayerSpec, layer: QuantizedLayer, q: Tensor) -> Tensor:
        """v, as `int8.reference` has it but for a rounding here and there: float32 holds sums to 2^24."""
        x, (padding, groups) = q.to(torch.float32), _padding_and_groups(spec)
        if spec.kind == "stem":
            zero = self._input_zero[:, None, None]
            x, padding = F.pad(x - zero, (1, 1, 1, 1)) + zero, 0
        acc = F.conv2d(x, layer.weight.to(torch.float32), None, spec.stride, padding, groups=groups)
        return (acc + layer.bias[:, None, None]) * layer.scale[:, None, None]

    def _hidden_range(self, i: int) -> Tensor:
        """[cout]: what a uint8 of 255 stands for behind ReLU6.

        Other photos exceed the largest value of a few: what lies beyond is cut off, which costs more than
        wider steps. Measured as logit SNR on 100 other photos, without and with this margin:
        19.5 and 21.4 dB for 16 photos, 21.9 and 22.8 dB for 32, 24.5 and 24.4 dB for 100.
        """
        margin = min(1.5, 1 + _MARGIN / sum(map(len, self._q)))
        reach = (self._statistics[i].high * margin).clamp(max=6)
        live = reach > _DEAD * reach.max()
        reach = torch.where(live, reach, reach[live].median() if live.any() else torch.tensor(6.0))
        return reach if self._specs[i + 1].kind == "depthwise" else self._widened(i, reach)

    def _linear_grid(self, i: int) -> tuple[Tensor, Tensor]:
        """[cout]: steps per unit of a linear layer's output, and its zero."""
        low, high = self._statistics[i].low.clamp(max=0), self._statistics[i].high.clamp(min=0)
        reach = high - low
        least = float(reach.max()) * _DEAD if reach.max() > 0 else 1.0
        wider = self._widened(i, reach.clamp(min=least))
        steps = 255 / wider
        # What is gained in width lies on both sides alike.
        return steps, ((wider - reach) / 2 - low).mul(steps).round().clamp(0, 255)

    def _widened(self, i: int, reach: Tensor) -> Tensor:
        """Ranges for the inputs of layer i + 1, none narrower, that its weights can stand best."""
        return widen(reach, self._folded[i + 1][0].flatten(1), self._statistics[i].square)


def _image_grid(images: Sequence[Tensor], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Steps per unit and zero of each channel: a step is that of a uint8 image, unless values lie outside."""
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    low = torch.stack([x.amin((0, 2, 3)) for x in images]).amin(0)
    high = torch.stack([x.amax((0, 2, 3)) for x in images]).amax(0)
    scale = 255 * std
    zero = (mean * scale / std).round().clamp(0, 255)
    inside = (low * scale + zero > -1) & (high * scale + zero < 256)
    low, high = low.clamp(max=0), high.clamp(min=0)
    wide = 255 / (high - low).clamp(min=1e-3)
    return torch.where(inside, scale, wide), torch.where(inside, zero, (-low * wide).round())


def widen(reach: Tensor, weight: Tensor, mean_square: Tensor) -> Tensor:
    """Ranges of a layer's input channels, between their own and one for all.

    Logit SNR in a float simulation: 22.8 dB, with each channel's own range 19.1 dB.

    Weights are multiplied with their input's range before they are rounded, and a row of them has one scale.
    A wide range takes precision from the activation, narrow ones beside it from their weights. That exponent
    is taken which gives the least squared error of the layer's output, as expected of both roundings.

    Args:
        reach: [K], each above 0.
        weight: [N, K].
        mean_square: [K], of the inputs.
    """
    least, best = float("inf"), reach
    for exponent in _EXPONENTS:
        wider = reach**exponent * reach.max() ** (1 - exponent)
        step = wider / 255
        absorbed = weight * step
        scale = absorbed.abs().amax(1) / 127
        error = absorbed.square().sum(1) + scale.square() * (mean_square / step.square()).sum()
        if float(error.sum()) < least:
            least, best = float(error.sum()), wider
    return best


def round_weights(weight: Tensor, moments: Tensor) -> Tensor:
    """Whole numbers -127 to 127 near `weight` that change the layer's output little.

    One input after another is rounded, and those that are left make up for its error as far as inputs go
    together. Logit SNR in a float simulation: 22.8 dB, with the nearest numbers 22.4 dB. Source: Frantar et
    al., "GPTQ", arXiv:2210.17323, here with the largest inputs first.

    Args:
        weight: [B, N, K], in units of the grid.
        moments: [B, K, K] second moments of the inputs, float64.
    """
    energy = moments.diagonal(dim1=1, dim2=2)
    damping = (_DAMPING * energy.mean(1)).clamp(min=1e-9)
    order = energy.argsort(dim=1, descending=True)
    moments = moments + torch.diag_embed(damping[:, None].expand_as(energy))
    moments = moments.gather(1, order[:, :, None].expand_as(moments))
    moments = moments.gather(2, order[:, None, :].expand_as(moments))
    inverse = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True).to(torch.float32)
    columns = order[:, None, :].expand_as(weight)
    left = weight.gather(2, columns)
    rounded = torch.empty_like(left)
    for k in range(left.shape[2]):
        rounded[:, :, k] = left[:, :, k].round().clamp(-127, 127)
        error = (left[:, :, k] - rounded[:, :, k]) / inverse[:, None, k, k]
        left[:, :, k + 1 :] -= error[:, :, None] * inverse[:, None, k, k + 1 :]
    return torch.empty_like(rounded).scatter_(2, columns, rounded)


def _padding_and_groups(spec: LayerSpec) -> tuple[int, int]:
    padding = 1 if spec.kind in ("stem", "depthwise") else 0
    return padding, spec.cin if spec.kind == "depthwise" else 1


def _to_grid(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((x * scale[:, None, None]).round() + zero[:, None, None]).clamp(0, 255).to(torch.uint8)


def _taps(spec: LayerSpec, channels: Tensor) -> Tensor:
    """A value of each input channel as one of each weight of a row: [K], of a depthwise layer [C, 9]."""
    if spec.kind == "stem":
        return channels.repeat_interleave(9)
    return channels[:, None].expand(-1, 9) if spec.kind == "depthwise" else channels


def _mean_inputs(spec: LayerSpec, x: Tensor) -> Tensor:
    """What each weight multiplies in the mean over [N, C, H, W], borders included: [K] or [C, 9]."""
    if not _padding_and_groups(spec)[0]:
        return x.mean((0, 2, 3))
    # In the order of memory: 9 ms for 8 images of 96 x 112 x 112, with mean(0) and unfold 64.
    h, w = x.shape[2:]
    mean = F.pad(x.permute(0, 2, 3, 1).mean(0), (0, 0, 1, 1, 1, 1))
    taps = [
        mean[dy : dy + h : spec.stride, dx : dx + w : spec.stride].mean((0, 1))
        for dy in range(3)
        for dx in range(3)
    ]
    means = torch.stack(taps, 1)
    return means.flatten() if spec.kind == "stem" else means


def _patches(spec: LayerSpec, x: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """What the weights multiply at random places, about `wanted` in each image: [1 or C, rows, K]."""
    _, c, h, w = x.shape
    ho, wo = (h - 1) // spec.stride + 1, (w - 1) // spec.stride + 1
    places = torch.randperm(ho * wo, generator=generator)[:wanted]
    row, column = places // wo * spec.stride, places % wo * spec.stride
    if not _padding_and_groups(spec)[0]:
        return x[:, :, row, column].permute(0, 2, 1).reshape(1, -1, c)
    padded = F.pad(x, (1, 1, 1, 1))
    taps = [padded[:, :, row + dy, column + dx] for dy in range(3) for dx in range(3)]
    patches = torch.stack(taps, 3)  # [n, c, places, 9]
    if spec.kind == "stem":
        return patches.permute(0, 2, 1, 3).reshape(1, -1, c * 9)
    return patches.transpose(0, 1).reshape(c, -1, 9)

"""What a quantized network is, number by number, and the slow twin that says what it answers.

Every step is exact in integers or one rounding of one float32 operation, in a stated order, so that all
instruction sets give the same bits. With q a uint8, w an int8 and acc an int32:

    input        q = clamp(rne(min(max(x * input_scale[c], -1024), 1024)) + input_zero[c], 0, 255)
    convolution  acc[n] = bias[n] + sum of q * w[n];  v = float32(acc) * scale[n]
    ReLU6        q = clamp(rne(v), 0, 255)
    linear conv  v += v of the block's input, where it is added;
                 q = clamp(rne(v * output_scale[n]) + output_zero[n], 0, 255)
    pool         f = rne(float64(sum of q over H and W) * feature_steps / (H * W))
    classifier   acc[n] = bias[n] + sum of f * w[n];  logit = float32(acc) * scale[n]

rne rounds to the nearest integer, halves to even. Zero is exact in every tensor that is padded: ReLU6 outputs
have it at q = 0, the image at input_zero. Of a ReLU6 output, 255 is the top of the channel's own range, 6 at
most, which the scales of the two layers around it absorb. The bottlenecks' v, which residuals add, stay
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arch import LayerSpec
from .errors import UserError

INPUT_LIMIT = 1024.0
ACCUMULATOR_LIMIT = 2**30  # of a sum of products: half of an int32, the other half is for the bias
LARGEST_PRODUCT = 255 * 127
NOT_FINITE = "the images hold NaN or infinite values: int8 has neither, clean them"


@dataclass(frozen=True)
class QuantizedLayer:
    """The tensors of one layer.

    weight: int8 of the spec's `weight_shape`, -127 to 127. bias: int32 [cout], in units of the accumulator,
    what the input's zero adds included. scale: float32 [cout], from the accumulator to the output's units:
    steps of a uint8 where ReLU6 follows, real numbers elsewhere. output_scale: float32 [cout], steps per
    unit, and output_zero: uint8 [cout]; of a convolution without ReLU6 only.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    output_scale: Tensor | None = None
    output_zero: Tensor | None = None


@dataclass(frozen=True)
class QuantizedNetwork:
    """Layers first to last. input_scale: the image's steps per unit, float32 [3]; input_zero: uint8 [3]."""

    specs: tuple[LayerSpec, ...]
    layers: tuple[QuantizedLayer, ...]
    input_scale: Tensor
    input_zero: Tensor

    def __post_init__(self) -> None:
        check(self)


def is_linear(spec: LayerSpec) -> bool:
    """Whether a layer is a convolution without ReLU6: a block's last one."""
    return spec.kind != "linear" and not spec.relu6


def depth(spec: LayerSpec) -> int:
    """Products in one output of a layer."""
    return {"stem": 27, "depthwise": 9}.get(spec.kind, spec.cin)


def feature_steps(channels: int) -> int:
    """Steps of a pooled feature to one step of a uint8: the power of two that fits the classifier's int32."""
    steps = 32
    while steps > 1 and LARGEST_PRODUCT * steps * channels > ACCUMULATOR_LIMIT:
        steps //= 2
    return steps


def check_specs(specs: Sequence[LayerSpec]) -> None:
    """Look whether int8 can run these layers.

    Raises:
        UserError: it cannot; the message says which layer differs.
    """
    for i, spec in enumerate(specs):
        if (spec.kind in ("stem", "depthwise") and not spec.relu6) or (
            spec.kind == "depthwise" and i and not specs[i - 1].relu6
        ):
            raise UserError(f"int8 needs ReLU6 before and after {spec.conv}: use dtype='fp32' or 'bf16'")
        if spec.kind == "linear" and (i == 0 or not specs[i - 1].relu6):
            raise UserError(f"int8 needs ReLU6 before {spec.conv}: use dtype='fp32' or 'bf16'")
        if spec.residual and not (i > spec.residual and is_linear(specs[i - spec.residual - 1])):
            raise UserError(
                f"int8 adds bottlenecks only, {spec.conv} adds another: use dtype='fp32' or 'bf16'"
            )
        if LARGEST_PRODUCT * depth(spec) > ACCUMULATOR_LIMIT:
            raise UserError(f"{spec.conv} has {depth(spec)} inputs, too many for int8: use dtype='fp32'")
    if not specs or specs[0].kind != "stem" or specs[-1].kind != "linear":
        raise UserError("int8 is for whole networks, from the stem to the classifier: use dtype='fp32'")


def check(network: QuantizedNetwork) -> None:
    """Look at every tensor: its type, its shape, its range.

    Raises:
        UserError: one is missing or makes no sense; the message names it.
    """
    check_specs(network.specs)
    _check_tensor("input", "scale", network.input_scale, torch.float32, (3,))
    _check_tensor("input", "zero", network.input_zero, torch.uint8, (3,))
    _check_scale("input", "scale", network.input_scale)
    bounds: list[Tensor] = []  # of each layer's |v|
    for spec, layer in zip(network.specs, network.layers, strict=True):
        name, channels = spec.conv, (spec.cout,)
        _check_tensor(name, "weight", layer.weight, torch.int8, spec.weight_shape)
        _check_tensor(name, "bias", layer.bias, torch.int32, channels)
        _check_tensor(name, "scale", layer.scale, torch.float32, channels)
        _check_scale(name, "scale", layer.scale)
        rows = layer.weight.numpy().reshape(spec.cout, -1)
        if rows.min() == -128:
            raise UserError(f"{name}.weight holds -128, int8 weights are -127 to 127: quantize again")
        steps = feature_steps(spec.cin) if spec.kind == "linear" else 1
        # In integers by numpy: torch's float64 sums of all weights take 30 of the 60 ms of a start.
        sums = np.abs(rows, dtype=np.int16).sum(1, dtype=np.int64)
        largest = torch.from_numpy(sums).double() * 255 * steps + layer.bias.double().abs()
        bound = largest * layer.scale.double()
        limit = bound
        if is_linear(spec):
            if layer.output_scale is None or layer.output_zero is None:
                raise UserError(f"{name} has no output_scale or output_zero: quantize again")
            _check_tensor(name, "output_scale", layer.output_scale, torch.float32, channels)
            _check_tensor(name, "output_zero", layer.output_zero, torch.uint8, channels)
            _check_scale(name, "output_scale", layer.output_scale)
            if spec.residual:
                bound = bound + bounds[len(bounds) - spec.residual - 1]
            limit = bound * layer.output_scale.double()
        bounds.append(bound)
        # Half of an int32 for the output: it is rounded, and its zero comes on top.
        if largest.max() >= 2**31 or (spec.kind != "linear" and limit.max() >= 2**30):
            raise UserError(f"{name}.scale or .bias is too large: an int32 would overflow: quantize again")


def _check_tensor(layer: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise UserError(
            f"{layer}.{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}: "
            "quantize again"
        )


def _check_scale(layer: str, name: str, scale: Tensor) -> None:
    if not (scale.isfinite() & (scale > 0)).all():
        raise UserError(f"{layer}.{name} is zero, negative or not finite somewhere: quantize again")


def state_dict(network: QuantizedNetwork) -> dict[str, Tensor]:
    """Every tensor by its name, as a file holds them; `from_state_dict` takes them back."""
    tensors = {"input.scale": network.input_scale, "input.zero": network.input_zero}
    for spec, layer in zip(network.specs, network.layers, strict=True):
        tensors |= {
            f"{spec.conv}.{name}": tensor for name, tensor in vars(layer).items() if tensor is not None
        }
    return tensors


def expected_shapes(specs: Sequence[LayerSpec]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a quantized network's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"input.scale": (3,), "input.zero": (3,)}
    for spec in specs:
        names = ("bias", "scale", "output_scale", "output_zero") if is_linear(spec) else ("bias", "scale")
        shapes[f"{spec.conv}.weight"] = spec.weight_shape
        shapes |= {f"{spec.conv}.{name}": (spec.cout,) for name in names}
    return shapes


def from_state_dict(specs: Sequence[LayerSpec], tensors: Mapping[str, Tensor]) -> QuantizedNetwork:
    """The network of `state_dict`, whose tensors have the names of `expected_shapes`.

    Raises:
        UserError: a tensor makes no sense, or int8 cannot run these layers.
    """
    names = [field.name for field in fields(QuantizedLayer)]
    layers = [
        QuantizedLayer(**{name: tensors[key] for name in names if (key := f"{spec.conv}.{name}") in tensors})
        for spec in specs
    ]
    return QuantizedNetwork(tuple(specs), tuple(layers), tensors["input.scale"], tensors["input.zero"])


def byte_grid(network: QuantizedNetwork, table: Tensor) -> Tensor:
    """[3, 256] uint8: where the network's grid has each value of a uint8 image.

    Args:
        network: has the grid.
        table: float32 [3, 256], what each value is once normalized.
    """
    return quantize_input(network, table.T[:, :, None, None])[:, :, 0, 0].T.contiguous()


def quantize_input(network: QuantizedNetwork, x: Tensor) -> Tensor:
    """The image on the network's grid: float32 [N, 3, H, W] -> uint8 [N, 3, H, W].

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not x.isfinite().all():
        raise ValueError(NOT_FINITE)
    steps = (x * network.input_scale.reshape(1, 3, 1, 1)).clamp(-INPUT_LIMIT, INPUT_LIMIT)
    zero = network.input_zero.to(torch.int32).reshape(1, 3, 1, 1)
    return (steps.round().to(torch.int32) + zero).clamp(0, 255).to(torch.uint8)


Observer = Callable[[LayerSpec, Tensor], None]


@torch.no_grad()
def reference(network: QuantizedNetwork, x: Tensor, observe: Observer | None = None) -> Tensor:
    """What the network answers, by the definition above: [N, 3, H, W] -> float32 [N, classes].

    Args:
        x: float32 images, or uint8 ones on the network's grid already (`quantize_input`).
        observe: called with each layer and its output: uint8 [N, C, Ho, Wo] after ReLU6, float32 v
            [N, C, Ho, Wo] of a linear convolution, the logits at last.

    Raises:
        ValueError: a value of x is NaN or infinite.
    """
    q = x if x.dtype == torch.uint8 else quantize_input(network, x)
    outputs: list[Tensor] = []  # v of linear convolutions, for the residuals; uint8 of the others
    for spec, layer in zip(network.specs, network.layers, strict=True):
        if spec.kind == "linear":
            steps = feature_steps(spec.cin)
            pixels = q.shape[2] * q.shape[3]
            features = (q.double().sum((2, 3)) * steps / pixels).round()
            acc = features @ layer.weight.double().T + layer.bias.double()
            logits = acc.to(torch.int32).to(torch.float32) * layer.scale
            if observe:
                observe(spec, logits)
            return logits
        v = _convolve(spec, layer, q, network.input_zero)
        if is_linear(spec):
            assert layer.output_scale is not None
            assert layer.output_zero is not None
            if spec.residual:
                v = v + outputs[len(outputs) - spec.residual - 1]
            steps_out = (v * layer.output_scale.reshape(1, -1, 1, 1)).round().to(torch.int32)
            q = (steps_out + layer.output_zero.to(torch.int32).reshape(1, -1, 1, 1)).clamp(0, 255)
            q = q.to(torch.uint8)
            outputs.append(v)
        else:
            q = v.round().to(torch.int32).clamp(0, 255).to(torch.uint8)
            outputs.append(q)
        if observe:
            observe(spec, outputs[-1])
    raise AssertionError("check_specs lets no network end in a convolution")


def _convolve(spec: LayerSpec, layer: QuantizedLayer, q: Tensor, input_zero: Tensor) -> Tensor:
    """v of a convolution: float64 holds every sum of products exactly."""
    x = q.double()
    padding = 0 if spec.kind == "pointwise" else 1
    if spec.kind == "stem":  # its padding is the image's zero
        zero = input_zero.double().reshape(1, 3, 1, 1)
        x, padding = F.pad(x - zero, (1, 1, 1, 1)) + zero, 0
    groups = spec.cin if spec.kind == "depthwise" else 1
    acc = F.conv2d(x, layer.weight.double(), layer.bias.double(), spec.stride, padding, groups=groups)
    return acc.to(torch.int32).to(torch.float32) * layer.scale.reshape(1, -1, 1, 1)

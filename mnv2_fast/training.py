"""Layers in train mode on the kernels: one autograd node for convolutions in a row with their batch norms.

What a node keeps for backward is the input and the raw output of every convolution; batch norm and ReLU6 are
applied again where these are read.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import arch
from .arch import LayerSpec
from .autograd import TWICE
from .backends import cpu_train, triton_train
from .backends.cpu_train import Conv, Expansion, ExpansionGradient, Gradient, Norm, Step
from .reading import Declined, Reading, autocast_dtype, word

# An expansion's raw output is made again, not kept, where it has at most so many inputs and at least so
# many values. At batch 32 and 224 x 224, on two cores of a Xeon (AMX), a training step took 510 ms so
# and 570 ms with none, in 0.7 GB and 1.0 GB; with up to 64 inputs 560 ms.
REMADE_INPUTS = 32
REMADE_VALUES = 1 << 20


@dataclass(frozen=True)
class FrozenNorm:
    """What a batch norm in eval mode is to a layer: `nn.BatchNorm2d`'s attributes."""

    running_mean: Tensor
    running_var: Tensor
    eps: float
    training: bool = False


@dataclass(frozen=True)
class TrainLayer:
    """A convolution without bias, the batch norm after it and whether ReLU6 follows.

    The norm is asked at every call for its mode, running statistics, momentum and eps.
    """

    spec: LayerSpec
    norm: nn.BatchNorm2d | FrozenNorm

    @property
    def batch_moments(self) -> bool:
        """Whether the norm takes the batch's moments, as torch decides it."""
        return self.norm.training or self.norm.running_mean is None


@dataclass(frozen=True)
class TrainChain:
    """Layers in a row as a module has them.

    `tensors`: weight, scale and shift of every layer. `residual`: the first one's input is added to the last
    one's output.
    """

    layers: tuple[TrainLayer, ...]
    tensors: tuple[Tensor | None, ...]
    residual: bool


def read_chain(module: nn.Module, reading: Reading) -> TrainChain:
    """The layers of a module that was read in any mode, without a prefix.

    Raises:
        Declined: one of them has a bias or no norm, or a tensor that is not float32 or on another device.
    """
    _ = reading.device  # of all: the kernels get addresses
    layers: list[TrainLayer] = []
    of_layers: list[Tensor | None] = []
    for link, tensors in reading.parts:
        if link.bias or not link.norm:
            raise Declined(f"{link.spec.conv} has a bias or no norm, which no training kernel takes")
        if any(t.dtype is not torch.float32 for t in tensors):
            raise Declined(f"{link.spec.conv} is of {tensors[0].dtype}, the training kernels take float32")
        norm: Any = module.get_submodule(link.spec.bn)
        layers.append(TrainLayer(link.spec, norm))
        of_layers += [tensors[0], norm.weight, norm.bias]
    return TrainChain(tuple(layers), tuple(of_layers), layers[-1].spec.residual > 0)


def decline_input(x: Tensor, chain: TrainChain) -> None:
    """Look whether the training kernels take an input that `reading.decline_call` has let pass.

    Raises:
        Declined: they do not.
    """
    autocast, dtype = torch.is_autocast_enabled(x.device.type), _dtype(x.device)
    held = next(t.device for t in chain.tensors if t is not None)
    if held != x.device:
        raise Declined(f"the input is on {x.device}, the weights are on {held}")
    if reason := limit(x, [layer.spec for layer in chain.layers]):
        raise Declined(reason)
    if x.dtype not in (torch.float32, dtype):
        raise Declined(f"the input is {x.dtype}, the training kernels take float32, or autocast's own type")
    if autocast and chain.residual and x.dtype is torch.float32:
        raise Declined(f"autocast adds a float32 input to a {word(dtype)} answer")
    if x.shape[0] == 0:
        raise Declined("there are no images")
    cin = chain.layers[0].spec.cin
    if x.shape[1] != cin:
        raise Declined(f"the input has {x.shape[1]} channels, not {cin}")


def run(
    x: Tensor, layers: Sequence[TrainLayer], tensors: Sequence[Tensor | None], residual: bool = False
) -> Tensor:
    """The layers on x, within autograd; running statistics are updated as torch does.

    Args:
        x: float32 [N, C, H, W], or of autocast's dtype within it.
        layers: first to last; a stem only as the first.
        tensors: weight, scale and shift of each, float32; None for a scale of ones or a shift of zeros.
        residual: x is added to the result.

    Returns:
        [N, Cout, Ho, Wo] in channels_last.

    Raises:
        ValueError: a norm that takes the batch's moments sees one value a channel (as torch's), or none.
        RuntimeError: from backward, where a graph of the gradients is asked for.
    """
    y: Tensor = ChainTraining.apply(layers, residual, x, *tensors)
    return y


def _kernels(x: Tensor) -> Any:
    """The training kernels of a tensor's device."""
    return triton_train if x.is_cuda else cpu_train


def _dtype(device: torch.device) -> torch.dtype:
    """Of a training step on a device: autocast's, or float32."""
    return autocast_dtype(device) or torch.float32


def limit(x: Tensor, layers: Sequence[LayerSpec]) -> str | None:
    """Why an input is too large for the training kernels of some layers, or None where it is not."""
    reason: str | None = _kernels(x).limit(x.shape, layers)
    return reason


def joins(x: Tensor) -> bool:
    """Whether blocks in a row that add nothing train as one node where x is."""
    return _kernels(x).JOINS


def run_joined(x: Tensor, chain: TrainChain) -> Tensor:
    """`run` of a whole network's features, a residual block each in a node of its own."""
    for begin, end, residual in segments([layer.spec for layer in chain.layers]):
        x = run(x, chain.layers[begin:end], chain.tensors[3 * begin : 3 * end], residual)
    return x


def segments(specs: Sequence[LayerSpec]) -> list[tuple[int, int, bool]]:
    """(begin, end, whether the input is added) of convolutions in a row, each residual in one of its own."""
    found: list[tuple[int, int, bool]] = []
    begin = 0
    for i, spec in enumerate(specs):
        if spec.residual:
            if begin < i - spec.residual:
                found.append((begin, i - spec.residual, False))
            found.append((i - spec.residual, i + 1, True))
            begin = i + 1
    return found if begin == len(specs) else [*found, (begin, len(specs), False)]


class ChainTraining(torch.autograd.Function):
    """`run` as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[TrainLayer], residual: bool, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        """The result; arguments as `run` has them."""
        specs = [layer.spec for layer in layers]
        kernels, dtype = _kernels(x), _dtype(x.device)
        # A stem's image is float32, which its kernel multiplies in or rounds itself.
        stem = specs[0].kind == "stem"
        first = x.detach().float() if stem else _nhwc(x.detach().to(dtype))
        read: Tensor | Expansion = first
        norm: Norm | None = None
        moments: Tensor | None = None  # of an expansion's input
        saved: list[Tensor | None] = []
        norms = []
        with _counting() as counters:
            for i, layer in enumerate(layers):
                weight, gamma, beta = (_dense(t) for t in tensors[3 * i : 3 * i + 3])
                assert weight is not None
                if layer.spec.kind in kernels.ROUNDED:
                    weight = weight.to(dtype)
                batch = layer.batch_moments
                z: Tensor | Expansion
                if i == 0 and kernels is cpu_train and _is_remade(specs, math.prod(first.shape[:3])):
                    moments = cpu_train.input_moments(first) if batch else None
                    z = Expansion(first, weight, moments)
                    total = cpu_train.expansion_sums(z) if batch else None
                else:
                    conv = Conv(layer.spec.kind, weight, layer.spec.stride)
                    z, total = kernels.forward(conv, read, norm, sums=batch, dtype=dtype)
                pixels = math.prod(z.shape[:3]) if batch else 0
                total = total if batch else None
                norm = _normalize(kernels, layer, z, total, (gamma, beta), counters=counters)
                saved += [weight, gamma, z if isinstance(z, Tensor) else None, norm.moments, norm.values]
                norms.append((norm.eps, norm.relu6, pixels))
                read = z
        assert norm is not None
        assert isinstance(read, Tensor)
        y = kernels.activate(read, norm, first if residual else None)
        ctx.layers, ctx.residual, ctx.norms = specs, residual, norms
        ctx.save_for_backward(first, moments, *saved)
        return y.permute(0, 3, 1, 2).data  # no view for autograd, which would forbid to write in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what asked for one; layers before the first that did are not visited."""
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        x, moments, *saved = ctx.saved_tensors
        layers = [
            _Kept(spec, *saved[5 * i : 5 * i + 5], *norm)
            for i, (spec, norm) in enumerate(zip(ctx.layers, ctx.norms, strict=True))
        ]
        found = _gradients(layers, (x, moments), _nhwc(grad), ctx.residual, ctx.needs_input_grad[2:])
        return None, None, *found


class _Kept(NamedTuple):
    """What a node keeps of a layer for backward. `z` is None where it is made again."""

    spec: LayerSpec
    weight: Tensor
    gamma: Tensor | None
    z: Tensor | None
    moments: Tensor
    values: Tensor
    eps: float
    relu6: bool
    pixels: int

    @property
    def norm(self) -> Norm:
        return Norm(self.moments, self.values, self.eps, self.relu6)

    @property
    def conv(self) -> Conv:
        return Conv(self.spec.kind, self.weight, self.spec.stride)

    def raw(self, x: Tensor, moments: Tensor | None) -> Tensor | Expansion:
        """Its raw output; x and its moments are the first layer's."""
        return Expansion(x, self.weight, moments) if self.z is None else self.z


def _gradients(
    layers: Sequence[_Kept],
    first: tuple[Tensor, Tensor | None],
    grad: Tensor,
    residual: bool,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x and of each layer's three tensors, those that are needed.

    Args:
        layers: what was kept of them.
        first: the first one's input, [N, H, W, C] or a stem's image, and an expansion's moments of it.
        grad: of the result, [N, H, W, C].
        residual: x was added to the result.
        needed: for x, then for weight, scale and shift of every layer.
    """
    found: list[Tensor | None] = [None] * len(needed)
    x, last = first[0], layers[-1]
    kernels = _kernels(x)
    assert last.z is not None
    # Of the layer at hand: the gradient of what follows its norm, the norm whose ReLU6 has yet to mask it,
    # and the norm's sums.
    g: Tensor | ExpansionGradient | None = grad
    mask = last.norm if last.relu6 else None
    total = kernels.sums(grad, last.z, last.norm) if last.pixels or any(needed[-2:]) else None
    for i in reversed(range(len(layers))):
        if not any(needed[: 3 * i + 4]):
            break
        layer = layers[i]
        coefficients, *affine = kernels.norm_gradient(total, layer.norm, layer.gamma, layer.pixels)
        added = grad if residual and i == 0 and layer.spec.kind == "pointwise" else None
        dw: Tensor | None = None
        if not any(needed[: 3 * i + 2]):
            pass  # only the norm's own gradients were left
        elif isinstance(g, ExpansionGradient):
            remade = Expansion(x, layer.weight, first[1])
            g, dw = cpu_train.expansion_finish(remade, g, layer.norm, coefficients, added)
        else:
            assert g is not None
            gradient = Gradient(g, mask, coefficients)
            g, total, dw = _layer_gradients(layers[: i + 1], first, gradient, added, needed)
        of_layer = slice(3 * i + 1, 3 * i + 4)
        found[of_layer] = [
            t if need else None for t, need in zip((dw, *affine), needed[of_layer], strict=True)
        ]
        mask = None
    if needed[0] and isinstance(g, Tensor):
        if residual and layers[0].spec.kind != "pointwise":
            g.add_(grad)
        found[0] = g if layers[0].spec.kind == "stem" else g.permute(0, 3, 1, 2)
    return found


def _layer_gradients(
    layers: Sequence[_Kept],
    first: tuple[Tensor, Tensor | None],
    gradient: Gradient,
    residual: Tensor | None,
    needed: Sequence[bool],
) -> tuple[Tensor | ExpansionGradient | None, Tensor, Tensor | None]:
    """Gradients of the last of some layers, from that of its raw output; the rest as `_gradients` has it.

    Returns:
        Of what it read, or of an expansion as far as it is known; the sums of that one's norm; of the weight.
    """
    i, layer = len(layers) - 1, layers[-1]
    assert layer.z is not None
    read, norm = (first[0], None) if i == 0 else (layers[i - 1].raw(*first), layers[i - 1].norm)
    step = Step(layer.conv, read, norm, layer.z, gradient)
    for_x, for_weight, stem = any(needed[: 3 * i + 1]), needed[3 * i + 1], layer.spec.kind == "stem"
    if isinstance(read, Expansion) and for_x:
        begun, dw = cpu_train.expansion_backward(
            step, for_x=needed[0], for_weight=needed[1], for_after=for_weight
        )
        return begun, begun.total, dw
    g, total, dw = _kernels(first[0]).backward(
        step, residual=residual, for_x=for_x and not stem, for_weight=for_weight
    )
    return _stem_input(step) if stem and for_x else g, total, dw


def _is_remade(specs: Sequence[LayerSpec], pixels: int) -> bool:
    """Whether the first layer's raw output is not kept: a depthwise layer reads it, and to make it again from
    its input of so many pixels takes less time than to write it to memory and read it back.
    """
    if [spec.kind for spec in specs[:2]] != ["pointwise", "depthwise"]:
        return False
    return specs[0].cin <= REMADE_INPUTS and pixels * specs[0].cout >= REMADE_VALUES


def kept_bytes(nodes: Sequence[Sequence[LayerSpec]], images: int, size: int, dtype: torch.dtype) -> int:
    """Bytes of activations that `run` keeps until the backward pass, the most that a training step holds.

    On a CPU. On a GPU no expansion is made again, so that its raw output is kept, too, and blocks that are
    one node (`run_joined`) have one result.

    Args:
        nodes: the layers of each call, first to last; each reads what the one before returned.
        images: in a batch.
        size: of an image, height and width.
        dtype: bfloat16 under autocast, else float32.
    """
    values = 0
    for specs in nodes:
        layers = arch.layers(size=size, specs=specs)
        remade = _is_remade(specs, images * size * size)
        raw = sum(layer.ho * layer.wo * layer.spec.cout for layer in layers[remade:])
        size, result = layers[-1].ho, layers[-1].ho * layers[-1].wo * layers[-1].spec.cout
        values += images * (raw + result)
    return values * dtype.itemsize


def release_training_memory() -> int:
    """Give back to the system what training keeps between steps for the next one, as much as no tensor uses.

    Training goes on as before, its next step asks for memory anew. A GPU's memory is torch's own, and stays:
    `torch.cuda.empty_cache()` gives back what is kept of that.

    Returns:
        How many bytes of the host that was.
    """
    return cpu_train.release()


def _stem_input(step: Step) -> Tensor:
    """The gradient of a stem's image, which training does not ask for: by torch."""
    dz = _kernels(step.z).raw_gradient(step.gradient, step.z).float().permute(0, 3, 1, 2)
    dx: Tensor = torch.ops.aten.convolution_backward(
        dz, step.x, step.conv.weight, None, (2, 2), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
    )[0]
    return dx


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().contiguous()


def _nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] of any strides -> [N, H, W, C] without gaps; a view where it is channels_last already."""
    x = x.permute(0, 2, 3, 1)
    with torch.cuda.device_of(x):  # a GPU's tensors are made on the current one
        return x if x.is_contiguous() else _kernels(x).empty(*x.shape, dtype=x.dtype).copy_(x)


def _check_pixels(shape: torch.Size) -> None:
    n, h, w, c = shape
    if n * h * w <= 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size((n, c, h, w))}"
        )


def _normalize(
    kernels: Any,
    layer: TrainLayer,
    z: Tensor | Expansion,
    total: Any,
    affine: Sequence[Tensor | None],
    *,
    counters: list[Tensor],
) -> Norm:
    """The norm of a layer's raw output z: by the batch's sums, towards which its running statistics are moved
    as in torch, or by these where there are no sums. `counters` as `_share` has them.
    """
    of, relu6 = layer.norm, layer.spec.relu6
    if total is None:
        running = (_dense(t) for t in (of.running_mean, of.running_var))
        return cast("Norm", kernels.normalize_running(*running, *affine, eps=of.eps, relu6=relu6))
    share, moved = _share(of, counters), None
    _check_pixels(z.shape)
    if share is not None and of.running_mean is not None and of.running_var is not None:
        moved = (of.running_mean, of.running_var, share)
    pixels = math.prod(z.shape[:3])
    return cast("Norm", kernels.normalize(total, pixels, *affine, eps=of.eps, relu6=relu6, moved=moved))


def _share(norm: nn.BatchNorm2d | FrozenNorm, counters: list[Tensor]) -> float | None:
    """How far a batch moves the running statistics, None for not at all; the batch is counted, or is to be.

    As `torch.nn.BatchNorm2d` does it: before it looks whether there are values enough.
    """
    if isinstance(norm, FrozenNorm) or not norm.training or not norm.track_running_stats:
        return None
    counter = norm.num_batches_tracked
    if norm.momentum is not None:
        if counter is not None:
            counters.append(counter)
        return norm.momentum
    return 0.0 if counter is None else 1.0 / float(counter.add_(1))


@contextlib.contextmanager
def _counting() -> Iterator[list[Tensor]]:
    """Counters that are raised by one in the end, whatever that is, for each time they were listed within.

    In one launch on a GPU, where the 52 norms of a step took one each.
    """
    counters: list[Tensor] = []
    try:
        yield counters
    finally:
        times = collections.Counter(map(id, counters))  # no launch may write to one twice
        if distinct := {id(counter): counter for counter in counters}:
            torch._foreach_add_(list(distinct.values()), [times[key] for key in distinct])

"""The kernels of a training step on `_C`: tensors on the CPU, [N, H, W, C] without gaps.

Between layers there are raw outputs of convolutions only. A `Norm` says how one is read. All tensors of a
step, and the weights of its 1x1 convolutions, are float32, or all are bfloat16; the rest is float32: norms,
sums, a stem's image, other weights, every weight's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arch import LayerSpec
from . import cpu

# Layers whose weight a step has in its own dtype.
ROUNDED = ("pointwise",)
# Each block is a node of its own.
JOINS = False


@dataclass(frozen=True)
class Norm:
    """Batch norm of a raw output and the ReLU6 after it.

    `moments`: [2, C] float64, mean and biased variance. `values`: [3, C] float32, mean, scale and shift.
    """

    moments: Tensor
    values: Tensor
    eps: float
    relu6: bool


@dataclass(frozen=True)
class Conv:
    """A convolution.

    `kind`: "pointwise", "depthwise" (3x3 with padding 1) or "stem" (3x3 of stride 2 with padding 1).
    `weight`: as torch has it, contiguous. `stride`: of a depthwise one 1 or 2.
    """

    kind: str
    weight: Tensor
    stride: int


@dataclass(frozen=True)
class Gradient:
    """The gradient of a raw output, unmade.

    `g`: of what follows its norm.
    `mask`: the norm, where its ReLU6 is yet to be applied to g. `coefficients`: from `norm_gradient`.
    """

    g: Tensor
    mask: Norm | None
    coefficients: Any


@dataclass(frozen=True)
class Expansion:
    """The raw output of a 1x1 convolution that nobody keeps: the depthwise layer after it makes it again.

    `x`: [N, H, W, Cin], as it is. `weight`: [C, Cin, 1, 1], contiguous. `moments`: of x; None where the norm
    does not take the batch's.
    """

    x: Tensor
    weight: Tensor
    moments: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """[N, H, W, C]."""
        return torch.Size((*self.x.shape[:3], self.weight.shape[0]))


@dataclass(frozen=True)
class Step:
    """A convolution on the way back: what `forward` had, `z` that it gave, and the gradient of that."""

    conv: Conv
    x: Tensor | Expansion
    norm: Norm | None
    z: Tensor
    gradient: Gradient


def prefers_bfloat16() -> bool:
    """Whether a step in bfloat16 is the fastest one: it takes half (amx) to 0.72 (avx512bf16) of the time."""
    return cpu.isa() in ("amx", "avx512bf16")


def limit(shape: Sequence[int], layers: Sequence[LayerSpec]) -> str | None:
    """Why an input [N, C, H, W] is too large for the kernels of some layers: none is."""
    return None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor, not initialised, in memory that later ones take when it dies."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    buffer = cpu.extension().TrainBuffer(dtype.itemsize * count)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)


def release() -> int:
    """Give back to the system the memory that waits for a next `empty`; how many bytes that was."""
    if not cpu.loaded():  # and so nothing waits
        return 0
    released: int = cpu.extension().TrainBuffer.release()
    return released


def _kernels(dtype: torch.dtype) -> Any:
    """`_C`'s functions for tensors of a type."""
    c = cpu.extension()
    return c.train_bfloat16 if dtype is torch.bfloat16 else c.train_float32


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _size(conv: Conv, x: Tensor | Expansion) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(n, h, w, cin, cout, stride), and the strides of a stem's image [N, C, H, W]."""
    cout = conv.weight.shape[0]
    if conv.kind == "stem":
        assert isinstance(x, Tensor)
        n, cin, h, w = x.shape
        return (n, h, w, cin, cout, conv.stride), x.stride()
    n, h, w, cin = x.shape
    return (n, h, w, cin, cout, conv.stride), (0, 0, 0, 0)


def _expansion(x: Expansion) -> tuple[int, int, int, int]:
    return x.x.data_ptr(), x.weight.data_ptr(), x.x.shape[-1], _address(x.moments)


def _source(x: Tensor | Expansion) -> tuple[int, tuple[int, int, int, int] | None]:
    """The address of x, or what makes it."""
    if isinstance(x, Tensor):
        return x.data_ptr(), None
    return 0, _expansion(x)


def _sums(channels: int) -> Tensor:
    return torch.empty((2, channels), dtype=torch.float64, device="cpu")


def forward(
    conv: Conv, x: Tensor | Expansion, norm: Norm | None, *, sums: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A convolution of `norm` applied to x.

    Args:
        conv: the convolution.
        x: the raw output of the layer before with its norm, or anything with None. [N, H, W, Cin]; of a stem
            [N, Cin, H, W] of any strides, without norm; an `Expansion` of a depthwise layer only.
        norm: of x.
        sums: whether they are wanted.
        dtype: of the step.

    Returns:
        The raw output [N, Ho, Wo, Cout], and [2, Cout] float64, its sum and sum of squares over all pixels.
    """
    size, strides = _size(conv, x)
    n, h, w, _, cout, stride = size
    z = empty(n, (h - 1) // stride + 1, (w - 1) // stride + 1, cout, dtype=dtype)
    total = _sums(cout)
    address, expansion = _source(x)
    _kernels(dtype).forward(
        getattr(cpu.extension().TrainKind, conv.kind),
        size,
        strides,
        address,
        _address(None if norm is None else norm.values),
        norm is not None and norm.relu6,
        conv.weight.data_ptr(),
        z.data_ptr(),
        _address(total if sums else None),
        expansion,
        torch.get_num_threads(),
    )
    return z, total


def input_moments(x: Tensor) -> Tensor:
    """The mean of each channel, and the sums over pixels of products of two channels less their means.

    Args:
        x: [N, H, W, C].

    Returns:
        [1 + C, C] float64.
    """
    channels = x.shape[-1]
    result = torch.empty((1 + channels, channels), dtype=torch.float64, device="cpu")
    _kernels(x.dtype).moments(
        x.data_ptr(), x.numel() // channels, channels, result.data_ptr(), torch.get_num_threads()
    )
    return result


def expansion_sums(x: Expansion) -> Tensor:
    """The sums that `forward` would give of an expansion, which follow from the moments of its input."""
    channels = x.weight.shape[0]
    total = _sums(channels)
    _kernels(x.x.dtype).expand_sums(_expansion(x), math.prod(x.shape[:3]), channels, total.data_ptr())
    return total


def normalize(
    moments: Tensor,
    pixels: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    eps: float,
    relu6: bool,
    moved: tuple[Tensor, Tensor, float] | None = None,
) -> Norm:
    """The norm of a raw output.

    Args:
        moments: [2, C] float64, the sums that `forward` gives over `pixels`, which are replaced by mean and
            biased variance; or these, with 0 pixels.
        pixels: that were summed over.
        gamma, beta: [C], or None for ones and zeros.
        eps: is added to the variance.
        relu6: follows.
        moved: running mean and variance, which are moved towards the batch's by a share, see `move_running`.
    """
    channels = moments.shape[1]
    values = torch.empty((3, channels), dtype=torch.float32, device="cpu")
    cpu.extension().train_norm(
        moments.data_ptr(), pixels, _address(gamma), _address(beta), eps, values.data_ptr(), channels
    )
    norm = Norm(moments, values, eps, relu6)
    if moved is not None:
        move_running(*moved[:2], norm, pixels, moved[2])
    return norm


def normalize_running(
    mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, *, eps: float, relu6: bool
) -> Norm:
    """As `normalize`, by running statistics, [C]."""
    return normalize(torch.stack((mean, variance)).double(), 0, gamma, beta, eps=eps, relu6=relu6)


def move_running(mean: Tensor, variance: Tensor, norm: Norm, pixels: int, share: float) -> None:
    """Move running statistics, float32 [C], towards a batch's over so many pixels by a share, in place."""
    if all(t.is_contiguous() and not t.is_inference() for t in (mean, variance)):
        cpu.extension().train_running(
            norm.moments.data_ptr(), pixels, share, mean.data_ptr(), variance.data_ptr(), len(mean)
        )
        torch.autograd.graph.increment_version((mean, variance))
        return
    # Six calls of torch: so done for every norm they took 2 ms more of a step of 560.
    of_batch, biased = norm.moments.float()
    mean.mul_(1 - share).add_(of_batch, alpha=share)
    variance.mul_(1 - share).add_(biased, alpha=share * pixels / (pixels - 1))


def activate(z: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """What follows a raw output: normalized, activated, the residual of its shape added."""
    y = empty(*z.shape, dtype=z.dtype)
    channels = z.shape[-1]
    _kernels(z.dtype).activate(
        z.data_ptr(),
        norm.values.data_ptr(),
        norm.relu6,
        _address(residual),
        y.data_ptr(),
        z.numel() // channels,
        channels,
        torch.get_num_threads(),
    )
    return y


def sums(g: Tensor, z: Tensor, norm: Norm) -> Tensor:
    """Sums over pixels of g, the gradient of `activate`'s result masked by ReLU6, and of g * (z - mean).

    Returns:
        [2, C] float64.
    """
    channels = z.shape[-1]
    total = _sums(channels)
    _kernels(z.dtype).sums(
        g.data_ptr(),
        z.data_ptr(),
        norm.values.data_ptr(),
        norm.relu6,
        total.data_ptr(),
        z.numel() // channels,
        channels,
        torch.get_num_threads(),
    )
    return total


def norm_gradient(
    total: Tensor | None, norm: Norm, gamma: Tensor | None, pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What turns a gradient into that of the raw output.

    Args:
        total: as `sums` or `backward` gives it; None for zeros, where neither `pixels` nor the gradients of
            gamma and beta ask for it.
        norm: of the raw output.
        gamma: as it was for `normalize`.
        pixels: the moments are those of; 0 where they are not of the batch.

    Returns:
        [3, C] coefficients for `backward`, and the gradients of gamma and beta.
    """
    channels = norm.moments.shape[1]
    if total is None:
        total = _sums(channels).zero_()
    coefficients, affine = (
        torch.empty((rows, channels), dtype=torch.float32, device="cpu") for rows in (3, 2)
    )
    dgamma, dbeta = affine
    cpu.extension().train_norm_gradient(
        total.data_ptr(),
        norm.moments.data_ptr(),
        _address(gamma),
        norm.eps,
        pixels,
        norm.values.data_ptr(),
        coefficients.data_ptr(),
        dgamma.data_ptr(),
        dbeta.data_ptr(),
        channels,
    )
    return coefficients, dgamma, dbeta


def _backward(
    step: Step,
    *,
    residual: Tensor | None = None,
    dx: Tensor | None = None,
    total: Tensor | None = None,
    dw: Tensor | None = None,
    expanded: tuple[int, int] | None = None,
) -> Any:
    """The arguments of a backward pass as `_C` takes them."""
    address, expansion = _source(step.x)
    size, strides = _size(step.conv, step.x)
    norm, mask = step.norm, step.gradient.mask
    return _kernels(step.z.dtype).Backward(
        getattr(cpu.extension().TrainKind, step.conv.kind),
        size,
        strides,
        address,
        _address(None if norm is None else norm.values),
        norm is not None and norm.relu6,
        step.conv.weight.data_ptr(),
        step.z.data_ptr(),
        step.gradient.g.data_ptr(),
        _address(None if mask is None else mask.values),
        mask is not None and mask.relu6,
        step.gradient.coefficients.data_ptr(),
        _address(residual),
        _address(dx),
        _address(total),
        _address(dw),
        expansion,
        expanded,
    )


def backward(
    step: Step, *, residual: Tensor | None = None, for_x: bool = True, for_weight: bool = True
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Gradients of `forward`.

    Args:
        step: the convolution.
        residual: is added to the gradient of x; of a pointwise layer without norm only.
        for_x: the gradient of x is wanted; not of a stem, nor of an `Expansion`, see `expansion_backward`.
        for_weight: the gradient of the weight is.

    Returns:
        The gradient of x, or of its normalized value if it has a norm, then masked already; its `sums`, if
        so; the gradient of the weight.
    """
    x, weight = step.x, step.conv.weight
    assert not for_x or isinstance(x, Tensor)
    dx = empty(*x.shape, dtype=step.z.dtype) if for_x else None
    dw = torch.empty_like(weight, dtype=torch.float32) if for_weight else None
    total = _sums(x.shape[1 if step.conv.kind == "stem" else -1])
    wanted = total if for_x and step.norm is not None else None
    call = _backward(step, residual=residual, dx=dx, total=wanted, dw=dw)
    _kernels(step.z.dtype).backward(call, torch.get_num_threads())
    return dx, total, dw


@dataclass(frozen=True)
class ExpansionGradient:
    """Gradients of an expansion as far as they are known before `norm_gradient` of the sums is.

    `dx`: of its input, float32. `dw`: of its weight. `total`: the sums, as `backward` has them.
    """

    dx: Tensor | None
    dw: Tensor | None
    total: Tensor

    @property
    def addresses(self) -> tuple[int, int]:
        return _address(self.dx), _address(self.dw)


def expansion_backward(
    after: Step,
    *,
    for_x: bool = True,
    for_weight: bool = True,
    for_after: bool = True,
) -> tuple[ExpansionGradient, Tensor | None]:
    """Gradients of a depthwise layer and of the expansion before it, in one pass.

    Args:
        after: the depthwise layer, whose x is the expansion and has a norm.
        for_x: the gradient of the expansion's input is wanted.
        for_weight: the gradient of the expansion's weight is.
        for_after: that of the depthwise weight is.

    Returns:
        What `expansion_finish` takes, and the gradient of the depthwise weight.
    """
    x = after.x
    assert isinstance(x, Expansion)
    dx = empty(*x.x.shape) if for_x else None
    dw = torch.empty_like(x.weight, dtype=torch.float32) if for_weight else None
    of_after = torch.empty_like(after.conv.weight, dtype=torch.float32) if for_after else None
    begun = ExpansionGradient(dx, dw, _sums(x.weight.shape[0]))
    call = _backward(after, total=begun.total, dw=of_after, expanded=begun.addresses)
    _kernels(x.x.dtype).backward(call, torch.get_num_threads())
    return begun, of_after


def expansion_finish(
    x: Expansion, begun: ExpansionGradient, norm: Norm, coefficients: Tensor, residual: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Make whole what `expansion_backward` has begun, which is used up.

    Args:
        x: the expansion.
        begun: its gradients.
        norm: of the expansion.
        coefficients: from `norm_gradient` of its sums.
        residual: is added to the gradient of the expansion's input.

    Returns:
        The gradients of the expansion's input and of its weight.
    """
    channels, dtype = x.weight.shape[0], x.x.dtype
    dx = begun.dx if begun.dx is None or dtype is torch.float32 else empty(*x.x.shape, dtype=dtype)
    _kernels(dtype).expand_finish(
        _expansion(x),
        math.prod(x.shape[:3]),
        channels,
        begun.total.data_ptr(),
        norm.values.data_ptr(),
        coefficients.data_ptr(),
        _address(residual),
        begun.addresses,
        _address(dx),
        torch.get_num_threads(),
    )
    return dx, begun.dw


def raw_gradient(gradient: Gradient, z: Tensor) -> Tensor:
    """The gradient of a raw output z, made, by torch."""
    g = gradient.g
    if gradient.mask is not None:
        _, scale, shift = gradient.mask.values
        y = torch.addcmul(shift, z, scale)
        g = g.masked_fill((y <= 0) | (y >= 6), 0)
    of_g, of_z, constant = gradient.coefficients
    return of_g * g + of_z * z + constant

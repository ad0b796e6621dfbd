"""The kernels of a training step on a GPU, as `cpu_train` has them for the CPU: tensors [N, H, W, C].

All tensors of a step, and the weights of its 1x1 convolutions, are of one dtype: float32, or float16 or
bfloat16 under autocast. The rest is float32: norms, sums, other weights, every weight's gradient. Sums are
what the programs of a kernel leave, which the next one adds up.

Importing this module imports no triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..arch import LayerSpec
from .cpu_train import Conv, Gradient, Norm, Step
from .triton import multiplies_tf32

if TYPE_CHECKING:
    from mnv2_fast.kernels.norm import Applied, RawGradient

# Layers whose weight a step has in its own dtype.
ROUNDED = ("pointwise",)
# Blocks in a row that add nothing are one node: their outputs are not written a second time, normalized.
# Counted, 5 of 97.6 MB an image, and the memory for it.
JOINS = True


class Coefficients(NamedTuple):
    """What turns the gradient of what follows a norm into that of the raw output.

    `rows`: [3, C], of the gradient, of the raw output less its mean, and a constant. `values`: of the norm.
    `batch`: the norm took the batch's moments.
    """

    rows: Tensor
    values: Tensor
    batch: bool


def limit(shape: Sequence[int], layers: Sequence[LayerSpec]) -> str | None:
    """Why an input [N, C, H, W] is too large for the kernels of some layers, or None where it is not."""
    from mnv2_fast.kernels import depthwise

    n, _, h, w = shape
    return depthwise.limit(torch.Size((n, max(spec.cout for spec in layers), h, w)))


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor on the current GPU, not initialised."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def forward(
    conv: Conv, x: Tensor, norm: Norm | None, *, sums: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """A convolution of `norm` applied to x.

    Arguments as `cpu_train.forward` has them.

    Returns:
        The raw output [N, Ho, Wo, Cout], and what `normalize` takes if `sums` are wanted.
    """
    from mnv2_fast.kernels import train_depthwise, train_pointwise, train_stem

    if conv.kind == "stem":
        return train_stem.forward(x, conv.weight, dtype, moments=sums, tf32=multiplies_tf32())
    if conv.kind == "depthwise":
        return train_depthwise.forward(x, _applied(norm), conv.weight, conv.stride, moments=sums)
    return train_pointwise.forward(x, _applied(norm), conv.weight, moments=sums, tf32=multiplies_tf32())


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
    """The norm of a raw output of so many pixels from what `forward` found.

    The rest as `cpu_train.normalize` has it.
    """
    from mnv2_fast.kernels import norm

    plain = moved is not None and all(_plain(t) for t in moved[:2])
    running, share = (moved[:2], moved[2]) if moved is not None and plain else (None, None)
    found, values = norm.normalize(moments, gamma, beta, eps, running=running, share=share)
    if running is not None:
        torch.autograd.graph.increment_version(running)
    elif moved is not None:
        _move_running(*moved, found, pixels)
    return Norm(found, values, eps, relu6)


def normalize_running(
    mean: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, *, eps: float, relu6: bool
) -> Norm:
    """As `normalize`, by running statistics, [C] float32, contiguous."""
    from mnv2_fast.kernels import norm

    moments, values = norm.normalize_running(mean, variance, gamma, beta, eps)
    return Norm(moments, values, eps, relu6)


def activate(z: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """What follows a raw output: normalized, activated, the residual of its shape added."""
    from mnv2_fast.kernels import norm as kernels

    return kernels.activate(z, norm.values, norm.relu6, residual)


def sums(g: Tensor, z: Tensor, norm: Norm) -> Tensor:
    """What `norm_gradient` takes of g, the gradient of `activate`'s result."""
    from mnv2_fast.kernels import norm as kernels

    return kernels.sums(g, z, norm.values, norm.relu6)


def norm_gradient(
    total: Tensor | None, norm: Norm, gamma: Tensor | None, pixels: int
) -> tuple[Coefficients, Tensor, Tensor]:
    """What turns a gradient into that of the raw output, as `cpu_train.norm_gradient` has it."""
    from mnv2_fast.kernels import norm as kernels

    if total is None:
        total = torch.zeros((1, 2, norm.moments.shape[1]), device=norm.moments.device)
    coefficients, (dgamma, dbeta) = kernels.norm_gradient(total, norm.moments, gamma, pixels, norm.eps)
    return Coefficients(coefficients, norm.values, pixels > 0), dgamma, dbeta


def backward(
    step: Step, *, residual: Tensor | None = None, for_x: bool = True, for_weight: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`, as `cpu_train.backward` has them; sums are what `norm_gradient` takes."""
    from mnv2_fast.kernels import train_depthwise, train_pointwise_gradient, train_stem

    conv, of, x = step.conv, _raw_gradient(step.gradient, step.z), step.x
    assert isinstance(x, Tensor)
    if conv.kind == "stem":
        return None, None, train_stem.weight_gradient(of, x, tf32=multiplies_tf32()) if for_weight else None
    wanted = {"for_x": for_x, "for_weight": for_weight}
    if conv.kind == "depthwise":
        return train_depthwise.gradients(of, conv.weight, x, _applied(step.norm), conv.stride, **wanted)
    return train_pointwise_gradient.gradients(
        of, conv.weight, x, _applied(step.norm), residual, tf32=multiplies_tf32(), **wanted
    )


def raw_gradient(gradient: Gradient, z: Tensor) -> Tensor:
    """The gradient of a raw output z, made, by torch."""
    of_z: Coefficients = gradient.coefficients
    mean, scale, shift = of_z.values
    g, distance = gradient.g.float(), z.float() - mean
    if gradient.mask is not None:
        y = distance * scale + shift
        g = g.masked_fill((y <= 0) | (y >= 6), 0)
    of_g, of_distance, constant = of_z.rows
    return of_g * g + of_distance * distance + constant


def _applied(norm: Norm | None) -> Applied | None:
    from mnv2_fast.kernels.norm import Applied

    return None if norm is None else Applied(norm.values, norm.relu6)


def _raw_gradient(gradient: Gradient, z: Tensor) -> RawGradient:
    from mnv2_fast.kernels.norm import RawGradient

    of_z: Coefficients = gradient.coefficients
    mask = gradient.mask is not None
    return RawGradient(gradient.g, z, of_z.values, of_z.rows, mask, of_z.batch)


def _plain(t: Tensor) -> bool:
    return t.is_contiguous() and not t.is_inference() and t.dtype is torch.float32


@torch.no_grad()
def _move_running(mean: Tensor, variance: Tensor, share: float, moments: Tensor, pixels: int) -> None:
    """Move running statistics of any form towards a batch's by a share, in place."""
    of_batch, biased = moments
    mean.mul_(1 - share).add_(of_batch.to(mean.dtype), alpha=share)
    variance.mul_(1 - share).add_(biased.to(variance.dtype), alpha=share * pixels / (pixels - 1))

"""The float64 twins of the training kernels: batch norm, ReLU6 and convolution one after the other, by torch.

Tensors are [N, H, W, C] as the kernels have them, a stem's image is [N, 3, H, W].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from .norm import Applied, RawGradient


def applied(x: torch.Tensor, norm: Applied | None) -> torch.Tensor:
    """What a convolution multiplies: x with its norm applied."""
    if norm is None:
        return x.double()
    mean, scale, shift = norm.values.double()
    y = (x.double() - mean) * scale + shift
    return y.clamp(0, 6) if norm.relu6 else y


def forward(x: torch.Tensor, norm: Applied | None, weight: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """The raw output of the convolution that a weight's shape says: 1x1, depthwise 3x3 or a stem."""
    a = x.double() if weight.shape[1] == 3 == weight.shape[2] else applied(x, norm).permute(0, 3, 1, 2)
    z = F.conv2d(a, weight.double(), None, stride, weight.shape[2] // 2, 1, _groups(weight))
    return z.permute(0, 2, 3, 1)


def moments(z: torch.Tensor) -> torch.Tensor:
    """Mean and biased variance of each channel, [2, C]."""
    variance, mean = torch.var_mean(z.double().flatten(0, 2), 0, correction=0)
    return torch.stack((mean, variance))


def raw_gradient(of: RawGradient) -> torch.Tensor:
    """The gradient of a raw output, made."""
    mean, scale, shift = of.values.double()
    g, distance = of.g.double(), of.z.double() - mean
    y = distance * scale + shift
    if of.mask:
        g = g.masked_fill((y <= 0) | (y >= 6), 0)
    of_g, of_z, constant = of.coefficients.double()
    return of_g * g + of_z * distance + constant if of.batch else of_g * g


class Gradients(NamedTuple):
    """`x`: of what follows the norm of x, masked, or of x; `sums`: [2, C], of that norm; `weight`."""

    x: torch.Tensor
    sums: torch.Tensor | None
    weight: torch.Tensor


def gradients(
    of: RawGradient,
    weight: torch.Tensor,
    x: torch.Tensor,
    norm: Applied | None,
    residual: torch.Tensor | None = None,
    *,
    stride: int = 1,
) -> Gradients:
    """Gradients of `forward`, without that of a stem's image, for which zeros stand."""
    dz, groups = raw_gradient(of).permute(0, 3, 1, 2), _groups(weight)
    how = (stride, weight.shape[2] // 2, 1, groups)
    if weight.shape[1] == 3 == weight.shape[2]:
        return Gradients(torch.zeros_like(x), None, conv2d_weight(x.double(), weight.shape, dz, *how))
    a = applied(x, norm).permute(0, 3, 1, 2)
    dx = conv2d_input(a.shape, weight.double(), dz, *how).permute(0, 2, 3, 1)
    dw = conv2d_weight(a, weight.shape, dz, *how)
    if norm is None:
        return Gradients(dx if residual is None else dx + residual.double(), None, dw)
    return Gradients(*masked(dx, x, norm), dw)


def masked(g: torch.Tensor, z: torch.Tensor, norm: Applied) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of what follows a norm, masked by its ReLU6; its sums [2, C], plain and with z - mean."""
    mean, scale, shift = norm.values.double()
    distance = z.double() - mean
    y = distance * scale + shift
    g = g.double().masked_fill((y <= 0) | (y >= 6), 0) if norm.relu6 else g.double()
    return g, torch.stack((g.sum((0, 1, 2)), (g * distance).sum((0, 1, 2))))


def _groups(weight: torch.Tensor) -> int:
    return weight.shape[0] if weight.shape[1] == 1 and weight.shape[2] == 3 else 1

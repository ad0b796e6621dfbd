"""Layers in train mode on the kernels: one autograd node for convolutions in a row with their batch norms.

What a node keeps for backward is the input and the raw output of every convolution; batch norm and ReLU6 are
applied again where these are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arch import LayerSpec
from .autograd import TWICE
from .backends import cpu_train
from .backends.cpu_train import Conv, Gradient, Norm


@dataclass(frozen=True)
class TrainLayer:
    """A convolution without bias, the batch norm after it and whether ReLU6 follows."""

    spec: LayerSpec
    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weight and the norm's scale and shift."""
        return self.conv.weight, self.norm.weight, self.norm.bias

    @property
    def batch_moments(self) -> bool:
        """Whether the norm takes the batch's moments, as torch decides it."""
        return self.norm.training or self.norm.running_mean is None


def layers_of(module: nn.Module) -> list[TrainLayer]:
    """The convolutions of a `ConvBNReLU6` or an `InvertedResidual`, each with the norm after it."""
    flat = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU6)]
    layers = []
    for conv, norm, after in zip(flat, flat[1:], [*flat[2:], None], strict=False):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            kind = "pointwise" if conv.kernel_size == (1, 1) else "depthwise" if conv.groups > 1 else "stem"
            relu6 = isinstance(after, nn.ReLU6)
            spec = LayerSpec(kind, "", "", conv.in_channels, conv.out_channels, conv.stride[0], relu6)
            layers.append(TrainLayer(spec, conv, norm))
    return layers


def run(x: Tensor, layers: Sequence[TrainLayer], residual: bool = False) -> Tensor:
    """The layers on x, within autograd; running statistics are updated as torch does.

    Args:
        x: float32 [N, C, H, W] on the CPU.
        layers: first to last; a stem only as the first.
        residual: x is added to the result.

    Returns:
        [N, Cout, Ho, Wo] in channels_last.

    Raises:
        ValueError: a norm that takes the batch's moments sees one value a channel (as torch's), or none.
        RuntimeError: from backward, where a graph of the gradients is asked for.
    """
    tensors = [t for layer in layers for t in layer.tensors]
    y: Tensor = ChainTraining.apply(layers, residual, x, *tensors)
    return y


class ChainTraining(torch.autograd.Function):
    """`run` as a node of autograd."""

    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[TrainLayer], residual: bool, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        """The result; arguments as `run` has them, then weight, scale and shift of every layer."""
        stem = layers[0].spec.kind == "stem"
        read = x.detach() if stem else _nhwc(x.detach())
        first, norm = read, None
        saved: list[Tensor | None] = []
        norms = []
        for i, layer in enumerate(layers):
            weight, gamma, beta = (_dense(t) for t in tensors[3 * i : 3 * i + 3])
            assert weight is not None
            batch = layer.batch_moments
            conv = Conv(layer.spec.kind, weight, layer.spec.stride)
            z, total = cpu_train.forward(conv, read, norm, sums=batch)
            pixels = z.numel() // z.shape[-1]
            if batch:
                _check_pixels(z, pixels)
            else:
                total = _running_moments(layer.norm)
            norm = cpu_train.normalize(
                total,
                pixels if batch else 0,
                gamma,
                beta,
                eps=layer.norm.eps,
                relu6=layer.spec.relu6,
            )
            if batch:
                _update(layer.norm, norm.moments, pixels)
            saved += [weight, gamma, z, norm.moments, norm.values]
            norms.append((norm.eps, norm.relu6, pixels if batch else 0))
            read = z
        assert norm is not None
        y = cpu_train.activate(read, norm, first if residual else None)
        ctx.layers, ctx.residual, ctx.norms = [layer.spec for layer in layers], residual, norms
        ctx.save_for_backward(first, *saved)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what asked for one; layers before the first that did are not visited."""
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        specs, needed = ctx.layers, ctx.needs_input_grad[2:]
        x, *saved = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(needed)
        grad = _nhwc(grad)
        g: Tensor | None = grad
        mask: Norm | None = None
        for i in reversed(range(len(specs))):
            if not any(needed[: 3 * i + 4]):
                break
            weight, gamma, z, moments, values = saved[5 * i : 5 * i + 5]
            eps, relu6, pixels = ctx.norms[i]
            norm = Norm(moments, values, eps, relu6)
            assert g is not None
            if i == len(specs) - 1:
                mask = norm if relu6 else None
                total = cpu_train.sums(g, z, norm)
            coefficients, *affine = cpu_train.norm_gradient(total, norm, gamma, pixels)
            read, before = (x, None) if i == 0 else _before(saved, ctx.norms, i)
            stem = specs[i].kind == "stem"
            for_x, for_weight = any(needed[: 3 * i + 1]), needed[3 * i + 1]
            in_place = ctx.residual and i == 0 and specs[i].kind == "pointwise"
            conv, gradient = Conv(specs[i].kind, weight, specs[i].stride), Gradient(g, mask, coefficients)
            dx, total, dw = cpu_train.backward(
                conv,
                read,
                before,
                z,
                gradient,
                residual=grad if in_place else None,
                for_x=for_x and not stem,
                for_weight=for_weight,
            )
            if stem and for_x:
                dx = _stem_input(x, weight, z, gradient)
            found[3 * i + 1 : 3 * i + 4] = [
                t if need else None
                for t, need in zip((dw, *affine), needed[3 * i + 1 : 3 * i + 4], strict=True)
            ]
            g, mask = dx, None
        if needed[0] and g is not None:
            if ctx.residual and specs[0].kind != "pointwise":
                g.add_(grad)
            found[0] = g if specs[0].kind == "stem" else g.permute(0, 3, 1, 2)
        return None, None, *found


def _before(saved: Sequence[Tensor], norms: Sequence[tuple[float, bool, int]], i: int) -> tuple[Tensor, Norm]:
    """What layer i reads: the raw output of the one before, and its norm."""
    _, _, z, moments, values = saved[5 * i - 5 : 5 * i]
    eps, relu6, _ = norms[i - 1]
    return z, Norm(moments, values, eps, relu6)


def _stem_input(x: Tensor, weight: Tensor, z: Tensor, gradient: Gradient) -> Tensor:
    """The gradient of a stem's image, which training does not ask for: by torch."""
    g = gradient.g
    if gradient.mask is not None:
        _, scale, shift = gradient.mask.values
        at = torch.addcmul(shift, z, scale)
        g = g.masked_fill((at <= 0) | (at >= 6), 0)
    of_g, of_z, constant = gradient.coefficients
    dz = (of_g * g + of_z * z + constant).permute(0, 3, 1, 2)
    dx: Tensor = torch.ops.aten.convolution_backward(
        dz, x, weight, None, (2, 2), (1, 1), (1, 1), False, (0, 0), 1, (True, False, False)
    )[0]
    return dx


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().contiguous()


def _nhwc(x: Tensor) -> Tensor:
    """[N, C, H, W] of any strides -> [N, H, W, C] without gaps; a view where it is channels_last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _check_pixels(z: Tensor, pixels: int) -> None:
    if pixels <= 1:
        n, h, w, c = z.shape
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size((n, c, h, w))}"
        )


def _running_moments(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return torch.stack((norm.running_mean, norm.running_var)).double()


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, moments: Tensor, pixels: int) -> None:
    """Running statistics after a batch, as `torch.nn.BatchNorm2d` keeps them."""
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        return
    share = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if share is None:
            share = 1.0 / float(norm.num_batches_tracked)
    mean, variance = moments.float()
    kept = 1.0 - (0.0 if share is None else share)
    norm.running_mean.mul_(kept).add_(mean, alpha=1 - kept)
    norm.running_var.mul_(kept).add_(variance, alpha=(1 - kept) * pixels / (pixels - 1))

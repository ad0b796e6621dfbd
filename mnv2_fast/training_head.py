"""The end of a network as one autograd node: mean over H and W, dropout and the linear layer.

All of it is torch's arithmetic, and small. What a node of its own saves is the gradient of the mean: one
value a channel for all pixels, which torch's nodes write out in fresh memory. (So a hook of the feature maps
must not write into their gradient in place, which torch does not allow either.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import TWICE
from .reading import autocast_dtype


def run(x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Logits of a batch's last feature maps, within autograd.

    Args:
        x: [N, C, H, W] of any strides.
        weight: [classes, C], of x's dtype; under autocast of any.
        bias: [classes] likewise, or None.
        dropout: probability with which a mean is dropped; 0 where the layer is in eval mode. The same ones
            are dropped as by `torch.nn.functional.dropout` of the means.

    Returns:
        [N, classes], of autocast's dtype within it.

    Raises:
        RuntimeError: from backward, where a graph of the gradients is asked for.
    """
    y: Tensor = HeadTraining.apply(x, weight, bias, dropout)
    return y


class HeadTraining(torch.autograd.Function):
    """`run` as a node of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        """The logits; arguments as `run` has them."""
        pooled = x.mean((2, 3))
        scale = F.dropout(torch.ones_like(pooled), dropout) if dropout else None  # 0 or 1 / (1 - dropout)
        if scale is not None:
            pooled.mul_(scale)
        # Cast by hand: autocast would keep its own cast of a parameter, made here without autograd.
        dtype = autocast_dtype(x.device) or x.dtype
        pooled, held = pooled.to(dtype), weight.detach().to(dtype)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(pooled, held, scale)
        return F.linear(pooled, held, None if bias is None else bias.detach().to(dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what asked for one; that of x is a view of one value a channel."""
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        pooled, weight, scale = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        dx = dw = db = None
        with torch.autocast(grad.device.type, enabled=False):  # whatever surrounds the backward pass
            if for_x:
                means = (grad @ weight).to(ctx.dtype)
                if scale is not None:
                    means *= scale
                _, _, h, w = ctx.shape
                dx = (means / (h * w))[:, :, None, None].expand(ctx.shape)
            if for_weight:
                dw = grad.t() @ pooled
            if for_bias:
                db = grad.sum(0)
        return dx, dw, db, None

"""The operators in plain torch: any device, any dtype, differentiable. Fast answers are compared to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain import Chain, Link

_switches = threading.Lock()


def declines(op: str, *args: object) -> str | None:
    """None: plain torch serves every call."""
    return None


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Products of float32 on a GPU as TF32, or in full, within it, whatever torch's switches say.

    The switches are the process's: one thread at a time.
    """
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    with _switches:
        before = conv.fp32_precision, matmul.fp32_precision
        conv.fp32_precision = matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            conv.fp32_precision, matmul.fp32_precision = before


def channels_last(y: Tensor) -> Tensor:
    """`y` with a fresh channels_last tensor's strides, also where sizes of 1 leave them open."""
    _, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def stem(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool) -> Tensor:
    """3x3 convolution of stride 2: [N, 3, H, W] -> [N, Cout, Ho, Wo]."""
    return _finish(F.conv2d(x, weight, bias, stride=2, padding=1), None, relu6)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, stride: int, relu6: bool) -> Tensor:
    """3x3 depthwise convolution: [N, C, H, W] -> [N, C, Ho, Wo]."""
    return _finish(F.conv2d(x, weight, bias, stride, padding=1, groups=weight.shape[0]), None, relu6)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """1x1 convolution: [N, Cin, H, W] -> [N, Cout, H, W], the residual added after ReLU6."""
    return _finish(F.conv2d(x, weight, bias), residual, relu6)


def head(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """ReLU6 of a 1x1 convolution, its mean over H and W, a linear layer: [N, C, H, W] -> [N, classes]."""
    return F.linear(_pool(F.relu6(F.conv2d(x, w1, b1))), w2, b2)


def network(x: Tensor, tensors: Sequence[Tensor], spec: str) -> Tensor:
    """A chain of layers with batch norm by its running statistics, step by step as the modules would run it.

    Args:
        x: [N, C, H, W].
        tensors: what the layers read, in the order of `spec`.
        spec: `Chain.encode()`.

    Returns:
        [N, C] where the chain is pooled or ends in a linear layer, else [N, C, Ho, Wo] in the layout torch
        chooses.
    """
    chain = Chain.decode(spec)
    inputs: list[Tensor] = []
    for link, named in zip(chain.links, chain.split(tensors), strict=True):
        inputs.append(x)
        y = _layer(link, x, named)
        residual = link.spec.residual
        x = inputs[-residual - 1] + y if residual else y
    return _pool(x) if chain.pool and x.dim() == 4 else x


def _layer(link: Link, x: Tensor, named: dict[str, Tensor]) -> Tensor:
    spec = link.spec
    weight, bias = named["weight"], named.get("bias")
    if spec.kind == "linear":
        return F.linear(_pool(x) if x.dim() == 4 else x, weight, bias)
    groups = spec.cout if spec.kind == "depthwise" else 1
    y = F.conv2d(x, weight, bias, spec.stride, weight.shape[-1] // 2, groups=groups)
    if link.norm:
        mean, var = named["running_mean"], named["running_var"]
        y = F.batch_norm(y, mean, var, named.get("norm_weight"), named.get("norm_bias"), eps=link.eps)
    return F.relu6(y) if spec.relu6 else y


def _pool(x: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


def _finish(y: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    y = F.relu6(y) if relu6 else y
    return channels_last(y if residual is None else y + residual)

"""The network that `bench.gpu` checks and times: in plain torch, and on our kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnv2_fast import arch

if TYPE_CHECKING:
    import torch

    from kernels.network import Network

NORM = ((0.0171, 0.0175, 0.0174), (-2.118, -2.036, -1.804))  # bytes to numbers, for ImageNet


def plain_network(num_classes: int = 1000) -> torch.nn.Module:
    """MobileNetV2 in plain torch modules, from the table of layers: [N, 3, H, W] -> [N, num_classes]."""
    from torch import Tensor, nn

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.specs = arch.network(num_classes)
            self.layers = nn.ModuleList(_plain_layer(spec) for spec in self.specs)
            self.branches = {i - spec.residual for i, spec in enumerate(self.specs) if spec.residual}

        def forward(self, x: Tensor) -> Tensor:
            saved = x
            for i, (spec, layer) in enumerate(zip(self.specs, self.layers, strict=True)):
                if i in self.branches:
                    saved = x
                x = layer(x)
                if spec.residual:
                    x = x + saved
            return x

    return Plain()


def _plain_layer(spec: arch.LayerSpec) -> torch.nn.Module:
    from torch import nn

    if spec.kind == "linear":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(spec.cin, spec.cout))
    kernel = 1 if spec.kind == "pointwise" else 3
    groups = spec.cin if spec.kind == "depthwise" else 1
    convolution = nn.Conv2d(spec.cin, spec.cout, kernel, spec.stride, kernel // 2, groups=groups, bias=False)
    activation = [nn.ReLU6(inplace=True)] if spec.relu6 else []
    return nn.Sequential(convolution, nn.BatchNorm2d(spec.cout), *activation)


def our_network(model: torch.nn.Module, dtype: torch.dtype, device: str, fuse: bool) -> Network:
    """A plain network's layers, batch norm folded, on our kernels."""
    import torch

    from kernels.network import Network

    pairs = []
    for spec, layer in zip(model.specs, model.layers, strict=True):  # type: ignore[arg-type]
        if spec.kind == "linear":
            pairs.append((layer[2].weight.detach(), layer[2].bias.detach()))
            continue
        norm = layer[1]
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = layer[0].weight.double() * scale.view(-1, 1, 1, 1)
        pairs.append((weight.detach(), (norm.bias.double() - norm.running_mean.double() * scale).detach()))
    norm = torch.tensor(NORM)
    return Network(model.specs, pairs, dtype, torch.device(device), norm=norm, fuse=fuse)  # type: ignore[arg-type]

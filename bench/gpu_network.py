"""The network that `bench.gpu` checks and times: in plain torch, and on our kernels as an engine runs it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import gpu_forms
from bench.gpu_forms import DTYPES, NORM
from kernels.network import Network
from mnv2_fast import arch
from mnv2_fast.backends import replay

SIZE = 224  # of photos


def plain_network(num_classes: int = 1000) -> nn.Module:
    """MobileNetV2 in plain torch modules, from the table of layers: [N, 3, H, W] -> [N, num_classes]."""

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


def _plain_layer(spec: arch.LayerSpec) -> nn.Module:
    if spec.kind == "linear":
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(spec.cin, spec.cout))
    kernel = 1 if spec.kind == "pointwise" else 3
    groups = spec.cin if spec.kind == "depthwise" else 1
    convolution = nn.Conv2d(spec.cin, spec.cout, kernel, spec.stride, kernel // 2, groups=groups, bias=False)
    activation = [nn.ReLU6(inplace=True)] if spec.relu6 else []
    return nn.Sequential(convolution, nn.BatchNorm2d(spec.cout), *activation)


def settled_network(num_classes: int = 1000) -> nn.Module:
    """A plain network in eval mode on the device whose logits depend on the photo, the same at every call.

    Weights by He, batch norms with the statistics that photos have there, so that activations neither die
    nor explode. Their biases have most activations between ReLU6's ends: where half are cut off, roundings
    grow from layer to layer until fp16's are a tenth of what photos differ by; so they are an eightieth.
    """
    generator = torch.Generator().manual_seed(0)
    model = plain_network(num_classes)
    with torch.no_grad():
        for layer in model.layers:  # type: ignore[union-attr]
            weight = next(layer.parameters())
            gain = 1.0 if isinstance(layer[-1], nn.Linear) else 2.0
            std = (gain / weight[0].numel()) ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
            if isinstance(norm := layer[1], nn.BatchNorm2d):
                norm.momentum = None  # statistics of all that it sees
                norm.weight.copy_(torch.rand(weight.shape[0], generator=generator) + 0.5)
                norm.bias.copy_(torch.randn(weight.shape[0], generator=generator) * 0.5)
                norm.bias.add_(isinstance(layer[-1], nn.ReLU6))
        model = model.to(gpu_forms.DEVICE).train()
        model(as_numbers(photos(16, 0), torch.float32))
    return model.eval()


def photos(n: int, seed: int) -> Tensor:
    """Bytes [N, SIZE, SIZE, 3] on the device: large patches of colour with grain, each photo of its own."""
    generator, size = torch.Generator().manual_seed(seed), SIZE
    patches = torch.rand((n, 3, 5, 5), generator=generator).mul_(255)
    grain = torch.randn((n, 3, size, size), generator=generator).mul_(25)
    smooth = F.interpolate(patches, size=(size, size), mode="bilinear", align_corners=False)
    return (smooth + grain).clamp_(0, 255).byte().permute(0, 2, 3, 1).contiguous().to(gpu_forms.DEVICE)


def as_numbers(photos: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [N, H, W, 3] as normalised [N, 3, H, W], in float64 up to the one rounding to `dtype`."""
    scale, shift = torch.tensor(NORM, dtype=torch.float64, device=photos.device).view(2, 1, 1, 3)
    return (photos * scale + shift).to(dtype).permute(0, 3, 1, 2)


def our_network(model: nn.Module, kind: str, fuse: bool) -> Network:
    """A plain network's layers, batch norm folded, on our kernels; kind: of `DTYPES`."""
    pairs = []
    for spec, layer in zip(model.specs, model.layers, strict=True):  # type: ignore[arg-type]
        if spec.kind == "linear":
            pairs.append((layer[2].weight.detach(), layer[2].bias.detach()))
            continue
        norm = layer[1]
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = layer[0].weight.double() * scale.view(-1, 1, 1, 1)
        pairs.append((weight.detach(), (norm.bias.double() - norm.running_mean.double() * scale).detach()))
    dtype, tf32 = DTYPES[kind]
    device, norm = torch.device(gpu_forms.DEVICE), torch.tensor(NORM)
    return Network(
        model.specs,  # type: ignore[arg-type]
        pairs,
        dtype,
        device,
        norm=norm,
        tf32=tf32,
        fuse=fuse,
        project=None,
    )


def engine(model: nn.Module, kind: str, fuse: bool) -> Callable[[Tensor], Tensor]:
    """Our network as an engine calls it: padded to a bucket, replayed as one CUDA graph."""
    return replay.Replayed(our_network(model, kind, fuse))


def torchs_answer(model: nn.Module, photos: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits that torch computes in `dtype`, float32 in full, as float64."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return deepcopy(model).to(dtype)(as_numbers(photos, dtype)).double()

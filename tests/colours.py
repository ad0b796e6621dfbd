"""A small network that tells colours apart, and photos of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from mnv2_fast import MobileNetV2, data
from mnv2_fast.weights import Preprocessing

LABELS = ["red", "green", "blue", "white", "black"]
COLOURS = ((210, 50, 50), (50, 210, 50), (50, 50, 210), (210, 210, 210), (50, 50, 50))
PREPROCESSING = Preprocessing(32, 32)


def save_weights(path: Path, spread: float) -> str:
    """A weights file of a small network that tells the colours of `write_photos` apart.

    The larger `spread`, the farther its classes lie from each other.
    """
    torch.manual_seed(0)
    model = MobileNetV2(len(LABELS), width_mult=0.35)
    x = settle(model)
    with torch.no_grad():
        features = model.features(x).mean((2, 3))
        of_colours = (features[:5] + features[5:]) / 2
        apart = of_colours - of_colours.mean(0)
        model.classifier[1].weight.copy_(of_colours.mean(0) + spread * apart)
        model.classifier[1].bias.copy_(-spread * apart @ of_colours.mean(0))
    metadata = {"preprocessing": json.dumps(PREPROCESSING.to_dict()), "labels": json.dumps(LABELS)}
    save_file(model.state_dict(), path, metadata)
    return str(path)


@torch.no_grad()
def settle(model: MobileNetV2) -> torch.Tensor:
    """Fit the batch norms of a model to photos, two of each colour, and put it in eval mode; the photos."""
    x = data.normalize(torch.from_numpy(np.stack([picture(i) for i in range(10)])), PREPROCESSING)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.constant_(norm.bias, 1.0)  # few values in ReLU6's bends: small errors stay small
        norm.momentum = None
    model.train()(x)
    model.eval()
    return x


def picture(i: int) -> np.ndarray:
    """A photo of colour i % 5, with some noise: uint8 [32, 32, 3]."""
    noise = np.random.default_rng(i).integers(-40, 41, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    return (np.array(COLOURS[i % 5]) + noise).clip(0, 255).astype(np.uint8)

"""What several test modules build their models with."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


@torch.no_grad()
def calibrate(model: Net, size: tuple[int, int] = (64, 64)) -> Net:
    """`model` in eval mode, with batch norms that carry the signal through, as in a trained network."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.momentum = 1.0
    model.train()(torch.randn(4, 3, *size))
    for norm in norms:
        norm.momentum = 0.1
        norm.running_var.clamp_(min=1e-3)
    return model.eval()

"""How near to float64 the tests of training kernels ask for, and the maps that they run on."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
BF16 = 2.0**-8  # a rounding is at most half of it; a tensor has two or three, of operands and of itself
SIZES = ((1, 1), (2, 7), (7, 2), (8, 15), (15, 16))


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in L2."""
    return float((a.double() - b).norm() / b.norm()) if b.any() else float(a.double().norm())

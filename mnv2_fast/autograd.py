"""Gradients of what the kernels compute: the call is recomputed in plain torch, which is differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import packs
from .backends import eager

_TWICE = (
    "the fast forward of mnv2_fast has no double backward (create_graph=True): "
    "use MobileNetV2(backend='eager') or set MNV2_BACKEND=eager"
)


def gradients(
    grad: Tensor, tensors: Sequence[Tensor | None], needed: Sequence[bool], op: str, rest: Sequence[Any]
) -> list[Tensor]:
    """Gradients of one operator, by way of its eager function.

    Args:
        grad: of the result.
        tensors: the operator's tensors, in the order of its schema, a list among them flattened.
        needed: for each, whether its gradient is asked for.
        op: the operator's name.
        rest: its other arguments.

    Returns:
        The gradients asked for, in order.
    """
    leaves = [
        t.detach().requires_grad_(need) if t is not None else None
        for t, need in zip(tensors, needed, strict=True)
    ]
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
    with torch.enable_grad():
        if op == "network":
            y = eager.network(leaves[0], leaves[1:], *rest)  # type: ignore[arg-type]
        else:
            y = getattr(eager, op)(*leaves, *rest)
    found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


class ChainFunction(torch.autograd.Function):
    """A packed chain within autograd: saves the input and the raw tensors, nothing in between."""

    @staticmethod
    def forward(ctx: Any, pack: packs.Pack, x: Tensor, *tensors: Tensor) -> Tensor:
        """The pack's answer; `tensors` are the chain's, in its order, so that autograd sees them."""
        ctx.chain = pack.chain
        ctx.save_for_backward(x, *tensors)
        return pack.run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what asked for one."""
        if torch.is_grad_enabled():
            raise RuntimeError(_TWICE)
        needed = ctx.needs_input_grad[1:]
        found = iter(gradients(grad, ctx.saved_tensors, needed, "network", (ctx.chain.encode(),)))
        return None, *(next(found) if need else None for need in needed)

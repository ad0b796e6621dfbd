"""Gradients of what the kernels compute: the call is computed again within autograd, which differentiates it.

An operator's is in plain torch, that of a module's chain as `training` does it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import ops
from .backends import eager
from .ops import Op

TWICE = (
    "the fast forward of mnv2_fast has no double backward (create_graph=True): "
    "use MobileNetV2(backend='eager') or set MNV2_BACKEND=eager"
)


def gradients(
    grad: Tensor,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    compute: Callable[[list[Any]], Tensor],
    *,
    autocast: torch.dtype | None = None,
) -> list[Tensor]:
    """Gradients of what was computed, by computing it again within autograd.

    Args:
        grad: of the result.
        tensors: what it was computed of.
        needed: for each, whether its gradient is asked for.
        compute: gives the result for tensors in their places.
        autocast: recompute under autocast to it, as the call ran; None: without.

    Returns:
        The gradients asked for, in order.
    """
    leaves = [
        t.detach().requires_grad_(need) if t is not None else None
        for t, need in zip(tensors, needed, strict=True)
    ]
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need and leaf is not None]
    device = grad.device.type
    # Whatever surrounds the backward pass.
    surroundings = torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False)
    with torch.enable_grad(), surroundings:
        y = compute(leaves)
        found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def _by_eager(op: str, rest: Sequence[Any], tensors: list[Any]) -> Tensor:
    """An operator's eager function.

    Args:
        op: its name.
        rest: its arguments that are no tensors.
        tensors: the others, in the order of its schema, a list among them flattened.
    """
    if op == "network":
        return eager.network(tensors[0], tensors[1:], rest[0])
    y: Tensor = getattr(eager, op)(*tensors, *rest)
    return y


def flat(op: Op, inputs: Sequence[Any]) -> tuple[list[Tensor | None], list[Any]]:
    """A call's tensors in the order of its schema, a list among them flattened, and its other arguments."""
    tensors: list[Tensor | None] = []
    rest = []
    for kind, value in zip(op.kinds, inputs, strict=True):
        if kind == "tensors":
            tensors += value
        elif kind == "tensor":
            tensors.append(value)
        else:
            rest.append(value)
    return tensors, rest


def _register(op: Op) -> None:
    """Make one operator differentiable, by way of `mnv2::gradients`."""

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        tensors, ctx.rest = flat(op, inputs)
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        needed = [
            need and t is not None for need, t in zip(flat(op, ctx.needs_input_grad)[0], saved, strict=True)
        ]
        found = iter(torch.ops.mnv2.gradients(grad, saved, needed, op.name, json.dumps(ctx.rest)))
        asked = iter([next(found) if need else None for need in needed])
        lists = len(saved) - op.kinds.count("tensor")
        return tuple(
            [next(asked) for _ in range(lists)]
            if kind == "tensors"
            else next(asked)
            if kind == "tensor"
            else None
            for kind in op.kinds
        )

    torch.library.register_autograd(
        f"mnv2::{op.name}", backward, setup_context=setup_context, lib=ops.library
    )


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd on within an operator, where the dispatcher has it off."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with (
        torch._C._SetExcludeDispatchKeyGuard(keys[0], False),
        torch._C._SetExcludeDispatchKeyGuard(keys[1], False),
    ):
        yield


def _gradients(
    grad: Tensor, tensors: list[Tensor | None], needed: list[bool], op: str, rest: str
) -> list[Tensor]:
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need and t is not None]
    with _recording():
        found = gradients(grad, tensors, needed, functools.partial(_by_eager, op, json.loads(rest)))
    # Strides as the fake promises them, and memory of their own.
    return [torch.empty_like(t).copy_(g) for t, g in zip(wanted, found, strict=True)]


def _gradients_fake(
    grad: Tensor, tensors: list[Tensor | None], needed: list[bool], op: str, rest: str
) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(tensors, needed, strict=True) if need and t is not None]


def _refuse(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(TWICE)


def _register_all() -> None:
    schema = "(Tensor grad, Tensor?[] tensors, bool[] needed, str op, str rest) -> Tensor[]"
    ops.library.define("gradients" + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        ops.library.impl("gradients", _gradients, key)
    torch.library.register_fake("mnv2::gradients", _gradients_fake, lib=ops.library)
    torch.library.register_autograd("mnv2::gradients", _refuse, lib=ops.library)
    for op in ops.OPS:
        _register(op)


_register_all()

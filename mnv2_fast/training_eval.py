"""A packed chain within autograd: a whole network in eval mode whose gradients may be asked for.

Most such calls never ask. So nothing is kept but the input and the raw tensors, and the backward pass
computes the chain again, on the training kernels with the norms as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import packs, training, training_head
from .autograd import TWICE, gradients
from .backends import eager
from .chain import Chain, Link
from .training import FrozenNorm, TrainLayer


class ChainFunction(torch.autograd.Function):
    """A packed chain within autograd: saves the input and the raw tensors, nothing in between."""

    @staticmethod
    def forward(  # noqa: PLR0917 (autograd passes no names)
        ctx: Any,
        pack: packs.Pack,
        trains: bool,
        tensors: Sequence[Tensor],
        asked: Sequence[bool],
        x: Tensor,
        *_: Tensor,
    ) -> Tensor:
        """The pack's answer.

        Args:
            ctx: autograd's.
            pack: of the chain.
            trains: the training kernels make the gradients; plain torch otherwise.
            tensors: the chain's, in its order.
            asked: for each, whether it requires a gradient.
            x: the input.
            *_: the tensors that do, once more, so that autograd sees them (and only them: it takes time).
        """
        ctx.chain, ctx.trains, ctx.asked, ctx.autocast = pack.chain, trains, asked, pack.autocast
        ctx.save_for_backward(x, *tensors)
        return pack.run(x).data  # no view, as in `training.ChainTraining`

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what asked for one."""
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        _, _, _, _, for_x, *of_asked = ctx.needs_input_grad
        rest = iter(of_asked)
        needed = [for_x, *(asked and next(rest) for asked in ctx.asked)]
        compute = functools.partial(_compute, ctx.chain, ctx.trains)
        found = iter(gradients(grad, ctx.saved_tensors, needed, compute, autocast=ctx.autocast))
        return None, None, None, None, *(next(found) if need else None for need in (for_x, *of_asked))


def _compute(chain: Chain, trains: bool, tensors: list[Any]) -> Tensor:
    """A chain's answer within autograd: by the training kernels where they know all of it, or by plain torch.

    Args:
        chain: in eval mode.
        trains: there are training kernels.
        tensors: the input, then the chain's, in its order.
    """
    x, *held = tensors
    links = list(zip(chain.links, chain.split(held), strict=True))
    serves = trains and x.shape[0] > 0 and training.limit(x, chain.specs) is None
    if not serves or not all(map(_is_frozen, links)):
        return eager.network(x, held, chain.encode())
    for begin, end, residual in training.segments([spec for spec in chain.specs if spec.kind != "linear"]):
        layers: list[TrainLayer] = []
        of_layers: list[Tensor | None] = []
        for link, own in links[begin:end]:
            norm = FrozenNorm(own["running_mean"], own["running_var"], link.eps)
            layers.append(TrainLayer(link.spec, norm))
            of_layers += [own["weight"], own.get("norm_weight"), own.get("norm_bias")]
        x = training.run(x, layers, of_layers, residual)
    last, own = links[-1]
    if last.spec.kind == "linear":
        return training_head.run(x, own["weight"], own.get("bias"))
    return x.mean((2, 3)) if chain.pool else x


def _is_frozen(link: tuple[Link, dict[str, Tensor]]) -> bool:
    """Whether a layer is a float32 one with a norm, whose statistics want no gradient, or the linear one."""
    of, own = link
    stats = (own[name] for name in ("running_mean", "running_var") if name in own)
    if any(t.dtype is not torch.float32 for t in own.values()) or any(t.requires_grad for t in stats):
        return False
    return of.spec.kind == "linear" or (of.norm and not of.bias)

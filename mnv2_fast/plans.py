"""What a module remembers between calls, and how a call runs on it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import env, training
from .autograd import TWICE, gradients
from .backends import chains, eager
from .packs import ModuleWatch, Pack, TensorWatch
from .reading import Declined

requires_grad = operator.attrgetter("requires_grad")


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y, which is in channels_last, in the memory format of the input."""
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


# What a plan is for: the dtype of autocast, whether the call `is_cut`, what `Kernels.settings` gave.
Kind = tuple[torch.dtype | None, bool, Hashable]


@dataclass(frozen=True)
class Plan:
    """What a module remembers between calls. Immutable; replaced whole."""

    modules: ModuleWatch
    watch: TensorWatch
    tensors: tuple[Tensor, ...]  # the chain's, in its order
    pack: Pack
    rest: nn.Module | None = None  # runs in torch after the chain

    def changed(self, root: nn.Module) -> bool:
        """Whether the module, or a tensor that was read, is another since."""
        return bool(self.modules.changed(root) or self.watch.changed(self.modules.tensors))

    def decline_input(self, x: Tensor) -> None:
        """Look whether an input fits the chain.

        Raises:
            Declined: it does not, or torch's answer would be of another dtype than the kernels', or some of
                them run in plain torch, which `MNV2_STRICT` forbids.
        """
        links = self.pack.chain.links
        if x.device != self.pack.device:
            raise Declined(f"the input is on {x.device}, the weights are on {self.pack.device}")
        if x.shape[1] != links[0].spec.cin:
            raise Declined(f"the input has {x.shape[1]} channels, not {links[0].spec.cin}")
        held = self.tensors[0].dtype
        cast = self.pack.autocast
        if cast is None and x.dtype is not held:
            raise Declined(f"the input is {x.dtype}, the weights are {held}")
        if cast is not None and x.dtype is not cast and links[-1].spec.residual == len(links) - 1 > 0:
            raise Declined(f"autocast adds a {_word(x.dtype)} input to a {_word(cast)} answer")
        if self.pack.in_torch and env.strict():
            raise Declined("; ".join(self.pack.in_torch.values()))

    def run(self, x: Tensor) -> Tensor:
        """The module's answer for an input that `decline_input` has let pass, in x's memory format."""
        y = self._within_autograd(x)
        if y.dim() == 4:
            y = in_format_of(x, y)
        return y if self.rest is None else self.rest(y)

    def _within_autograd(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            asked = list(map(requires_grad, self.tensors))
            if x.requires_grad or any(asked):
                of_asked = itertools.compress(self.tensors, asked)
                trains = chains.KERNELS[x.device.type].trains
                function = training.ChainFunction if trains else PlainChainFunction
                y: Tensor = function.apply(self.pack, self.tensors, asked, x, *of_asked)
                return y
        return self.pack.run(x)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PlainChainFunction(training.ChainFunction):
    """The same where there are no training kernels: its backward computes the chain again in plain torch."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what asked for one."""
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        _, _, _, for_x, *of_asked = ctx.needs_input_grad
        rest, spec = iter(of_asked), ctx.chain.encode()
        needed = [for_x, *(asked and next(rest) for asked in ctx.asked)]

        def compute(tensors: list[Any]) -> Tensor:
            return eager.network(tensors[0], tensors[1:], spec)

        found = iter(gradients(grad, ctx.saved_tensors, needed, compute, autocast=ctx.autocast))
        return None, None, None, *(next(found) if need else None for need in (for_x, *of_asked))


@dataclass(frozen=True)
class TrainPlan:
    """What a module remembers between training steps: a `Plan` without the values of the weights.

    To look at the modules of a network takes 0.5 ms of a step so, to read them anew 5 ms, or 9 where a step's
    tensors have emptied the caches.
    """

    modules: ModuleWatch
    forms: list[tuple[object, ...]]
    chain: training.TrainChain

    def changed(self, root: nn.Module) -> bool:
        """Whether the chain must be read again."""
        return self.modules.changed(root) is not None or forms(self.modules.tensors) != self.forms


def forms(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """All but the values: `Tensor.data` may be set to another memory, and a memory may get another size."""
    return [(t.dtype, t.shape, t.stride(), t.data_ptr(), t.untyped_storage().nbytes()) for t in tensors]

"""What a module remembers between calls, and how a call runs on it."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import env, training, training_eval
from .packs import HOOKS, Holder, ModuleWatch, Pack, TensorWatch
from .reading import Declined, Reading, word

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
    trains: bool  # the training kernels make its gradients
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
            raise Declined(f"autocast adds a {word(x.dtype)} input to a {word(cast)} answer")
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
                y: Tensor = training_eval.ChainFunction.apply(
                    self.pack, self.trains, self.tensors, asked, x, *of_asked
                )
                return y
        return self.pack.run(x)


@dataclass(frozen=True)
class TrainPlan:
    """What a module remembers between training steps: a `Plan` without the values of the weights.

    To look at the modules of a network takes 0.5 ms of a step so, to read them anew 5 ms, or 9 where a step's
    tensors have emptied the caches. So why there is no chain is remembered, too: a hook may stay for long.
    """

    modules: ModuleWatch
    forms: list[tuple[object, ...]]
    found: training.TrainChain | str  # or why there is none

    def changed(self, root: nn.Module) -> bool:
        """Whether the chain must be read again."""
        return self.modules.changed(root) is not None or forms(self.modules.tensors) != self.forms


def train_chain(root: nn.Module, holder: Holder, read: Callable[[], Reading]) -> training.TrainChain:
    """A module's layers for the training kernels, read anew where something changed since the last call.

    Raises:
        Declined: they have none for it.
    """
    plan: TrainPlan | None = holder.train
    if plan is None or plan.changed(root):
        plan = holder.train = _train_plan(root, read)
    if isinstance(plan.found, str):
        raise Declined(plan.found)
    return plan.found


def _train_plan(root: nn.Module, read: Callable[[], Reading]) -> TrainPlan:
    """What `train_chain` has read.

    Raises:
        Declined: there are no kernels, and it cannot be told when that changes.
    """
    found: training.TrainChain | str
    try:
        reading = read()
        found = training.read_chain(root, reading)
        watch = ModuleWatch(root, reading.modules)
    except Declined as reason:
        modules = [module for module in root.modules() if module is not root]  # any of them may be why
        if not all(map(_is_watchable, modules)):
            raise
        found, watch = str(reason), ModuleWatch(root, modules, hooked=True)
    return TrainPlan(watch, forms(watch.tensors), found)


def _is_watchable(module: nn.Module) -> bool:
    """Whether any module is one that `ModuleWatch` and `forms` can look at: a scripted one is not."""
    state, slots = module.__dict__, ("_parameters", "_buffers", "_modules")
    if "training" not in state or not all(isinstance(state.get(name), dict) for name in (*HOOKS, *slots)):
        return False
    tensors = [*state["_parameters"].values(), *state["_buffers"].values()]
    return all(
        t is None or (type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided) for t in tensors
    )


def forms(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """All but the values: `Tensor.data` may be set to another memory, and a memory may get another size."""
    return [(t.dtype, t.shape, t.stride(), t.data_ptr(), t.untyped_storage().nbytes()) for t in tensors]

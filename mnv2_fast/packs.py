"""Packed weights that are never stale.

A pack is made from tensors that anybody may change at any time, in ways that torch does not always record:
fused optimizers move neither `_version` nor `data_ptr`, a train-mode batch norm raises the version of its
counter only, `.data` and numpy write unseen, `functional_call` reuses addresses. So a pack remembers what it
read, and serves only while, for every tensor, the object, dtype, shape, strides, address, version and a few
values are unchanged, and no optimizer has stepped. It keeps an alias of each, so that no address is given to
another tensor while the pack lives.

Not seen: a write through `.data` or numpy that leaves every sampled value as it was. `refresh()` of the
module is the cure.
"""

from __future__ import annotations

import importlib
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .backends import cpu
from .chain import Chain

_SAMPLES = 3  # values remembered of each tensor: the first, the middle one, the last

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Kind:
    """What the answer of a module of one class depends on: dicts of its slots, and attributes."""

    slots: tuple[str, ...]
    settings: tuple[str, ...] = ()


_KINDS: dict[type, _Kind] = {
    nn.Conv2d: _Kind(("_parameters",), ("stride", "padding", "dilation", "groups", "padding_mode")),
    nn.BatchNorm2d: _Kind(("_parameters", "_buffers"), ("eps", "track_running_stats")),
    nn.Linear: _Kind(("_parameters",)),
    nn.ReLU6: _Kind((), ("min_val", "max_val")),
    nn.Dropout: _Kind(()),
}


def _kind(cls: type) -> _Kind:
    """The row of a class; one of ours, which holds modules, names its attributes in `watched`."""
    return _KINDS.get(cls) or _Kind(("_modules",), getattr(cls, "watched", ()))


_version = operator.attrgetter("_version")
_geometry = operator.attrgetter("dtype", "shape", "layout")
_forward = operator.attrgetter("forward")

_steps = 0  # of every optimizer in this process


@torch.compiler.disable(recursive=False)
def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _sample_addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Addresses of a few elements of each tensor, four bytes to be read at each."""
    addresses = []
    for t in tensors:
        last = t.numel() - 1
        for at in {last * i // (_SAMPLES - 1) for i in range(_SAMPLES)} if last >= 0 else ():
            index, offset = at, 0
            for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
                index, position = divmod(index, size)
                offset += position * stride
            addresses.append(t.data_ptr() + offset * t.element_size())
    return addresses


def _geometry_guard(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """torch.compile's own check of dtypes, shapes and strides: a fifth of the time, but no public interface.

    It says no to more than what matters here (`requires_grad`, inference mode), so that only its yes counts.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) else None
    except (ImportError, TypeError, RuntimeError):
        return None


class TensorWatch:
    """Remembers tensors on the CPU and tells whether any has changed since. Keeps an alias of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._steps = _steps
        self.aliases = [t.detach() for t in tensors]
        self._versioned = [not t.is_inference() for t in tensors]
        self._versions = self._read_versions(tensors)
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._meta = list(map(_geometry, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self._guard = _geometry_guard(tensors)
        self._sampled_at = np.array(_sample_addresses(self.aliases), dtype=np.uint64)
        self._gather = importlib.import_module("mnv2_fast._C").gather_f32
        self._values = self._read_values()

    def _read_values(self) -> bytes:
        out = np.empty(self._sampled_at.size, dtype=np.float32)
        self._gather(self._sampled_at, out)
        return out.tobytes()

    def _same_geometry(self, tensors: Sequence[Tensor]) -> bool:
        if self._guard is not None and self._guard(*tensors):
            return True
        if list(map(_geometry, tensors)) != self._meta or list(map(Tensor.stride, tensors)) != self._strides:
            return False
        self._guard = _geometry_guard(tensors)  # another mode than the last call's
        return True

    def _read_versions(self, tensors: Sequence[Tensor]) -> list[int] | None:
        try:
            return list(map(_version, itertools.compress(tensors, self._versioned)))
        except RuntimeError:  # one has become an inference tensor, which has no version
            return None

    def changed(self, tensors: Sequence[Tensor]) -> str | None:
        """What changed, or None: `tensors` are those the watch was made of or stand for them, one by one.

        The tensors' classes are the caller's to check.
        """
        if self._steps != _steps:
            return "an optimizer stepped"
        if list(map(Tensor.data_ptr, tensors)) != self._addresses:
            return "a tensor's memory is another"
        if self._read_versions(tensors) != self._versions:
            return "a tensor was written"
        if not self._same_geometry(tensors):
            return "a tensor's dtype, shape or strides are others"
        if self._read_values() != self._values:
            return "a tensor's values are others"
        return None


class ModuleWatch:
    """Remembers the modules below a root: which they are, their hooks, mode and settings, and what lies in
    their slots.

    The root itself is handed over at each look, so that the watch, which the root owns, does not keep it
    alive. The root's own hooks run around its forward and are none of the watch's business.
    """

    def __init__(self, root: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._read_root = operator.itemgetter("training", "_modules", *_kind(type(root)).settings)
        self._root = self._read_root(root.__dict__)[2:]
        self._modules = list(modules)
        self._dicts = [module.__dict__ for module in self._modules]
        self._types = list(map(type, self._modules))
        self._sizes = list(map(len, self._dicts))
        # By class, so that what is read of its modules is read without Python in between.
        groups = [
            (cls, [d for d, kind in zip(self._dicts, self._types, strict=True) if kind is cls])
            for cls in dict.fromkeys(self._types)
        ]
        self._slots = [
            (operator.itemgetter(slot), dicts) for cls, dicts in groups for slot in _kind(cls).slots
        ]
        self._readers = [
            (operator.itemgetter(*HOOKS, "training", *_kind(cls).settings), dicts) for cls, dicts in groups
        ]
        self._facts = self._read_facts()
        self._hooks = [hooks for facts in self._facts for hooks in facts[: len(HOOKS)]]
        self._forwards = [(cls, _forward(cls)) for cls in set(self._types)]
        self._contents = self._read_contents(root._modules)
        self.tensors = [value for value in self._contents if isinstance(value, Tensor)]

    def _read_facts(self) -> list[tuple[Any, ...]]:
        return list(itertools.chain.from_iterable(map(read, dicts) for read, dicts in self._readers))

    def _read_contents(self, children: dict[str, nn.Module | None]) -> list[Any]:
        slots = itertools.chain.from_iterable(map(read, dicts) for read, dicts in self._slots)
        return [*children.values(), *itertools.chain.from_iterable(map(dict.values, slots))]

    def changed(self, root: nn.Module) -> str | None:
        """What changed, or None."""
        training, children, *settings = self._read_root(root.__dict__)
        if training or tuple(settings) != self._root:
            return "the module's mode or a setting is another"
        contents = self._read_contents(children)
        if len(contents) != len(self._contents) or not all(map(operator.is_, contents, self._contents)):
            return "a module or a tensor was replaced"
        if any(self._hooks) or self._read_facts() != self._facts:
            return "a hook, a mode or a setting is another"
        if list(map(type, self._modules)) != self._types or list(map(len, self._dicts)) != self._sizes:
            return "a module's class or attributes are others"
        if any(_forward(cls) is not forward for cls, forward in self._forwards):
            return "a class's forward was replaced"
        return None


class Pack:
    """A chain with its weights folded and packed for the CPU kernels. Immutable."""

    def __init__(self, chain: Chain, tensors: Sequence[Tensor]) -> None:
        self.chain = chain
        self._network = cpu.Network(chain.specs, chain.fold(tensors), pool=chain.pooled)

    def run(self, x: Tensor) -> Tensor:
        """The chain's answer for float32 [N, C, H, W] on the CPU."""
        return self._network.run(x)


class Holder:
    """Where a module keeps its pack. Pickle, deepcopy and `torch.save` find it empty.

    `value` is read once and replaced whole: a call that runs keeps what it read.
    """

    alive: ClassVar[weakref.WeakValueDictionary[int, Holder]] = weakref.WeakValueDictionary()
    _numbers = itertools.count(1)
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.value: Any = None  # the owner's
        self.compiled: tuple[str, TensorWatch, Pack] | None = None
        with Holder._lock:
            self.number = next(Holder._numbers)
            Holder.alive[self.number] = self

    def __reduce__(self) -> tuple[type[Holder], tuple[()]]:
        return Holder, ()

    def clear(self) -> None:
        """Forget every pack; the next call makes another."""
        self.value = self.compiled = None


def lookup(spec: str, tensors: Sequence[Tensor]) -> Pack:
    """The pack of an operator's call that knows its tensors only by what they hold.

    Args:
        spec: `Chain.encode()`; the pack is kept between calls in the holder it names, while that is there.
        tensors: in the chain's order; the holder's last ones, perhaps as other objects on the same memory.
    """
    chain = Chain.decode(spec)
    holder = Holder.alive.get(chain.holder)
    if holder is None:
        return Pack(chain, tensors)
    kept = holder.compiled
    if kept is None or kept[0] != spec or kept[1].changed(tensors) is not None:
        watch = TensorWatch(tensors)
        kept = holder.compiled = spec, watch, Pack(chain, tensors)
    return kept[2]

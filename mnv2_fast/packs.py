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

import ctypes
import importlib
import itertools
import operator
import threading
import types
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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


def _c() -> types.ModuleType:
    """The extension: there is no pack without it."""
    return importlib.import_module("mnv2_fast._C")


_forward = operator.attrgetter("forward")

_steps = 0  # of every optimizer in this process


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# As torch.compiler.disable would mark it, without the second that importing torch._dynamo takes.
_count_step._torchdynamo_disable = True  # type: ignore[attr-defined]


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


def _describe(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What the extension's `TensorTable` compares, in Python: ten times slower, and for any tensor."""
    return [
        (t.data_ptr(), t.dtype, t.layout, t.shape, t.stride(), None if t.is_inference() else t._version)
        for t in tensors
    ]


class TensorWatch:
    """Remembers tensors on the CPU and tells whether any has changed since. Keeps an alias of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._steps = _steps
        self.aliases = [t.detach() for t in tensors]
        self._originals = list(tensors)  # the table reads them: they must live
        self._described = _describe(tensors)
        self._sampled_at = _sample_addresses(self.aliases)
        self._values = self._read_values()
        try:
            self._table = _c().TensorTable(list(tensors), self._sampled_at)
        except (RuntimeError, ValueError):  # this torch hides them, or a tensor has many dimensions
            self._table = None

    def _read_values(self) -> list[bytes]:
        return [ctypes.string_at(address, 4) for address in self._sampled_at]

    def changed(self, tensors: list[Tensor]) -> str | None:
        """What changed, or None: `tensors` are those the watch was made of or stand for them, one by one.

        The tensors' classes are the caller's to check.
        """
        if self._steps != _steps:
            return "an optimizer stepped"
        if self._table is not None and self._table.unchanged(tensors):
            return None
        # Other objects may stand for the same memory, as `torch.compile` hands them over.
        if _describe(tensors) != self._described:
            return "a tensor was written, or its memory, dtype, shape or strides are others"
        return None if self._read_values() == self._values else "a tensor's values are others"


class ModuleWatch:
    """Remembers the modules below a root: which they are, their hooks, mode and settings, and what lies in
    their slots.

    The root itself is handed over at each look, so that the watch, which the root owns, does not keep it
    alive. The root's own hooks run around its forward and are none of the watch's business.
    """

    def __init__(self, root: nn.Module, modules: Sequence[nn.Module]) -> None:
        self._read_root = operator.itemgetter("training", *_kind(type(root)).settings)
        self._root = self._read_root(root.__dict__)
        self._children = root._modules
        self._entries: list[tuple[dict[str, Any], str, Any]] = []  # keep what the extension only points to
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._classes = [(module, type(module)) for module in modules]
        self.tensors: list[Tensor] = []
        self._look_into(self._children)
        for module in modules:
            values, kind = module.__dict__, _kind(type(module))
            self._sizes.append((values, len(values)))
            self._sizes += [(values[name], 0) for name in HOOKS]
            for name in (*HOOKS, "training", *kind.settings, *kind.slots):
                self._entries.append((values, name, values[name]))
            for slot in kind.slots:
                self._look_into(values[slot])
        self._watch = _c().Watch(self._entries, self._sizes, self._classes)
        self._forwards = [(cls, _forward(cls)) for cls in {type(module) for module in modules}]

    def _look_into(self, slot: dict[str, Any]) -> None:
        self._sizes.append((slot, len(slot)))
        for name, value in slot.items():
            self._entries.append((slot, name, value))
            if isinstance(value, Tensor):
                self.tensors.append(value)

    def changed(self, root: nn.Module) -> str | None:
        """What changed, or None."""
        if self._read_root(root.__dict__) != self._root:
            return "the module's mode or a setting is another"
        if root._modules is not self._children or not self._watch.unchanged():
            return "a module or a tensor was replaced, or a hook, a mode or a setting is another"
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
    if kept is None or kept[0] != spec or kept[1].changed(list(tensors)) is not None:
        watch = TensorWatch(tensors)
        kept = holder.compiled = spec, watch, Pack(chain, tensors)
    return kept[2]

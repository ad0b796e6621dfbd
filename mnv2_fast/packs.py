"""Packed weights that are never stale.

A pack is made from tensors that anybody may change at any time, in ways that torch does not always record:
fused optimizers move neither `_version` nor `data_ptr`, a train-mode batch norm raises the version of its
counter only, `.data` and numpy write unseen, `functional_call` reuses addresses. So a pack remembers what it
read, and serves only while, for every tensor, the object, dtype, shape, strides, address, version and a few
values are unchanged, and no optimizer has stepped on its memory. It keeps an alias of each, so that no
address is given to another tensor while the pack lives.

Not seen, where every sampled value stays as it was: a write through `.data` or numpy, a fused kernel that no
Optimizer runs (`torch._fused_sgd_` called by hand) or that one of your own runs on a frozen parameter or on
memory that another storage has, too (dlpack, numpy), a write by another process to shared memory. Nor is a
method of torch put on a module in the place of one of torch's own attributes, deleted before it.

On a GPU no value is sampled: to read one is to wait for the GPU. What is left, objects, addresses, strides,
versions and optimizer steps, sees whatever torch's operators write in place, `load_state_dict`, optimizers
(fused ones, too) and batch norms in train mode. Not seen there is any write through `.data`, by a kernel of
your own, through dlpack, or by the replay of a CUDA graph that has your optimizer step in it. (Another tensor
as `.data` is seen.) Parameters made in inference mode have no version: no pack is made of such there.

`refresh()` of the module is the cure.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import operator
import threading
import types
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import env
from .backends import chains
from .chain import Chain

_ANY = -1  # in the place of a storage's address: it may be any
_MOST_STEPPED = 10_000
_SAMPLES = 3  # values remembered of each tensor: the first, the middle one, the last

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What a module runs, where its class has it; the same name in its __dict__ takes its place.
METHODS = ("forward", "_call_impl", "_conv_forward", "_check_input_dim")

# Attributes that torch gives its modules and nobody deletes.
_TORCHS_OWN = {
    *nn.Module().__dict__,
    "_reversed_padding_repeated_twice",
    "num_features",
    "momentum",
    "affine",
}
_TORCHS_OWN |= {"in_channels", "out_channels", "kernel_size", "transposed", "output_padding", "inplace", "p"}
_TORCHS_OWN |= {"in_features", "out_features"}


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


def methods_of(cls: type) -> tuple[object, ...]:
    """What the class runs now: another one in its place changes the answer of every module of the class."""
    return tuple([getattr(cls, name, None) for name in METHODS])


_steps = 0  # of every optimizer in this process
_step_lock = threading.Lock()
_stepped: dict[int, int] = {}  # address of a storage -> the last step that may have written to it


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Take note of what a step may have moved: torch's optimizers leave alone what has no gradient."""
    global _steps
    with _step_lock:
        step = _steps + 1
        if len(_stepped) > _MOST_STEPPED:  # mostly of tensors that are dead
            _stepped[_ANY] = step
            for storage in list(_stepped):
                if storage != _ANY:
                    del _stepped[storage]
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad or p.grad is not None:
                    _stepped[_storage(p)] = step
        _steps = step  # last: who sees it sees what it wrote to


def _storage(t: Tensor) -> int:
    """The address of a tensor's memory, which others may share."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or a subclass without memory
        return _ANY


# As torch.compiler.disable would mark it, without the second that importing torch._dynamo takes.
_count_step._torchdynamo_disable = True  # type: ignore[attr-defined]


register_optimizer_step_post_hook(_count_step)


def within_storage(t: Tensor) -> bool:
    """Whether the memory of a strided tensor holds all its elements; a storage can be resized to nothing."""
    if t.numel() == 0:
        return True
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (t.storage_offset() + last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def _has_samples(t: Tensor) -> bool:
    """Whether the memory of its elements may be read."""
    kernels = chains.KERNELS.get(t.device.type)
    if kernels is None or not kernels.samples:
        return False
    plain = t.layout is torch.strided and t.element_size() >= 2
    try:
        return plain and t.data_ptr() != 0 and within_storage(t)
    except RuntimeError:  # a subclass without memory
        return False


def _sample_addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Addresses of a few elements of each tensor, four bytes to be read at each."""
    addresses = []
    for t in filter(_has_samples, tensors):
        last, start = t.numel() - 1, t.untyped_storage().data_ptr()
        end = start + t.untyped_storage().nbytes()
        for at in {last * i // (_SAMPLES - 1) for i in range(_SAMPLES)} if last >= 0 else ():
            index, offset = at, 0
            for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
                index, position = divmod(index, size)
                offset += position * stride
            address = t.data_ptr() + offset * t.element_size()
            # Where the last two bytes of the storage are an element, the four that end with it.
            if end - start >= 4:
                addresses.append(min(address, end - 4))
    return addresses


def _describe(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """What the extension's `TensorTable` compares, in Python: ten times slower, and for any tensor."""
    rows: list[tuple[Any, ...]] = []
    for t in tensors:
        row = (t.dtype, t.layout, t.shape, None if t.is_inference() else t._version)
        try:
            rows.append((*row, t.data_ptr(), t.stride()))
        except RuntimeError:  # sparse, or a subclass without memory
            rows.append(row)
    return rows


class TensorWatch:
    """Remembers tensors and tells whether any has changed since. Keeps an alias of each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._steps = _steps
        self._storages = {_ANY, *map(_storage, tensors)}
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
        now = _steps
        if self._steps != now:
            if any(_stepped.get(storage, 0) > self._steps for storage in self._storages):
                return "an optimizer stepped"
            self._steps = now
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

    Args:
        root: whose children they are.
        modules: all of them that matter.
        hooked: they may have hooks now, where without it any hook is a change.
    """

    def __init__(self, root: nn.Module, modules: Sequence[nn.Module], *, hooked: bool = False) -> None:
        self._class = type(root)
        self._read_root = operator.itemgetter("training", *_kind(type(root)).settings)
        self._root = self._read_root(root.__dict__)
        self._children = root._modules
        self._entries: list[tuple[dict[str, Any], str, Any]] = []  # keep what the extension only points to
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._classes = [(module, type(module)) for module in modules]
        self.tensors: list[Tensor] = []
        self._look_into(self._children)
        self._containers: list[dict[str, Any]] = []
        for module in modules:
            values, kind = module.__dict__, _kind(type(module))
            self._sizes.append((values, len(values)))
            self._sizes += [(values[name], len(values[name]) if hooked else 0) for name in HOOKS]
            # Others' attributes too: with the sizes they tell whether another, a forward say, came for one.
            for name in {*HOOKS, "training", *kind.slots, *(values.keys() - _TORCHS_OWN)}:
                self._entries.append((values, name, values[name]))
            for slot in kind.slots:
                self._look_into(values[slot])
            if "_modules" in kind.slots:
                self._containers.append(values["_modules"])
        self._watch = _c().Watch(self._entries, self._sizes, self._classes)
        self._order = self._read_order()
        self._methods = [(cls, methods_of(cls)) for cls in {type(module) for module in modules}]

    def _read_order(self) -> list[str]:
        return list(itertools.chain.from_iterable(self._containers))

    def _look_into(self, slot: dict[str, Any]) -> None:
        self._sizes.append((slot, len(slot)))
        for name, value in slot.items():
            self._entries.append((slot, name, value))
            if isinstance(value, Tensor):
                self.tensors.append(value)

    def changed(self, root: nn.Module) -> str | None:
        """What changed, or None."""
        if type(root) is not self._class or self._read_root(root.__dict__) != self._root:
            return "the module's class, mode or a setting is another"
        if root._modules is not self._children or not self._watch.unchanged():
            return "a module or a tensor was replaced, or a hook, a mode or a setting is another"
        if self._read_order() != self._order:
            return "modules stand in another order"
        if any(methods_of(cls) != methods for cls, methods in self._methods):
            return "a class's forward was replaced"
        return None


class Pack:
    """A chain with its weights folded and packed for the kernels of its tensors' device. Immutable.

    Its answers are of the tensors' `dtype`, or of that which it is made for calls under `autocast` to.
    `settings` are what `Kernels.settings` gave.
    """

    def __init__(
        self,
        chain: Chain,
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
        *,
        autocast: torch.dtype | None = None,
        settings: Hashable = None,
    ) -> None:
        self.chain, self.autocast, self.device = chain, autocast, tensors[0].device
        self._dtype = autocast or dtype
        make = chains.KERNELS[self.device.type].network
        self._network = make(chain, tensors, self._dtype, settings)

    @property
    def in_torch(self) -> Mapping[str, str]:
        """Operators that run in plain torch, and why."""
        return self._network.in_torch

    def run(self, x: Tensor) -> Tensor:
        """The chain's answer for [N, C, H, W] of a dtype and on the device of the kernels."""
        return self._network.run(x).to(self._dtype)


class Holder:
    """Where a module keeps its pack. Pickle, deepcopy and `torch.save` find it empty.

    `value` is read once and replaced whole: a call that runs keeps what it read.
    """

    alive: ClassVar[weakref.WeakValueDictionary[int, Holder]] = weakref.WeakValueDictionary()
    _numbers = itertools.count(1)
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.value: Any = None  # the owner's
        self.train: Any = None  # the owner's, for train mode
        self.compiled: tuple[Hashable, TensorWatch, Pack] | None = None
        with Holder._lock:
            self.number = next(Holder._numbers)
            Holder.alive[self.number] = self

    def __reduce__(self) -> tuple[type[Holder], tuple[()]]:
        return Holder, ()

    def clear(self) -> None:
        """Forget everything; the next call makes it again."""
        self.value = self.train = self.compiled = None


def lookup(spec: str, tensors: Sequence[Tensor]) -> Pack:
    """The pack of an operator's call that knows its tensors only by what they hold.

    Args:
        spec: `Chain.encode()`; the pack is kept between calls in the holder it names, while that is there.
        tensors: in the chain's order; the holder's last ones, perhaps as other objects on the same memory.
    """
    chain = Chain.decode(spec)
    holder = Holder.alive.get(chain.holder)
    settings = chains.KERNELS[tensors[0].device.type].settings(env.backend())
    if holder is None:
        return Pack(chain, tensors, tensors[0].dtype, settings=settings)
    kept, kind = holder.compiled, (spec, settings)
    if kept is None or kept[0] != kind or kept[1].changed(list(tensors)) is not None:
        watch = TensorWatch(tensors)
        kept = holder.compiled = kind, watch, Pack(chain, tensors, tensors[0].dtype, settings=settings)
    return kept[2]

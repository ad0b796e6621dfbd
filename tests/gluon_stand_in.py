"""Executes the source of a Gluon kernel by numpy, for there is no interpreter of Gluon.

It checks what indices, masks and halos do: shared memory begins as NaN, and no read or write may leave what
is allocated. What is asynchronous comes as late as it may: a copy when its group is waited for, until when
its target is NaN; a product of tensor cores when that is waited for, until when nobody may write what it
reads. Threads, layouts (but for padding), barriers and races it knows nothing of.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language import constexpr


class Array(np.ndarray):
    """A tensor in registers; what is one number in Gluon has a dimension of 1 here."""

    def __iadd__(self, other: Any) -> Array:  # type: ignore[override, misc]
        return self + other  # tensors in registers are values: who else holds this one keeps it

    def to(self, dtype: Any) -> Array:
        with np.errstate(over="ignore"):
            return self.astype(dtype)


def _array(values: Any) -> Array:
    return np.asarray(values).view(Array)


class Traffic:
    """Bytes read and written in memory: the unique addresses of each program, summed over programs."""

    def __init__(self) -> None:
        self.read = self.written = 0
        self._seen: dict[tuple[int, bool], list[np.ndarray]] = {}

    def note(self, memory: np.ndarray, at: np.ndarray, write: bool) -> None:
        self._seen.setdefault((id(memory), write), []).append(np.unique(at))

    def end_program(self, sizes: Mapping[int, int]) -> None:
        """`sizes`: bytes of an element, by the identity of its array."""
        for (owner, write), found in self._seen.items():
            count = len(np.unique(np.concatenate(found))) * sizes[owner]
            if write:
                self.written += count
            else:
                self.read += count
        self._seen.clear()


class Pointer:
    """A place in a flat array, or many."""

    def __init__(self, memory: np.ndarray, at: Any, traffic: Traffic) -> None:
        self.memory, self.at, self.traffic = memory, at, traffic
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + np.asarray(offset, np.int64), self.traffic)

    def places(self, mask: Any, write: bool) -> tuple[np.ndarray, np.ndarray]:
        at, wanted = np.broadcast_arrays(self.at, True if mask is None else mask)
        used = at[wanted]
        assert used.size == 0 or (used.min() >= 0 and used.max() < len(self.memory)), "outside of an array"
        self.traffic.note(self.memory, used, write)
        return at, wanted


@dataclass
class Copy:
    """A copy into shared memory that has been asked for."""

    memory: np.ndarray
    at: np.ndarray
    values: np.ndarray

    def arrive(self) -> None:
        self.memory[self.at] = self.values


@dataclass
class Product:
    """Sums that tensor cores are making: only another product, or the wait for them, may take them."""

    sums: Array


class Flight:
    """What a program has begun and not waited for: groups of copies, and what products read."""

    def __init__(self) -> None:
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []
        self.reading: list[tuple[np.ndarray, np.ndarray]] = []

    def copy(self, target: Shared, pointer: Pointer) -> None:
        values = _load(pointer)
        assert target.shape == values.shape
        target.store(np.full_like(values, np.nan))
        self.open.append(Copy(target.memory, target.places(), values))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, outstanding: int) -> None:
        """Let the oldest groups arrive until so many are outstanding."""
        while len(self.groups) > outstanding:
            for copy in self.groups.pop(0):
                copy.arrive()

    def product(self, a: Shared, b: Shared, sums: Array | Product, is_async: bool) -> Product:
        assert (a.shape[0] % 64, a.shape[1] % 16, b.shape[1] % 8) == (0, 0, 0)
        assert b.shape[1] <= 256, "tensor cores make 256 columns at most"
        assert is_async
        before = sums.sums if isinstance(sums, Product) else sums
        self.reading += [(view.memory, view.places()) for view in (a, b)]
        return Product(_array(a.load().astype(np.float32) @ b.load().astype(np.float32) + before))

    def wait_for_products(self, outstanding: int, products: Sequence[Product]) -> Any:
        assert outstanding == 0
        self.reading.clear()
        made = [product.sums for product in products]
        return made if len(made) > 1 else made[0]

    def check_write(self, memory: np.ndarray, at: np.ndarray) -> None:
        for read, places in self.reading:
            assert read is not memory or not np.isin(at, places).any(), (
                "a product still reads what is written"
            )

    def end(self) -> None:
        begun = [*self.open, *self.groups, *self.reading]
        assert not begun, "the program ends before what it began"


class Shared:
    """A view of an allocation of shared memory. `pad`: so many numbers are left out after each so many."""

    def __init__(
        self,
        memory: np.ndarray,
        base: int,
        shape: Sequence[int],
        flight: Flight,
        pad: tuple[int, int] | None = None,
    ) -> None:
        self.memory, self.base, self.shape, self.flight, self.pad = memory, base, tuple(shape), flight, pad
        self.part: tuple[slice, ...] = tuple(slice(None) for _ in self.shape)
        self.dtype = memory.dtype

    def index(self, i: int) -> Shared:
        assert self.pad is None
        assert 0 <= i < self.shape[0], "outside of an allocation"
        return Shared(self.memory, self.base + i * math.prod(self.shape[1:]), self.shape[1:], self.flight)

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        assert dtype == self.dtype
        return Shared(self.memory, self.base, shape, self.flight, getattr(layout, "pad", None))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        view = Shared(self.memory, self.base, self.shape, self.flight, self.pad)
        parts = list(self.part)
        parts[dim] = slice(start, start + length)
        view.part = tuple(parts)
        return view

    def places(self) -> np.ndarray:
        """Where in the allocation the view's numbers are."""
        places = np.arange(math.prod(self.shape))
        if self.pad is not None:
            every, more = self.pad
            places = places + places // every * more
        places = (self.base + places).reshape(self.shape)[self.part]
        assert places.min() >= 0, "outside of an allocation"
        assert places.max() < len(self.memory), "outside of an allocation"
        return places

    def store(self, values: Array) -> None:
        at = self.places()
        self.flight.check_write(self.memory, at)
        assert at.shape == values.shape
        assert values.dtype == self.dtype
        self.memory[at] = values

    def load(self, layout: Any = None) -> Array:
        return _array(self.memory[self.places()])


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Array:
    at, wanted = pointer.places(mask, write=False)
    values = np.full(at.shape, np.nan if other is None else other, pointer.memory.dtype)
    values[wanted] = pointer.memory[at[wanted]]
    return _array(values)


def _store(pointer: Pointer, values: Any, mask: Any = None) -> None:
    at, wanted = pointer.places(mask, write=True)
    assert values.dtype == pointer.memory.dtype
    pointer.memory[at[wanted]] = np.broadcast_to(values, at.shape)[wanted]


def _padded(pairs: Sequence[Sequence[int]], shape: Sequence[int], order: Sequence[int]) -> Any:
    return types.SimpleNamespace(pad=tuple(pairs[0]))


def _layout(*_: Any, **__: Any) -> Any:
    return types.SimpleNamespace()


def _nothing(*_: Any) -> None:
    pass


def _language(program: int, flight: Flight) -> types.SimpleNamespace:
    """What a kernel calls `gl`."""

    def allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        return Shared(np.full(math.prod(shape), np.nan, dtype), 0, shape, flight)

    return types.SimpleNamespace(
        float16=np.dtype(np.float16),
        float32=np.dtype(np.float32),
        int64=np.dtype(np.int64),
        constexpr=constexpr,
        arange=lambda start, stop, layout: _array(np.arange(start, stop)),
        full=lambda shape, value, dtype, layout: _array(np.full(shape, value, dtype)),
        zeros=lambda shape, dtype, layout: _array(np.zeros(shape, dtype)),
        where=lambda condition, a, b: _array(np.where(condition, a, b)),
        minimum=lambda a, b, propagate_nan: _array(np.minimum(a, b)),  # numpy's keep NaN
        maximum=lambda a, b, propagate_nan: _array(np.maximum(a, b)),
        load=_load,
        store=_store,
        program_id=lambda axis: _array([program]),
        static_range=range,
        allocate_shared_memory=allocate,
        BlockedLayout=_layout,
        SliceLayout=_layout,
        SwizzledSharedLayout=_layout,
        NVMMASharedLayout=_layout,
        NVMMADistributedLayout=_layout,
        PaddedSharedLayout=types.SimpleNamespace(with_identity_for=_padded),
    )


def _globals(kernel: GluonJITFunction, program: int, flight: Flight) -> dict[str, Any]:
    """The globals of the kernel's module with numpy in the place of Gluon."""
    names = dict(kernel.fn.__globals__)
    for name, value in list(names.items()):
        if isinstance(value, constexpr):
            names[name] = value.value
        elif isinstance(value, GluonJITFunction):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
    names["gl"] = _language(program, flight)
    names["async_copy"] = types.SimpleNamespace(
        async_copy_global_to_shared=flight.copy, commit_group=flight.commit, wait_group=flight.wait
    )
    names |= {"warpgroup_mma": flight.product, "warpgroup_mma_wait": flight.wait_for_products}
    names |= {"fence_async_shared": _nothing, "thread_barrier": _nothing}
    return names


def run(kernel: GluonJITFunction, programs: int, arguments: Mapping[str, Any]) -> Traffic:
    """Execute all programs, one after the other; tensors are changed in place.

    Args:
        kernel: a `gluon.jit` function.
        programs: how many along the first dimension.
        arguments: by name: tensors for pointers, numbers for the rest.
    """
    traffic, memories = Traffic(), {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            # All that lies between its first and its last number.
            span = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
            memories[name] = value.as_strided((span,), (1,)).numpy()
    sizes = {id(memory): memory.itemsize for memory in memories.values()}
    for program in range(programs):
        flight = Flight()
        function = types.FunctionType(
            kernel.fn.__code__, _globals(kernel, program, flight), kernel.fn.__name__
        )
        function(**arguments | {name: Pointer(memory, 0, traffic) for name, memory in memories.items()})
        flight.end()
        traffic.end_program(sizes)
    return traffic


@contextlib.contextmanager
def executed() -> Iterator[list[Traffic]]:
    """Launches of Gluon kernels within it are run by numpy, on CPU tensors; yields what each has moved."""
    moved: list[Traffic] = []
    launch = triton.runtime.JITFunction.run

    def execute(self: Any, *values: Any, grid: Any, warmup: bool, num_warps: int, **named: Any) -> None:
        names = [parameter.name for parameter in self.params]
        moved.append(run(self, grid[0], dict(zip(names, values, strict=False)) | named))

    triton.runtime.JITFunction.run = execute
    try:
        yield moved
    finally:
        triton.runtime.JITFunction.run = launch

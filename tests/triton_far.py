"""Runs interpreted kernels as the last programs of launches on tensors that no memory here could hold.

The ids of a kernel's programs begin high, and its pointers are lowered by what the programs before would own:
an address is right only where it is counted with 64 bits. Every access is held to the memory of the launch's
tensors, so that a wrong one is an error and not a crash.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Far:
    """`programs` come before a kernel's own ones along each axis of its grid. By an argument's name: how many
    elements of a tensor are `before` the ones that there are, and by how much an integer is `more`.
    """

    kernel: str
    programs: tuple[int, int, int] = (0, 0, 0)
    before: Mapping[str, int] = dataclasses.field(default_factory=dict)
    more: Mapping[str, int] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def run(far: Far) -> Iterator[None]:
    """Launch the kernel so, within; others as they are.

    Raises:
        triton.runtime.errors.InterpreterError: an access outside of the tensors' memory.
        AssertionError: the kernel was not launched, or has no such argument.
    """
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    launched = []

    def launch_far(self: Any, *values: Any, **named: Any) -> None:
        if self.fn.__name__ != far.kernel:
            launch(self, *values, **named)
            return
        given = dict(zip(self.arg_names, values, strict=False))
        assert {*far.before, *far.more} <= given.keys()
        launched.append(far.kernel)
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        lowered = {
            tensors[name].data_ptr(): count * tensors[name].element_size()
            for name, count in far.before.items()
        }
        with _displaced(far.programs, lowered), _held_to(tensors.values()):
            launch(
                self,
                *(value + far.more[name] if name in far.more else value for name, value in given.items()),
                **named,
            )

    with mock.patch.object(interpreter.GridExecutor, "__call__", launch_far):
        yield
    assert launched


@contextlib.contextmanager
def _displaced(programs: tuple[int, int, int], lowered: Mapping[int, int]) -> Iterator[None]:
    """Program ids and numbers of programs larger by `programs`, pointers lower by so many bytes."""
    from triton.runtime import interpreter

    builder, convert = interpreter.InterpreterBuilder, interpreter._implicit_cvt

    def program_id(self: Any, axis: int) -> Any:
        return _int32(self.grid_idx[axis] + programs[axis])

    def num_programs(self: Any, axis: int) -> Any:
        return _int32(self.grid_dim[axis] + programs[axis])

    def implicit_cvt(value: Any) -> Any:
        converted = convert(value)
        if isinstance(value, torch.Tensor):
            converted.handle.data = converted.handle.data - np.uint64(lowered.get(value.data_ptr(), 0))
        return converted

    with (
        mock.patch.object(builder, "create_get_program_id", program_id),
        mock.patch.object(builder, "create_get_num_programs", num_programs),
        mock.patch.object(interpreter, "_implicit_cvt", implicit_cvt),
    ):
        yield


@contextlib.contextmanager
def _held_to(tensors: Any) -> Iterator[None]:
    """Loads and stores outside of the tensors' memory raise IndexError."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    memory = {(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors}

    def check(pointers: Any, mask: Any) -> None:
        wanted = np.broadcast_to(mask.data.astype(bool), np.broadcast(pointers.data, mask.data).shape)
        used = np.broadcast_to(pointers.data, wanted.shape)[wanted]
        inside = np.zeros(used.shape, bool)
        for start, size in memory:
            # Unsigned: what lies before the start is far past the end.
            inside |= used - np.uint64(start) < np.uint64(size)
        if not inside.all():
            raise IndexError(f"{int((~inside).sum())} accesses outside of the tensors")

    def create_masked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *more)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *more)

    with (
        mock.patch.object(builder, "create_masked_load", create_masked_load),
        mock.patch.object(builder, "create_masked_store", create_masked_store),
    ):
        yield


@contextlib.contextmanager
def without_64_bits() -> Iterator[None]:
    """No integer is made one of 64 bits, within: as the kernels would be without their casts."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.create_int_cast

    def create_int_cast(self: Any, source: Any, kind: Any, signed: bool) -> Any:
        return source if kind.scalar == interpreter.tl.int64 else cast(self, source, kind, signed)

    with mock.patch.object(builder, "create_int_cast", create_int_cast):
        yield


def _int32(value: int) -> Any:
    from triton.runtime import interpreter

    return interpreter.TensorHandle(np.array([value], np.int32), interpreter.tl.int32)

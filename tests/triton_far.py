"""Runs interpreted kernels as the last programs of launches on tensors that no memory here could hold.

The ids of a kernel's programs begin high, and its pointers are lowered by what the programs before would own:
an address is right only where it is counted with 64 bits. Every access is held to the memory of the launch's
tensors, so that a wrong one is an error and not a crash.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch

from mnv2_fast import kernels

KERNELS = Path(kernels.__file__).parent
INSTRUCTION = 2  # bytes of one in Python's bytecode
# Of an expression: first and last line, first column and the one past the last.
Place = tuple[int | None, int | None, int | None, int | None]


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


@dataclasses.dataclass(frozen=True)
class Cast:
    """A `.to(tl.int64)` in a kernel's source: the function it is in, what is cast, and where."""

    module: str
    function: str
    what: str
    place: Place

    def __str__(self) -> str:
        return f"{self.module}.{self.function}: {self.what}"


@functools.cache
def casts() -> tuple[Cast, ...]:
    """Those of every kernel that the interpreter runs."""
    return tuple(
        Cast(path.stem, function.name, ast.unparse(call.func.value), _place(call))
        for path in sorted(KERNELS.glob("*.py"))
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "to"
        and ast.unparse(call.args[0]) == "tl.int64"
    )


def _place(call: ast.Call) -> Place:
    return call.lineno, call.end_lineno, call.col_offset, call.end_col_offset


@contextlib.contextmanager
def without(dropped: Collection[Cast]) -> Iterator[set[Cast]]:
    """The kernels as they would be without these casts, within. Yields the casts that widened something."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    cast, int64 = TritonSemantic.cast, interpreter.tl.int64
    known = {(each.module, each.place): each for each in casts()}
    met: set[Cast] = set()

    def cast_but(self: Any, source: Any, kind: Any, *more: Any) -> Any:
        written = known.get(_caller()) if kind.scalar == int64 != source.type.scalar else None
        if written is not None:
            met.add(written)
        return source if written in dropped else cast(self, source, kind, *more)

    with mock.patch.object(TritonSemantic, "cast", cast_but):
        yield met


def _caller() -> tuple[str, Place] | None:
    """Module and place of the kernels' expression that is being evaluated."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        package, _, module = frame.f_globals["__name__"].rpartition(".")
        if package == kernels.__name__:
            return module, _places(frame.f_code)[frame.f_lasti // INSTRUCTION]
        frame = frame.f_back
    return None


@functools.cache
def _places(code: CodeType) -> tuple[Place, ...]:
    """Of each instruction's expression."""
    return tuple(code.co_positions())


def _int32(value: int) -> Any:
    from triton.runtime import interpreter

    return interpreter.TensorHandle(np.array([value], np.int32), interpreter.tl.int32)

"""Runs a test module's cases in Triton's interpreter, in a child process, and mends what it gets wrong.

Triton decides when a kernel is defined whether it will be interpreted. So the module runs itself as a script
with TRITON_INTERPRET=1 and prints a verdict for each case; the tests compile in their own process.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch

# Children at a time, each with one thread, and how long one may take beside the other and the tests.
CHILDREN, CHILD_SECONDS = 2, 480

# The modules of this run that have cases, in order: `conftest` lists them.
wanted: list[str] = []
_pool = ThreadPoolExecutor(CHILDREN)
_started: dict[str, Future[dict[str, str]]] = {}
_running: set[subprocess.Popen[str]] = set()

Case = TypeVar("Case")


def kinds() -> Iterator[tuple[str, bool]]:
    """How a kernel can compute: dtype and whether float32 is multiplied as TF32."""
    for dtype in ("float32", "float16", "bfloat16"):
        yield dtype, False
    yield "float32", True


def verdicts(path: str) -> dict[str, str]:
    """What is wrong with each case, "" where nothing is: what `print_verdicts` prints when `path` is run.

    The children of the other modules begin, too: one after the other they took nine minutes of one core.
    """
    for one in (path, *wanted):
        if one not in _started:
            _started[one] = _pool.submit(_verdicts, one)
    return _started[path].result()


def _verdicts(path: str) -> dict[str, str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, path], env=environment, stdout=pipe, stderr=pipe, text=True
    ) as child:
        _running.add(child)
        try:
            out, err = child.communicate(timeout=CHILD_SECONDS)
        finally:
            child.kill()
            _running.discard(child)
    assert child.returncode == 0, err[-4000:]
    found: dict[str, str] = json.loads(out)
    return found


def stop() -> None:
    """End the children that nobody waits for any more."""
    _pool.shutdown(wait=False, cancel_futures=True)
    for child in list(_running):
        child.kill()


def print_verdicts(cases: Iterable[Case], verdict: Callable[[Case], str]) -> None:
    """Judge the cases, by their names, in this process, whose kernels are interpreted."""
    mend()
    torch.set_num_threads(1)
    print(json.dumps({str(case): verdict(case) for case in cases}))


def judge(out: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> str:
    """What is wrong with `out`, "" where nothing is: NaN and infinity are where float64 has them, numbers off
    by no more than is allowed.
    """
    special = ~want.isfinite()
    if not torch.equal(out[special].double().nan_to_num(9e9), want[special].nan_to_num(9e9)):
        return "NaN or Inf is not where float64 has it"
    if not out[~special].isfinite().all():
        return "NaN or Inf where float64 has a number"
    excess = ((out - want).abs() - allowed)[~special]
    if excess.numel() and excess.max() > 0:
        return f"off by up to {(out - want).abs()[~special].max():.3g}, {int((excess > 0).sum())} elements"
    return ""


def mend() -> None:
    """Make Triton 3.6's interpreter do what the hardware does where it does not.

    It rounds to bfloat16 towards zero and multiplies matrices of it by their bits; TF32 keeps all of
    float32's bits; numpy 2.4 turns no array of one element into the number that a loop's bound is; and it
    counts loops in numbers, which have 32 bits where they are small, whatever their bounds have.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl
    if getattr(cast, "mended", False):
        return

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == interpreter.tl.float32 and kind.scalar == interpreter.tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), kind.scalar)
        return cast(self, source, kind)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, _: Any) -> Any:
        products = _factor(a, str(precision)) @ _factor(b, str(precision))
        return interpreter.TensorHandle(products + d.data, d.dtype.scalar)

    cast_impl.mended = True  # type: ignore[attr-defined]
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    interpreter.range = _range


class Traffic:
    """Bytes that interpreted kernels move: unique addresses of each program, summed over programs."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: dict[tuple[bool, int], list[np.ndarray]] = {}

    def note(self, pointers: Any, mask: Any, write: bool) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        wanted = mask.data.astype(bool)  # it may be of bytes
        used = np.unique(np.broadcast_to(pointers.data, wanted.shape)[wanted])
        self._seen.setdefault((write, size), []).append(used)

    def end_program(self) -> None:
        for (_, size), found in self._seen.items():
            self.total += size * len(np.unique(np.concatenate(found)))
        self._seen.clear()


@contextlib.contextmanager
def recorded() -> Iterator[Traffic]:
    """What the kernels launched within move."""
    from triton.runtime import interpreter

    builder, traffic = interpreter.InterpreterBuilder, Traffic()
    load, store, place = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

    def create_masked_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        traffic.note(pointers, mask, write=False)
        return load(self, pointers, mask, *more)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        traffic.note(pointers, mask, write=True)
        return store(self, pointers, value, mask, *more)

    def set_grid_idx(self: Any, *index: int) -> None:
        traffic.end_program()
        place(self, *index)

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
    builder.set_grid_idx = set_grid_idx
    try:
        yield traffic
        traffic.end_program()
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.set_grid_idx = place


def _factor(handle: Any, precision: str) -> np.ndarray:
    """A matrix as float32, as the tensor cores see it."""
    if str(handle.dtype.scalar) == "bf16":
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    wide = handle.data.astype(np.float32)
    if precision.endswith("TF32") and str(handle.dtype.scalar) == "fp32":
        wide = (wide.view(np.uint32) & 0xFFFFE000).view(np.float32)
    return wide


def _range(*bounds: Any) -> Iterable[Any]:
    """The numbers of a loop: of its bounds' widest type where they are tensors."""
    from triton.runtime import interpreter

    numbers = builtins.range(*map(_number, bounds))
    kinds = [bound.dtype for bound in bounds if hasattr(bound, "handle")]
    if not kinds:
        return numbers
    kind = max(kinds, key=lambda kind: kind.primitive_bitwidth)
    dtype, tl = interpreter._get_np_dtype(kind), interpreter.tl
    return (tl.tensor(interpreter.TensorHandle(np.array([i], dtype), kind), kind) for i in numbers)


def _number(bound: Any) -> int:
    return int(bound.handle.data.item()) if hasattr(bound, "handle") else int(bound)

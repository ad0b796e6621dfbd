"""Compile a kernel for a GPU that is not here, and ask what the machine code costs.

Triton carries ptxas and cuobjdump, so registers, stack and spills of every kernel are known on any machine.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from .common import POINTERS


@dataclass(frozen=True)
class Compiled:
    """What one program costs: registers a thread; stack, local (both: spills) and shared memory in bytes,
    that which a launch asks for included.
    """

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str


def compile_for(
    kernel: Any, arch: int, arguments: Mapping[str, str | int | bool], num_warps: int, num_stages: int = 3
) -> Compiled:
    """Compile for sm_`arch`.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function.
        arch: compute capability times ten, such as 80 or 90.
        arguments: every argument in order: the value of a `tl.constexpr`, or else the Triton type ("i32";
            "*fp16", a pointer, taken as 16-byte aligned, as torch's allocations are).
        num_warps: warps a program.
        num_stages: how many steps ahead a loop loads.
    """
    types = {name: value if isinstance(value, str) else "constexpr" for name, value in arguments.items()}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, value in enumerate(types.values()) if value.startswith("*")
    }
    return _compile(kernel, arch, (types, constants, aligned), num_warps, num_stages)


def _compile(
    kernel: Any, arch: int, signature: tuple[dict[str, str], dict[str, Any], Any], warps: int, stages: int
) -> Compiled:
    """`signature`: the arguments' types, those that are constants, and what else is known of them."""
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, *signature)
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resource_usage(binary.asm["cubin"])
    shared = max(usage["SHARED"], binary.metadata.shared)
    return Compiled(usage["REG"], usage["STACK"], usage["LOCAL"], shared, binary.asm["ptx"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` says of a cubin with one kernel: REG, STACK, SHARED, LOCAL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


@dataclass(frozen=True)
class Launch:
    """A kernel's launch as a launcher asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by name
    warps: int
    stages: int

    def compile_for(self, arch: int) -> Compiled:
        """Compile for sm_`arch` as the launch would: integers that are multiples of 16 known as such, 1 taken
        as a constant, unless the kernel asks for neither.
        """
        types: dict[str, str] = {}
        constants, known = {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                types[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            free = not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                types[parameter.name] = POINTERS[value.dtype]
                known[i,] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                types[parameter.name] = "fp32"
            elif value == 1 and free:
                types[parameter.name] = "constexpr"
                constants[parameter.name] = value
            else:
                types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and free:
                    known[i,] = [["tt.divisibility", 16]]
        return _compile(self.kernel, arch, (types, constants, known), self.warps, self.stages)


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """The launches that are asked for within, none of which is made: tensors may be of device "meta"."""
    made: list[Launch] = []
    run = triton.runtime.JITFunction.run

    def record(
        self: Any, *values: Any, grid: Any, warmup: bool, num_warps: int, num_stages: int = 3, **named: Any
    ) -> None:
        names = [parameter.name for parameter in self.params]
        made.append(Launch(self, grid, dict(zip(names, values, strict=False)) | named, num_warps, num_stages))

    triton.runtime.JITFunction.run = record
    try:
        yield made
    finally:
        triton.runtime.JITFunction.run = run

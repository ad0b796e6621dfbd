"""Compile a kernel for a GPU that is not here, and ask what the machine code costs.

Triton carries ptxas and cuobjdump, so registers, stack and spills of every kernel are known on any machine.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource


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
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, types, constants, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
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

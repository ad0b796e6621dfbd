"""Says in one line what this machine lacks for building mnv2_fast, before anything is downloaded.

Run by the Makefile with the system's interpreter, so it uses the standard library alone.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MINIMUM_PYTHON = (3, 11)
MINIMUM_DISK_GB = 4.0

# Fails to compile before C++17 and without OpenMP.
PROBE = """
#include <omp.h>
#include <optional>
int main() { if (std::optional<int> n = omp_get_max_threads(); n) return 0; return 1; }
"""


def python_problem() -> str | None:
    """The interpreter's version, its headers and its `venv`."""
    have = sys.version_info[:2]
    if have < MINIMUM_PYTHON:
        return (
            f"Python {have[0]}.{have[1]} is too old: install Python 3.11 or newer and name it, "
            "as in `make demo PYTHON=python3.11`"
        )
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        return "Python cannot make virtual environments: `sudo apt install python3-venv`"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"the Python headers are missing ({header}): `sudo apt install python3-dev`"
    return None


def compiler_problem() -> str | None:
    """A C++17 compiler with OpenMP: $CXX, or the one CMake would take."""
    asked = os.environ.get("CXX")
    command = shlex.split(asked) if asked else []
    if not command:
        command = [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command or shutil.which(command[0]) is None:
        what = f"CXX={asked} is not there" if asked else "there is no C++ compiler"
        return f"{what}: `sudo apt install g++`, or set CXX to a C++17 compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE, encoding="utf-8")
        done = subprocess.run(
            [*command, "-std=c++17", "-fopenmp", str(source), "-o", str(source.with_suffix(""))],
            capture_output=True,
            check=False,
        )
    if done.returncode != 0:
        return (
            f"{command[0]} builds no C++17 program with OpenMP: `sudo apt install g++` "
            "(for clang also libomp-dev), or set CXX to another compiler"
        )
    return None


def disk_problem() -> str | None:
    """Room for the virtual environment; a PyTorch with CUDA takes more than the minimum asked here."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    minimum = float(os.environ.get("MINIMUM_DISK_GB") or MINIMUM_DISK_GB)
    if free < minimum:
        return (
            f"{free:.1f} GB are free in {Path.cwd()} and the installation takes {minimum:g}: free some, "
            "or lower MINIMUM_DISK_GB if you know better"
        )
    return None


CHECKS = {"python": python_problem, "compiler": compiler_problem, "disk": disk_problem}


def main(names: list[str]) -> int:
    """Run the checks named (all where none is); print the first problem and return 1, or return 0."""
    for name in names or CHECKS:
        if problem := CHECKS[name]():
            print(f"mnv2: error: {problem}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Builds the extension `mnv2_fast._C` with CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake once for the one extension and leaves the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; CMake itself skips what has not changed."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Apart for each interpreter, so that building for another one starts clean.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        # The environment's own cmake and ninja first, also where it was not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        tools = {**os.environ, "PATH": path}
        subprocess.run(
            [
                "cmake",
                "-S",
                str(ROOT),
                "-B",
                str(build),
                "-G",
                "Ninja",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                # Said anew each time: an isolated build's ninja is gone by the next one.
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=path)}",
            ],
            check=True,
            env=tools,
        )
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True, env=tools)


setup(ext_modules=[Extension("mnv2_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})

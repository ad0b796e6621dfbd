"""CONTENDERS: everyone who runs the network, a row for each precision, each in its best configuration.

A row's engine is a module of `bench.engines`. A row whose packages are not installed is named and left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import material
from .engines import Call, Case

DTYPES = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class Contender:
    """One row.

    Attributes:
        name: of the engine; with `dtype` it names the row.
        engine: module of `bench.engines`.
        needs: modules to run it, in the order of their import.
        makes: packages that only `prepare` needs.
        options: for the engine, see its module.
        env: environment of its processes.
        slow: timed at batch 1 only.
        tedious: takes a minute or more to make or to start; not in a quick run.
        singly: knows no batch, or is slower with one: images are always given one by one.
    """

    name: str
    dtype: str
    engine: str
    needs: tuple[str, ...]
    makes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    slow: bool = False
    tedious: bool = False
    singly: bool = False

    @property
    def title(self) -> str:
        """The row's own name."""
        return f"{self.name}, {self.dtype}"

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.engine == "ours"

    @property
    def module(self) -> Any:
        """The engine's module."""
        return importlib.import_module(f"bench.engines.{self.engine}")

    def missing(self) -> list[str]:
        """Packages it needs that are not installed."""
        packages = dict.fromkeys(name.partition(".")[0] for name in (*self.needs, *self.makes))
        return [name for name in packages if importlib.util.find_spec(name) is None]


ENGINE = "mnv2_fast"
AUTOMATIC = "mnv2_fast model(x)"
ENGINE_AVX2 = "mnv2_fast avx2"
ENGINE_SCALAR = "mnv2_fast scalar"
TORCH_COMPILE = "torch.compile"
COMPILE_AVX2 = "torch.compile avx2"
OPENVINO_AVX2 = "OpenVINO avx2"

_OURS = ("torch", "mnv2_fast")
_TORCH, _VISION = ("torch",), ("torchvision",)
_EXPORT = ("torch", "torchvision", "onnx", "onnxscript")
_XNNPACK = ("torch", "executorch.extension.pybindings.portable_lib")
# ONNX Runtime finds its instruction set by itself and has no setting for it. These have, and obey: oneDNN's
# primitives are then brgconv_avx2 and brgconv_1x1:avx2 (OpenVINO's runtime model, ONEDNN_VERBOSE=1).
_ONEDNN_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
_TORCH_AVX2 = {**_ONEDNN_AVX2, "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_COMPILE = {"compile": True}
_COMPILE_256 = {**_COMPILE, "vector_bits": 256}
_AVX2, _SCALAR = {"MNV2_FORCE_ISA": "avx2"}, {"MNV2_FORCE_ISA": "scalar"}

CONTENDERS: tuple[Contender, ...] = (
    Contender(ENGINE, "fp32", "ours", _OURS),
    Contender(AUTOMATIC, "fp32", "ours", _OURS, options={"automatic": True}),
    Contender("ONNX Runtime", "fp32", "onnxruntime", ("onnxruntime",), _EXPORT),
    Contender("OpenVINO", "fp32", "openvino", ("openvino",), _EXPORT),
    Contender("XNNPACK", "fp32", "xnnpack", _XNNPACK, ("torchvision", "torchao"), singly=True, tedious=True),
    Contender("ncnn", "fp32", "ncnn", ("ncnn",), ("torch", "torchvision", "pnnx"), singly=True),
    Contender(TORCH_COMPILE, "fp32", "pytorch", _TORCH, _VISION, _COMPILE, tedious=True),
    Contender("torch eager", "fp32", "pytorch", _TORCH, _VISION),
    Contender(ENGINE_AVX2, "fp32", "ours", _OURS, env=_AVX2, slow=True),
    Contender(OPENVINO_AVX2, "fp32", "openvino", ("openvino",), _EXPORT, env=_ONEDNN_AVX2, slow=True),
    Contender(
        COMPILE_AVX2, "fp32", "pytorch", _TORCH, _VISION, _COMPILE_256, _TORCH_AVX2, slow=True, tedious=True
    ),
    Contender(ENGINE_SCALAR, "fp32", "ours", _OURS, env=_SCALAR, slow=True),
    Contender(ENGINE, "bf16", "ours", _OURS),
    Contender("OpenVINO", "bf16", "openvino", ("openvino",), _EXPORT),
    Contender("ncnn", "bf16", "ncnn", ("ncnn",), ("torch", "torchvision", "pnnx"), singly=True),
    Contender(TORCH_COMPILE, "bf16", "pytorch", _TORCH, _VISION, _COMPILE, slow=True, tedious=True),
    Contender(ENGINE, "int8", "ours", _OURS),
    Contender("ONNX Runtime", "int8", "onnxruntime", ("onnxruntime",), _EXPORT),
    Contender("OpenVINO", "int8", "openvino", ("openvino",), (*_EXPORT, "nncf")),
    Contender("XNNPACK", "int8", "xnnpack", _XNNPACK, ("torchvision", "torchao"), singly=True, tedious=True),
    # No ncnn: its quantizers, ncnn2table and ncnn2int8, come with neither of its packages.
)


def find(title: str) -> Contender:
    """The row of that title.

    Raises:
        ValueError: there is none.
    """
    for contender in CONTENDERS:
        if contender.title == title:
            return contender
    raise ValueError(f"no contender {title!r}: one of {'; '.join(row.title for row in CONTENDERS)}")


def names() -> list[str]:
    """Every name once."""
    return list(dict.fromkeys(contender.name for contender in CONTENDERS))


def environment(own: Mapping[str, str], folder: str) -> dict[str, str]:
    """What a contender's processes are started with: this environment, and of the settings of ours and of
    glibc's allocator only the contender's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MNV2_", "MALLOC_"))}
    # Inductor's cache is the run's own, so that what is compiled has been compiled in this run.
    return {**kept, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", **own}


def serve(title: str, case: Mapping[str, Any], keys: Sequence[str]) -> Callable[[str], Call]:
    """For bench.workers: from a key ("16", or "16 singly") to the call on so many photos."""
    contender, given = find(title), Case(**case)
    calls = {key: _call(contender, given, key) for key in keys}
    for call in calls.values():
        call()
    return calls.__getitem__


def _call(contender: Contender, case: Case, key: str) -> Call:
    batch, _, singly = key.partition(" ")
    photos = material.photos(case.material, int(batch))
    if not singly:
        whole: Call = contender.module.load(replace(case, batch=int(batch)))(photos)
        return whole
    bind = contender.module.load(replace(case, batch=1))
    each = [bind(photos[i : i + 1].copy()) for i in range(int(batch))]

    def one_by_one() -> None:
        for call in each:
            call()

    return one_by_one

"""The one module that imports torchvision, when it is first asked for.

A torchvision wheel built for CUDA fails to import beside a CPU-only torch (`operator torchvision::nms does
not exist`): its native library cannot be loaded, so nobody defines the two schemas its Python code refers to.
They are then defined here. Models, datasets and transforms work; the detection operators have no kernel and
say so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from .errors import UserError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # its schemas go when it does


def installed() -> bool:
    """Whether torchvision is installed; imports nothing."""
    return "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None


@functools.cache
def torchvision() -> ModuleType:
    """The torchvision package, with `models`, `datasets` and `transforms` loaded.

    Raises:
        UserError: it is not installed, or cannot be imported beside this torch.
    """
    if not installed():
        raise UserError("torchvision is not installed: pip install torchvision")
    try:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "operator torchvision::nms does not exist" not in str(error):
                raise
            _define_schemas()
            for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[name]  # half imported
            return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"torchvision cannot be imported beside torch {torch.__version__} ({reason}): "
            "install the torchvision built for it"
        ) from error


@functools.cache
def transforms_v2() -> ModuleType:
    """torchvision's `transforms.v2`, which the package itself does not load.

    Raises:
        UserError: as `torchvision`.
    """
    return importlib.import_module(f"{torchvision().__name__}.transforms.v2")


def _define_schemas() -> None:
    global _library
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)

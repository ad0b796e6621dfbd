"""MobileNetV2, as torchvision defines it, on kernels of our own.

`from mnv2_fast import MobileNetV2` is a drop-in for torchvision's class; `compile` freezes a model into an
Engine.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# name -> module; imported at first use, so that `import mnv2_fast` costs little more than `import torch`.
_EXPORTS = {
    "MobileNetV2": "model",
    "mobilenet_v2": "model",
    "accelerate": "model",
    "Engine": "engine",
    "compile": "engine",
    "load": "engine",
    "Predictor": "predict",
    "Evaluation": "metrics",
    "evaluate": "evaluation",
    "fit": "train",
    "release_training_memory": "training",
    "UserError": "errors",
}

__all__ = [*sorted(_EXPORTS), "__version__"]  # noqa: PLE0604 (names are resolved by __getattr__)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})

"""What `mnv2 info` prints: everything that decides which code runs here, and what one model is made of."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch

from . import __version__, arch, env, machine, ops, weights
from .backends import chains, cpu, triton
from .engine import DTYPES

_PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "safetensors", "onnxruntime", "openvino")


def collect() -> dict[str, Any]:
    """Versions, processor, kernels, threads, GPU, backend per operator, weights and environment, ready for
    JSON.

    Raises:
        UserError: an environment variable has a value that makes no sense.
    """
    env.strict()
    return {
        "versions": _versions(),
        "processor": _processor(),
        "kernels": _kernels(),
        "threads": {"torch": torch.get_num_threads(), "openmp": cpu.openmp() if cpu.available() else None},
        "gpu": _gpus(),
        "backends": _backends(),
        "dtypes": list(DTYPES),
        "weights": {
            **{row.name: str(weights.find_local(row) or "not here") for row in weights.WEIGHTS},
            **{engine.name: str(engine.path) for engine in weights.BOXED},
        },
        "environment": {
            variable.name: {
                "value": os.environ.get(variable.name),
                "default": variable.default or None,
                "meaning": variable.meaning,
            }
            for variable in env.VARIABLES
        },
    }


def _versions() -> dict[str, str]:
    found = {"mnv2_fast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next(
                (line.partition(":")[2].strip() for line in file if line.startswith("model name")), name
            )
    return {"name": name, "cores": machine.cores(), "features": cpu.features() if cpu.available() else {}}


def _kernels() -> dict[str, Any]:
    if not cpu.available():
        return {"isa": None, "reason": cpu.unavailable_reason()}
    return {"isa": cpu.isa(), "isas": cpu.isas(), "bf16": cpu.bf16_arithmetic(), **cpu.build_info()}


def _gpus() -> dict[str, Any]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "devices": [torch.cuda.get_device_name(i) for i in devices],
        "triton": triton.unavailable_reason() or "available",
    }


def _backends() -> dict[str, dict[str, str]]:
    """Device -> operator -> the backend of a model's float32 call, with the reason where it is eager."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {device: {op.name: _backend(op, device) for op in ops.OPS} for device in devices}


def _backend(op: ops.Op, device: str) -> str:
    asked = env.backend()
    if asked == "eager":
        return f"eager ({env.BACKEND.name}=eager)"
    fitting = chains.KERNELS[device].backend
    if asked not in ("auto", fitting):
        return (
            f"eager ({env.BACKEND.name}={asked} has no kernels on {device}: unset it, or set it to {fitting})"
        )
    args = next(iter(op.samples((8,), (8,), (1,))))
    args = ops.map_tensors(lambda t: t.to(device), args)
    if op.name == "network":
        reason = ops.network_declines(*args)
        return f"eager ({reason})" if reason else fitting
    module, reason = ops.backend_of(op.name, *args)
    name = module.__name__.rpartition(".")[2]
    return f"{name} ({reason})" if reason else name


def text(facts: Mapping[str, Any]) -> str:
    """The same for people: one section per fact, one line per value."""
    lines = []
    for section, values in facts.items():
        lines.append(f"{section}:")
        if not isinstance(values, Mapping):
            lines.append(f"  {_value(values)}")
            continue
        for name, value in values.items():
            if section == "environment":
                shown = f"unset ({value['default'] or 'none'})" if value["value"] is None else value["value"]
                lines += [f"  {name} = {shown}", f"    {value['meaning']}"]
            else:
                lines.append(f"  {name:14}{_value(value)}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        if all(isinstance(item, bool) for item in value.values()):
            return " ".join(name for name, item in value.items() if item) or "none"
        return "; ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def describe(
    model: str, *, dtype: str | None = None, batch: int = 1, size: int = 224, threads: int | None = None
) -> dict[str, Any]:
    """What a model is made of and what a call of it takes, ready for JSON.

    Args:
        model: a weights or engine file, or a name.
        dtype: arithmetic of the network; by default the engine's own, else "fp32".
        batch: images per call.
        size: their height and width.
        threads: of the network; torch's number by default.

    Returns:
        Sizes in bytes; `macs` are of one image. `parameters` have batch norm folded in. `workspace_bytes` is
        the peak of activations that is planned for the call.

    Raises:
        UserError: there is no such model, or an argument makes no sense.
    """
    from .predict import Predictor

    engine = Predictor(model, dtype=dtype, threads=threads).engine
    file = weights.find_weights(model)
    layers = [
        {
            "name": layer.spec.conv,
            "kind": layer.spec.kind,
            "input": [layer.spec.cin, layer.h, layer.w],
            "output": [layer.spec.cout, layer.ho, layer.wo],
            "stride": layer.spec.stride,
            "parameters": layer.weights,
            "macs": layer.macs,
        }
        for layer in arch.layers(size=size, specs=engine.layers)
    ]
    return {
        "model": model,
        "file": str(file),
        "file_bytes": file.stat().st_size,
        "dtype": engine.dtype,
        "kernels": f"{engine.backend} {engine.isa}".rstrip(),
        "classes": engine.num_classes,
        "parameters": sum(layer["parameters"] for layer in layers),
        "macs": sum(layer["macs"] for layer in layers),
        "packed_bytes": engine.packed_bytes,
        "batch": batch,
        "size": size,
        "threads": engine.threads or torch.get_num_threads(),
        "workspace_bytes": engine.workspace_bytes(batch, size, size),
        "layers": layers,
    }


def description(facts: Mapping[str, Any]) -> str:
    """`describe` for people: one line per fact, then the layers."""
    lines = []
    for name, value in facts.items():
        if name != "layers":
            shown = f"{value:,}" if type(value) is int else _value(value)
            lines.append(f"{name.replace('_', ' '):16}{shown}")
    lines.append(f"{'layer':24}{'kind':11}{'input':>16}{'output':>16} stride{'parameters':>12}{'MACs':>14}")
    for layer in facts["layers"]:
        shapes = ["x".join(map(str, layer[side])) for side in ("input", "output")]
        lines.append(
            f"{layer['name']:24}{layer['kind']:11}{shapes[0]:>16}{shapes[1]:>16}{layer['stride']:7}"
            f"{layer['parameters']:12,}{layer['macs']:14,}"
        )
    return "\n".join(lines)

"""The CUDA backend: the Triton kernels of `mnv2_fast.kernels` as operators, on sm_80 and newer.

Importing this module imports no triton, so that it costs nothing where no GPU is used.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch

# min.NaN, max.NaN and bfloat16 begin here.
CAPABILITY = (8, 0)


@functools.cache
def unavailable_reason() -> str:
    """Why no call can be served here, in one line that names the cure; empty where calls can be served."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: install torch's CUDA build, or triton>=3.6"
    if torch.version.cuda is None:
        return "torch is built without CUDA: install torch's CUDA build"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device: check the driver with nvidia-smi"
    try:
        importlib.import_module("mnv2_fast.kernels.depthwise")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}): install mnv2-fast with pip"
    return ""


def available() -> bool:
    """Whether calls can be served here."""
    return not unavailable_reason()


def declines(op: str, *args: object) -> str | None:
    """Why this backend does not serve one call, or None where it does.

    Args:
        op: the operator's name, such as "depthwise".
        args: the call's arguments, in the order of the operator's schema.
    """
    if op != "depthwise":
        return f"the triton backend has no {op} kernel"
    x, *weights = (arg for arg in args if isinstance(arg, torch.Tensor))
    return _device_reason(x.device) or _tensor_reason(x, weights)


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, relu6: bool
) -> torch.Tensor:
    """act(depthwise 3x3 convolution of x, padding 1, + bias), as `mnv2_fast.kernels.depthwise.depthwise`.

    x [N, C, H, W], weight [C, 1, 3, 3], bias [C]; returns [N, C, HO, WO], channels_last.

    Raises:
        ValueError: the arguments do not fit together, or x is too large for the kernel.
    """
    from mnv2_fast.kernels.depthwise import depthwise

    return depthwise(x, weight, bias, stride, relu6)


@functools.cache
def _device_reason(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the triton backend serves CUDA tensors, not {device.type}"
    if reason := unavailable_reason():
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < CAPABILITY:
        return f"the triton backend needs sm_80 or newer, {device} is sm_{major}{minor}"
    return None


def _tensor_reason(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> str | None:
    from mnv2_fast.kernels.common import DTYPES
    from mnv2_fast.kernels.depthwise import limit

    if x.dtype not in DTYPES:
        return f"the triton backend has no {x.dtype} kernels"
    for weight in weights:
        if weight.dtype != x.dtype or weight.device != x.device:
            return f"x is {x.dtype} on {x.device}, a weight is {weight.dtype} on {weight.device}"
    for tensor in (x, *weights):
        if tensor.layout != torch.strided or tensor.is_neg():
            return f"a tensor is {tensor.layout} or a negative view: the kernels read plain memory"
    return limit(x.shape)

"""What an engine takes for a batch of images, and one line for anything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .model import InputError

CPU = torch.device("cpu")

_TRACING_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def check_images(x: Any, device: torch.device = CPU) -> None:
    """Say in one line what is wrong with a batch of images for an engine on `device`.

    Raises:
        InputError: wrong dtype, rank, channels, size, device or layout; no plain tensor, or a transform or a
            tracer wants to see the call.
        TypeError: no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"an engine takes a tensor, not {type(x).__name__}: convert with torch.from_numpy or as_tensor"
        )
    watcher = _watcher(x)
    if watcher:
        raise InputError(f"an engine cannot run under {watcher}: use the model there, not the engine")
    if type(x) not in (Tensor, nn.Parameter):
        raise InputError(
            f"an engine takes plain tensors, not {type(x).__name__}: convert with x.as_subclass(torch.Tensor)"
        )
    got = f"got {x.dtype} {list(x.shape)}"
    if x.dtype not in (torch.float32, torch.uint8):
        raise InputError(
            f"an engine takes float32 [N, 3, H, W] or uint8 [N, H, W, 3], {got}: convert with x.float()"
        )
    if x.dim() != 4:
        raise InputError(f"an engine takes a batch of 4 dimensions, {got}: add it to one image with x[None]")
    h, w, channels = x.shape[1:] if x.dtype == torch.uint8 else (x.shape[2], x.shape[3], x.shape[1])
    if channels != 3:
        layout, cure = (
            ("[N, H, W, 3]", (0, 2, 3, 1)) if x.dtype == torch.uint8 else ("[N, 3, H, W]", (0, 3, 1, 2))
        )
        raise InputError(
            f"{x.dtype} images are {layout}, {got}: 3 channels are wanted, perhaps x.permute{cure}"
        )
    if h < 1 or w < 1:
        raise InputError(f"H and W must be at least 1, {got}")
    if x.device != device or x.layout != torch.strided:
        use = "x.cpu()" if device == CPU else f"x.to({str(device)!r})"
        where = "CPU tensors" if device == CPU else f"tensors on {device}"
        raise InputError(f"this engine takes dense {where}, got {x.layout} on {x.device}: use {use}")


def _watcher(x: Tensor) -> str:
    """What would have to see inside an engine, or would hand it tensors without memory; empty: nothing."""
    if torch.compiler.is_dynamo_compiling():
        return ""  # the graph breaks at the kernels, which then run on real tensors
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "a transform such as vmap or grad"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _TRACING_MODES)):
        return "fake tensors or a tracer"
    # Neither a mode nor its module need be there for a fake tensor to be given.
    return "fake tensors" if any(kind.__name__ == "FakeTensor" for kind in type(x).__mro__) else ""

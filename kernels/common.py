"""What every Triton kernel here shares: ReLU6 that keeps NaN, the committed tile tables, and what launchers
ask of their tensors.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl

# The types the kernels read and write, and Triton's names for pointers to them.
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DTYPES = tuple(POINTERS)

# What CUDA allows along a grid's second and third dimension.
GRID_LIMIT = 65535

CONFIGS = Path(__file__).parent / "configs"
Tile = Mapping[str, int]


@triton.jit
def relu6(x):
    """min(max(x, 0), 6) of a float32 tensor. NaN stays NaN, which the hardware's plain min and max drop."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. With Triton's, made for kernels, a training step takes the host half longer."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is no less than a positive n."""
    return 1 << (n - 1).bit_length()


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """How products are made, as the tile tables name it: "half", "ieee" (float32 in full) or "tf32"."""
    return "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"


def slug(device_name: str) -> str:
    """A GPU's name as the stem of its tile table: "NVIDIA H200" is configs/h200.json."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """x [N, C, H, W] as contiguous [N, H, W, C]: a view of it where it is channels_last, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def output(
    out: torch.Tensor | None, shape: Sequence[int], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A result [N, C, H, W] of `shape` in channels_last, of x's dtype and device, and its memory [N, H, W,
    C].

    Raises:
        ValueError: `out` is given and is none.
    """
    n, c, h, w = shape
    if out is None:
        out = torch.empty((n, h, w, c), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    lines = out.permute(0, 2, 3, 1)
    if (
        lines.shape != (n, h, w, c)
        or not lines.is_contiguous()
        or (out.dtype, out.device) != (x.dtype, x.device)
    ):
        raise ValueError(f"out must be channels_last {tuple(shape)} of {x.dtype} on {x.device}")
    return out, lines


def batches(n: int, images: int = 1) -> Iterator[slice]:
    """n images in runs, one a launch; a program along a limited dimension of the grid takes `images`."""
    most = GRID_LIMIT * images
    return (slice(first, min(first + most, n)) for first in range(0, n, most))


@functools.cache
def device_of(device: torch.device) -> tuple[str, int]:
    """Name and number of multiprocessors; no name and one where the interpreter stands in for a GPU."""
    if device.type != "cuda":
        return "", 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count


@functools.cache
def tiles(device_name: str, kernel: str) -> Mapping[str, Tile]:
    """The tiles of one kernel on one GPU, from its committed table.

    The table configs/<gpu>.json is used where it exists and has a row for the kernel; default.json otherwise.
    Nothing is tuned at run time, so that the first call is as fast and as reproducible as the last.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it; "" for the default.
        kernel: a key of the table, such as "depthwise".
    """
    for path in (CONFIGS / f"{slug(device_name)}.json", CONFIGS / "default.json"):
        if path.is_file():
            table = json.loads(path.read_text())
            if kernel in table:
                return table[kernel]
    raise KeyError(f"no tiles for {kernel!r} in {CONFIGS}")

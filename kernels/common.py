"""What every Triton kernel here shares: ReLU6 that keeps NaN, and the committed tile tables."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import triton
import triton.language as tl

# The types the kernels read and write, and Triton's names for pointers to them.
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DTYPES = tuple(POINTERS)

CONFIGS = Path(__file__).parent / "configs"


@triton.jit
def relu6(x):
    """min(max(x, 0), 6) of a float32 tensor. NaN stays NaN, which the hardware's plain min and max drop."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)


def slug(device_name: str) -> str:
    """A GPU's name as the stem of its tile table: "NVIDIA H200" is configs/h200.json."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


@functools.cache
def tiles(device_name: str, kernel: str) -> Mapping[str, Mapping[str, int]]:
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

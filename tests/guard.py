"""Tensors that end where their memory page ends: one element too many ends the process.

For scripts that run in a process of their own.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_keep: list[mmap.mmap] = []


def guarded(t: Tensor) -> Tensor:
    """A dense copy of `t` right before a page that may not be touched."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = (size + page - 1) // page + 1
    area = mmap.mmap(-1, pages * page)
    _keep.append(area)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert _libc.mprotect(base + (pages - 1) * page, page, 0) == 0
    flat = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=(pages - 1) * page - size)
    return flat.copy_(t.flatten()).view(t.shape)


def guarded_nhwc(t: Tensor) -> Tensor:
    """The same of [N, C, H, W] in channels_last."""
    return guarded(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def guard_outputs() -> None:
    """From now on `torch.empty` guards what it makes in channels_last, as answers are made."""
    empty = torch.empty

    def guarded_empty(*args: Any, **kwargs: Any) -> Tensor:
        t = empty(*args, **kwargs)
        return guarded_nhwc(t) if kwargs.get("memory_format") is torch.channels_last else t

    torch.empty = guarded_empty

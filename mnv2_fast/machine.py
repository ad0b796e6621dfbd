"""What this process may use of the machine: cores, memory, a device of torch's.

Linux promises memory that it does not have and ends the process that touches it: `malloc` does not fail. So
what is going to be needed is compared with what is left before the work.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    import torch

MAX_THREADS = 1024  # as csrc/parallel.h says

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")

# Below it nobody asks: reading the limits takes about 300 us.
_SMALL = 256 * 2**20

_once = threading.Lock()
_warned = False


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def warn_of_threads(threads: int) -> None:
    """Say once in a process that there are more threads than cores."""
    global _warned
    have = cores()
    if threads <= have:
        return
    with _once:
        if _warned:
            return
        _warned = True
    warnings.warn(
        f"threads={threads} is more than the {have} core(s) this process may use: threads take turns there, "
        f"threads={have} is faster",
        RuntimeWarning,
        stacklevel=4,
    )


def device(name: str | torch.device) -> torch.device:
    """A device that is here, as tensors on it name theirs: a GPU with its number.

    Raises:
        UserError: there is no such device.
    """
    import torch  # here alone: help and mistakes of the command line load none

    try:
        place = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={str(name)!r} is none: use cpu, or cuda where there is a GPU") from None
    if place.type == "cpu":
        return torch.device("cpu")
    module: Any = getattr(torch, place.type, None)  # torch.cuda, say; meta has none
    if not (hasattr(module, "is_available") and module.is_available()):
        raise UserError(f"device={str(name)!r}: torch finds no such device here, use cpu")
    index = module.current_device() if place.index is None else place.index
    if index >= module.device_count():
        raise UserError(f"device={str(name)!r}: there are {module.device_count()} here, counted from 0")
    return torch.device(place.type, index)


def available_memory() -> int | None:
    """Bytes that the machine and the control groups of this process still have; None where neither says."""
    return min(_available(), default=None)


def fits_memory(need: int) -> bool:
    """Whether as many bytes are left, as far as can be known."""
    if need <= _SMALL:
        return True
    have = available_memory()
    return have is None or need <= have


def no_memory(need: int, n: int, h: int, w: int) -> MemoryError:
    """What to raise where a batch of images of h x w needs more bytes than are left."""
    have = available_memory()
    left = "" if have is None else f", {have / 1e9:.1f} GB are left"
    return MemoryError(
        f"no memory for {n} images of {h} x {w}: {need / 1e9:.1f} GB are needed{left}: "
        "use smaller batches or images"
    )


def _available() -> Iterator[int]:
    kilobytes = _fields(_PROC / "meminfo").get("MemAvailable:")
    if kilobytes is not None:
        yield kilobytes * 1024
    for group, limit, usage, cache in _memory_groups():
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            # Pages of files count as used, but go when memory is asked for.
            yield max(0, most - used + _fields(group / "memory.stat").get(cache, 0))


def _memory_groups() -> Iterator[tuple[Path, str, str, str]]:
    """(folder, names of its limit, usage and file pages) of the process's group and those around it."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.strip("/")
        while True:  # the group of a container may not be seen from inside it; its root is then the limit
            if group.is_dir():
                yield group, *names
            if group == root:
                break
            group = group.parent


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or a word such as `max` in it."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """`name number` lines of a file; empty where there is none."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}

"""What memory this process holds, in bytes, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

_SELF = Path("/proc/self")


def resident() -> float:
    """Held now."""
    return _status("VmRSS")


def peak() -> float:
    """The most that was held since the process began, or since `restart_peak`."""
    return _status("VmHWM")


def restart_peak() -> None:
    """Let the peak begin anew, from what is held now."""
    (_SELF / "clear_refs").write_text("5", encoding="ascii")


def _status(name: str) -> float:
    for line in (_SELF / "status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024.0 * int(value.split()[0])
    raise KeyError(name)

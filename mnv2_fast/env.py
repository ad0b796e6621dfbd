"""Every environment variable the package reads. `mnv2 info` prints this table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

BACKENDS = ("auto", "eager", "cpu", "triton")


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, what it does and what it is when unset."""

    name: str
    meaning: str
    default: str = ""

    def get(self) -> str:
        """The value now, stripped; the default where it is unset or empty."""
        return os.environ.get(self.name, "").strip() or self.default


FORCE_ISA = Variable("MNV2_FORCE_ISA", "instruction set of the CPU kernels, instead of the best one here")
BACKEND = Variable("MNV2_BACKEND", f"backend of every model: {', '.join(BACKENDS)}", "auto")
STRICT = Variable("MNV2_STRICT", "1: a call that no fast path can serve is an error", "0")
WEIGHTS = Variable("MNV2_WEIGHTS", "folder searched for weights before torch hub's cache and any download")
DATA = Variable("MNV2_DATA", "folder for photos that are fetched, instead of one in torch hub's cache")

VARIABLES = (FORCE_ISA, BACKEND, STRICT, WEIGHTS, DATA)


def force_isa() -> str | None:
    """The instruction set asked for, or None. Whether it exists here is for the CPU backend to say."""
    return FORCE_ISA.get().lower() or None


def backend() -> str:
    """The backend asked for.

    Raises:
        UserError: the value names no backend.
    """
    return check_backend(BACKEND.get().lower(), BACKEND.name)


def check_backend(name: str, where: str = "backend") -> str:
    """`name` if it is a backend.

    Raises:
        UserError: it is not; the message lists the valid ones.
    """
    if name not in BACKENDS:
        raise UserError(f"{where}={name!r} is no backend: use one of {', '.join(BACKENDS)}")
    return name


def strict() -> bool:
    """Whether a call that no fast path serves is an error.

    Raises:
        UserError: the value is neither 0 nor 1.
    """
    value = STRICT.get()
    if value not in ("0", "1"):
        raise UserError(f"{STRICT.name}={value!r}: use 0 or 1")
    return value == "1"


def weights_folder() -> Path | None:
    """The folder to search for weights, or None.

    Raises:
        UserError: it is set but is no folder.
    """
    return _folder(WEIGHTS, "that holds weights")


def data_folder() -> Path | None:
    """The folder for photos that are fetched, or None.

    Raises:
        UserError: it is set but is no folder.
    """
    return _folder(DATA, "for photos")


def _folder(variable: Variable, what: str) -> Path | None:
    value = variable.get()
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise UserError(f"{variable.name}={value!r} is no folder: set it to one {what}, or unset it")
    return folder

"""How each engine is used: one module each, with the same two functions.

`prepare(case)` writes the engine's own files of the network into `case.files`: exported, quantized or packed
ahead, as its users would. `load(case)` reads them in another process and returns `bind`: from normalized
images, float32 [batch, 3, H, W] contiguous, to the call that answers them. The call takes nothing, returns
the logits and is what is timed; whatever layout or buffer an engine likes best is made in `bind`. `load`
imports nothing but its engine, since it is timed too. Two more where they are needed: `imports()` imports all
that a row's `needs` do not say, and `note(case)` says what a reader of the numbers has to know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Call = Callable[[], Any]
Bind = Callable[[Any], Call]


@dataclass(frozen=True)
class Case:
    """One contender in one setting.

    Attributes:
        material: folder of what everyone shares, see `bench.material`.
        files: folder of the contender's own files.
        dtype: "fp32", "bf16" or "int8".
        batch: images a call.
        threads: threads of the engine; its process is pinned to as many cores.
        calibration: 0 or 1: the half of the photos that an int8 network is calibrated on.
        options: the contender's own.
    """

    material: str
    files: str
    dtype: str = "fp32"
    batch: int = 1
    threads: int = 1
    calibration: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """A file of the contender's own."""
        return Path(self.files) / name

"""What this machine can do at most, measured by our own kernels: `python -m bench.limits THREADS`."""

from __future__ import annotations

import functools
import json
import operator
import os
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass

from .results import ROOT

COPY_MEGABYTES = 256  # far past every cache
REPEATS = 3  # a limit is the most that was ever seen: whoever else runs here can only lower it


@dataclass(frozen=True)
class Limits:
    """10^9 a second: `gmacs` float32 multiply-accumulates, `bf16_gmacs` and `int8_gmacs` those by what our
    kernels multiply bf16 and int8 with, `gbs` bytes read and written by memcpy."""

    gmacs: float
    gbs: float
    bf16_gmacs: float
    int8_gmacs: float

    def __or__(self, other: Limits) -> Limits:
        """The larger of each."""
        return Limits(*map(max, astuple(self), astuple(other)))

    def peak(self, dtype: str) -> float:
        """GMAC/s that a precision's share is of."""
        return {"fp32": self.gmacs, "bf16": self.bf16_gmacs, "int8": self.int8_gmacs}[dtype]


def measure(threads: int) -> Limits:
    """The limits of `threads` threads, the best of a few processes pinned to as many cores.

    Raises:
        RuntimeError: the extension is not there; the message says why.
    """
    return functools.reduce(operator.or_, (_measure_once(threads) for _ in range(REPEATS)))


def _measure_once(threads: int) -> Limits:
    environment = {name: value for name, value in os.environ.items() if name != "MNV2_FORCE_ISA"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.limits", str(threads)],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the limits cannot be measured"])[-1])
    return Limits(**json.loads(done.stdout))


def cores(threads: int, first: int = 0) -> list[int]:
    """`threads` of the cores that this process may use, from the `first`-th on.

    Raises:
        ValueError: there are not so many.
    """
    usable = sorted(os.sched_getaffinity(0))
    if first + threads > len(usable):
        raise ValueError(f"{first + threads} cores are needed and {len(usable)} may be used here")
    return usable[first : first + threads]


def main(arguments: list[str]) -> int:
    """Print the limits of as many threads as asked (1 by default), as JSON."""
    threads = int(arguments[0]) if arguments else 1
    os.sched_setaffinity(0, cores(threads))
    import torch  # noqa: F401 (its OpenMP runtime is the one the extension must find)

    from mnv2_fast import _C

    found = Limits(
        gmacs=_C.fma_peak(threads),
        gbs=_C.copy_bandwidth(COPY_MEGABYTES, threads),
        bf16_gmacs=_C.dot2_peak(threads),
        int8_gmacs=_C.dot4_peak(threads),
    )
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

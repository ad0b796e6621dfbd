"""How long a fresh process takes to its first answer, and what memory it takes: `bench.peers` runs this.

Files are in the page cache. The interpreter and numpy, which reads the photo, are there before the clock
starts.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

from . import limits, material, memory
from .contenders import find
from .engines import Case

CALLS = 3  # for the memory: some engines take more at the second call


def measure(title: str, case: Case) -> dict[str, float]:
    """Milliseconds and bytes.

    Returns:
        `start_ms`: from nothing imported to the first answer; `first_ms`: of that, loading the network and
        the first answer; `memory`: the most bytes the process held over what it held before loading.
    """
    photo = material.photos(case.material, 1)
    contender = find(title)
    engine = contender.module
    begin = time.perf_counter()
    for name in contender.needs:
        importlib.import_module(name)
    if hasattr(engine, "imports"):
        engine.imports()
    imported = time.perf_counter()
    memory.restart_peak()
    before = memory.resident()
    loading = time.perf_counter()
    call = engine.load(case)(photo)
    call()
    end = time.perf_counter()
    for _ in range(CALLS - 1):
        call()
    return {
        "start_ms": 1e3 * (imported - begin + end - loading),
        "first_ms": 1e3 * (end - loading),
        "memory": memory.peak() - before,
    }


def main(order: str) -> int:
    """Measure and print it as JSON."""
    asked = json.loads(order)
    case = Case(**asked["case"])
    os.sched_setaffinity(0, limits.cores(case.threads))
    print(f"\n{json.dumps(measure(asked['title'], case))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

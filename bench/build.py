"""The part of bench.peers that makes things, in processes of their own: shared files, and a contender's own.

A contender's files are made and then answer every photo, one by one, so that what is judged is what is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import material
from .contenders import Contender, environment, find
from .engines import Case
from .results import ROOT


class BuildError(RuntimeError):
    """A process that failed. The message is the last line it printed."""


@dataclass(frozen=True)
class Built:
    """A contender's files, and what it answered: `logits` is a .npy of [N, 1000]; `note` is the engine's."""

    contender: Contender
    case: Case
    bytes: int
    logits: Path
    note: str


def run(module: str, order: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Any:
    """What `python -m bench.MODULE ORDER` prints as its last line, from JSON.

    Raises:
        BuildError: it failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{module}", json.dumps(order)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        errors.seek(0)
        printed = errors.read().strip().splitlines()
        raise BuildError(printed[-1] if printed else f"exit code {done.returncode}")


def case_of(contender: Contender, folder: str, half: int = 0, threads: int = 1) -> Case:
    """The contender's case at batch 1."""
    files = Path(folder) / f"{contender.title} {half}".replace(" ", "_").replace(",", "")
    return Case(
        folder,
        str(files),
        contender.dtype,
        threads=threads,
        calibration=half,
        options=dict(contender.options),
    )


def shared(folder: str, pictures: Path, count: int | None, onnx: bool) -> None:
    """Make the shared folder; the exact answers and the ONNX file at once."""
    run("build", {"do": "make", "folder": folder, "pictures": str(pictures), "count": count})
    steps = ["exact", *(["onnx"] if onnx else [])]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(run, "build", {"do": step, "folder": folder}) for step in steps]:
            done.result()


def everyone(
    chosen: list[Contender], folder: str, halves: Sequence[int], say: Callable[[str], None]
) -> dict[Contender, list[Built]]:
    """Build all contenders, two at a time, int8 ones once for each half; those that fail are named."""
    built: dict[Contender, list[Built]] = {}
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            contender: [
                pool.submit(_build, contender, folder, half)
                for half in (halves if contender.dtype == "int8" else (0,))
            ]
            for contender in sorted(chosen, key=lambda row: not row.tedious)
        }
        for contender in chosen:
            try:
                built[contender] = [job.result() for job in jobs[contender]]
            except BuildError as error:
                say(f"left out: {contender.title}: {error}")
    return built


def _build(contender: Contender, folder: str, half: int) -> Built:
    case = case_of(contender, folder, half)
    order = {"do": "build", "title": contender.title, "case": asdict(case)}
    found = run("build", order, environment(contender.env, folder))
    return Built(contender, case, found["bytes"], Path(found["logits"]), found["note"])


def _answer(title: str, case: Case) -> dict[str, Any]:
    import numpy as np

    engine, files = find(title).module, Path(case.files)
    files.mkdir(parents=True)
    engine.prepare(case)
    size = sum(file.stat().st_size for file in files.iterdir())
    bind = engine.load(case)
    photos = material.photos(case.material)
    logits = np.stack([_numbers(bind(photos[i : i + 1].copy())()) for i in range(len(photos))])
    target = files / "logits.npy"
    np.save(target, logits)
    note = engine.note(case) if hasattr(engine, "note") else ""
    return {"bytes": size, "logits": str(target), "note": note}


def _numbers(logits: Any) -> Any:
    """[classes] float32, copied: engines answer into buffers that they use again."""
    import numpy as np

    return np.array(logits.float() if hasattr(logits, "float") else logits, dtype=np.float32).reshape(-1)


def main(order: str) -> int:
    """Do what is asked and print the answer as JSON."""
    asked = json.loads(order)
    answer: Any = None
    if asked["do"] == "make":
        material.make(asked["folder"], Path(asked["pictures"]), asked["count"])
    elif asked["do"] == "exact":
        material.answer_exactly(asked["folder"])
    elif asked["do"] == "onnx":
        material.export_onnx(asked["folder"])
    else:
        answer = _answer(asked["title"], Case(**asked["case"]))
    print(f"\n{json.dumps(answer)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

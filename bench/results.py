"""Where every benchmark's rows go: one schema, added to CSV files under bench/results/.

Only the standard library is imported, so that a benchmark can run where the package is not installed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "onnxruntime",
    "openvino",
    "nncf",
    "executorch",
    "torchao",
    "ncnn",
    "pnnx",
    "onnx",
    "numpy",
)


@dataclass(frozen=True)
class Row:
    """One measurement. Times are milliseconds a call; shares are of the limit measured in the same run.

    `bench` is the program, `name` what was measured (an operator's layer, or the network), `contender` who
    did it and `form` how (a session, streams, ...). `ms_alone` is the median with every other contender
    stopped; `noisy` says that it differs from `ms` by more than 10%. `gmacs` are 10^9 multiply-accumulates a
    second, `gbs` 10^9 bytes read and written a second, each tensor counted once. `gmacs_peak` is fp32's in
    every row, `own_peak` the one that `gmacs_share` is of.

    Of a network's answers: `agreement` is the share of photos with the first class of the float network,
    `top1` that with the right one, `logit_error` the largest error of a logit. `file_mb` are 10^6 bytes of
    its files; `start_ms` the time of a fresh process from nothing imported to the first answer, `first_ms`
    that without the imports; `peak_mb` 10^6 bytes of memory over what the process held before loading.

    Of training: `ms` is a step's and `first_ms` the first one's, which may compile; `peak_mb` is over what
    the process held once model and optimizer were made; `noisy` says that the medians of its turns differ by
    more than 10%; `loss` is that of the `step`-th step, from 1.

    Of a whole training: `seed`, `epochs`, `top1` of the averaged weights of the last one, `best_top1` of the
    best one, `seconds` of the command, `images_per_s` while it trains.
    """

    bench: str
    name: str
    contender: str
    dtype: str = "fp32"
    device: str = "cpu"
    isa: str = ""
    size: str = "224"
    batch: int = 1
    threads: int = 1
    form: str = "session"
    ms: float = float("nan")
    ms_p20: float = float("nan")
    ms_p80: float = float("nan")
    ms_alone: float | None = None
    noisy: bool = False
    images_per_s: float | None = None
    gmacs: float | None = None
    gmacs_peak: float | None = None
    own_peak: float | None = None
    gmacs_share: float | None = None
    gbs: float | None = None
    gbs_copy: float | None = None
    gbs_share: float | None = None
    agreement: float | None = None
    top1: float | None = None
    logit_error: float | None = None
    file_mb: float | None = None
    start_ms: float | None = None
    first_ms: float | None = None
    peak_mb: float | None = None
    step: int | None = None
    loss: float | None = None
    seed: int | None = None
    epochs: int | None = None
    best_top1: float | None = None
    seconds: float | None = None
    weights: str = ""
    note: str = ""


CONTEXT = ("run", "machine", "processor", "cores", "python", "versions", "commit")
COLUMNS = (*(field.name for field in fields(Row)), *CONTEXT)


def processor() -> str:
    """The processor's name as the system gives it, with family and model, which names alone often hide."""
    facts: dict[str, str] = {}
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name


def versions() -> str:
    """Versions of the packages that matter, those that are installed."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def commit() -> str:
    """The checkout's commit, with a + where tracked files differ from it; empty outside a checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        # The results are tracked too; rows appended to them are no change to what is measured.
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!README.md"
        )
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except OSError:
        return ""


def context() -> dict[str, str]:
    """What all rows of one run share. `run` is the time of its start, UTC."""
    return {
        "run": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": socket.gethostname(),
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
    }


def save(path: Path, rows: Iterable[Row], shared: Mapping[str, str]) -> None:
    """Add the rows of one run to a CSV file, made with its header where it is absent.

    What the file has of the same run gives way to them, so that a run may save all it has as often as it
    likes. The file is written beside and renamed: whoever is cut off leaves the last whole one.

    Raises:
        ValueError: the file there has a column that is none of ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(reader.fieldnames or ()) <= set(COLUMNS):
                raise ValueError(
                    f"{path} has other columns: move it away, or name another file with --output"
                )
            kept = [row for row in reader if row.get("run") != shared["run"]]
    ours = ({name: _text(value) for name, value in {**asdict(row), **shared}.items()} for row in rows)
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows(ours)
    os.replace(beside, path)


def read_last_run(path: Path) -> list[dict[str, str]]:
    """The rows of the newest run in a CSV file.

    Raises:
        FileNotFoundError: it is absent or holds no row.
    """
    return read_last_runs(path)[0]


def read_last_runs(path: Path) -> list[list[dict[str, str]]]:
    """The rows of the newest run on each processor in a CSV file, the newest one first.

    Raises:
        FileNotFoundError: it is absent or holds no row.
    """
    rows: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise FileNotFoundError(f"no rows in {path}: run the benchmark that writes it")
    newest: dict[str, str] = {}
    for row in rows:
        newest[row["processor"]] = max(row["run"], newest.get(row["processor"], ""))
    order = sorted(newest, key=newest.__getitem__, reverse=True)
    return [[row for row in rows if (row["processor"], row["run"]) == (of, newest[of])] for of in order]


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)

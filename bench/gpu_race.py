"""compute-sanitizer's racecheck on one launch of every kernel that is off by default."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bench import results
from bench.gpu_checks import CHECK_BATCH
from bench.gpu_children import kill_all
from bench.gpu_forms import TIMED, Form, forms, usable
from bench.gpu_training_forms import training_forms
from mnv2_fast.backends.triton import PROVEN

SANITIZER = ("compute-sanitizer", "--tool", "racecheck", "--print-limit", "20")
GROUPS = 4
BEGUN, DONE = "launched under racecheck: ", "came back: "
HAZARD = re.compile(r"^=+ +(?:Error|Warning|ERROR|WARNING): +(.*(?:[Rr]ace|hazard).*)$")
SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards?")
# The operator of a form, where it has another name.
OPERATORS = {
    "features": "head",
    "classifier": "pointwise",
    "stem of bytes": "stem",
    "block of bytes": "block",
    "depthwise, then project": "depthwise",
}


@dataclass
class Verdict:
    """Lines of hazards by form's name; the forms that have come back without; the others."""

    wrong: dict[str, str] = field(default_factory=dict)
    clean: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def off_by_default() -> list[Form]:
    """What this GPU has and the package does not use unasked, a training step's first, then whole blocks.

    One form a kernel, row of its tile table and variant: racecheck's few minutes are not enough for each
    shape. Of products it is the last, whose many channels have its loops go round most often, of others the
    first, which has the largest map.
    """
    off = [f for f in forms() if usable(f) and OPERATORS.get(f.name, f.name) not in PROVEN]
    off.sort(key=lambda form: not form.whole_block)
    chosen: dict[tuple[str, tuple[str, ...], str], Form] = {}
    for form in (*([] if "training" in PROVEN else training_forms()), *off):
        if form.variant is None:
            continue
        key = form.name, form.rows, form.variant
        if key not in chosen or (form.multiplies and _kind(form) == TIMED):
            chosen[key] = form
    return list(chosen.values())


def _kind(form: Form) -> str:
    """The kind that is timed, or the first that the form has."""
    kinds = form.kinds()
    return TIMED if TIMED in kinds else kinds[0]


def once(name: str) -> None:
    """One launch of the form of this name; with compute-sanitizer around the process, its hazards are told.

    Raises:
        ValueError: there is no such form.
    """
    known = itertools.chain(forms(), training_forms())
    form = next((form for form in known if str(form) == name), None)
    if form is None:
        raise ValueError(f"no form {name!r}: there is {next(iter(forms()))!s}, and what the checks name")
    probe = form.make(CHECK_BATCH, _kind(form))
    torch.cuda.synchronize()
    print(f"{BEGUN}{form}", flush=True)
    probe.run()
    torch.cuda.synchronize()
    time.sleep(0.2)  # what the sanitizer has to say comes from another process
    print(f"{DONE}{form}", flush=True)


def check_races(seconds: float) -> Verdict | None:
    """What racecheck says of what is off by default; None where there is no compute-sanitizer."""
    if shutil.which(SANITIZER[0]) is None:
        return None
    names = [str(form) for form in off_by_default()]
    groups = [group for k in range(GROUPS) if (group := names[k::GROUPS])]
    until, verdict = time.monotonic() + seconds, Verdict()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [open(f"{folder}/{k}", "w+", errors="replace") for k in range(len(groups))]  # noqa: SIM115
        children = [
            subprocess.Popen(
                [*SANITIZER, sys.executable, "-m", "bench.gpu", "--once", *group],
                cwd=results.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for group, output in zip(groups, outputs, strict=True)
        ]
        for group, child, output in zip(groups, children, outputs, strict=True):
            try:
                child.wait(max(until - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                kill_all(child)
                child.wait()
            output.seek(0)
            read(output.read(), group, verdict)
            output.close()
    return verdict


def read(text: str, group: Sequence[str], verdict: Verdict) -> None:
    """Add to a verdict what one process said of its group of forms.

    A hazard is of the form that was launched last; one that only the summary counts is of all of the group.
    """
    last, wrong = group[0], dict[str, str]()
    done: list[str] = []
    for line in text.splitlines():
        if line.startswith(BEGUN):
            last = line.removeprefix(BEGUN)
        elif line.startswith(DONE):
            done.append(line.removeprefix(DONE))
        elif (found := HAZARD.match(line)) is not None:
            wrong.setdefault(last, found[1])
        elif (found := SUMMARY.search(line)) is not None and int(found[1]) and not wrong:
            wrong = dict.fromkeys(done or group[:1], f"{found[1]} hazards here or in another of its group")
    verdict.wrong.update(wrong)
    verdict.clean += [name for name in done if name not in wrong]
    verdict.unchecked += [name for name in group if name not in done and name not in wrong]

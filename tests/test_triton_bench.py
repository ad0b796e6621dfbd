"""`python -m bench.gpu`, as far as it goes without a GPU: its children, its time, its races, its report."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

from bench import (
    gpu,
    gpu_checks,
    gpu_children,
    gpu_forms,
    gpu_race,
    gpu_report,
    gpu_resources,
    gpu_times,
    results,
)
from bench.gpu_checks import Check
from bench.gpu_children import Answer
from bench.gpu_forms import Form, Probe
from bench.gpu_training_forms import training_forms

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    command = [sys.executable, "-m", "bench.gpu"]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert child.stdout == ""
    assert child.stderr.count("\n") == 1
    assert "no CUDA device" in child.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.main([]) == 2
    assert "torch is not installed: install torch>=2.11" in capsys.readouterr().err


def test_runs_from_a_bare_checkout(tmp_path: Path) -> None:
    """No extension, and kernels where the repository has them."""
    for folder in ("bench", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    built = shutil.ignore_patterns("*.so", "*.pyd", "kernels")
    shutil.copytree(ROOT / "mnv2_fast", tmp_path / "mnv2_fast", ignore=built)
    shutil.copy(ROOT / "tests" / "triton_interpreter.py", tmp_path)
    program = (
        "import sys, torch, kernels, triton_interpreter\n"
        "triton_interpreter.mend()\n"
        "from bench import gpu, gpu_checks, gpu_forms, gpu_network, gpu_race, gpu_report\n"
        "from bench import gpu_times, gpu_tune\n"
        "gpu_forms.DEVICE = 'cpu'\n"
        "from mnv2_fast import arch\n"
        "layers = arch.layers(size=5, specs=[arch.LayerSpec('depthwise', '', '', 8, 8, 1, True)])\n"
        "form = gpu_forms.forms(layers)[0]\n"
        "said = [check.run() for check in gpu_checks.form_checks(form, 'fp16')]\n"
        "assert said == ['', ''], said\n"
        "assert gpu_checks.checks() and gpu_times.works() and gpu_tune.tries()\n"
        "ours = {name for name in sys.modules if name.startswith('mnv2_fast.')}\n"
        "leaves = {'arch', 'chain', 'env', 'errors', 'backends', 'backends.eager'}\n"
        "leaves |= {'backends.replay', 'backends.triton'}\n"
        "assert ours == {f'mnv2_fast.{name}' for name in leaves}, ours\n"
        "print(kernels.__file__)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    assert Path(child.stdout.strip()).parent.parent == tmp_path


def test_resources_are_printed_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    layers = gpu_resources.depthwise_layers()[:1]
    monkeypatch.setattr(gpu_resources, "depthwise_layers", lambda: layers)
    assert gpu.main(["--resources"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[-3:] == ["registers", "stack", "local"]
    assert len(lines) == 12
    assert all(line.split()[-2:] == ["0", "0"] for line in lines)


CHILD = f"""
import os, sys, time
sys.path.insert(0, {os.fspath(ROOT)!r})
from bench import gpu_children

lost = []

def answer(number):
    print("what a library prints", flush=True)
    if number == 2:
        raise RuntimeError("ptxas\\nis out of registers")
    if number == 3:
        print("Segmentation fault", file=sys.stderr)
        os._exit(139)
    if number == 4:
        lost.append(number)
    if number == 5:
        time.sleep(60)
    return number * number

gpu_children.context_lost = lambda: bool(lost)
sys.exit(gpu_children.serve(answer))
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return [sys.executable, os.fspath(path)]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_breaks_a_child_costs_only_itself(command: list[str], workers: int) -> None:
    """An error, a crash, a lost context, and a hang, each in the midst of numbers that are answered."""
    found = {
        answer.number: answer
        for answer in gpu_children.answers(command, range(9), 60, workers=workers, answer_s=3)
    }
    assert sorted(found) == list(range(9))
    assert {n: a.found for n, a in found.items() if not a.failed} == {n: n * n for n in (0, 1, 6, 7, 8)}
    assert found[2].failed == "RuntimeError: is out of registers"
    assert found[3].failed == "its process ended with 139: Segmentation fault"
    assert "nothing runs in its CUDA context any more" in found[4].failed
    assert found[5].failed == "no answer within 3 s"


def test_children_end_in_time(command: list[str]) -> None:
    """What had an answer is kept; what hangs, and what nobody took, has none."""
    began = time.monotonic()
    found = [answer.number for answer in gpu_children.answers(command, [1, 5, 6], 4)]
    assert found == [1]
    assert time.monotonic() - began < 8


def test_children_that_are_not_wanted_any_more_end(command: list[str]) -> None:
    began = time.monotonic()
    found = gpu_children.answers(command, [1, 5, 5, 5], 60)
    assert next(found).number == 1
    found.close()
    assert time.monotonic() - began < 20


def test_a_child_that_does_not_start_is_told_once() -> None:
    found = list(gpu_children.answers(["/bin/false"], range(5), 20))
    assert [(answer.number, answer.failed) for answer in found] == [
        (0, "its process ended with 1: no message")
    ]


def test_a_lost_context_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_children.context_lost()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_children.context_lost()


def _check(name: str, subject: str = "") -> Check:
    return Check(name, subject, lambda: "")


def test_only_what_was_checked_and_is_right_is_right(capsys) -> None:
    verdicts = gpu.Verdicts()
    for subject, tile, answer in (
        ("right", "large", Answer(0, "")),
        ("right", "small", Answer(1, "")),
        ("wrong", "large", Answer(2, "3 of 4 values beyond tolerance")),
        ("wrong", "small", Answer(3, "")),
        ("broken", "large", Answer(4, None, "RuntimeError: is out of registers")),
        ("too large", "large", Answer(5, None, "OutOfMemoryError: CUDA out of memory")),
        ("late", "large", Answer(6, "")),
        ("late", "small", None),
    ):
        verdicts.take(_check(f"{subject} {tile}", subject), answer)
    assert [name for name in verdicts.subjects if verdicts.right(name)] == ["right"]
    assert not verdicts.right("never heard of")
    gpu.print_verdicts(verdicts)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "WRONG wrong large: 3 of 4 values beyond tolerance",
        "WRONG broken large: RuntimeError: is out of registers",
        "not checked: too large large: OutOfMemoryError: CUDA out of memory",
        "not checked: late small: no time left",
        "2 checks are WRONG, 2 were not made",
    ]


def _form(name: str) -> Form:
    out = torch.zeros(4, 5)
    probe = Probe(lambda x, out: out, out, out, lambda: (out, out), lambda: None, ())
    return Form(name, "8 to 8 s1", 7, 10**9, 3, lambda batch, kind, tile=None: probe, "stem")


TIMES = [2.0, 1.0, 3.0]
COPY = {"gbs": 4000.0, "floors": {"layer by layer": 27.5e6}}


@pytest.fixture
def program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, list[dict[str, str]]]]:
    """The whole program on three forms, of which "off" is wrong and "unchecked" has no time, and one network;
    its children are stubs. Returns its code and rows.
    """
    forms = [_form("right"), _form("off"), _form("unchecked")]
    checks = [_check(f"{form}, fp16, half", str(form)) for form in forms]
    checks.append(_check("network by layer, fp16, photos as bytes", "network by layer"))
    monkeypatch.setattr(gpu_checks, "checks", lambda: checks)
    monkeypatch.setattr(gpu_times, "forms", lambda: forms)
    monkeypatch.setattr(gpu_times, "training_forms", list)
    monkeypatch.setattr(gpu_times, "has_blocks", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")

    def run(
        fail_at: str = "", budget: float = 100.0, races: gpu_race.Verdict | None = None, failing: bool = True
    ) -> tuple[int, list[dict[str, str]]]:
        monkeypatch.setattr(gpu_race, "check_races", lambda seconds: races)

        def answers(
            command: Sequence[str], numbers: Iterable[int], seconds: float, workers: int = 1, **_: float
        ) -> Iterator[Answer]:
            name = command[-1]
            for number in numbers:
                if name == "checks" and not (failing and number == 2):
                    wrong = failing and number == 1
                    yield Answer(number, "19 of 20 values beyond tolerance" if wrong else "")
                if name == "compiled" and number != 8:
                    yield Answer(number, [8.0, 7.0, 9.0])
                if name == "times":
                    work = gpu_times.works()[number]
                    if work.name == fail_at:
                        raise KeyboardInterrupt
                    values: Any = {"bytes": 10**6, gpu_times.OURS: TIMES, gpu_times.EAGER: [4.0, 4.0, 4.0]}
                    values[gpu_times.NO_GRAPH] = {gpu_times.OURS: "", gpu_times.EAGER: ""}
                    yield Answer(number, COPY if number == 0 else values if work.form else TIMES)

        monkeypatch.setattr(gpu, "answers", answers)
        path = tmp_path / "gpu.csv"
        try:
            code = gpu.run(path, time.monotonic() + budget)
        except KeyboardInterrupt:
            code = -1
        return code, results.read_last_run(path)

    return run


def test_every_measurement_of_what_is_right_makes_a_row(program: Callable, capsys) -> None:
    code, rows = program()
    assert code == 1
    named = [(row["name"], row["contender"], int(row["batch"])) for row in rows]
    batches = (256, 1, 32, 1024, 8)
    ours, eager, compiled = "mnv2_fast by layer", gpu_times.EAGER, gpu_times.COMPILED
    assert named == [
        *[("network", contender, batch) for batch in batches for contender in (ours, eager)],
        ("right 8 to 8 s1", "mnv2_fast", 256),
        ("right 8 to 8 s1", eager, 256),
        *[("network", compiled, batch) for batch in batches],
    ]
    for row in rows[:11]:
        assert (row["device"], row["dtype"], row["ms"], row["ms_p20"], row["ms_p80"]) == (
            *("a GPU", "fp16"),
            *("2", "1", "3"),
        )
    gbs = 1e6 / 1e9 / 2e-3
    assert float(rows[10]["gbs"]) == pytest.approx(gbs)
    assert float(rows[10]["gbs_share"]) == pytest.approx(gbs / 4000, rel=1e-5)
    assert rows[-1]["ms"] == "nan"
    assert rows[-1]["note"].startswith("not compiled within")
    said = capsys.readouterr().out.splitlines()
    assert f"not checked: {_form('unchecked')}, fp16, half: no time left" in said
    table = said[said.index(next(line for line in said if line.startswith("images/s"))) :]
    assert table[-1] == "floor, layer by layer: 27.50 MB an image, 145455 images/s at a copy's speed"
    batch_8, batch_256 = (table[1 + i].split() for i in (1, 3))
    assert batch_256 == ["256", "128000", "128000", "32000", "1.00x", "4.00x"]
    assert batch_8 == ["8", "4000", "4000", "-", "1.00x", "-"]


def test_what_racecheck_did_not_come_to_was_not_checked(program: Callable, capsys) -> None:
    """So the program returns 1, as it does not where there is no racecheck; the form is timed."""
    assert program(failing=False)[0] == 0
    assert program(failing=False, races=gpu_race.Verdict(clean=["a", "b"]))[0] == 0
    capsys.readouterr()
    form = str(_form("right"))
    code, rows = program(failing=False, races=gpu_race.Verdict(unchecked=[form]))
    assert code == 1
    said = capsys.readouterr().out.splitlines()
    assert f"not checked: {form}: racecheck did not come to it" in said
    assert "0 checks are WRONG, 1 were not made" in said
    assert "right 8 to 8 s1" in {row["name"] for row in rows}


def test_rows_are_saved_whatever_happens(program: Callable, capsys) -> None:
    code, rows = program(fail_at=str(_form("right")))
    assert code == -1
    assert len(rows) == 10
    assert "10 rows added" in capsys.readouterr().out


def test_rows_are_saved_as_they_come(program: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a program that is killed saves nothing at its end."""
    saved: list[int] = []
    monkeypatch.setattr(
        results,
        "save",
        lambda path, rows, context, to=results.save: saved.append(len(rows)) or to(path, rows, context),
    )
    program()
    assert saved == [0, *range(1, 11), 12, *range(13, 18), 17]


def test_kernels_are_summed_up_by_name(capsys) -> None:
    report = gpu_report.Report("a GPU")
    form, other = _form("depthwise"), _form("depthwise")
    other = Form("depthwise", "other", 7, 10**9, 1, other.make)
    copy = gpu_times.Work("copy", "", "", 1, lambda: None)
    report.take(copy, Answer(0, COPY))
    for one, ours, eager in ((form, 0.5, 1.0), (other, 2.0, "OutOfMemoryError")):
        theirs = eager if isinstance(eager, str) else [eager] * 3
        found = {"bytes": 10**9, gpu_times.OURS: [ours] * 3, gpu_times.EAGER: theirs}
        found[gpu_times.NO_GRAPH] = {gpu_times.OURS: "it waits" if ours == 2 else "", gpu_times.EAGER: ""}
        report.take(gpu_times.Work(str(one), "mnv2_fast", str(one), 256, lambda: None, one), Answer(1, found))
    report.take(
        gpu_times.Work("off", "mnv2_fast", "off", 256, lambda: None, _form("off")),
        Answer(2, None, "it hangs"),
    )
    said = capsys.readouterr().out
    assert "off: it hangs" in said
    assert said.count("called, not replayed: it waits\n") == 1
    kernels = next(line for line in report.tables() if line.startswith("depthwise")).split()
    # 3 x 0.5 + 2 ms for 4 GB: 1143 GB/s of 4000; the slower one has 500.
    assert kernels == ["depthwise", "3.500", "nan", "29%", "12%", "nowhere"]
    assert [row.note for row in report.rows if math.isnan(row.ms)] == ["OutOfMemoryError"]
    notes = [row.note for row in report.rows if row.contender == gpu_times.OURS]
    assert notes == ["occurs 3 times", "occurs 1 times; called, not replayed: it waits"]


RACE = """========= Warning: Race reported between Write access at block_kernel+0x10
=========     and Read access at block_kernel+0x20 [16 hazards]
"""


def test_a_hazard_is_of_the_form_that_was_launched_last() -> None:
    begun, done = gpu_race.BEGUN, gpu_race.DONE
    verdict = gpu_race.Verdict()
    text = f"========= COMPUTE-SANITIZER\n{begun}a\n{done}a\n{begun}b\n{RACE}{done}b\n{begun}c\n"
    gpu_race.read(text + "========= RACECHECK SUMMARY: 1 hazard displayed\n", ["a", "b", "c", "d"], verdict)
    assert list(verdict.wrong) == ["b"]
    assert "Race reported between Write access at block_kernel" in verdict.wrong["b"]
    assert (verdict.clean, verdict.unchecked) == (["a"], ["c", "d"])


def test_hazards_that_only_the_summary_counts_are_of_the_group() -> None:
    verdict = gpu_race.Verdict()
    text = f"{gpu_race.BEGUN}a\n{gpu_race.DONE}a\n========= RACECHECK SUMMARY: 0 hazards displayed\n"
    gpu_race.read(text, ["a"], verdict)
    assert (verdict.wrong, verdict.clean) == ({}, ["a"])
    gpu_race.read(text.replace(": 0", ": 2"), ["a"], verdict)
    assert list(verdict.wrong) == ["a"]


def test_racecheck_is_run_where_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(gpu_forms, "DEVICE", "cpu")
    names = [str(form) for form in gpu_race.off_by_default()]
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    verdicts = gpu.Verdicts()
    assert gpu_race.check_races(5.0) is None
    gpu.take_races(verdicts, None)
    assert "races are not checked" in capsys.readouterr().out
    assert not verdicts.unchecked
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        "names = sys.argv[sys.argv.index('--once') + 1:]\n"
        f"for name in names[:-1]:\n    print({gpu_race.BEGUN!r} + name)\n"
        f"    if name == {names[0]!r}: print({RACE!r}, end='')\n"
        f"    print({gpu_race.DONE!r} + name, flush=True)\n"
        f"if {names[1]!r} in names: time.sleep(60)\n"
    )
    fake.chmod(0o755)
    began = time.monotonic()
    races = gpu_race.check_races(5.0)
    assert time.monotonic() - began < 10
    assert races is not None
    assert list(races.wrong) == [names[0]]
    assert len(races.unchecked) == gpu_race.GROUPS
    assert len(races.clean) == len(names) - 1 - gpu_race.GROUPS
    gpu.take_races(verdicts, races)
    assert not verdicts.right(names[0])
    assert verdicts.wrong[0].startswith(f"{names[0]}: racecheck: Race reported")
    assert verdicts.unchecked == [f"{name}: racecheck did not come to it" for name in races.unchecked]


def test_proven_forms_are_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_race, "usable", lambda form: True)
    raced = gpu_race.off_by_default()
    everything = {form.name for form in raced}
    theirs = {form.name for form in (*gpu_forms.forms(), *training_forms())}
    assert theirs - everything == {"depthwise, then project"}  # launches of two others
    of_steps = [form.name.startswith("train") for form in raced]
    assert of_steps == sorted(of_steps, reverse=True)
    assert next(form for form in raced if not form.name.startswith("train")).whole_block
    monkeypatch.setattr(gpu_race, "PROVEN", frozenset({"block", "head", "stem"}))
    left = {form.name for form in gpu_race.off_by_default()}
    assert everything - left == {"block", "block of bytes", "stem", "stem of bytes", "features"}


def test_each_kernel_is_raced_once_in_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough for the time; whatever a kernel reads, masks or adds to is among them."""
    monkeypatch.setattr(gpu_race, "usable", lambda form: True)
    raced = gpu_race.off_by_default()
    assert len(raced) < 65
    keys = [(form.name, form.rows, form.variant) for form in raced]
    assert len(keys) == len(set(keys))
    for form in (*gpu_forms.forms(), *training_forms()):
        assert form.variant is None or (form.name, form.rows, form.variant) in keys, str(form)
    kept = dict(zip(keys, raced, strict=True))
    of_projections = kept["train pointwise gradients", ("{}",), "reads relu6"]
    assert str(of_projections) == "train pointwise gradients 960 to 160 s1 at 7"
    of_depthwise = kept["train depthwise", ("forward_s1",), "reads relu6"]
    assert str(of_depthwise) == "train depthwise 32 to 32 s1 at 112"
    of_input = kept["train pointwise input gradient", ("input_{}",), "reads as it is, added to"]
    assert "fp16" in of_input.kinds()


def test_once_takes_a_kind_that_the_form_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that float32 alone makes apart."""
    asked: list[str] = []
    probe = Probe(lambda x, out: None, *[None] * 4, ())
    few = [
        Form("f", "", 7, 1, 1, lambda batch, kind: asked.append(kind) or probe, among=among)
        for among in (("fp32", "tf32"), ("fp32", "fp16"))
    ]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for form in few:
        monkeypatch.setattr(gpu_race, "forms", lambda form=form: [form])
        gpu_race.once(str(form))
    assert asked == ["fp32", "fp16"]
    monkeypatch.setattr(gpu_race, "forms", list)
    for found in (few, few[::-1]):  # the kind that is timed is raced where a shape has it
        monkeypatch.setattr(gpu_race, "training_forms", lambda found=found: found)
        assert few[1] in gpu_race.off_by_default()
        assert few[0] not in gpu_race.off_by_default()


def test_once_launches_forms_by_name(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    launched = []
    form = Form(
        "f", "8 to 8 s1", 7, 1, 1, lambda *_: Probe(lambda x, out: launched.append(1), *[None] * 4, ())
    )
    monkeypatch.setattr(gpu_race, "forms", lambda: [form])
    monkeypatch.setattr(gpu, "unavailable", lambda needs_gpu: "")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu.main(["--once", "f 8 to 8 s1 at 7"]) == 0
    assert launched == [1]
    assert capsys.readouterr().out.splitlines() == [gpu_race.BEGUN + str(form), gpu_race.DONE + str(form)]
    with pytest.raises(ValueError, match="no form 'g'"):
        gpu_race.once("g")

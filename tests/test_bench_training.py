"""bench.training: that everyone trains alike, who is compared with whom, what is kept, printed and drawn."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import one_thread  # noqa: F401 (a fixture)
from torch import nn

sys.path.insert(0, str(ROOT))  # bench is not installed

from bench import limits, material, memory, plot, results
from bench.contenders import environment
from bench.training import bars, blocks, contenders, loops, losses, run
from bench.training import plot as charts
from bench.training.contenders import CONTENDERS, DTYPES, OURS, PLAIN, SETTINGS, STEP, TUNED
from bench.workers import WorkerError

TINY = ["--batch", "4", "--size", "64", "--threads", "1", "--rounds", "1", "--steps", "2", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the nominal core, and no published weights."""
    monkeypatch.setattr(limits, "measure", lambda threads: limits.Limits(117.6 * threads, 10.0, 200.0, 400.0))
    monkeypatch.setattr(material, "source", lambda: "seeded")


def row(contender: str, ms: float, name: str = STEP, dtype: str = "fp32", **more: object) -> results.Row:
    """A row as a full run has it."""
    facts = {"batch": 32, "threads": 2, "form": "step", "gmacs_peak": 235.2, "first_ms": 2 * ms, **more}
    return results.Row("training", name, contender, dtype, ms=ms, images_per_s=32e3 / ms, **facts)


def rows() -> list[results.Row]:
    """A run with bars reached and bars missed."""
    return [
        row(OURS, 400.0, peak_mb=900.0),
        row(PLAIN, 3200.0, peak_mb=2600.0),
        row(contenders.BEST, 1000.0, peak_mb=2800.0),
        row(contenders.COMPILED, 1100.0, peak_mb=1500.0, noisy=True),
        row(OURS, 800.0, dtype="bf16", peak_mb=600.0, note="because"),
        row(contenders.CHANNELS_LAST, 1000.0, dtype="bf16", peak_mb=1500.0),
        row(OURS, 500.0, name="classic", peak_mb=900.0),
        row(PLAIN, 2600.0, name="classic", peak_mb=2600.0),
        row(OURS, 100.0, name="batch-8", peak_mb=300.0),
        row(contenders.BEST, 250.0, name="batch-8", peak_mb=900.0),
    ]


def saved(path: Path, found: Sequence[results.Row]) -> list[dict[str, str]]:
    results.save(path, found, results.context())
    return results.read_last_run(path)


def test_bars_are_judged_by_torchs_best_of_the_precision() -> None:
    fp32, bf16, classic = bars.verdicts(rows())
    assert fp32 == (
        "step, fp32, batch 32, 224x224, 2 threads: 2.50x torch channels_last, tuned, asked 2.2x: reached; "
        "80.0 images/s, asked 75: reached (at 117.6 GMAC/s a core, not 58.8, 150: MISSED); "
        "0.60 of the memory of torch.compile, tuned, asked 0.5: MISSED"
    )
    assert "1.25x torch channels_last, asked 2.8x: MISSED; 40.0 images/s, asked 110: MISSED" in bf16
    assert bf16.endswith("0.40 of the memory of torch channels_last, asked 0.5: reached")
    assert classic.endswith("5.20x torch NCHW, asked 5.0x: reached")


@pytest.mark.parametrize("left", [OURS, PLAIN])
def test_bars_are_for_the_sizes_they_were_set_at(left: str) -> None:
    alone = [row(left, 400.0)]
    small = [row(OURS, 400.0, size="64"), row(PLAIN, 400.0, size="64")]
    for found in (alone, small):
        assert all(line.endswith("mnv2_fast against torch: not measured") for line in bars.verdicts(found))


def test_rows_of_the_tables_name_each_other() -> None:
    names = [one.name for one in CONTENDERS]
    assert len(set(names)) == len(names)
    assert {one.name for one in CONTENDERS if one.ours} == {OURS}
    settings = {one.name: one for one in SETTINGS}
    assert len(settings) == len(SETTINGS)
    assert all(set(one.contenders) <= set(names) for one in SETTINGS)
    assert {*losses.CURVES, contenders.BEST} <= set(names)
    for bar in bars.BARS:
        assert bar.dtype in settings[bar.setting].dtypes
    assert all(contenders.find(one.name) is one for one in CONTENDERS)
    assert all(contenders.setting_of(one.name) is one for one in SETTINGS)


def test_a_setting_has_torchs_best_of_the_step_before() -> None:
    norms, step = contenders.setting_of("frozen-norms"), contenders.setting_of(STEP)

    def names(*args: object) -> list[str]:
        return [one.name for one in run.competitors(*args)]

    assert names(step, "fp32", CONTENDERS, []) == [one.name for one in CONTENDERS]
    assert names(norms, "fp32", CONTENDERS, rows()) == [OURS, contenders.BEST]
    assert names(norms, "bf16", CONTENDERS, rows()) == [OURS, contenders.CHANNELS_LAST]
    assert names(norms, "fp32", CONTENDERS, []) == [OURS, contenders.BEST]
    assert names(contenders.setting_of("classic"), "fp32", CONTENDERS[:3], rows()) == [OURS, PLAIN]


def test_only_the_tuned_have_an_allocator_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("MNV2_BACKEND", "eager")
    for one in CONTENDERS:
        env = environment(one.env, str(tmp_path))
        assert {name: value for name, value in env.items() if name.startswith("MALLOC_")} == one.env
        assert one.env == (TUNED if one.name.endswith(", tuned") else {})
        assert "MNV2_BACKEND" not in env


def test_what_is_frozen() -> None:
    def learning(name: str) -> tuple[int, set[bool]]:
        setting = contenders.setting_of(name)
        model = loops.Loop(contenders.find(OURS), "fp32", setting.freeze).model
        norms = {m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
        assert model.training
        return sum(p.requires_grad for p in model.parameters()), norms

    assert learning("frozen-norms") == (158, {False})
    assert learning("head") == (2, {False})
    assert learning("head-train") == (2, {True})
    assert learning("batch-8") == (158, {True})


@pytest.mark.usefixtures("native", "one_thread")
@pytest.mark.parametrize("setting", [one.name for one in SETTINGS if not one.name.startswith("batch")])
def test_everyone_trains_alike(setting: str) -> None:
    """From one seed losses are the same, in any model and any layout, until rounding grows.

    A step of Adam on four small images moves ours by 3%.
    """
    found = {}
    for one in CONTENDERS[:3]:
        calls = loops.serve(one.name, "fp32", setting, 4, 64)
        assert calls("why_not")() == ""
        found[one.name] = [calls("step")() for _ in range(2)]
    expected = found.pop(PLAIN)
    assert expected[0] != expected[1]
    for name, values in found.items():
        assert values[0] == pytest.approx(expected[0], rel=1e-4), name
        assert values[1] == pytest.approx(expected[1], rel=5e-2), name


@pytest.mark.usefixtures("one_thread")
def test_autocast_is_on_for_bf16_alone() -> None:
    logits = []
    for dtype in DTYPES:
        loop = loops.Loop(contenders.find(PLAIN), dtype)
        loop.model.register_forward_hook(lambda model, args, y: logits.append(y.dtype))
        assert loop.step(torch.randn(2, 3, 64, 64), torch.arange(2)).dtype is torch.float32
    assert logits == [torch.float32, torch.bfloat16]


def test_the_peak_of_memory_begins_anew() -> None:
    held = memory.resident()
    block = torch.ones(40_000_000)
    assert memory.peak() - held > 100e6
    del block
    memory.restart_peak()
    assert memory.peak() - held < 50e6


@pytest.mark.usefixtures("native")
def test_a_run_times_and_weighs_each_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "training.csv"
    chosen = ["--only", PLAIN, OURS, "--setting", STEP, "classic", "--output", str(path)]
    assert run.main([*TINY, *chosen]) == 0
    found = results.read_last_run(path)
    assert [(one["name"], one["contender"]) for one in found] == [
        (STEP, OURS),
        (STEP, PLAIN),
        ("classic", OURS),
        ("classic", PLAIN),
    ]
    for one in found:
        assert float(one["ms"]) > 0
        assert float(one["first_ms"]) > 0
        assert 0 < float(one["peak_mb"]) < 1000
        assert float(one["images_per_s"]) == pytest.approx(4e3 / float(one["ms"]), rel=1e-4)
        assert (one["batch"], one["size"], one["threads"], one["note"]) == ("4", "64", "1", "")
        assert bool(one["isa"]) == (one["contender"] == OURS)
    printed = capsys.readouterr().out
    assert "a training step, fp32, batch 4, 64x64, 1 thread(s)" in printed
    assert printed.count(f"x {PLAIN}\n") == 2
    assert printed.count("not measured") == len(bars.BARS)


def turns(monkeypatch: pytest.MonkeyPatch, *steps: object) -> None:
    """Let turns take what is listed, or raise it, over and over."""
    given = itertools.cycle(steps)

    def take_turn(*args: object) -> run.Turn:
        step = next(given)
        if isinstance(step, BaseException):
            raise step
        return run.Turn(1e3, [float(step), float(step)], 5e8, "", "scalar")

    monkeypatch.setattr(run, "take_turn", take_turn)


def test_who_fails_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns(monkeypatch, 10.0, WorkerError("exit code -9"), 30.0)
    chosen = ["--only", OURS, PLAIN, "--setting", STEP, "--dtype", "fp32", "--rounds", "2"]
    assert run.main([*chosen, "--output", str(tmp_path / "t.csv")]) == 0
    (only,) = results.read_last_run(tmp_path / "t.csv")
    assert (only["contender"], only["ms"], only["noisy"], only["peak_mb"]) == (OURS, "20", "True", "500")
    printed = capsys.readouterr().out
    assert f"left out: a training step, {PLAIN}, fp32: exit code -9" in printed
    assert "medians of its turns differ by more than 10%" in printed


def test_a_run_that_is_cut_off_leaves_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turns(monkeypatch, 10.0, 20.0, KeyboardInterrupt())
    chosen = ["--only", OURS, PLAIN, "--rounds", "1", "--output", str(tmp_path / "t.csv")]
    with pytest.raises(KeyboardInterrupt):
        run.main(chosen)
    assert [one["dtype"] for one in results.read_last_run(tmp_path / "t.csv")] == ["fp32", "fp32"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Three photos of each of two classes, one of them for validation."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("oak", "elm"):
        (tmp_path / "trees" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "trees" / name / f"{i}.png")
    return tmp_path / "trees"


def test_images_to_learn_come_again_where_there_are_few(labelled: Path, tmp_path: Path) -> None:
    import numpy as np

    assert losses.prepare(tmp_path, labelled, 6, 32) == "4 photos of trees"
    images, labels = (np.load(tmp_path / name) for name in ("images.npy", "labels.npy"))
    assert images.shape == (6, 32, 32, 3)
    assert sorted(labels[:4]) == [0, 0, 1, 1]
    assert (images[:2] == images[4:]).all()
    assert (labels[:2] == labels[4:]).all()


@pytest.mark.usefixtures("native")
def test_losses_begin_alike_and_are_compared(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "losses.csv"
    arguments = [*TINY, "--losses", "--data", str(labelled), "--only", PLAIN, OURS, "--output", str(path)]
    assert run.main([*arguments, "--steps", "3"]) == 0
    found = results.read_last_run(path)
    curves = {
        name: [float(one["loss"]) for one in found if one["contender"] == name] for name in (OURS, PLAIN)
    }
    assert [len(curve) for curve in curves.values()] == [3, 3]
    assert [one["step"] for one in found] == ["1", "2", "3"] * 2
    assert curves[OURS][0] == pytest.approx(curves[PLAIN][0], rel=1e-3)
    assert len(set(curves[OURS])) == 3
    assert all((one["isa"] != "") == (one["contender"] == OURS) for one in found)
    assert f"{OURS} is 0." in capsys.readouterr().out.splitlines()[-1]
    charts.draw_losses(found, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_the_distance_between_curves_is_that_from_torchs() -> None:
    pairs = ((PLAIN, (2.0, 1.0)), (contenders.CHANNELS_LAST, (2.1, 1.3)), (OURS, (2.0, 0.9)))
    curves = [row(name, 1.0, name="losses", loss=loss) for name, values in pairs for loss in values]
    assert losses.compare(curves) == [
        f"fp32: {name} is {mean} from {PLAIN} in the mean of 2 steps, {most} at most; "
        "losses go from 2.000 to 1.000"
        for name, mean, most in (
            (contenders.CHANNELS_LAST, "0.2000", "0.3000"),
            (OURS, "0.0500", "0.1000"),
        )
    ]


def test_wrong_names_numbers_and_folders_are_refused(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (["--only", "nobody"], "invalid choice: 'nobody'"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--steps", "1"], "--steps must be at least 2"),
        (["--threads", "100000"], "--threads 100000: "),
        (["--losses", "--blocks"], "not allowed with"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run.parse(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    for i in range(4):
        (labelled / f"other {i}").symlink_to(labelled / "oak")
    for folder, said in (
        ("nothing", "does not exist"),
        ("trees", "has 6 classes: give a folder of at most 5"),
    ):
        assert (
            run.main(["--losses", "--data", str(tmp_path / folder), "--output", str(tmp_path / "l.csv")]) == 2
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("bench.training: error: ")
        assert said in line
    assert not (tmp_path / "l.csv").exists()


def test_the_tables_show_everyone_and_torchs_best(tmp_path: Path) -> None:
    table = charts.table(saved(tmp_path / "t.csv", rows()))
    assert "| fp32 | mnv2_fast | 80.0 | 400 | 900 | 0.8 |" in table
    assert "|  | torch.compile, tuned | 29.1\\* | 1100 | 1500 | 2.2 |" in table
    assert "| batch 8 | fp32 | torch channels_last, tuned | 320.0 | 128.0 | 2.50x | 300 | 900 |" in table
    assert "| the classic script | fp32 | torch NCHW | 64.0 | 12.3 | 5.20x |" in table
    assert "mnv2_fast, bf16, on torch's kernels: because." in table
    assert "2 threads; 32 images where no batch is named, 224x224" in table


def test_the_last_run_on_each_processor_is_shown(tmp_path: Path) -> None:
    path, context = tmp_path / "t.csv", results.context()
    runs = {"2026-01-02": "new", "2026-01-01": "old", "2026-01-03": "old", "2026-01-04": "new"}
    for day, processor in runs.items():
        faster = row(OURS, 1000 / int(day[-1]), peak_mb=900.0, note=f"because of {processor}")
        results.save(path, [faster, *rows()[1:]], {**context, "run": day, "processor": processor})
    newest, other = charts.last_runs(path)
    assert [(of[0]["run"], of[0]["processor"]) for of in (newest, other)] == [
        ("2026-01-04", "new"),
        ("2026-01-03", "old"),
    ]
    here, there = charts.table(newest, other).split("The same on old, ")
    assert "| a training step | fp32 | torch channels_last, tuned | 128.0 | 32.0 | 4.00x |" in here
    assert "| a training step | fp32 | torch channels_last, tuned | 96.0 | 32.0 | 3.00x |" in there
    assert "on new, " in here
    assert "mnv2_fast, fp32, on torch's kernels: because of old." in there
    assert "32 images where no batch is named, 224x224" in there
    assert charts.table(newest, other[:1]) == here.rstrip()  # which has ours alone, beside nobody


def test_tables_and_charts_are_written_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = [marker for pair in plot.MARKERS.values() for marker in pair]
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(marks))
    monkeypatch.setattr(plot, "README", readme)
    results.save(tmp_path / "t.csv", rows(), results.context())
    curves = [
        row(name, 1.0, name="losses", loss=loss) for name, loss in zip(losses.CURVES, (1, 2, 3), strict=True)
    ]
    results.save(tmp_path / "l.csv", curves, results.context())
    names = {"training": "t", "losses": "l", "peers": "none", "kernels": "none", "flowers": "none"}
    files = [part for name, file in names.items() for part in (f"--{name}", str(tmp_path / f"{file}.csv"))]
    assert plot.main([*files, "--folder", str(tmp_path), "--readme"]) == 0
    for picture in ("training", "losses"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 10_000
    text = readme.read_text()
    assert text.startswith(f"{marks[0]}\n{marks[1]}\n{marks[2]}\n| ")
    end = "\n".join(marks[3:])
    assert text.endswith(f"(training.png)\n\n![Losses of the same steps by each](losses.png)\n{end}")
    capsys.readouterr()
    results.save(tmp_path / "t.csv", rows()[-2:], {**results.context(), "run": "2999"})
    with pytest.raises(SystemExit):
        plot.main([*files, "--folder", str(tmp_path)])
    assert "has no row of the setting 'step': run bench.training again" in capsys.readouterr().err


@pytest.mark.usefixtures("native")
def test_blocks_are_timed_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--blocks", "--batch", "2", "--size", "32", "--threads", "1", "--steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition("x")[0].split() for line in lines[1:-2]]
    assert names[0] == ["3", "->", "32", "@", "32"]
    assert names[-1] == ["320", "->", "1280", "@", "1"]
    assert len(names) == len(blocks.modules(32)) == 14
    assert lines[-1].split()[0] == "images/s"

"""The benchmarks' own parts: how calls are timed, where rows go, and what is measured at all."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from mnv2_fast import arch, ops

sys.path.insert(0, str(ROOT))  # bench is not installed

from bench import bars, build, contenders, kernels, limits, material, peers, plot, results, roofline, timing
from bench.contenders import CONTENDERS, Contender
from bench.engines import Case
from bench.workers import Worker, WorkerError, alone

CORE = sorted(os.sched_getaffinity(0))[:1]


def rows() -> list[results.Row]:
    """A run of bench.peers with bars reached and bars missed, on a core of twice the nominal speed."""
    common = {"bench": "peers", "name": "network", "gmacs_peak": 117.6, "weights": "seeded", "batch": 1}
    bulk = {**common, "batch": 16, "threads": 2, "gmacs_peak": 235.2}
    said = {"bench": "peers", "name": "answers"}
    return [
        results.Row(contender=contenders.ENGINE, ms=2.0, images_per_s=500.0, **common),
        results.Row(contender=contenders.AUTOMATIC, ms=2.1, images_per_s=476.0, **common),
        results.Row(contender="OpenVINO", ms=3.0, ms_alone=4.0, noisy=True, images_per_s=333.0, **common),
        results.Row(contender=contenders.ENGINE, threads=2, ms=1.2, images_per_s=833.0, **common),
        results.Row(contender=contenders.ENGINE, dtype="bf16", ms=2.0, images_per_s=500.0, **common),
        results.Row(
            contender="OpenVINO", dtype="bf16", ms=9.0, images_per_s=111.0, note="emulated", **common
        ),
        results.Row(contender=contenders.ENGINE, ms=20.0, images_per_s=800.0, **bulk),
        results.Row(contender="OpenVINO", ms=40.0, images_per_s=400.0, **bulk),
        results.Row(contender="OpenVINO", ms=25.0, form="2 streams", images_per_s=640.0, **bulk),
        results.Row(contender=contenders.ENGINE, agreement=1.0, file_mb=14.0, first_ms=30.0, **said),
        results.Row(contender=contenders.ENGINE, dtype="int8", agreement=0.975, **said),
        results.Row(contender="XNNPACK", dtype="int8", agreement=0.98, **said),
        results.Row(contender="OpenVINO", dtype="bf16", agreement=0.95, note="emulated", **said),
    ]


def test_a_turn_counts_only_what_follows_the_warm_up() -> None:
    called: list[int] = []
    times = timing.turn(lambda: called.append(1), calls=7, warm_calls=5, warm_ms=0)
    assert (len(times), len(called)) == (7, 12)
    called.clear()
    timing.turn(lambda: called.append(1), calls=1, warm_calls=1, warm_ms=20)
    assert len(called) > 100  # calls of microseconds fill the 20 ms


def test_summary_is_of_medians_and_quantiles() -> None:
    assert timing.summarize([float(i) for i in range(11)]) == timing.Summary(5.0, 2.0, 8.0)
    with pytest.raises(ValueError, match="1 times make no quantiles"):
        timing.summarize([1.0])
    assert not timing.differ(10.0, 10.9)
    assert timing.differ(10.0, 11.1)
    assert timing.differ(11.1, 10.0)


def test_rows_can_be_added_to_the_results_that_are_kept() -> None:
    files = sorted(results.FOLDER.glob("*.csv"))
    assert files
    for path in files:
        with path.open(newline="", encoding="utf-8") as file:
            assert set(next(csv.reader(file))) <= set(results.COLUMNS), path


def test_rows_come_back_from_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.csv"
    with pytest.raises(FileNotFoundError, match="run the benchmark"):
        results.read_last_run(path)
    shared = results.context()
    results.save(path, rows()[:1], {**shared, "run": "2020-01-01T00:00:00Z"})
    results.save(path, rows(), shared)
    found = results.read_last_run(path)
    assert [(row["contender"], row["ms"], row["noisy"]) for row in found] == [
        (row.contender, f"{row.ms:.6g}", str(row.noisy)) for row in rows()
    ]
    assert found[0]["ms_alone"] == ""
    assert all(found[0][name] for name in ("run", "machine", "processor", "cores", "versions"))
    path.write_text("run,contender,ms\n2019,old,1.5\n")  # written before there were more columns
    results.save(path, rows()[:1], {**shared, "run": "2018"})
    assert [(row["contender"], row["ms"], row["batch"]) for row in results.read_last_run(path)] == [
        ("old", "1.5", "")
    ]
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.save(path, rows(), shared)


def test_a_run_saved_again_is_there_once(tmp_path: Path) -> None:
    path, shared = tmp_path / "peers.csv", results.context()
    results.save(path, rows()[:2], {**shared, "run": "2020-01-01T00:00:00Z"})
    before = path.read_bytes()
    for count in range(1, 4):
        results.save(path, rows()[:count], shared)
    saved = path.read_bytes()
    assert saved.startswith(before)
    path.write_bytes(before)
    results.save(path, rows()[:3], shared)
    assert path.read_bytes() == saved
    assert [row["dtype"] for row in results.read_last_run(path)] == [row.dtype for row in rows()[:3]]
    assert list(tmp_path.iterdir()) == [path]


class Cut:
    """Stands for what bench.peers starts and times, until a setting in which it is cut off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: peers.Setting) -> None:
        self.at = at
        self.closed = 0
        self.built = build.Built(CONTENDERS[0], Case("", "", "fp32"), 1, Path(), "")
        self.workers = (SimpleNamespace(isa="scalar"),)
        monkeypatch.setattr(build, "shared", lambda *args, **more: None)
        monkeypatch.setattr(build, "everyone", lambda *args: {CONTENDERS[0]: [self.built]})
        monkeypatch.setattr(limits, "measure", lambda cores: limits.Limits(100.0, 10.0, 200.0, 400.0))
        monkeypatch.setattr(peers, "judge", lambda *args: results.Row("peers", "answers", contenders.ENGINE))
        monkeypatch.setattr(
            peers, "start", lambda *args: dict.fromkeys(("start_ms", "first_ms", "memory"), 1.0)
        )
        monkeypatch.setattr(peers, "_start", lambda *args: [self])
        monkeypatch.setattr(peers, "measure", self.measure)

    def measure(self, teams: object, setting: peers.Setting, *_: object) -> list[tuple[object, object]]:
        if setting == self.at:
            raise KeyboardInterrupt
        return [(self, (timing.Summary(2.0, 1.0, 3.0), 2.0))]

    def close(self) -> None:
        self.closed += 1


def test_a_run_that_is_cut_off_leaves_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(monkeypatch, at=peers.Setting(16, 1))
    path = tmp_path / "peers.csv"
    with pytest.raises(KeyboardInterrupt):
        peers.main(["--cores", "1", "--output", str(path)])
    assert [(row["name"], row["batch"]) for row in results.read_last_run(path)] == [
        ("answers", "1"),
        ("network", "1"),
    ]
    assert cut.closed == 1
    assert plot.last_run(path)
    cut.at = peers.Setting(1, 1)
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        peers.main(["--cores", "1", "--output", str(path)])
    assert [row["name"] for row in results.read_last_run(path)] == ["answers"]
    with pytest.raises(ValueError, match="cut off before it timed anything"):
        plot.last_run(path)


def test_every_operator_and_every_layer_is_measured() -> None:
    shapes = kernels.shapes()
    assert {shape.op for shape in shapes} == {op.name for op in ops.OPS}
    layers = arch.layers()
    for batch in (1, 3):
        macs = {
            shape.name: kernels.row(shape.op).macs(*kernels.arguments(shape, batch)) * shape.count
            for shape in shapes
        }
        (network,) = (name for name in macs if name.startswith("network"))
        assert macs.pop(network) == sum(macs.values()) == batch * sum(layer.macs for layer in layers)


def test_an_operator_without_a_shape_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ops", type("", (), {"OPS": (*ops.OPS, type("", (), {"name": "new"})())}))
    with pytest.raises(RuntimeError, match="no shapes for the operators new"):
        kernels.shapes()


@pytest.mark.usefixtures("native")
def test_our_side_and_torchs_compute_the_same() -> None:
    import torch

    for shape in kernels.shapes():
        if shape.op != "network" and shape.layers[0].h <= 14:
            args = kernels.arguments(shape, 1)
            with torch.no_grad():
                got, expected = kernels.ours(shape, args)(), kernels.row(shape.op).eager(*args)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_bars_compare_the_best_forms() -> None:
    lines = bars.verdicts(rows())
    assert len(lines) == len(bars.BARS) + len(bars.ANSWERS) + 2

    def said(*texts: str) -> bool:
        return any(all(text in line for text in texts) for line in lines)

    # Half the nominal milliseconds and twice the images, for the core has twice the nominal speed.
    assert said(
        "fp32, batch 1, 1 core(s)",
        "1.50x OpenVINO (fp32, session), asked 1.30x: reached; 2.00 ms, asked 2.95",
    )
    assert said(
        "fp32, batch 16, 2 core(s)", "1.25x OpenVINO (fp32, 2 streams), asked 1.30x: MISSED", "asked 670"
    )
    # In bf16 the best peer is the one that is faster in fp32.
    assert said("bf16, batch 1, 1 core(s)", "1.50x OpenVINO (fp32, session)", "2.00 ms, asked 1.70", "MISSED")
    assert said("int8, batch 1, 1 core(s): mnv2_fast against the best peer: not measured")
    assert said("fp32, first class", "100.0%, asked 100%: reached")
    assert said("int8, first class", "97.5%, asked 97%: reached; above XNNPACK with 98.0%: MISSED")
    assert said("one core to two: 1.67x, asked 1.85x: MISSED")
    assert said("the automatic path costs 100 us over the engine")


def test_every_bar_names_contenders_and_settings_there_are() -> None:
    places = {(setting.batch, setting.cores) for setting in peers.SETTINGS}
    for bar in bars.BARS:
        assert (bar.batch, bar.cores) in places
        assert {bar.ours, *bar.against} <= set(contenders.names())
        assert any(row.name == bar.ours and row.dtype == bar.dtype for row in CONTENDERS)
    assert len({row.title for row in CONTENDERS}) == len(CONTENDERS)


def test_every_contender_is_timed_in_every_setting_or_says_why_not() -> None:
    for row in CONTENDERS:
        for setting in peers.SETTINGS:
            expected = (setting.batch == 1 or not row.slow) and not (setting.singly and row.singly)
            assert peers.served(row, setting) == expected
            key = peers.keyed(row, setting)
            share = setting.batch // 2 if setting.streams else setting.batch
            assert int(key.split()[0]) == share
            assert key.endswith("singly") == (setting.singly or (row.singly and setting.batch > 1))
        assert callable(row.module.prepare)
        assert callable(row.module.load)


def test_a_contender_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Contender("Other", "fp32", "ours", ("torch", "no_such_engine.runtime"), ("no_such_tool",))
    monkeypatch.setattr(contenders, "CONTENDERS", (CONTENDERS[0], absent))
    assert peers.contestants(peers.parse([])) == [CONTENDERS[0]]
    printed = capsys.readouterr().out
    assert "left out: Other, fp32: not installed: no_such_engine, no_such_tool" in printed


def test_wrong_names_and_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--only", "nobody"], "no contender 'nobody': one of mnv2_fast"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--dtype", "fp8"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as stopped:
            peers.parse(arguments)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


def test_answers_are_judged_on_the_photos_that_did_not_calibrate(tmp_path: Path) -> None:
    import numpy as np

    exact = np.eye(4)
    wrong = np.roll(exact, 1, axis=1)
    np.save(tmp_path / material.EXACT, exact)
    np.save(tmp_path / material.LABELS, np.array([0, 1, 2, 0]))
    built = []
    for half in (0, 1):  # each is right on the other half alone: all of what it is judged on
        logits = np.where((np.arange(4) % 2 == half)[:, None], wrong, exact)
        np.save(tmp_path / f"{half}.npy", logits.astype(np.float32))
        case = Case(str(tmp_path), str(tmp_path), "int8", calibration=half)
        int8 = contenders.find("mnv2_fast, int8")
        built.append(build.Built(int8, case, 3_600_000, tmp_path / f"{half}.npy", ""))
    row = peers.judge(built, str(tmp_path), "seeded")
    assert (row.agreement, row.top1, row.file_mb) == (1.0, 0.75, 3.6)
    fp32 = dataclasses.replace(built[0], contender=contenders.find("mnv2_fast, fp32"))
    row = peers.judge([fp32], str(tmp_path), "seeded")  # judged on all photos
    assert (row.agreement, row.top1, row.logit_error) == (0.5, 0.25, 1.0)


def test_few_photos_serve_again_for_a_larger_batch(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / material.PHOTOS, np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1))
    assert material.photos(str(tmp_path), 5).ravel().tolist() == [0, 1, 2, 0, 1]
    assert material.photos(str(tmp_path)).ravel().tolist() == [0, 1, 2]
    assert [material.calibration(str(tmp_path), half).ravel().tolist() for half in (0, 1)] == [[0, 2], [1]]


def test_the_readme_gets_its_table(tmp_path: Path) -> None:
    results.save(tmp_path / "peers.csv", rows(), results.context())
    table = plot.table(results.read_last_run(tmp_path / "peers.csv"))
    assert "| fp32 | mnv2_fast | 2.00 | 1.20 | 800 | 100.0% | 14.0 | 30 |  |" in table
    assert "|  | OpenVINO | 3.00\\* |  | 640 (s) |  |  |  |  |" in table
    assert "OpenVINO, bf16: emulated." in table
    readme = tmp_path / "README.md"
    begin, end = plot.MARKERS["peers"]
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    plot.write_readme(table, readme)
    plot.write_readme(table, readme)
    assert readme.read_text() == f"before\n{begin}\n{table}\n{end}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="put them where the table belongs"):
        plot.write_readme(table, readme)


def test_the_chart_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    results.save(tmp_path / "peers.csv", rows(), results.context())
    plot.draw_peers(results.read_last_run(tmp_path / "peers.csv"), tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_the_readme_has_the_markers_once() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for markers in plot.MARKERS.values():
        assert [text.count(marker) for marker in markers] == [1, 1]


def test_roof_is_the_slower_of_the_two_limits() -> None:
    compute = roofline.Point("a", 1, ms=2.0, macs=1e8, bytes=1e6, peak=100.0, copy=10.0)
    memory = roofline.Point("b", 1, ms=2.0, macs=1e6, bytes=1e7, peak=100.0, copy=10.0)
    assert (compute.bound, compute.roof_ms) == ("compute", pytest.approx(1.0))
    assert (memory.bound, memory.roof_ms) == ("memory", pytest.approx(1.0))


def scalar_case(folder: Path) -> Case:
    """Our scalar kernels' file of seeded weights, and noise for photos."""
    import numpy as np

    folder.mkdir()
    material.make(str(folder), folder / "nothing", None)
    np.save(folder / material.PHOTOS, material.photos(str(folder), 2)[:, :, :32, :32].copy())
    case = build.case_of(contenders.find(f"{contenders.ENGINE_SCALAR}, fp32"), str(folder))
    Path(case.files).mkdir()
    contenders.find(f"{contenders.ENGINE}, fp32").module.prepare(case)
    return case


@pytest.fixture
def seeded_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No published weights are found."""
    monkeypatch.setattr(material, "source", lambda: "seeded")


@pytest.mark.usefixtures("native", "seeded_weights")
def test_workers_take_turns_and_stop_for_each_other(tmp_path: Path) -> None:
    case = scalar_case(tmp_path / "shared")
    scalar = contenders.find(f"{contenders.ENGINE_SCALAR}, fp32")
    request = {"title": scalar.title, "case": dataclasses.asdict(case), "keys": ["1", "2", "2 singly"]}
    workers: list[Worker] = []
    try:
        for _ in range(2):
            env = contenders.environment(scalar.env, str(tmp_path))
            workers.append(Worker("contenders", request, CORE, env))
        assert [worker.ready().isa for worker in workers] == ["scalar", "scalar"]
        with alone(workers[:1], workers):
            assert len(workers[0].turn(3, "1")) == 3
            stopped = Path(f"/proc/{workers[1].pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert stopped == "T"
        assert all(ms > 0 for key in ("2", "2 singly") for ms in workers[1].turn(2, key))
    finally:
        for worker in workers:
            worker.close()


@pytest.mark.usefixtures("native", "seeded_weights")
def test_a_start_is_timed_and_weighed_in_a_process_of_its_own(tmp_path: Path) -> None:
    case = scalar_case(tmp_path / "shared")
    title = f"{contenders.ENGINE_SCALAR}, fp32"
    order = {"title": title, "case": dataclasses.asdict(case)}
    env = contenders.environment(contenders.find(title).env, str(tmp_path))
    found = build.run("start", order, env)
    assert found["start_ms"] > found["first_ms"] > 0
    assert found["memory"] > 13e6  # the weights alone


def test_a_contender_that_does_not_start_says_why() -> None:
    request = {"title": "nobody", "case": {"material": "", "files": ""}, "keys": []}
    with pytest.raises(WorkerError, match="no contender 'nobody': one of mnv2_fast"):
        Worker("contenders", request, CORE, dict(os.environ)).ready()
    order = {"do": "build", "title": "nobody", "case": {"material": "", "files": "x"}}
    with pytest.raises(build.BuildError, match="no contender 'nobody'"):
        build.run("build", order)


def test_cores_asked_for_have_to_be_there() -> None:
    assert limits.cores(1) == CORE
    with pytest.raises(ValueError, match="cores are needed"):
        limits.cores(100_000)


@pytest.mark.usefixtures("native")
def test_every_limit_is_measured_and_the_most_that_was_seen_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPEATS", 1)
    found = limits.measure(1)
    assert all(0 < limit < float("inf") for limit in dataclasses.astuple(found))
    larger = limits.Limits(1.0, 5.0, 9.0, 6.0) | limits.Limits(4.0, 2.0, 7.0, 8.0)
    assert larger == limits.Limits(4.0, 5.0, 9.0, 8.0)


def test_a_share_is_of_the_peak_of_its_own_precision(capsys: pytest.CaptureFixture[str]) -> None:
    bounds = limits.Limits(100.0, 10.0, 200.0, 400.0)
    for dtype, peak in (("fp32", 100.0), ("bf16", 200.0), ("int8", 400.0)):
        contender = contenders.find(f"{contenders.ENGINE}, {dtype}")
        built = build.Built(contender, Case("", "", dtype), 1, Path(), "")
        team = SimpleNamespace(built=built, workers=[SimpleNamespace(isa="scalar")])
        row = peers._row(team, (timing.Summary(2.0, 1.0, 3.0), 2.0), peers.Setting(1, 1), bounds, "seeded")
        assert row.gmacs_peak == 100.0  # what the bars scale by
        assert row.gmacs_share == pytest.approx(peers.MACS / 2e-3 / 1e9 / peak)
        peers.show([row])
        assert f"{dtype}, batch 1, 1 core(s), session: {dtype} peak {peak} GMAC/s" in capsys.readouterr().out

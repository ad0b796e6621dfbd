"""The benchmarks' own parts: how calls are timed, where rows go, and what is measured at all."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from mnv2_fast import arch, ops

sys.path.insert(0, str(ROOT))  # bench is not installed

from bench import kernels, limits, model, peers, plot, results, roofline, timing
from bench.workers import Worker, WorkerError, alone

CORE = sorted(os.sched_getaffinity(0))[:1]


def rows() -> list[results.Row]:
    """A run of bench.model with a bar reached and a bar missed."""
    common = {"bench": "model", "name": "network", "gmacs_peak": 100.0, "weights": "seeded", "batch": 1}
    return [
        results.Row(contender=peers.ENGINE, ms=2.0, images_per_s=500.0, **common),
        results.Row(contender=peers.AUTOMATIC, ms=2.1, images_per_s=476.0, **common),
        results.Row(contender="OpenVINO", ms=3.0, ms_alone=4.0, noisy=True, images_per_s=333.0, **common),
        results.Row(contender=peers.ENGINE, threads=2, ms=2.0, images_per_s=500.0, **common),
        results.Row(contender="OpenVINO", threads=2, ms=2.1, images_per_s=476.0, **common),
        results.Row(contender="OpenVINO", threads=2, form="2 streams", ms=1.5, images_per_s=666.0, **common),
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


def test_rows_come_back_from_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.csv"
    with pytest.raises(FileNotFoundError, match="run the benchmark"):
        results.read_last_run(path)
    shared = results.context()
    results.append(path, rows()[:1], {**shared, "run": "2020-01-01T00:00:00Z"})
    results.append(path, rows(), shared)
    found = results.read_last_run(path)
    assert [(row["contender"], row["ms"], row["noisy"]) for row in found] == [
        (row.contender, f"{row.ms:.6g}", str(row.noisy)) for row in rows()
    ]
    assert found[0]["ms_alone"] == ""
    assert all(found[0][name] for name in ("run", "machine", "processor", "cores", "versions"))
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, rows(), shared)


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
    lines = model.verdicts(rows())
    assert (
        lines[0] == "batch 1, 1 core(s): mnv2_fast (session) 1.50x OpenVINO (session), asked 1.15x: reached"
    )
    assert (
        lines[1] == "batch 1, 2 core(s): mnv2_fast (session) 0.75x OpenVINO (2 streams), asked 1.10x: MISSED"
    )
    assert "not measured" in lines[2]
    assert lines[-1] == "the automatic path costs 100 us over the engine"


def test_the_readme_gets_its_table(tmp_path: Path) -> None:
    results.append(tmp_path / "model.csv", rows(), results.context())
    table = plot.table(results.read_last_run(tmp_path / "model.csv"))
    assert "| OpenVINO | 3.00\\* | 1.50 (2 streams) |" in table
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    plot.write_readme(table, readme)
    plot.write_readme(table, readme)
    assert readme.read_text() == f"before\n{plot.BEGIN}\n{table}\n{plot.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="put them where the table belongs"):
        plot.write_readme(table, readme)


def test_the_readme_has_the_markers_once() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (text.count(plot.BEGIN), text.count(plot.END)) == (1, 1)


def test_roof_is_the_slower_of_the_two_limits() -> None:
    compute = roofline.Point("a", 1, ms=2.0, macs=1e8, bytes=1e6, peak=100.0, copy=10.0)
    memory = roofline.Point("b", 1, ms=2.0, macs=1e6, bytes=1e7, peak=100.0, copy=10.0)
    assert (compute.bound, compute.roof_ms) == ("compute", pytest.approx(1.0))
    assert (memory.bound, memory.roof_ms) == ("memory", pytest.approx(1.0))


@pytest.mark.usefixtures("native")
def test_workers_take_turns_and_stop_for_each_other() -> None:
    case = {"batch": 1, "threads": 1, "size": 32}
    request = {"peer": peers.ENGINE_SCALAR, "case": case}
    workers: list[Worker] = []
    try:
        for _ in range(2):
            env = peers.environment(peers.by_name(peers.ENGINE_SCALAR))
            workers.append(Worker("peers", request, CORE, env))
        assert [worker.isa for worker in workers] == ["scalar", "scalar"]
        with alone(workers[:1], workers):
            assert len(workers[0].turn(3)) == 3
            stopped = Path(f"/proc/{workers[1].pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert stopped == "T"
        assert all(ms > 0 for ms in workers[1].turn(2))
    finally:
        for worker in workers:
            worker.close()


def test_a_contender_that_does_not_start_says_why() -> None:
    with pytest.raises(WorkerError, match="no contender 'nobody': one of mnv2_fast"):
        Worker("peers", {"peer": "nobody", "case": {"batch": 1, "threads": 1}}, CORE, dict(os.environ))


def test_cores_asked_for_have_to_be_there() -> None:
    assert limits.cores(1) == CORE
    with pytest.raises(ValueError, match="cores are needed"):
        limits.cores(100_000)

"""`python -m bench.gpu --tune` without a GPU: which tile wins, what is dropped, the table that is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

import kernels.common
from bench import gpu, gpu_checks, gpu_tune
from bench.gpu_children import Answer
from bench.gpu_tune import Try
from kernels import aot, depthwise
from kernels.common import CONFIGS

DEFAULT = json.loads((CONFIGS / "default.json").read_text())
Verdict = Callable[[Try], str]
Timer = Callable[[Try], float]


@pytest.fixture(autouse=True)
def with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune, "usable", lambda form: True)


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    """The whole tuning with stubs for its children; returns the table as `tiles` reads it.

    `verdict` may raise, as `timer` may; None for a time is one that nobody took.
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    for path in CONFIGS.iterdir():
        (tmp_path / path.name).write_text(path.read_text())

    def run(timer: Timer, verdict: Verdict = lambda one: "") -> dict:
        def answers(
            command: Sequence[str], numbers: Iterable[int], seconds: float, workers: int = 1
        ) -> Iterator[Answer]:
            answer = {"tiles": verdict, "tile times": timer}[command[-1]]
            for number in numbers:
                try:
                    found = answer(known[number])
                except RuntimeError as error:
                    yield Answer(number, None, f"RuntimeError: {error}")
                    continue
                if found is not None:
                    yield Answer(number, found)

        known = gpu_tune.tries()
        monkeypatch.setattr(gpu_tune, "answers", answers)
        path = gpu_tune.tune(100.0, tmp_path)
        assert path == tmp_path / "h200.json"
        assert not list(tmp_path.glob(".*"))
        monkeypatch.setattr(kernels.common, "CONFIGS", tmp_path)
        return {name: kernels.common.tiles.__wrapped__("NVIDIA H200", name) for name in DEFAULT}

    return run


def _default(one: Try) -> dict[str, int]:
    rows = DEFAULT[one.table]
    return rows.get(f"{one.row}_{one.shape}", rows[one.row])


def test_without_a_time_the_table_is_the_default(tune: Callable[..., dict]) -> None:
    def raises(one: Try) -> float:
        raise RuntimeError("the GPU is gone")

    assert tune(raises) == DEFAULT
    assert tune(lambda one: 1.0, lambda one: "12 registers spilled") == DEFAULT


def test_where_the_default_is_fastest_it_stays(tune: Callable[..., dict]) -> None:
    assert tune(lambda one: 1.0 if dict(one.tile) == _default(one) else 2.0) == DEFAULT


def test_the_fastest_wins_in_every_row(tune: Callable[..., dict]) -> None:
    """The last candidate is, everywhere; a row for a shape that the common one serves is left out."""
    last = {(one.table, one.row): one.tile for one in gpu_tune.tries()}
    table = tune(lambda one: 1.0 if one.tile == last[one.table, one.row] else 2.0)
    for name, rows in DEFAULT.items():
        for row in rows:
            if (name, row) in last:  # not a row of one shape's own
                assert table[name][row] == dict(last[name, row]), (name, row)
                assert table[name][row] != rows[row]
    common = {row for row in DEFAULT["pointwise"] if "x" not in row}
    assert {row for row in table["pointwise"] if row.startswith("large_half")} == {"large_half"}
    assert common <= table["pointwise"].keys()


def test_the_table_is_complete(tune: Callable[..., dict], tmp_path: Path) -> None:
    """As the tests of the committed tables ask; the names of numbers, too."""
    import test_triton_depthwise
    import test_triton_operators

    last = {(one.table, one.row): one.tile for one in gpu_tune.tries()}
    tune(lambda one: 1.0 if one.tile == last[one.table, one.row] else 2.0)
    for tests in (test_triton_depthwise, test_triton_operators):
        tests.test_tile_table_is_complete(tmp_path / "h200.json")


def test_all_rows_are_tried() -> None:
    """Those of whole blocks first; small tiles with one image; at most so many as there is time for.

    Not those of what bench.gpu does not time: training, and depthwise with projection.
    """
    tries = gpu_tune.tries()
    timed = {name: rows for name, rows in DEFAULT.items() if not name.startswith(("train", "norm"))}
    del timed["depthwise_project"]
    wanted = {(name, row) for name, rows in timed.items() for row in rows if "x" not in row}
    assert {(one.table, one.row) for one in tries} == wanted
    assert tries[0].form.whole_block
    assert {one.batch for one in tries if one.row.startswith("small")} == {1}
    assert {one.batch for one in tries if one.row.startswith("large") or one.table == "block"} == {256}
    assert len([one for one in tries if one.kind == "fp16"]) < 1600
    keys = [(one.table, one.row, str(one.form), one.tile) for one in tries]
    assert len(keys) == len(set(keys))


def test_candidates_that_fail_or_are_wrong_do_not_win(tune: Callable[..., dict]) -> None:
    """The fastest raises when it is checked, the second is wrong, the third raises when it is timed."""
    stem = [one.tile for one in gpu_tune.tries() if (one.table, one.row) == ("stem", "half")]
    ranks = {tile: i for i, tile in enumerate(reversed(list(dict.fromkeys(stem))))}
    assert len(ranks) > 4

    def verdict(one: Try) -> str:
        if (one.table, one.row) == ("stem", "half"):
            if ranks[one.tile] == 0:
                raise RuntimeError("out of resource: shared memory")
            if ranks[one.tile] == 1:
                return "3 of 4 values beyond tolerance"
        return ""

    def timer(one: Try) -> float | None:
        if (one.table, one.row) != ("stem", "half"):
            return None
        assert ranks[one.tile] > 1
        if ranks[one.tile] == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return 1.0 + ranks[one.tile]

    table = tune(timer, verdict)
    third = next(tile for tile, rank in ranks.items() if rank == 3)
    assert table["stem"]["half"] == dict(third)
    assert {**table, "stem": DEFAULT["stem"]} == DEFAULT


def test_a_tile_right_on_some_shapes_is_for_those_alone(tune: Callable[..., dict]) -> None:
    """The fastest tile spills on one shape: the common row is the best of all, others get their own."""
    tiles = list(
        dict.fromkeys(
            one.tile for one in gpu_tune.tries() if (one.table, one.row) == ("pointwise", "large_half")
        )
    )
    fast, common = tiles[1], tiles[2]

    def verdict(one: Try) -> str:
        return "4 registers spilled" if one.tile == fast and one.shape == "16x96" else ""

    def timer(one: Try) -> float | None:
        if (one.table, one.row) != ("pointwise", "large_half"):
            return None
        return {fast: 1.0, common: 2.0}.get(one.tile, 3.0)

    rows = tune(timer, verdict)["pointwise"]
    assert rows["large_half"] == dict(common)
    assert "large_half_16x96" not in rows
    assert rows["large_half_96x24"] == rows["large_half_192x32"] == dict(fast)


def test_a_row_of_its_own_must_be_worth_it(tune: Callable[..., dict]) -> None:
    tiles = [one.tile for one in gpu_tune.tries() if (one.table, one.row) == ("pointwise", "large_half")]
    other = tiles[1]

    def timer(one: Try) -> float:
        gains = {"32x192": 0.99, "96x24": 0.9}
        if one.tile == other:
            return gains.get(one.shape, 5.0)
        return 1.0 if dict(one.tile) == DEFAULT["pointwise"].get(one.row) else 4.0

    rows = tune(timer)["pointwise"]
    assert rows["large_half"] == DEFAULT["pointwise"]["large_half"]
    assert rows["large_half_96x24"] == dict(other)
    assert "large_half_32x192" not in rows


def test_common_layers_count_as_often_as_they_occur(tune: Callable[..., dict]) -> None:
    """What one tile saves on a layer that occurs thrice is more than it costs on one that occurs once."""
    row = [one for one in gpu_tune.tries() if (one.table, one.row) == ("depthwise", "large_s1")]
    counts = {str(one.form): one.form.count for one in row}
    common, rare = max(counts, key=lambda form: counts[form]), min(counts, key=lambda form: counts[form])
    default, other = list(dict.fromkeys(one.tile for one in row))[:2]
    assert counts[common] > 2 * counts[rare]

    def timer(one: Try) -> float:
        costs = {(other, rare): 3.0, (default, common): 2.0}
        return costs.get((one.tile, str(one.form)), 1.0 if one.tile in (default, other) else 9.0)

    assert tune(timer)["depthwise"]["large_s1"] == dict(other)


def test_the_file_is_as_the_default_is_written(tmp_path: Path) -> None:
    """One row a line, in the order of the default, so that the next tuning differs where tiles do."""
    path = tmp_path / "default.json"
    gpu_tune.write(path, DEFAULT)
    assert path.read_text() == (CONFIGS / "default.json").read_text()
    assert os.listdir(tmp_path) == ["default.json"]


@pytest.mark.parametrize(("stack", "said"), [(0, ""), (3, "3 registers spilled")])
def test_a_tile_that_spills_is_dropped(monkeypatch: pytest.MonkeyPatch, stack: int, said: str) -> None:
    """What earlier launches spilled is forgotten first."""
    kernel = SimpleNamespace(device_caches={0: ({"before": SimpleNamespace(n_spills=9)}, {}, None)})

    def launched(*_: object) -> str:
        cache = kernel.device_caches.setdefault(0, ({}, {}, None))[0]
        cache["now"] = SimpleNamespace(n_spills=stack)
        return ""

    monkeypatch.setattr(gpu_checks, "_functions", lambda: [kernel])
    monkeypatch.setattr(gpu_tune, "check_form", launched)
    assert gpu_tune.check_try(gpu_tune.tries()[0]) == said
    monkeypatch.setattr(gpu_tune, "check_form", lambda *_: "wrong")
    assert gpu_tune.check_try(gpu_tune.tries()[0]) == "wrong"


def test_all_kernels_are_asked_for_spills() -> None:
    named = {function.fn.__name__ for function in gpu_checks._functions()}
    assert named >= {"depthwise_kernel", "pointwise_kernel", "stem_kernel", "pool_kernel", "block_kernel"}
    assert named >= {"input_gradient_s2_kernel", "weight_gradient_kernel", "add_parts_kernel"}


def test_tune_is_the_programs(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(gpu, "unavailable", lambda needs_gpu: "")
    monkeypatch.setattr(gpu, "print_versions", lambda: None)
    monkeypatch.setattr(gpu_tune, "tune", lambda seconds: asked.append(seconds) or Path("x.json"))
    assert gpu.main(["--tune"]) == gpu.main(["--tune", "--budget", "60"]) == 0
    assert asked == [gpu.TUNE_S, 60.0]
    assert capsys.readouterr().out == "the table is x.json\n" * 2


def _spilled(one: Try) -> int:
    """Bytes that a candidate for the depthwise kernel spills on sm_90."""
    tile, dtype = dict(one.tile), torch.float16
    c, stride = (int(part.removeprefix("s")) for part in one.form.layer.split()[0::3])
    arguments = depthwise.compile_arguments(c, stride, True, dtype, tile)
    built = aot.compile_for(depthwise.depthwise_kernel, 90, arguments, tile["warps"])
    return built.stack + built.local


def test_depthwise_candidates_compile_without_spills() -> None:
    """Of two layers; on a GPU those that spill are dropped, and would be no loss if they are few."""
    seen = {}
    for one in gpu_tune.tries():
        if one.form.name == "depthwise" and one.form.layer.split()[0] in ("96", "384"):
            seen.setdefault((one.row, one.tile), one)
    spilled = [(row, dict(tile)) for (row, tile), one in seen.items() if _spilled(one)]
    assert len(seen) > 20
    assert len(spilled) < 4, spilled

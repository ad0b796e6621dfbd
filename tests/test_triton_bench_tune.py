"""`python -m bench.gpu --tune` without a GPU: which tile wins, what is dropped, the table that is written."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton==3.6.0")

import kernels.common
from bench import gpu, gpu_candidates, gpu_checks, gpu_forms, gpu_tune
from bench.gpu_children import Answer
from bench.gpu_training_forms import training_forms
from bench.gpu_tune import Try
from kernels import aot, depthwise, depthwise_project, train_pointwise_gradient
from kernels.common import CONFIGS
from kernels.network import Network
from mnv2_fast import arch

DEFAULT = json.loads((CONFIGS / "default.json").read_text())
# Seconds of a try on one core, by its table: some of them compiled for sm_90, their mean rounded up; whole
# blocks are a guess. So are launches with their float64 twin, and calls for a time with what comes before.
COMPILING_S = {"stem": 1.0, "head": 1.0, "pointwise": 0.5, "pointwise_gradient": 0.5, "block": 4.0}
COMPILING_S |= {
    "depthwise": 1.3,
    "depthwise_input_s2": 1.0,
    "depthwise_weight": 2.7,
    "depthwise_project": 1.3,
}
COMPILING_S |= {"train_pointwise": 1.5, "train_depthwise": 10.0, "train_stem": 3.0, "norm": 0.7}
COMPILING_S |= {"train_pointwise_both": 4.5}
CALLS_S, TIMING_S = 0.3, 0.12
Verdict = Callable[[Try], str]
Timer = Callable[[Try], float]


@pytest.fixture(autouse=True)
def with_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune, "usable", lambda form: True)


class Children:
    """What children were asked for: (program, seconds, tables of the tries). They take all of their time."""

    def __init__(self) -> None:
        self.now, self.asked = 0.0, list[tuple[str, float, set[str]]]()

    def monotonic(self) -> float:
        return self.now

    def ask(self, what: str, seconds: float, tries: list[Try]) -> None:
        self.asked.append((what, seconds, {one.table for one in tries}))
        self.now += seconds


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    found = Children()
    monkeypatch.setattr(gpu_tune, "time", found)
    return found


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, children: Children) -> Callable[..., dict]:
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
            children.ask(command[-1], seconds, [known[number] for number in numbers])
            answer = {"tiles": verdict, "tile times": timer}[command[-1]]
            for number in numbers:
                try:
                    found = answer(known[number])
                except RuntimeError as error:
                    yield Answer(number, None, f"RuntimeError: {error}")
                    continue
                if found is not None:
                    yield Answer(number, [found, ""] if command[-1] == "tile times" else found)

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
    """Those of whole blocks first, of training last; small tiles with one image; no more than a few."""
    tries = gpu_tune.tries()
    wanted = {(name, row) for name, rows in DEFAULT.items() for row in rows if "x" not in row}
    assert {(one.table, one.row) for one in tries} == wanted
    assert tries[0].form.whole_block
    assert {one.batch for one in tries if one.row.startswith("small")} == {1}
    assert {one.batch for one in tries if one.row.startswith("large") or one.table == "block"} == {256}
    of_fp16 = [one.form.name.startswith("train") for one in tries if one.kind == "fp16"]
    assert of_fp16 == sorted(of_fp16)
    assert (
        tries[of_fp16.index(True)].table == "train_pointwise"
    )  # the quickest to compile, and the most launches
    keys = [(one.table, one.row, str(one.form), one.tile) for one in tries]
    assert len(keys) == len(set(keys))


def _compiling(one: Try) -> float:
    """Seconds; two kernels in place of one are from the cache, for the stage before has compiled them."""
    return 0.0 if dict(one.tile).get("most") == 1 else COMPILING_S[one.table]


def test_each_stage_has_time_for_fp16() -> None:
    """On the 16 cores beside an H200, as long as compiling takes on one core, and calls on the GPU."""
    tries, left = [one for one in gpu_tune.tries() if one.kind == "fp16"], gpu.TUNE_S
    for share, tables in gpu_tune.STAGES:
        seconds, some = share * left, [one for one in tries if one.table in tables]
        left -= seconds
        checking = sum(_compiling(one) + CALLS_S for one in some) / gpu_tune.WORKERS
        assert checking < gpu_tune.CHECKING * seconds, tables
        assert TIMING_S * len(some) < (1 - gpu_tune.CHECKING) * seconds, tables


def test_what_there_is_time_for_can_win() -> None:
    """A row comes tile by tile, each on all of its shapes, what the default table has for them first."""
    tries = gpu_tune.tries()
    for kind in ("fp16", "tf32", "fp32"):
        of_kind = [one for one in tries if one.kind == kind]
        rows = [row for row, _ in itertools.groupby((one.table, one.row) for one in of_kind)]
        assert len(rows) == len(set(rows))
        for table, row in rows:
            some = [one for one in of_kind if (one.table, one.row) == (table, row)]
            forms = {str(one.form): one for one in some}
            runs = [tile for tile, _ in itertools.groupby(one.tile for one in some)]
            assert len(runs) == len(set(runs))
            assert {str(one.form) for one in some if one.tile == runs[-1]} == forms.keys()
            own = list(dict.fromkeys(tuple(_default(one).items()) for one in forms.values()))
            first = list(dict.fromkeys([*own, tuple(DEFAULT[table][row].items())]))
            assert runs[: len(first)] == first


def test_a_row_whose_time_ends_has_a_winner(tune: Callable[..., dict]) -> None:
    """The default's tiles and three more were timed on all shapes, of the next one on half of them."""
    some = [one for one in gpu_tune.tries() if (one.table, one.row) == ("train_pointwise", "forward_half")]
    tiles = list(dict.fromkeys(one.tile for one in some))
    best, begun = tiles[-3], tiles[-2]
    shapes = [str(one.form) for one in some if one.tile == begun]
    assert len(shapes) > 4

    def timer(one: Try) -> float | None:
        if (one.table, one.row) != ("train_pointwise", "forward_half") or one.tile == tiles[-1]:
            return None
        if one.tile == begun:
            return 2.0 if str(one.form) in shapes[: len(shapes) // 2] else None
        return 1.0 if one.tile == best else 3.0

    assert tune(timer)["train_pointwise"]["forward_half"] == dict(best)


def test_each_gradient_of_a_1x1_layer_is_tuned_by_itself() -> None:
    """For all shapes, so that both in one kernel stand beside the best of two, not beside untuned ones."""
    tries = [one for one in gpu_tune.tries() if one.kind == "fp16"]
    both = {one.shape for one in tries if one.table == "train_pointwise_both"}
    assert len(both) > 15
    for of in ("input", "weight"):
        alone = [one for one in tries if one.form.name == f"train pointwise {of} gradient"]
        assert {one.shape for one in alone} == both
    apart = [form for form in training_forms() if form.name == "train pointwise weight gradient"]
    assert {form.shape for form in apart if "fp16" in form.kinds()} < both  # what is checked and timed


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
    other = next(tile for tile in tiles if dict(tile) not in DEFAULT["pointwise"].values())

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


def test_stages_follow_each_other_in_time(
    tune: Callable[..., dict], children: Children, tmp_path: Path
) -> None:
    """Inference, then training, then what one kernel makes of two, for which the table is written by then;
    together within the time.
    """
    seen: dict[str, dict] = {}

    def timer(one: Try) -> float:
        path = tmp_path / "h200.json"
        seen.setdefault(one.table, json.loads(path.read_text()) if path.is_file() else {})
        return 1.0 if one.tile == last[one.table, one.row] else 2.0

    last = {(one.table, one.row): one.tile for one in gpu_tune.tries()}
    table = tune(timer)
    kinds, seconds, tables = zip(*children.asked, strict=True)
    assert kinds == ("tiles", "tile times") * 3
    assert set.union(*tables) == DEFAULT.keys()
    assert "stem" in tables[0]
    assert tables[2] == {"train_depthwise", "train_pointwise", "train_stem", "norm"}
    assert tables[4] == {"depthwise_project", "train_pointwise_both"}
    assert seen["pointwise"] == {}
    assert seen["train_stem"] == {**DEFAULT, **{name: table[name] for name in tables[0]}}
    both = {**table, **{name: DEFAULT[name] for name in tables[4]}}
    assert seen["train_pointwise_both"] == both
    assert sum(seconds) == pytest.approx(100)
    assert min(seconds) > 5
    assert sum(seconds[:2]) == pytest.approx(44)


def test_one_launch_for_two_layers_where_it_is_faster(
    tune: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For one shape at large batches, by a network that looks the table up."""

    def timer(one: Try) -> float | None:
        if one.table != "depthwise_project":
            return None
        faster = (one.row, one.shape) == ("large_half", "144x24") and dict(one.tile)["used"]
        return (
            0.5 if faster and dict(one.tile)["m"] == 32 else 0.9 if faster else 1.0 + dict(one.tile)["used"]
        )

    rows = tune(timer)["depthwise_project"]
    changed = {name: row for name, row in rows.items() if row != DEFAULT["depthwise_project"].get(name)}
    assert changed.keys() == {"large_half_144x24"}
    assert (changed["large_half_144x24"]["used"], changed["large_half_144x24"]["m"]) == (1, 32)
    monkeypatch.setattr(depthwise_project, "tiles", lambda *_: rows)
    monkeypatch.setattr(depthwise_project, "device_of", lambda device: ("NVIDIA H200", 132))
    with torch.device("cpu"):
        specs = arch.network()
        tensors = [(torch.zeros(spec.weight_shape), torch.zeros(spec.cout)) for spec in specs]
        network = Network(specs, tensors, torch.float16, torch.device("cpu"), project=None)
    pairs = [launch.first for launch in network.plan(224, 224, 256) if launch.form == "depthwise_project"]
    assert [(specs[i].cin, specs[i + 1].cout) for i in pairs] == [(144, 24)]
    assert all(launch.count == 1 for launch in network.plan(224, 224, 1)[:-1])


def test_one_kernel_for_both_gradients_where_it_is_faster(
    tune: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shape whose gradients are faster apart has a row that has them so, and the launcher follows it."""

    def timer(one: Try) -> float | None:
        if one.table != "train_pointwise_both":
            return None
        apart = dict(one.tile)["most"] == 1
        return 1.0 if apart == (one.shape == "32x192") else 2.0

    rows = tune(timer)["train_pointwise_both"]
    assert rows["half_32x192"]["most"] == 1
    assert rows["half"]["most"] > 1
    monkeypatch.setattr(gpu_forms, "DEVICE", "meta")
    monkeypatch.setattr(
        train_pointwise_gradient,
        "tiles",
        lambda _, name: rows if name == "train_pointwise_both" else DEFAULT[name],
    )
    apart = set()
    for form in training_forms():
        if form.name == "train pointwise gradients":
            with aot.launches() as made:
                form.make(256, "fp16").run()
            if "input_gradient_kernel" in {launch.kernel.__name__ for launch in made}:
                apart.add(form.shape)
    assert "32x192" in apart
    assert "24x144" not in apart


def test_candidates_are_each_another(with_blocks: None) -> None:
    """Of a row as the launcher takes it: no list has one twice, none changes what chooses between rows."""
    for key, changes in gpu_candidates.CHANGES.items():
        rows = [tuple(sorted(change.items())) for change in changes]
        assert len(rows) == len(set(rows)), key
    known = {key.partition(" ")[0] for key in gpu_candidates.CHANGES}
    assert known == DEFAULT.keys()
    for row in DEFAULT["train_pointwise"]:
        if "wide" not in row and "x" not in row and not row.startswith("weight"):
            kept = {
                dict(tile)["n"]
                for tile in gpu_tune.candidates("train_pointwise", row, "", DEFAULT["train_pointwise"])
            }
            assert kept == {DEFAULT["train_pointwise"][row]["n"]}


def _constants(one: Try) -> dict[str, int | bool]:
    """What a try's kernel is compiled for: its tile without what lies past the channels."""
    tile, channels = dict(one.tile), [int(word) for word in re.findall(r"\d+", one.form.layer)[:2]]
    cin, cout = max(16, _power_of_2(channels[0])), max(16, _power_of_2(channels[-1]))
    if one.table == "train_pointwise_both":
        return {"FOR_X": True, "K": tile["k"]}
    if one.table == "train_depthwise":
        return {"ROWS": tile["rows"], "COLS": tile["cols"]}
    if one.table == "train_stem":
        return {"M": tile["m"]}
    if one.table == "norm":
        return {"M": tile["m"], "N": min(tile["n"], _power_of_2(channels[0]))}
    if one.row.startswith("weight"):
        return {"FOR_X": False, "M": min(tile["m"], cout), "N": min(tile["n"], cin), "K": tile["k"]}
    made, read = (cout, cin) if one.row.startswith("forward") else (cin, cout)
    return {"M": tile["m"], "N": min(tile["n"], made), "K": min(tile["k"], read)}


def _power_of_2(channels: int) -> int:
    return 1 << (channels - 1).bit_length()


def test_every_candidate_reaches_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, where launchers look tiles up: each row's candidates launch what the row says."""
    monkeypatch.setattr(gpu_forms, "DEVICE", "meta")
    seen = set()
    for one in gpu_tune.tries():
        tile = dict(one.tile)
        if not one.form.name.startswith("train") or tile.get("most") == 1:
            continue
        with aot.launches() as made:
            one.form.make(256, one.kind, tile).run()
        alike = [
            launch
            for launch in made
            if launch.warps == tile["warps"]
            and launch.stages == tile.get("stages", 3)
            and _constants(one).items() <= launch.arguments.items()
        ]
        if alike:
            seen.add((one.table, one.row, one.tile))
        else:  # too few sums are allowed for these channels
            assert one.table == "train_pointwise_both", one
    wanted = {(one.table, one.row, one.tile) for one in gpu_tune.tries() if one.form.name.startswith("train")}
    assert {one for one in wanted if dict(one[2]).get("most") != 1} == seen


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


def test_all_kernels_are_asked_for_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel that a candidate launches, but that of a whole block, which is Gluon's."""
    monkeypatch.setattr(gpu_forms, "DEVICE", "meta")
    launched = set()
    for one in {(one.table, one.form.name): one for one in gpu_tune.tries()}.values():
        if not one.form.whole_block:
            with aot.launches() as made:
                one.form.make(4, one.kind, dict(one.tile)).run()
            launched |= {id(launch.kernel) for launch in made}
    assert len(launched) > 15
    asked = gpu_checks._functions()
    assert launched <= {id(function) for function in asked}
    assert "block_kernel" in {function.fn.__name__ for function in asked}


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

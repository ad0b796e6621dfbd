"""bench.flowers: that both train the same, what is kept, printed and written."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import colour_photos
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(ROOT))  # bench is not installed

from bench import limits, results
from bench import plot as readme
from bench.flowers import bars, contenders, plot, run
from bench.flowers.contenders import CONTENDERS
from bench.training.contenders import BEST, OURS, TUNED
from mnv2_fast import MobileNetV2, UserError, train
from mnv2_fast.recipe import Recipe

TINY = "--epochs 2 --image-size 32 --batch-size 8 --workers 0 --augment none"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of photos; published weights with nothing learned; known limits."""
    monkeypatch.setattr(limits, "measure", lambda threads: limits.Limits(117.6 * threads, 10.0, 200.0, 400.0))
    (tmp_path / "weights").mkdir()
    save_file(MobileNetV2().state_dict(), tmp_path / "weights" / "mobilenet_v2-IMAGENET1K_V1.safetensors")
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path / "weights"))
    return colour_photos(tmp_path / "photos")


def row(contender: str, seed: int, top1: float, seconds: float, **more: Any) -> results.Row:
    facts = {"epochs": 8, "best_top1": top1 + 0.01, "images_per_s": 90.0, "note": f"9 photos; {run.DEFAULTS}"}
    facts |= {"threads": 2, "weights": "IMAGENET1K_V1", **more}
    return results.Row("flowers", "finetune", contender, seed=seed, top1=top1, seconds=seconds, **facts)


def rows() -> list[results.Row]:
    """A run of three seeds."""
    ours = [
        row(OURS, seed, top1, 200.0 + seed, dtype="bf16") for seed, top1 in enumerate((0.90, 0.92, 0.925))
    ]
    torchs = [row(BEST, seed, 0.91, 502.5, dtype="fp32") for seed in range(3)]
    return ours + torchs + [row(BEST, seed, 0.90, 402.0, dtype="bf16") for seed in range(3)]


def test_bars_are_of_the_mean_and_the_slowest() -> None:
    assert bars.verdicts(rows()) == [
        "mnv2_fast: top-1 91.5% in the mean of 3 seeds, asked 91%: reached; "
        "202 s at most, asked 300: reached",
        "mnv2_fast in bf16 2.00x torch channels_last, tuned in bf16 in wall time, top-1 +1.5 points",
        "mnv2_fast in bf16 2.50x torch channels_last, tuned in fp32 in wall time, top-1 +0.5 points",
    ]
    assert bars.verdicts(rows()[:-1])[1:] == [  # torch's last is not there: the same seeds are compared
        "mnv2_fast in bf16 2.00x torch channels_last, tuned in bf16 in wall time, top-1 +1.0 points",
        "mnv2_fast in bf16 2.50x torch channels_last, tuned in fp32 in wall time, top-1 +0.5 points",
    ]
    worse = [row(OURS, seed, 0.90, 301.0) for seed in range(3)]
    assert bars.verdicts(worse) == [
        "mnv2_fast: top-1 90.0% in the mean of 3 seeds, asked 91%: MISSED; 301 s at most, asked 300: MISSED"
    ]
    assert bars.verdicts(worse[:2]) == ["mnv2_fast: 2 of 3 seeds measured"]


def test_the_table_says_what_the_rows_do(tmp_path: Path) -> None:
    results.save(tmp_path / "f.csv", rows(), results.context())
    table = plot.table(results.read_last_run(tmp_path / "f.csv"))
    assert "| bf16 | mnv2_fast | 91.5% | 90.0%, 92.0%, 92.5% | 92.5% | 201 | 202 | 90.0 |" in table
    assert "| fp32 | torch channels_last, tuned | 91.0% |" in table
    assert "| bf16 | torch channels_last, tuned | 90.0% |" in table
    assert "default options of `mnv2 finetune`, 8 epochs" in table
    assert table.endswith(
        "mnv2_fast, in bf16 by its default on this processor, is 2.00 times as fast as torch's fastest, "
        "which is in bf16."
    )
    results.save(
        tmp_path / "f.csv",
        [row(OURS, 0, 0.5, 9.0, note="9 photos; --epochs 1")],
        results.context() | {"run": "3"},
    )
    table = plot.table(results.read_last_run(tmp_path / "f.csv"))
    assert "on 9 photos: `mnv2 finetune --epochs 1`, 8 epochs" in table
    assert "times as fast" not in table


def test_the_table_is_written_into_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, end = readme.MARKERS["flowers"]
    page = tmp_path / "README.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter")
    monkeypatch.setattr(readme, "README", page)
    results.save(tmp_path / "f.csv", rows(), results.context())
    others = [part for name in ("peers", "kernels", "training", "losses") for part in (f"--{name}", "none")]
    assert readme.main([*others, "--flowers", str(tmp_path / "f.csv"), "--readme"]) == 0
    table = plot.table(results.read_last_run(tmp_path / "f.csv"))
    assert page.read_text() == f"before\n{begin}\n{table}\n{end}\nafter"


def test_both_begin_with_the_same_weights(published: Path) -> None:
    recipe = Recipe(seed=3)
    ours = train._network(None, "IMAGENET1K_V1", recipe, ("a", "b", "c"), None, lambda text: None)
    theirs = contenders.torchs("IMAGENET1K_V1", 3, 3)
    assert type(theirs).__module__.startswith("torchvision.")
    for (name, mine), (other, its) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, its), name
    convolution = next(module for module in theirs.modules() if isinstance(module, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("native")
def test_everyone_trains_in_a_process_of_its_own_and_is_kept(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is there is not done again."""
    output, keep = tmp_path / "flowers.csv", tmp_path / "keep"
    asked = ["--data", str(published), "--seeds", "1", "--threads", "1", "--keep", str(keep)]
    asked += ["--output", str(output), *TINY.split()]
    assert run.main(asked) == 0
    found = results.read_last_run(output)
    assert [one["contender"] for one in found] == [OURS, BEST, BEST]
    assert [one["dtype"] for one in found][1:] == ["fp32", "bf16"]
    for one in found:
        assert (one["seed"], one["epochs"], one["batch"], one["threads"]) == ("0", "2", "8", "1")
        assert one["note"] == f"30 photos, 6 to validate; {TINY}"
        assert 0 <= float(one["top1"]) <= float(one["best_top1"]) <= 1
        assert float(one["seconds"]) > 1
        assert float(one["images_per_s"]) > 1
    kept = ["ours-0.json", "torch-bf16-0.json", "torch-none-0.json"]
    assert sorted(path.name for path in keep.iterdir()) == kept
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split() == ["seed", "epochs", "top-1", "best", "seconds", "images/s"]
    assert printed[-3] == "mnv2_fast: 1 of 3 seeds measured"
    assert f"x {BEST} in bf16 in wall time, top-1 " in printed[-2]
    assert f"x {BEST} in fp32 in wall time, top-1 " in printed[-1]

    def never(*args: object) -> float:
        raise AssertionError(args)

    monkeypatch.setattr(run, "finetune", never)
    assert run.main(asked) == 0
    assert [one["seconds"] for one in results.read_last_run(output)] == [one["seconds"] for one in found]
    capsys.readouterr()
    assert run.main([*asked, "--ema", "0"]) == 2
    assert "is of other photos, options or versions: give another --keep" in capsys.readouterr().err


def test_a_run_that_is_cut_off_goes_on(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []

    def quick(contender: contenders.Contender, seed: int, *args: object) -> dict[str, Any]:
        if len(done) == 4 and cut:
            raise KeyboardInterrupt
        done.append((contender.key, seed))
        return {"contender": contender.name, "seed": seed, "epochs": 1, "top1": 0.5, "best_top1": 0.5} | {
            "dtype": "fp32",
            "seconds": 9.0,
            "images_per_s": 1.0,
        }

    monkeypatch.setattr(run, "train", quick)
    asked = ["--data", str(published), "--seeds", "2", "--threads", "1", "--keep", str(tmp_path / "keep")]
    asked += ["--output", str(tmp_path / "f.csv")]
    cut = True
    with pytest.raises(KeyboardInterrupt):
        run.main(asked)
    assert len(results.read_last_run(tmp_path / "f.csv")) == 4
    cut = False
    assert run.main(asked) == 0
    first, second = (
        [("ours", 0), ("torch-none", 0), ("torch-bf16", 0)],
        [("torch-none", 1), ("torch-bf16", 1)],
    )
    assert done == [*first, *second, ("ours", 1)]
    assert len(json.loads((tmp_path / "keep" / "ours-1.json").read_text())["asked"]["photos"]) == 64


def words_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> dict[str, Sequence[str]]:
    """What each contender's process is asked in a run, and with which environment."""
    asked: dict[str, Sequence[str]] = {}

    def finetune(contender: contenders.Contender, words: Sequence[str], *args: object) -> float:
        asked[contender.key] = contender.command(words)[1:]
        raise UserError("no further")

    options = run.parse(["--data", str(tmp_path), "--threads", "1", *arguments])
    monkeypatch.setattr(run, "finetune", finetune)
    for contender in CONTENDERS:
        with pytest.raises(UserError, match="no further"):
            run.train(contender, 2, options, tmp_path)
    return asked


def test_only_torchs_arithmetic_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ours has the default options alone; torch has its allocator tuned, and both arithmetics."""
    found = words_of(monkeypatch, tmp_path)
    ours = list(found["ours"])
    assert ours[:3] == ["-m", "mnv2_fast", "finetune"]
    assert ours[-2:] == ["--seed", "2"]
    assert "--amp" not in ours
    for amp in ("none", "bf16"):
        theirs = list(found[f"torch-{amp}"])
        assert theirs[:2] == ["-m", "bench.flowers.contenders"]
        assert theirs[-2:] == ["--amp", amp]
        assert theirs[2:6] == ours[3:7]
    assert [contender.env for contender in CONTENDERS] == [{}, TUNED, TUNED]


def test_what_is_wrong_is_one_line(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "f.csv")
    assert run.main(["--data", str(tmp_path / "nothing"), "--threads", "1", "--output", output]) == 2
    assert capsys.readouterr().err.startswith("bench.flowers: error: ")
    asked = ["--data", str(published), "--threads", "1", "--output", output, "--batch-size", "31"]
    assert run.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench.flowers: error: {OURS}: mnv2: error: batch_size=31 for 30 photos")
    assert not Path(output).exists()
    for arguments, said in (
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--threads", "100000"], "cores may be used here"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--seed=3", "--amp", "none"], "--amp, --seed: bench.flowers sets it itself, leave it out"),
    ):
        with pytest.raises(SystemExit):
            run.parse(["--data", str(published), *arguments])
        assert said in capsys.readouterr().err

"""`mnv2 compare`: what is trained, what the report says of it, and that it goes on where it was cut off."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from colours import save_weights
from helpers import colour_photos, one_thread  # noqa: F401

import mnv2_fast
from mnv2_fast import UserError, cli, compare, compare_report, contenders, costs, plots, report
from mnv2_fast.compare import Comparison, Result, Settings
from mnv2_fast.contenders import AUGMENT, CONTENDERS, Contender
from mnv2_fast.corruptions import CORRUPTIONS
from mnv2_fast.costs import Cost
from mnv2_fast.errors import Interrupted
from mnv2_fast.recipe import Recipe
from mnv2_fast.runs import Run

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--epochs", 2, "--image-size", 32, "--batch-size", 8, "--workers", 0)
TWO = ("--only", "lenet", "--only", "lenet-augmented")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes half a minute; `test_costs.py` has the real one."""
    monkeypatch.setattr(costs, "_compiled", lambda network, x: network)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts take longer than all the rest."""
    monkeypatch.setattr(plots, "_save", lambda figure, path: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return colour_photos(tmp_path / "photos")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that has `photos`, as the current one."""
    monkeypatch.chdir(folder.parent)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of each training."""
    calls: list[dict[str, Any]] = []
    fit = compare.fit

    def watched(data: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return fit(data, **keywords)

    monkeypatch.setattr(compare, "fit", watched)
    return calls


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main(["compare", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def results(out: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("runs/*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["contender"], []).append(result)
    return found


def test_a_whole_comparison(
    folder: Path, tmp_path: Path, trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = save_weights(tmp_path / "w.safetensors", 1.0), tmp_path / "out"
    args = ["--data", folder, "--out", out, *QUICK, "--weights", weights, "--split-seed", 3]
    everyone = [*TWO, "--only", "mobilenetv2*", "--only", "lenet-with-flip"]
    code, printed, _ = run(capsys, *args, "--seeds", 1, *everyone)
    assert (code, printed) == (0, f"{out / 'report.md'}\n")
    assert {Run(path).args()["split_seed"] for path in (out / "runs").iterdir()} == {3}
    names = ["lenet", "lenet-augmented", "mobilenetv2-scratch", "mobilenetv2-finetuned", "lenet-with-flip"]
    assert len(trained) == len(names)
    assert {call["weights"] for call in trained} == {None, weights}

    found = results(out)
    assert set(found) == set(names)
    text = (out / "report.md").read_text(encoding="utf-8")
    for name in names[:4]:
        (contender,), (result,) = contenders.choose([name]), found[name]
        assert (result["seed"], result["epochs"], sum(map(sum, result["confusion"]))) == (0, 2, 6)
        assert set(result["robustness"]) == {corruption.name for corruption in CORRUPTIONS}
        assert f"\n| {contender.title} | {100 * result['top1']:.1f}% |" in text
        shares = [result["top1"], *result["robustness"]["blur"]]
        assert (
            f"| blur | {contender.title} | {' | '.join(f'{100 * share:.1f}%' for share in shares)} |" in text
        )
    assert found["lenet-with-flip"][0]["robustness"] == {}
    recipes = {name: of[0]["recipe"] for name, of in found.items()}
    assert [recipes[name]["lr"] for name in names] == pytest.approx([2.5e-4, 2.5e-4, 2.5e-4, 7.5e-5, 2.5e-4])
    assert [recipes[name]["head_lr_factor"] for name in names] == [1, 1, 1, 10, 1]
    assert recipes["mobilenetv2-finetuned"]["augment"] == list(contenders.USUAL)
    begun = report.escape(str(weights))
    assert f"\n| MobileNetV2 fine-tuned | {begun} | 7.5e-05, last layer 0.00075 | 32 | crop, flip," in text
    assert "\n| LeNet-5 | random | 0.00025 | 32 | none | fp32 |\n" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 8
    assert all((out / link).exists() for link in links)
    assert not (out / compare.CACHE).exists()
    assert not list(out.glob("runs/*/last.pt"))

    # Again: nothing is trained. One seed more: only that.
    assert run(capsys, *args, "--seeds", 1, *everyone)[0] == 0
    assert (out / "report.md").read_text(encoding="utf-8") == text
    assert len(trained) == len(names)
    assert run(capsys, *args, "--seeds", 2, "--only", "lenet")[0] == 0
    assert [call["seed"] for call in trained[len(names) :]] == [1]
    tops = [result["top1"] for result in results(out)["lenet"]]
    assert f"\n| LeNet-5 | {100 * mean(tops):.1f}% ±" in (out / "report.md").read_text(encoding="utf-8")


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results are equal but for the time they took."""

    def timeless(result: dict[str, Any]) -> dict[str, Any]:
        clocks = ("seconds", "images_per_second")
        history = [{k: v for k, v in row.items() if k not in clocks} for row in result["history"]]
        return {**result, "seconds": 0, "history": history}

    return timeless(one) == timeless(other)


def test_it_goes_on_where_it_was_cut_off(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second run, after its first epoch; the result is that of a comparison in one go."""
    args = ["--data", folder, *QUICK, "--seeds", 1, *TWO]
    assert run(capsys, *args, "--out", tmp_path / "whole")[0] == 0

    fit = compare.fit
    calls: list[dict[str, Any]] = []

    def cut(data: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        if len(calls) == 2:

            def stop(row: Any) -> None:
                raise Interrupted("go on with mnv2 finetune", 15)

            keywords["on_epoch_end"] = stop
        return fit(data, **keywords)

    monkeypatch.setattr(compare, "fit", cut)
    code, out, err = run(capsys, *args, "--out", tmp_path / "cut")
    assert (code, out) == (143, "")
    assert err.endswith("mnv2: interrupted: 1 of 2 runs are done: the same command goes on from there\n")
    assert not (tmp_path / "cut" / "report.md").exists()
    code, _, err = run(capsys, *args, "--out", tmp_path / "cut")
    assert code == 0
    assert "run 1 of 2" not in err
    assert [call["resume"] for call in calls] == [False, False, True]
    whole, again = results(tmp_path / "whole"), results(tmp_path / "cut")
    assert all(same(whole[name][0], again[name][0]) for name in ("lenet", "lenet-augmented"))


def test_a_run_cut_off_before_its_first_checkpoint_begins_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["--data", folder, "--out", out, *QUICK, "--seeds", 1, "--only", "lenet"]
    assert run(capsys, *args)[0] == 0
    before = results(out)["lenet"][0]
    (out / "runs" / "lenet-seed0" / "result.json").write_text("{")  # as a full disk leaves it
    assert run(capsys, *args)[0] == 0
    assert same(results(out)["lenet"][0], before)


def test_a_budget_of_time(
    folder: Path, tmp_path: Path, trained: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = ["--data", folder, "--out", out, "--batch-size", 8, "--workers", 0, "--seconds", 1]
    code, _, _ = run(capsys, *args, "--seeds", 2, "--only", "lenet")
    assert code == 0
    (trial, first, second) = trained
    assert (trial["epochs"], "out" in trial) == (1, False)
    assert first["epochs"] == second["epochs"] > 1
    found = results(out)["lenet"]
    assert [result["epochs"] for result in found] == [first["epochs"]] * 2
    assert all(result["seconds"] < 3 for result in found)
    assert "whole epochs within 1 s of training" in (out / "report.md").read_text(encoding="utf-8")


def test_damaged_photos_are_named_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [folder / "red" / "1.png", folder / "grün" / "5.png"]
    for path in bad:
        path.write_bytes(b"")
    out = tmp_path / "out"
    code, _, err = run(capsys, "--data", folder, "--out", out, *QUICK, "--seeds", 1, *TWO)
    assert code == cli.BAD_FILES
    assert err.count("photo skipped") == 2
    assert all(err.count(f"{path} ") == 1 for path in bad)
    assert "| left out | 2 photos that could not be used |" in (out / "report.md").read_text(encoding="utf-8")

    for path in (folder / "red").iterdir():
        path.write_bytes(b"")
    code, _, err = run(capsys, "--data", folder, "--out", tmp_path / "none", *QUICK, *TWO)
    assert code == 2
    assert "no photo of class 'red' to train on" in err


def test_other_settings_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--data", folder, "--out", tmp_path / "out", "--seeds", 1, "--only", "lenet", "--workers", 0]
    assert run(capsys, *args, "--epochs", 1, "--batch-size", 8)[0] == 0
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["version"] == mnv2_fast.__version__
    code, out, err = run(capsys, *args, "--epochs", 3, "--batch-size", 9)
    assert (code, out) == (2, "")
    assert "has runs with other settings: epochs is 3, not 1; batch_size is 9, not 8: give the same" in err


def test_other_photos_are_told_in_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--data", folder, "--out", tmp_path / "out", "--seeds", 1, "--only", "lenet", *QUICK]
    assert run(capsys, *args)[0] == 0
    shutil.copy(folder / "red" / "1.png", folder / "red" / "extra 1.png")
    code, _, err = run(capsys, *args)
    assert code == 2
    assert "other settings: other photos, 7 to validate on instead of 6: give the same ones" in err
    (folder / "red" / "extra 1.png").unlink()
    code, _, err = run(capsys, *args, "--val-share", 0.4)
    assert "other photos, 21 to train on instead of 30 and 15 to validate on instead of 6: give" in err
    (folder / "red" / "2.png").rename(folder / "red" / "another.png")
    code, _, err = run(capsys, *args)
    assert "other settings: the same numbers of photos, but others: give the same ones" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data", "nowhere", "--out", "out"], "'nowhere' does not exist"),
        (["--data", "photos", "--out", "photos/out"], "out 'photos/out' is among the photos of photos"),
        (
            ["--data", "photos", "--out", "out", "--report", "photos/r"],
            "report 'photos/r' is among the photos",
        ),
        (["--data", "photos", "--out", "file"], "'file' is a file or empty"),
        (
            ["--data", "photos", "--out", "out", "--only", "lennet"],
            "no contender is called 'lennet': use lenet,",
        ),
        (["--data", "photos", "--out", "out", "--seeds", "0"], "give a whole number of at least 1"),
        (["--data", "photos", "--out", "out", "--epochs", "1", "--seconds", "9"], "not allowed with"),
        ([], "required: --data"),
        (
            ["--data", "photos", "--out", "out", "--weights", "none.pth"],
            "no weights file none.pth",
        ),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], said: str, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("mine")
    try:
        code, out, err = run(capsys, *args)
    except SystemExit as stop:
        code, (out, err) = int(stop.code or 0), capsys.readouterr()
    assert (code, out) == (2, "")
    (error,) = [line for line in err.splitlines() if line.startswith("mnv2: error: ")]
    assert said in error


def test_who_takes_part() -> None:
    names = [contender.name for contender in CONTENDERS]
    assert len(set(names)) == len(names)
    assert [c.name for c in contenders.choose(["mobile*", "lenet"])] == [
        "lenet", "mobilenetv2-scratch", "mobilenetv2-finetuned"
    ]  # fmt: skip
    assert contenders.choose(()) == CONTENDERS
    for name in AUGMENT:
        alone, without = contenders.choose([f"lenet-with-{name}", f"lenet-without-{name}"])
        assert alone.augment == (name,)
        assert set(without.augment) == set(AUGMENT) - {name}
    with pytest.raises(UserError, match="no contender is called 'x'"):
        contenders.choose(["lenet", "x"])


SETTINGS = Settings("0.1.0", "/photos", ("a", "b"), 80, 20, "0f", 10, None, "IMAGENET1K_V1", 32, None)


def made(contender: Contender, seed: int, top1: float, worse: float = 0.2) -> Result:
    robustness = {c.name: [top1 - worse * i / 3 for i in (1, 2, 3)] for c in CORRUPTIONS}
    history = [{"epoch": 1, "train_loss": 1.0, "train_top1": top1 + 0.1, "ema_val_top1": top1}]
    right = round(10 * top1)
    confusion = [[right, 10 - right], [10 - right, right]]
    recipe = Recipe(augment=contender.augment, amp="none", train_size=32).with_rates(32).to_dict()
    return Result(
        contender.name, seed, recipe, 1, top1, 0.5, 0.1, confusion, robustness, history, 10.0, 250_000
    )


def told(tmp_path: Path, top1: dict[str, list[float]], **more: Any) -> str:
    """The report of made-up figures."""
    chosen = tuple(c for c in CONTENDERS if c.name in top1)
    found = {c.name: [made(c, i, value) for i, value in enumerate(top1[c.name])] for c in chosen}
    cost = {
        "LeNet-5": Cost(60_000, 600_000, {"torch eager": 0.5, "torch.compile": None}),
        "MobileNetV2": Cost(2_400_000, 300_000_000, {"mnv2_fast engine, fp32": 5.0}),
    }
    cost = {title: cost[title] for title in dict.fromkeys(c.network.title for c in chosen)}
    comparison = replace(Comparison(SETTINGS, chosen, found, cost, 0), **more)
    compare_report.write(tmp_path, comparison, {"machine": "a|b"})
    return (tmp_path / "report.md").read_text(encoding="utf-8")


def test_sentences_follow_from_the_numbers(tmp_path: Path, undrawn: None) -> None:
    figures = {"lenet": [0.4, 0.5], "lenet-augmented": [0.5, 0.6], "mobilenetv2-finetuned": [0.9, 0.9]}
    text = told(tmp_path, figures)
    assert (
        "- MobileNetV2 fine-tuned is 35.0 points above LeNet-5 with augmentation; its worst seed is above"
        in text
    )
    assert "- LeNet-5 with augmentation is 10.0 points above LeNet-5; their seeds overlap" in text
    assert "| MobileNetV2 fine-tuned | 90.0% ±0.0 (90.0 to 90.0) |" in text
    assert "| LeNet-5 | 45.0% ±7.1 (40.0 to 50.0) |" in text
    assert "MobileNetV2 has 40 times the parameters of LeNet-5 and does 500 times its" in text
    assert "takes it 10.0 times as long" in text
    assert "| torch.compile | does not run here |" in text
    assert r"| machine | a\|b |" in text
    # The other way round.
    text = told(tmp_path, {**figures, "mobilenetv2-finetuned": [0.2, 0.3]})
    assert "- LeNet-5 is 20.0 points above MobileNetV2 fine-tuned; its worst seed is above" in text
    text = told(tmp_path, {"lenet": [0.5], "lenet-augmented": [0.5], "mobilenetv2-finetuned": [0.6]})
    assert "- LeNet-5 and LeNet-5 with augmentation are equal." in text
    assert "- MobileNetV2 fine-tuned is 10.0 points above LeNet-5; with one seed" not in text
    assert (
        "- MobileNetV2 fine-tuned is 10.0 points above LeNet-5, with one seed, which says nothing of" in text
    )


def test_what_changes_most_is_named(tmp_path: Path, undrawn: None) -> None:
    lenet, mobilenet = CONTENDERS[0], CONTENDERS[3]
    found = {lenet.name: [made(lenet, 0, 0.5, 0.1)], mobilenet.name: [made(mobilenet, 0, 0.9, 0.3)]}
    text = told(tmp_path, {lenet.name: [], mobilenet.name: []}, results=found)
    assert "- noise of strength 3: MobileNetV2 fine-tuned changes by -30.0 points, LeNet-5 by -10.0." in text
    found[lenet.name] = [made(lenet, 0, 0.5, -0.1)]
    text = told(tmp_path, {lenet.name: [], mobilenet.name: []}, results=found)
    assert "MobileNetV2 fine-tuned changes by -30.0 points, LeNet-5 by +10.0." in text
    found[lenet.name] = [made(lenet, 0, 0.5, 0.0)]
    text = told(tmp_path, {lenet.name: [], mobilenet.name: []}, results=found)
    assert "MobileNetV2 fine-tuned changes by -30.0 points, LeNet-5 by +0.0." in text


def test_the_ablation(tmp_path: Path, undrawn: None) -> None:
    figures = {
        "lenet": [0.5],
        "lenet-augmented": [0.6],
        "lenet-with-flip": [0.45],
        "lenet-without-crop": [0.7],
    }
    text = told(tmp_path, figures)
    assert "| LeNet-5 with flip | 45.0% | -5.0 |" in text
    assert "| LeNet-5 with all but crop | 70.0% | +10.0 |" in text
    assert "+10.0 points without augmentation, +10.0 with all of it." in text
    assert "## Augmentation" not in told(tmp_path, {"lenet": [0.5], "mobilenetv2-finetuned": [0.9]})
    # Ablation alone has nothing to say of accuracy.
    text = told(tmp_path, {"lenet-with-flip": [0.5]})
    assert "## Accuracy" not in text
    assert "## Costs" in text


@pytest.mark.slow
def test_a_short_comparison_of_flowers(
    flowers: Path, weights_v1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty photos of each class, as a user would call it."""
    torch.set_num_threads(2)
    for side, count in (("train", 20), ("val", 10)):
        for name in sorted(path.name for path in (flowers / side).iterdir() if path.is_dir()):
            (tmp_path / "data" / side / name).mkdir(parents=True)
            for path in sorted((flowers / side / name).iterdir())[:count]:
                shutil.copy(path, tmp_path / "data" / side / name)
    args = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--seeds", 1, "--epochs", 4]
    args += ["--weights", weights_v1, "--image-size", 128, *TWO, "--only", "mobilenetv2-finetuned"]
    assert run(capsys, *args)[0] == 0
    found = results(tmp_path / "out")
    assert found["mobilenetv2-finetuned"][0]["top1"] > 0.6 > found["lenet"][0]["top1"]

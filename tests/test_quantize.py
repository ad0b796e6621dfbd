"""`mnv2 quantize`: the file it writes, what it says of it, and when it writes none."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import LABELS, PREPROCESSING, picture, save_weights
from helpers import one_thread  # noqa: F401
from PIL import Image
from safetensors.torch import load_file

import mnv2_fast
from mnv2_fast import cli, compile, data, demo, quantize

pytestmark = pytest.mark.usefixtures("one_thread")

# Twenty photos near the border of a class: how many agree depends on the order in which torch's threads add.
ANY = ("--min-agreement", 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five classes well apart."""
    return save_weights(tmp_path_factory.mktemp("weights") / "m.safetensors", 1.0)


@pytest.fixture(scope="module")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five classes all but alike: the least noise moves the first one."""
    return save_weights(tmp_path_factory.mktemp("weights") / "undecided.safetensors", 1e-5)


def write_photos(folder: Path, count: int) -> Path:
    """The first `count` pictures."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(picture(i)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", 40)


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = cli.main(["quantize", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_file_that_predict_takes(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.safetensors"
    code, out, err = run(capsys, "--data", photos, "--out", file, "--weights", weights, *ANY)
    assert (code, err) == (0, "")
    assert "calibrated on 20 photos, judged on 20 others" in out
    assert "top-1 not known: no photo is in a folder with the name" in out
    assert f"{file}: " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "photos"]

    engine = mnv2_fast.load(file)
    assert (engine.dtype, engine.labels, engine.preprocessing.crop) == ("int8", LABELS, 32)
    held_out = sorted(photos.iterdir())[1::2]
    crops = [data.resize_and_crop(Image.open(path), engine.preprocessing) for path in held_out]
    x = torch.from_numpy(np.stack(crops))
    model = mnv2_fast.mobilenet_v2(weights=weights).eval()
    agreement = (engine(x).argmax(1) == compile(model)(x).argmax(1)).float().mean().item()
    assert f"agreement with the float network: {agreement:.1%}" in out

    assert cli.main(["predict", "--model", str(file), "--json", str(held_out[0])]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {best["label"] for best in row["predictions"]} == set(LABELS)


def test_predict_and_bench_calibrate_by_themselves(
    weights: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "race", partial(demo.race, turns=1, timed=3))
    (photos / "10.png").write_text("no photo")
    int8 = ["--model", weights, "--dtype", "int8", "--threads", "1"]
    int8 += ["--calibration", str(photos / "0*.png"), "--calibration", str(photos / "1*.png")]
    assert cli.main(["predict", *int8, "--json", str(photos / "20.png")]) == 0
    out, err = capsys.readouterr()
    fitted = [path for path in sorted(photos.iterdir()) if path.name < "20" and path.name != "10.png"]
    engine = compile(mnv2_fast.mobilenet_v2(weights=weights).eval(), "int8", calibration=fitted)
    expected = mnv2_fast.Predictor(engine)(photos / "20.png")
    assert json.loads(out)["predictions"] == expected
    assert [str(photos / "10.png") in line for line in err.splitlines()] == [True, False]
    assert err.endswith("mnv2: 1 of 20 photos could not be used\n")

    assert cli.main(["bench", *int8, "--size", "32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["engine"].startswith("Engine(5 classes, int8, ")
    assert facts["engine"].endswith("threads=1)")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["predict", "PHOTOS", "--dtype", "int8"], "dtype='int8' needs calibration images: "),
        (["predict", "PHOTOS", "--dtype", "int8"], "--calibration), a folder of photos"),
        (["bench", "--dtype", "int8"], "--calibration), a folder of photos"),
        (["predict", "PHOTOS", "--calibration", "PHOTOS"], "add --dtype int8, or leave it out"),
        (["bench", "--calibration", "PHOTOS", "--dtype", "bf16"], "add --dtype int8, or leave it out"),
        (["bench", "--calibration", "none/*.png", "--dtype", "int8"], "no file matches 'none/*.png'"),
        (["bench", "--calibration", "none", "--dtype", "int8"], "none of the calibration photos can be used"),
        (["bench", "--calibration", "PHOTOS", "--dtype", "int8", "--threads", "5000"], "from 1 to 1024"),
    ],
)
def test_int8_without_its_photos_and_photos_without_int8(
    args: list[str], words: str, weights: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(photos) if arg == "PHOTOS" else arg for arg in args]
    assert cli.main([*given, "--model", weights]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("mnv2: error: ")
    assert words in last


def test_an_engine_is_not_calibrated_again(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.safetensors"
    assert run(capsys, "--data", photos, "--out", file, "--weights", weights, *ANY)[0] == 0
    asked = ["predict", "--model", str(file), "--dtype", "int8", str(photos / "01.png")]
    assert cli.main(asked) == 0
    capsys.readouterr()
    assert cli.main([*asked, "--calibration", str(photos)]) == 2
    assert "is an engine, which has no model: give the weights" in capsys.readouterr().err


def test_the_same_photos_give_the_same_tensors(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        args = ["--data", photos, "--out", tmp_path / name, "--weights", weights, "--images", 20]
        code, out, _ = run(capsys, *args, "--min-agreement", 0)
        assert code == 0
        assert "calibrated on 10 photos, judged on 10 others" in out
    one, other = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_folders_of_classes_give_the_drop_in_top1(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "classes"
    for name in ("red", "blue", "nobody"):
        write_photos(folder / name, 12)
    code, out, _ = run(capsys, "--data", folder, "--out", tmp_path / "m", "--weights", weights, *ANY)
    assert code == 0
    model = mnv2_fast.mobilenet_v2(weights=weights).eval()
    _, judging = quantize.split(folder)
    known = [path for path in judging if path.parent.name in LABELS]
    crops = [data.resize_and_crop(Image.open(path), PREPROCESSING) for path in known]
    x = torch.from_numpy(np.stack(crops))
    target = torch.tensor([LABELS.index(path.parent.name) for path in known])
    exact, ours = (
        (engine(x).argmax(1) == target).float().mean().item()
        for engine in (compile(model), mnv2_fast.load(tmp_path / "m"))
    )
    said = f"top-1 on the 12 photos in folders of classes: {ours:.1%}, float {exact:.1%}, drop "
    assert said + f"{100 * (exact - ours):.1f} points" in out


def test_each_layers_error(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--data", photos, "--out", tmp_path / "m", "--weights", weights, "--per-layer", *ANY]
    _, out, _ = run(capsys, *args)
    engine = mnv2_fast.load(tmp_path / "m")
    lines = out.splitlines()[1 : len(engine.layers) + 1]
    assert [line.split()[0] for line in lines] == [spec.conv for spec in engine.layers]
    decibels = [float(line.split()[1]) for line in lines]
    assert all(5 < value < 60 for value in decibels), decibels
    # The last layer's are the logits': another way to the same number.
    model = mnv2_fast.mobilenet_v2(weights=weights).eval()
    paths = quantize.split(photos)[1][:4]
    crops = [data.resize_and_crop(Image.open(path), engine.preprocessing) for path in paths]
    x = torch.from_numpy(np.stack(crops))
    exact = compile(model)(x).double()
    noise = (engine(x).double() - exact).square().sum()
    assert decibels[-1] == pytest.approx(10 * torch.log10(exact.square().sum() / noise).item(), abs=0.1)


def test_a_network_that_differs_too_much_is_not_written(
    undecided: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--data", photos, "--out", tmp_path / "m", "--weights", undecided]
    code, out, err = run(capsys, *args)
    assert code == 1
    assert "agreement with the float network: " in out
    assert "is under --min-agreement 0.9, " in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    assert run(capsys, *args, "--min-agreement", 0)[0] == 0
    assert (tmp_path / "m").is_file()


def test_damaged_photos_are_named_once_and_counted(
    weights: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("04.png", "39.png"):  # one to calibrate on, and the last one to judge by
        (photos / name).write_text("no photo")
    code, out, err = run(capsys, "--data", photos, "--out", tmp_path / "m", "--weights", weights, *ANY)
    assert code == 0
    assert "calibrated on 19 photos, judged on 19 others" in out
    first, second, count = err.splitlines()
    assert str(photos / "04.png") in first
    assert str(photos / "39.png") in second
    assert count == "mnv2: 2 of 40 photos could not be used"


def test_few_photos_are_a_warning(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_photos(tmp_path / "few", 2)
    args = ["--data", folder, "--out", tmp_path / "m", "--weights", weights, "--min-agreement", 0]
    code, out, err = run(capsys, *args)
    assert code == 0
    assert "calibrated on 1 photos, judged on 1 others" in out
    assert "mnv2: warning: 1 calibration image(s) are few" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--data": "nowhere"}, "there is no folder"),
        ({"--data": "empty"}, "no photos in"),
        ({"--data": "one"}, "1 photo is too few"),
        ({"--data": "damaged"}, "none of the calibration photos can be used"),
        ({"--data": "half"}, "none of the photos to judge by can be used"),
        ({"--out": "nowhere/m"}, "there is no folder"),
        ({"--out": "one"}, "is a folder or empty"),
        ({"--weights": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"--weights": "one/00.png"}, "00.png"),
    ],
    ids=str,
)
def test_what_cannot_be_quantized(
    change: dict[str, str],
    words: str,
    weights: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    write_photos(tmp_path / "one", 1)
    for name, bad in (("damaged", "*.png"), ("half", "01.png")):
        for path in write_photos(tmp_path / name, 2).glob(bad):
            path.write_text("no photo")
    before = sorted(tmp_path.rglob("*"))
    args = {"--data": str(tmp_path / "half"), "--out": str(tmp_path / "m"), "--weights": weights}
    args |= {key: str(tmp_path / value) for key, value in change.items()}
    code, _, err = run(capsys, *[word for pair in args.items() for word in pair])
    assert code == 2
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("mnv2: error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "half"])
def test_a_share_that_is_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quantize", "--data", "d", "--out", "m", "--min-agreement", value])
    assert stopped.value.code == 2
    assert "give a number from 0 to 1" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_for_each_stage_at_a_terminal(
    weights: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    args = ["--data", str(photos), "--out", str(tmp_path / "m"), "--weights", weights]
    assert cli.main(["quantize", *args]) == 0
    for stage in ("calibration photos read", "steps quantized", "photos judged"):
        assert stage in terminal.getvalue()


@pytest.mark.parametrize("stage", ["calibration photos read", "steps quantized", "photos judged"])
def test_interruption_leaves_no_file(stage: str, weights: str, photos: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from mnv2_fast import cli\n"
        "whole = cli.Stages.advance\n"
        "def slow(self, stage, done, of):\n"
        "    whole(self, stage, done, of)\n"
        "    if (stage, done) == (sys.argv[1], 3): print('here', flush=True); time.sleep(60)\n"
        "cli.Stages.advance = slow\n"
        "sys.exit(cli.main(['quantize', *sys.argv[2:]]))"
    )
    args = ["--data", str(photos), "--out", str(tmp_path / "m"), "--weights", weights]
    command = [sys.executable, "-c", code, stage, *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.startswith("mnv2: interrupted: 3 of ")
    assert err.endswith(f"{stage}, {tmp_path / 'm'} is not written\n")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]

"""The command `mnv2 finetune`: what it prints, its exit codes, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fails
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file

from mnv2_fast import MobileNetV2, cli, env, flowers, reporting, trainer
from mnv2_fast.reporting import Reporter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a quick training of a small network on 30 photos of three classes."""
    folder = tmp_path_factory.mktemp("fine tune")
    data = colour_photos(folder / "photos", 10)
    torch.manual_seed(0)
    save_file(MobileNetV2(5, width_mult=0.25).state_dict(), folder / "small.safetensors")
    options = "--epochs 2 --batch-size 8 --image-size 32 --threads 1 --workers 0"
    return ["--data", str(data), "--weights", str(folder / "small.safetensors"), *options.split()]


def test_from_a_folder_to_predictions(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my run"
    assert cli.main(["finetune", *words, "--out", str(out)]) == 0
    said, err = capsys.readouterr()
    pattern = r"(.*): top-1 [\d.]+% on 6 photos, after 2 epochs in \d+ s; "
    pattern += r"best.safetensors: [\d.]+%, after epoch \d\n"
    found = re.fullmatch(pattern, said)
    assert found is not None
    assert found[1] == str(out / "final.safetensors")
    assert re.search(r"small.safetensors: its classifier of 5 classes is replaced by a new one of 3\n", err)
    line = r"epoch 2/2: loss [\d.]+, top-1 [\d.]+%; validation: loss [\d.]+, top-1 [\d.]+%, averaged weights "
    assert re.search(line + r"[\d.]+%; \d+ images/s, \d:\d\d\n$", err)
    assert err.count("\n") == 3
    photo = str(Path(words[1]) / "sky blue" / "1.png")
    assert cli.main(["predict", "--model", str(out / "best.safetensors"), "--json", photo]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {best["label"] for best in row["predictions"]} == {"red", "grün", "sky blue"}


def test_ended_and_resumed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume --out RUN` is enough to go on."""
    whole, out = str(tmp_path / "whole"), str(tmp_path / "run")
    assert cli.main(["finetune", *words, "--out", whole]) == 0
    before, steps = trainer.Trainer._step, [0]

    def step(self: trainer.Trainer, found: Any) -> bool:
        steps[0] += 1
        if steps[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, found)

    monkeypatch.setattr(trainer.Trainer, "_step", step)
    capsys.readouterr()
    assert cli.main(["finetune", *words, "--out", out]) == 143
    said, err = capsys.readouterr()
    assert said == ""
    assert err.splitlines()[-1] == (
        "mnv2: interrupted: stopped after step 2 in epoch 1 of 2, go on with "
        f"mnv2 finetune --resume --out {out}"
    )
    assert "lr is 0.5, not 7.5e-05" in fails(capsys, "finetune", "--resume", "--out", out, "--lr", "0.5")
    assert cli.main(["finetune", "--resume", "--out", out]) == 0
    for ours, theirs in zip(
        load_file(Path(out) / "final.safetensors").values(),
        load_file(Path(whole) / "final.safetensors").values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_all_processes_save_first(
    words: list[str], tmp_path: Path, number: int, code: int
) -> None:
    """As a terminal sends Ctrl-C: to the worker processes, too."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "mnv2_fast", "finetune", *words, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--epochs", "500", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 100
        while not (out / "results.csv").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert said == ""
    last = err.splitlines()[-1]
    assert last.startswith("mnv2: interrupted: stopped after step ")
    assert last.endswith(f"mnv2 finetune --resume --out {out}")
    assert "Traceback" not in err
    state = torch.load(out / "last.pt", weights_only=True)["progress"]
    assert f"stopped after step {state['step']} " in last


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


ROW = {
    "epoch": 1,
    "train_loss": 1.5,
    "train_top1": 0.5,
    "val_loss": 1.25,
    "val_top1": 0.6,
    "ema_val_top1": 0.7,
    "skipped": 2,
    "images_per_second": 80.4,
    "seconds": 75.2,
}
SAID = (
    "epoch 1/3: loss 1.500, top-1 50.0%; validation: loss 1.250, top-1 60.0%, averaged weights 70.0%; "
    "80 images/s, 1:15, 2 photos could not be used"
)


def test_a_bar_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    reporter = Reporter(True, 3, 10, done=5)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where, **more: print(message, file=sys.stderr)
        with reporter.warnings_above():
            reporter.batch(1, 6, 1.5, 0.5, 80.4)
            warnings.warn("photo skipped: a.jpg", stacklevel=1)
            reporter.batch(1, 10, 1.4, 0.55, 80.4)
    reporter.epoch(ROW)
    reporter.close()
    lines = re.split(r"[\r\n]+", terminal.getvalue())
    assert SAID in lines
    last = lines[-2] if not lines[-1].strip() else lines[-1]
    assert last.startswith("epoch 1/3:")
    assert "10/30" in last
    assert "loss 1.400, top-1 55.0%, 80 images/s" in last
    assert "photo skipped: a.jpg" in lines


def test_the_bar_counts_the_batches_of_all_epochs(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["finetune", *words, "--out", str(tmp_path / "run")]) == 0
    lines = [line for line in re.split(r"[\r\n]+", terminal.getvalue()) if "/6 [" in line]
    assert "0/6 [" in lines[0]
    assert re.match(r"epoch 2/2: 100%.*6/6 \[.*loss [\d.]+, top-1 [\d.]+%, \d+ images/s\]", lines[-1])


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Within an epoch one a minute at most, and not more than one for a tenth of it."""
    now = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    reporter = Reporter(True, 3, 100)
    for done in range(1, 101):
        now[0] += 4
        reporter.batch(1, done, 1.5, 0.5, 80.4)
    reporter.epoch(ROW)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "epoch 1/3: batch 15/100, loss 1.500, top-1 50.0%, 80 images/s, 19:00 left"
    assert [line.split()[3] for line in lines[:-1]] == [f"{i}/100," for i in range(15, 100, 15)]
    assert lines[-1] == SAID
    reporter = Reporter(False, 3, 100)
    reporter.say("no")
    reporter.epoch(ROW)
    assert capsys.readouterr().err == ""


def test_variables_name_the_folder_of_fetched_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv(env.DATA.name, "")
    assert flowers.folder() == tmp_path / "hub" / "datasets" / "flower_photos"
    monkeypatch.setenv(env.DATA.name, str(tmp_path))
    assert flowers.folder() == tmp_path / "flower_photos"

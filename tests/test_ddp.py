"""Two processes that train one model with gloo: the gradients of one, and torch's DistributedDataParallel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp
import pytest
import torch
from conftest import ROOT
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)

from mnv2_fast import UserError, fit, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def _torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its processes, where a kill would leave them
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, 30 to train on, and 6 to validate on."""
    folder = tmp_path_factory.mktemp("ddp")
    colour_photos(folder / "photos")
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Any]:
    """What two processes came to."""
    done = _torchrun(str(ROOT / "tests" / "ddp.py"), str(root))
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = torch.load(root / "found.pt", weights_only=False)
    return result


def test_gradients_are_those_of_one_process(
    root: Path, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[Any] = []
    monkeypatch.setattr(trainer.Trainer, "_step", trainer.Trainer._step)  # to put it back
    ddp.record(trace)
    options = {**ddp.OPTIONS, **ddp.PLAIN, **ddp.FROZEN, "accumulate": 2, "batch_size": 8}
    fit(root / "photos", model=ddp.small_network(), **options)
    ours = trace[0][1]
    assert len(ours) == len(found["gradients"]) == 158
    assert sum(float(gradient.abs().max()) > 1e-3 for gradient in ours) > 100
    for mine, theirs in zip(ours, found["gradients"], strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * mine.abs().max()


def test_losses_are_those_of_torchvision_under_ddp(found: dict[str, Any]) -> None:
    assert len(found["losses"]) == len(found["torchvision"]) == 6
    assert found["losses"] == pytest.approx(found["torchvision"], rel=1e-4)
    epochs = [sum(found["losses"][i : i + 3]) / 3 for i in (0, 3)]
    assert [row["train_loss"] for row in found["history"]] == pytest.approx(epochs, rel=1e-5)


def test_all_processes_have_the_result(found: dict[str, Any]) -> None:
    assert found["equal"]


def test_told_to_one_stops_all_and_resumes_to_the_bit(root: Path, found: dict[str, Any]) -> None:
    first, second = found["interrupted"]
    assert first[0].startswith("stopped after step 4 in epoch 2 of 2, go on with mnv2 finetune --resume")
    assert second[0] == ""
    assert first[1] == second[1] == 143
    states = [torch.load(root / run / "last.pt", weights_only=True) for run in ("whole", "resumed")]
    for part in ("model", "average"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), key


def test_mistakes_are_said_by_one_process(root: Path, found: dict[str, Any]) -> None:
    for name, text in (("refused", "has a run"), ("nan", "lower lr")):
        first, second = found[name]
        assert (first[0], second[0]) == ("UserError", "SaidElsewhereError")
        assert text in first[1]
    assert "batch_size=99 of 2 processes for 30 photos to train on: use at most 15" in found["large"][0][1]
    with pytest.raises(UserError, match="the run had 2 processes, not 1: start as many"):
        fit(
            root / "photos",
            model=ddp.small_network(),
            preprocessing=ddp.SEEN,
            out=root / "whole",
            resume=True,
            progress=False,
        )


def test_the_command_under_torchrun(root: Path) -> None:
    words = "--weights none --epochs 1 --batch-size 4 --image-size 32 --threads 1 --workers 0"
    out = root / "by command"
    done = _torchrun(
        "-m", "mnv2_fast", "finetune", "--data", str(root / "photos"), "--out", str(out), *words.split()
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r".*final\.safetensors: top-1 .* on 6 photos, after 1 epochs .*\n", done.stdout)
    assert len(re.findall(r"^epoch 1/1: ", done.stderr, re.MULTILINE)) == 1
    assert (out / "best.safetensors").exists()

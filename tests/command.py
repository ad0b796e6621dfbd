"""What tests of the command `mnv2` call it with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2_fast import MobileNetV2, cli, compile, env, weights

LABELS = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module")
def engine_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small engine with five labels and small photos."""
    torch.manual_seed(0)
    model = MobileNetV2(5, width_mult=0.35).eval()
    torch.nn.init.normal_(model.classifier[1].weight)
    model.labels = LABELS
    model.preprocessing = weights.Preprocessing(40, 32)
    path = tmp_path_factory.mktemp("engine") / "m.safetensors"
    compile(model).save(path)
    return str(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of ours, no cached weights, no network; what a verb sets is undone."""
    for variable in env.VARIABLES:
        monkeypatch.setenv(variable.name, "")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    nowhere = (tmp_path / "nowhere").as_uri()
    rows = tuple(replace(row, url=f"{nowhere}/{row.file}") for row in weights.WEIGHTS)
    monkeypatch.setattr(weights, "WEIGHTS", rows)


def start(args: Sequence[str], **keywords: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "mnv2_fast", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a command line that a user got wrong; its one line on stderr."""
    try:
        code = cli.main([str(arg) for arg in args])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("mnv2: error: ")
    assert err.count("\n") == 1
    return err

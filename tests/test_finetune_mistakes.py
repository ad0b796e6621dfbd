"""Trainings that cannot end well: one line that names the cure, before the work where that can be."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)
from safetensors.torch import save_file
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, UserError, cli, fit, machine, settle, training
from mnv2_fast.recipe import Recipe
from mnv2_fast.runs import ARGS, LAST, Run

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 8,
    "image_size": 32,
    "workers": 0,
    "progress": False,
    "charts": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photos of three classes: 24 to train on, 6 to validate on."""
    return colour_photos(tmp_path_factory.mktemp("fine tune") / "photos", 10)


@pytest.fixture(scope="module")
def words(folder: Path) -> list[str]:
    """Options for a quick training of a small network."""
    weights = folder.parent / "small.safetensors"
    save_file(MobileNetV2(5, width_mult=0.25).state_dict(), weights)
    options = "--epochs 2 --batch-size 8 --image-size 32 --threads 1 --workers 0"
    return ["--data", str(folder), "--weights", str(weights), *options.split()]


def _fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command line that a user got wrong; its one error, after what was said of the weights."""
    try:
        code = cli.main(["finetune", *words])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    *said, error = err.splitlines()
    assert error.startswith("mnv2: error: ")
    assert all("its classifier of 5 classes is replaced" in line for line in said)
    return error


def _refused(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        fit(folder, **{**QUICK, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_command_lines(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert "--out" in _fails(capsys, "--data", "photos")
    assert "finetune needs photos: give a folder with --data" in _fails(capsys, *out)
    assert "does not exist" in _fails(capsys, *out, "--data", str(tmp_path / "nowhere"))
    assert "argument --epochs: '0': give a whole number of at least 1" in _fails(
        capsys, *out, *words, "--epochs", "0"
    )
    assert "argument --optimizer: 'adam': give one of adamw, sgd" in _fails(
        capsys, *out, *words, "--optimizer", "adam"
    )
    assert "argument --threads: '100000': give a whole number from 1 to 1024" in _fails(
        capsys, *out, *words, "--threads", "100000"
    )
    assert "not allowed with" in _fails(capsys, *out, *words, "--resume", "--overwrite")
    assert "no weights file" in _fails(capsys, *out, *words, "--weights", str(tmp_path / "no.safetensors"))
    assert "use at most 24" in _fails(capsys, *out, *words, "--batch-size", "25")
    assert "has no run to resume" in _fails(capsys, *out, "--resume")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_text("")
    assert "has a run (best.safetensors)" in _fails(capsys, *out, *words)


@pytest.mark.parametrize(
    "content", [5, None, "text", [1, 2], torch.zeros(3), {}, {"model": {"a": 1}}, {1: 2}]
)
@pytest.mark.parametrize("save", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
def test_weights_that_are_no_checkpoint(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: Any,
    save: Callable[[Any, Path], object],
) -> None:
    file = tmp_path / "some.pth"
    save(content, file)
    said = _fails(capsys, *words, "--weights", str(file), "--out", str(tmp_path / "run"))
    assert str(file) in said
    assert not (tmp_path / "run").exists()


LONE = "one value a channel, which has no variance: raise batch_size or image_size, or use freeze_bn"


def test_a_batch_of_one_with_maps_of_one_pixel(
    words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / LAST).write_text("of another run")
    said = _fails(capsys, *words, "--batch-size", "1", "--overwrite", "--out", str(out))
    assert LONE in said
    assert (out / LAST).read_text() == "of another run"
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten())
    assert LONE in _refused(folder, model=nn.Sequential(*pooled, nn.Linear(8, 3)), batch_size=1)
    for options in ({"freeze_bn": True}, {"image_size": 33, "train_size": 33}, {"freeze_epochs": 1}):
        model = MobileNetV2(3, width_mult=0.25)
        assert len(fit(folder, model=model, **{**QUICK, "batch_size": 1, **options}).history) == 1


def test_nothing_to_train(folder: Path, tmp_path: Path) -> None:
    model = MobileNetV2(3, width_mult=0.25).requires_grad_(False)
    out = tmp_path / "run"
    assert "no parameter of the model asks for a gradient: call requires_grad_()" in _refused(
        folder, model=model, out=out
    )
    model.features.requires_grad_()
    assert "no parameter of its last layer asks for" in _refused(
        folder, model=model, out=out, freeze_epochs=1
    )
    assert not out.exists()


def test_tensors_that_are_one(folder: Path, tmp_path: Path) -> None:
    """A safetensors file does not hold them; without one they train."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[3].weight
    said = _refused(folder, model=model, out=tmp_path / "run")
    assert said.startswith("2.weight and 3.weight of the model are one tensor")
    assert not (tmp_path / "run").exists()
    before = model[2].weight.clone()
    fit(folder, model=model, **QUICK)
    assert not torch.equal(model[2].weight, before)


def test_nan_in_validation_names_the_last_step(folder: Path) -> None:
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3072, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x.flatten(1))
            return y if self.training else y * math.nan

    said = _refused(folder, model=Explodes())
    assert said.startswith("the validation loss is nan in epoch 1, step 3, at a learning rate of ")


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_a_batch_is_refused_by_what_its_step_keeps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    """Of a width of 0.25, its expansions of 224 x 224 made again: half as much in bf16; and its photos."""
    options = {"amp": amp, "image_size": 224, "train_size": 224, "batch_size": 24}
    monkeypatch.setattr(machine, "_SMALL", 0)
    model = MobileNetV2(3, width_mult=0.25).train()
    nodes = [[layer.spec for layer in block.train_chain().layers] for block in model.features]
    needs = {
        name: training.kept_bytes(nodes, 24, 224, dtype)
        for name, dtype in (("none", torch.float32), ("bf16", torch.bfloat16))
    }
    assert needs["none"] == 2 * needs["bf16"]
    needs = {name: need + 24 * 3 * 224 * 224 * 4 for name, need in needs.items()}

    class BeganError(Exception):
        pass

    def began(*args: object, **more: object) -> None:
        raise BeganError

    monkeypatch.setattr("mnv2_fast.train.Trainer", began)
    monkeypatch.setattr(machine, "_available", lambda: iter([needs[amp]]))
    with pytest.raises(BeganError):
        fit(folder, model=model, **{**QUICK, **options})
    monkeypatch.setattr(machine, "_available", lambda: iter([needs[amp] - 1]))
    assert "lower batch_size" in _refused(folder, model=model, **options)
    with pytest.raises(BeganError):  # nothing of it is kept where the last layer trains alone
        fit(folder, model=model, **{**QUICK, **options, "freeze_epochs": 1})
    settled = Recipe(**options).with_rates(24)
    with pytest.raises(UserError, match="GB in each of 2 processes, "):
        settle.check_batch(model, settled, 224, 2)
    model.features[:-1].requires_grad_(False)
    settle.check_batch(model, settled, 224, 2)  # nor of what nobody trains


class _CutError(Exception):
    """The machine is lost."""


@contextlib.contextmanager
def _cut_at(call: int) -> Iterator[None]:
    """Within, the call with that number of those that change files fails."""
    calls = [0]

    def counted(before: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise _CutError
            return before(*args, **more)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "unlink"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield


def test_arguments_never_stand_beside_the_state_of_others(tmp_path: Path) -> None:
    """Wherever the beginning of a run in another one's place is cut off."""
    before, after = (
        {"data": "photos", "model": "MobileNetV2", "weights": None, "preprocessing": None, "epochs": epochs}
        for epochs in (1, 2)
    )
    cut = 0
    while True:
        run = Run(tmp_path / str(cut))
        run.begin(before)
        run.save_state({"identity": "of 1 epoch"})
        try:
            with _cut_at(cut + 1):
                run.begin(after)
        except _CutError:
            cut += 1
        else:
            break
        kept = (run.folder / LAST).exists()
        assert run.args() == before or not kept, cut
    assert cut > 8
    assert run.args() == after
    assert [file.name for file in run.folder.iterdir()] == [ARGS]

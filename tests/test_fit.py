"""`fit`: it learns, writes what a Predictor reads, and refuses what cannot end well."""

from __future__ import annotations

import csv
import errno
import importlib
import json
import math
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, Predictor, UserError, fit, lenet, machine, photos
from mnv2_fast.lenet import LeNet5
from mnv2_fast.recipe import Recipe
from mnv2_fast.settle import usual_train_size
from mnv2_fast.train import FitResult

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "image_size": 32,
    "workers": 0,
    "progress": False,
    "charts": False,
    "lr": 2e-3,
    "amp": "none",  # the same on every processor
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 photos of three classes: 30 to train on, 6 to validate on."""
    return colour_photos(tmp_path_factory.mktemp("data") / "photos")


def _network(seed: int = 0) -> MobileNetV2:
    torch.manual_seed(seed)
    return MobileNetV2(3, width_mult=0.25)


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A run of two epochs with a folder of its own."""
    torch.set_num_threads(1)
    return fit(folder, model=_network(), out=tmp_path_factory.mktemp("out") / "a run", **QUICK)


def test_it_learns(folder: Path) -> None:
    torch.manual_seed(0)
    options = {**QUICK, "image_size": None, "epochs": 8, "augment": ("flip",), "head_lr_factor": 1}
    result = fit(folder, model=LeNet5(3), preprocessing=lenet.PREPROCESSING, **options)
    assert result.top1 == 1
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.7 * losses[0]
    assert result.folder is None
    assert result.classes == ("grün", "red", "sky blue")


def test_history_and_results(run: FitResult) -> None:
    assert run.folder is not None
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert [row["step"] for row in run.history] == [3, 6]  # of 8 photos; the rest of an epoch is left out
    last = run.history[-1]
    assert run.top1 == last["ema_val_top1"]
    assert run.best_top1 == max(row["ema_val_top1"] for row in run.history)
    assert run.history[run.best_epoch - 1]["ema_val_top1"] == run.best_top1
    assert run.seconds == sum(row["seconds"] for row in run.history)
    assert len(run.photos.val) == 6
    with open(run.folder / "results.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(row) for row in run.history]
    for written, row in zip(rows, run.history, strict=True):
        assert {k: float(v) for k, v in written.items()} == pytest.approx(row, rel=1e-5)


def test_the_result_is_what_was_validated(run: FitResult) -> None:
    """The averaged weights, in eval mode, on photos as a Predictor sees them."""
    assert not run.model.training
    assert run.folder is not None
    predictor = Predictor(run.folder / "final.safetensors")
    names = {label: run.classes[label] for label in range(3)}
    right = [predictor(p.path)[0]["label"] == names[p.label] for p in run.photos.val]
    assert sum(right) / len(right) == pytest.approx(run.top1)
    final = load_file(run.folder / "final.safetensors")
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, final[key])


def test_checkpoints_carry_labels_and_preprocessing(run: FitResult) -> None:
    assert run.folder is not None
    for name in ("best.safetensors", "final.safetensors"):
        predictor = Predictor(run.folder / name)
        assert predictor.labels == list(run.classes)
        assert predictor.preprocessing == run.preprocessing
    assert (run.preprocessing.crop, run.preprocessing.resize) == (32, 37)
    assert isinstance(run.model, MobileNetV2)
    assert run.model.labels == list(run.classes)


def test_args_yaml_has_every_option(run: FitResult) -> None:
    yaml = pytest.importorskip("yaml")
    assert run.folder is not None
    args = yaml.safe_load((run.folder / "args.yaml").read_text(encoding="utf-8"))
    assert args["epochs"] == 2
    assert args["model"] == "MobileNetV2"
    assert args["data"] == str(run.photos.root)
    assert args["ema"] == 0.99
    assert sorted(file.name for file in run.folder.iterdir()) == [
        "args.yaml",
        "best.safetensors",
        "final.safetensors",
        "last.pt",
        "results.csv",
    ]


def test_the_same_again(folder: Path, run: FitResult) -> None:
    """Nothing but the seed decides: not the state of torch's generator, not the workers, not the cache."""
    torch.manual_seed(99)
    before = torch.get_rng_state()
    model = _network()
    torch.set_rng_state(before)
    again = fit(folder, model=model, **{**QUICK, "workers": 1, "cache": str(folder.parent / "cache")})
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    other = fit(folder, model=_network(), **{**QUICK, "seed": 1, "epochs": 1, "warmup_epochs": 0})
    assert other.history[0]["train_loss"] != run.history[0]["train_loss"]


class _Probe(nn.Module):
    """A linear model that says what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(x.detach().clone())
        return self.layer(x.flatten(1))


def _plain(folder: Path, batch: int, accumulate: int) -> list[Tensor]:
    """The weights after an epoch of the obvious loop, on the batches that the model saw."""
    options = {**QUICK, "image_size": 16, "batch_size": batch, "accumulate": accumulate, "epochs": 1}
    options |= {"ema": 0.0, "warmup_epochs": 0, "optimizer": "sgd", "weight_decay": 0.0, "seed": 3}
    torch.manual_seed(0)
    probe = _Probe()
    fit(folder, model=probe, **options)
    return [p.detach() for p in probe.parameters()]


def test_accumulated_batches_make_the_step_of_a_large_one(folder: Path) -> None:
    for ours, theirs in zip(_plain(folder, 5, 3), _plain(folder, 15, 1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_epoch_is_the_obvious_loop(folder: Path) -> None:
    """SGD on the photos that the model saw, with the labels of their numbers."""
    found = photos.find(folder)
    torch.manual_seed(0)
    probe = _Probe()
    twin = nn.Linear(3 * 16 * 16, 3)
    twin.load_state_dict(probe.layer.state_dict())
    options = {**QUICK, "image_size": 16, "epochs": 1, "warmup_epochs": 0, "optimizer": "sgd", "ema": 0.0}
    result = fit(
        found, model=probe, **{**options, "weight_decay": 0.0, "head_lr_factor": 1, "clip_grad": 0.5}
    )
    order = np.random.default_rng([0, 0]).permutation(len(found.train))
    step = torch.optim.SGD(twin.parameters(), 2e-3, 0.9, nesterov=True)
    losses = []
    for k, x in enumerate(probe.seen):
        labels = torch.tensor([found.train[i].label for i in order[8 * k : 8 * k + 8]])
        loss = nn.functional.cross_entropy(twin(x.flatten(1)), labels, label_smoothing=0.1)
        step.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in step.param_groups:
            group["lr"] = 2e-3 * (1 + math.cos(math.pi * k / 3)) / 2
        step.step()
        losses.append(loss.item())
    for ours, theirs in zip(probe.layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(losses) == 3
    assert result.history[0]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert result.model is probe
    assert "ema_val_top1" not in result.history[0]


@pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.4, "cutmix": 1.0},
        {"amp": "bf16"},
        {"freeze_epochs": 1},
        {"freeze_bn": True, "dropout": 0.5},
        {"class_weights": "balanced", "optimizer": "sgd", "clip_grad": 1.0},
        {"augment": ("crop", "flip", "randaugment"), "ema": 0.0},
    ],
    ids="-".join,
)
def test_every_option_trains(folder: Path, options: dict[str, Any]) -> None:
    model = _network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows: list[dict[str, Any]] = []
    fit(folder, model=model, on_epoch_end=rows.append, **{**QUICK, **options})
    assert len(rows) == 2
    assert all(math.isfinite(value) for row in rows for value in row.values())
    after = model.state_dict()
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert "features.0.0.weight" in moved
    assert ("features.0.1.running_mean" in moved) == ("freeze_bn" not in options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_epochs_move_the_head_alone(folder: Path) -> None:
    model = _network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit(folder, model=model, **{**QUICK, "epochs": 1, "freeze_epochs": 1})
    after = model.state_dict()
    assert {key for key in after if not torch.equal(after[key], before[key])} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }


def test_early_stopping(folder: Path) -> None:
    result = fit(folder, model=_network(), **{**QUICK, "epochs": 9, "lr": 1e-9, "patience": 2})
    assert result.best_epoch == 1
    assert len(result.history) == 3


def test_any_module_trains(folder: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.25)
    result = fit(folder, model=model, **{**QUICK, "epochs": 1})
    assert type(result.model) is type(model)


def test_a_checkpoint_of_other_classes_gets_a_new_head(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "five.safetensors"
    state = MobileNetV2(5, width_mult=0.25).state_dict()
    save_file(state, file, {"labels": json.dumps(list("abcde"))})
    options = {**QUICK, "progress": True, "epochs": 1}
    result = fit(folder, weights=file, **options)
    assert result.model.classifier[1].out_features == 3  # type: ignore[union-attr,index]
    assert "its classifier of 5 classes is replaced by a new one of 3" in capsys.readouterr().err
    save_file(_network().state_dict(), file, {"labels": json.dumps(["grün", "red", "sky blue"])})
    fit(folder, weights=file, **options)
    assert "its classifier is for these 3 classes and is kept" in capsys.readouterr().err
    save_file(_network().state_dict(), file, {"labels": json.dumps(["red", "grün", "sky blue"])})
    fit(folder, weights=file, **options)
    assert "its classifier of 3 classes is replaced" in capsys.readouterr().err
    save_file(_network().state_dict(), file)
    fit(folder, weights=file, **options)
    assert (
        "its classifier has 3 outputs, as many as there are classes, and is kept" in capsys.readouterr().err
    )


def test_unusable_photos_are_named_once_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(folder, tmp_path / "photos")
    bad = [photo.path for photo in photos.find(data).train[3:20:8]]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bad[1].read_bytes()[:99])
    bad[2].write_text("no photo")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = fit(data, model=_network(), **{**QUICK, "progress": True})
    found = [str(warning.message) for warning in said if "photo skipped" in str(warning.message)]
    assert len(found) == 3
    for path in bad:
        assert sum(str(path) in line for line in found) == 1
    assert result.history[-1]["skipped"] == 3
    assert "3 photos could not be used" in capsys.readouterr().err.splitlines()[-1]


def _refused(data: object, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        fit(data, **{"model": _network(), **QUICK, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in _refused(tmp_path / "nowhere")
    assert "one class only, 'a'" in _refused(colour_photos(tmp_path / "one", 3, ["a"]))
    lone = colour_photos(tmp_path / "lone", 12, ["a", "b"])
    for path in sorted((lone / "b").iterdir())[1:]:
        path.unlink()
    assert "class 'b' in" in _refused(lone)
    sides = tmp_path / "sides"
    colour_photos(sides / "train", 3, ["a", "b"])
    colour_photos(sides / "val", 3, ["a", "c"])
    assert "differ in their classes" in _refused(sides)
    for option in ("out", "cache"):
        said = _refused(folder, **{option: folder / "run"})
        assert (
            f"{option} '{folder / 'run'}' is among the photos of {folder}, where each folder is a class"
            in said
        )
    shutil.copytree(sides / "train", sides / "val", dirs_exist_ok=True)
    shutil.rmtree(sides / "val" / "c")
    assert "no class" not in (beside := _refused(sides, out=sides / "run", batch_size=99))
    assert "use at most" in beside  # no class is looked for beside train/ and val/
    assert "is among the photos" in _refused(sides, out=sides / "val" / "run")
    dark = shutil.copytree(folder, tmp_path / "dark")
    for path in (dark / "red").iterdir():
        path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "no photo of class 'red'" in _refused(dark)
        known = {"cache": str(tmp_path / "cache"), "out": tmp_path / "run"}
        assert "no photo of class 'red'" in _refused(dark, **known)
        assert not (tmp_path / "run").exists()


def test_what_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "batch_size=31 for 30 photos to train on: use at most 30" in _refused(folder, batch_size=31)
    assert "the model has 5 outputs for 3 classes" in _refused(folder, model=MobileNetV2(5, width_mult=0.25))
    assert "the model has none" in _refused(folder, model=nn.Flatten(), freeze_epochs=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device='cuda'" in _refused(folder, device="cuda")
    assert "device='gpu' is none" in _refused(folder, device="gpu")
    assert "tensorboard needs a run folder" in _refused(folder, tensorboard=True)
    assert "resume needs the run's folder" in _refused(folder, resume=True)
    monkeypatch.setattr(machine, "_available", lambda: iter([10**6]))
    assert "lower batch_size" in _refused(folder, image_size=2048)


@pytest.mark.parametrize("size", [None, 2**60])
def test_running_out_of_memory_is_one_line(folder: Path, size: int | None) -> None:
    class Greedy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if size is None:
                raise MemoryError
            return torch.empty(size, dtype=torch.uint8)

    message = _refused(folder, model=nn.Sequential(nn.Flatten(), Greedy(3072, 3)))
    assert "no memory to train on 8 photos at a time: lower batch_size" in message


@pytest.mark.parametrize("name", ["confusion.png", "tensorboard/events"])
def test_files_of_something_else_are_kept(folder: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "report" / name
    file.parent.mkdir(parents=True)
    file.write_text("not of a training")
    assert "give another folder" in _refused(folder, out=tmp_path / "report")
    assert file.read_text() == "not of a training"


def test_another_error_of_the_model_is_its_own(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(folder, model=nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), **QUICK)


def test_a_run_is_not_overwritten_by_mistake(folder: Path, run: FitResult, tmp_path: Path) -> None:
    assert run.folder is not None
    out = shutil.copytree(run.folder, tmp_path / "run")
    message = _refused(folder, out=out)
    assert "has a run" in message
    assert "--resume" in message
    assert "--overwrite" in message
    kept = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "at most 30" in _refused(folder, out=out, overwrite=True, batch_size=99)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == kept
    (out / "curves.png").write_text("old")
    again = fit(folder, model=_network(), out=out, overwrite=True, **{**QUICK, "epochs": 1})
    assert len(again.history) == 1
    assert not (out / "curves.png").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in _refused(folder, out=tmp_path / "file")
    assert "cannot make the folder" in _refused(folder, out=tmp_path / "file" / "run")


class _Explodes(nn.Module):
    """Its loss is NaN from the given step on."""

    def __init__(self, at: int, where: str) -> None:
        super().__init__()
        self.layer, self.at, self.where, self.calls = nn.Linear(3072, 3), at, where, 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(1))
        self.calls += self.training
        if self.calls < self.at or not self.training:
            return y
        # The square root's gradient at 0 is infinite, its value is not.
        return y * math.nan if self.where == "loss" else y + (y - y.detach()).sqrt()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(folder: Path, tmp_path: Path, where: str) -> None:
    out = tmp_path / "run"
    message = _refused(folder, model=_Explodes(5, where), out=out)
    assert message.startswith(f"the {where} is ")
    assert "in epoch 2, step 5, at a learning rate of " in message
    assert "lower lr" in message
    assert f"the last good checkpoint is kept in {out}" in message
    state = torch.load(out / "last.pt", weights_only=True)
    assert state["progress"]["epoch"] == 1
    assert all(value.isfinite().all() for value in state["model"].values())
    assert "checkpoint" not in _refused(folder, model=_Explodes(1, where))


def test_dropout_is_drawn_anew_in_every_step(folder: Path) -> None:
    masks: list[Tensor] = []

    class Watched(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.training:
                masks.append(y == 0)
            return y

    model = nn.Sequential(nn.Flatten(), Watched(0.5), nn.Linear(3072, 3))
    for seed in (0, 0, 1):
        torch.seed()
        fit(folder, model=model, **{**QUICK, "seed": seed, "epochs": 1})
    first, again, other = masks[:3], masks[3:6], masks[6:]
    assert all(torch.equal(mask, same) for mask, same in zip(first, again, strict=True))
    assert not any(torch.equal(mask, more) for mask, more in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1])


def test_checkpoints_take_each_others_place_at_once(folder: Path, tmp_path: Path) -> None:
    """Who holds the file of an epoch keeps it whole."""
    out, held = tmp_path / "run", []

    def hold(row: dict[str, Any]) -> None:
        os.link(out / "last.pt", tmp_path / f"held {row['epoch']}")
        held.append((out / "last.pt").read_bytes())

    fit(folder, model=_network(), out=out, on_epoch_end=hold, **QUICK)
    assert held[0] != held[1]
    assert [(tmp_path / f"held {epoch}").read_bytes() for epoch in (1, 2)] == held


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 100 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_checkpoint_before(folder: Path, tmp_path: Path, full_disk: None) -> None:
    out = tmp_path / "run"
    rows: list[Any] = []
    kept: dict[str, bytes] = {}

    def fill(row: dict[str, Any]) -> None:
        rows.append(row)
        kept.update({file.name: file.read_bytes() for file in out.iterdir()})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    message = _refused(folder, out=out, on_epoch_end=fill, epochs=4)
    assert len(rows) == 1
    assert "cannot save" in message
    assert "the one before is untouched" in message
    assert message.endswith("make room or check permissions, then go on with --resume")
    # The results, of a few bytes, could still be written.
    assert {file.name for file in out.iterdir()} == set(kept)
    for name in ("last.pt", "best.safetensors"):
        assert (out / name).read_bytes() == kept[name]


def test_a_full_disk_at_the_beginning(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = _refused(folder, out=tmp_path / "run")
    assert message.endswith("(No space left on device): make room or check permissions, then start it again")


def test_tensorboard(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    result = fit(folder, model=_network(), out=out, tensorboard=True, **QUICK)
    found = events.EventAccumulator(str(out / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in found.Scalars("val_loss")]
    assert [step for step, _ in points] == [3, 6]
    assert [value for _, value in points] == pytest.approx([row["val_loss"] for row in result.history])
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "pip install tensorboard" in _refused(folder, out=tmp_path / "other", tensorboard=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "case",
    [
        ("amx", "auto", "bf16"),
        ("avx512bf16", "auto", "bf16"),
        ("avx512", "auto", "none"),
        ("avx2", "auto", "none"),
        ("amx", "eager", "none"),
    ],
)
def test_autocast_is_chosen_by_the_processor_and_kept_for_resuming(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, str]
) -> None:
    isa, backend, amp = case
    monkeypatch.setattr("mnv2_fast.backends.cpu.isa", lambda: isa)
    monkeypatch.setenv("MNV2_BACKEND", backend)
    options = {**QUICK, "epochs": 1, "out": tmp_path / "run", "amp": "auto"}
    fit(folder, model=_network(), **options)
    assert yaml.safe_load((tmp_path / "run/args.yaml").read_text())["amp"] == amp
    monkeypatch.setattr("mnv2_fast.backends.cpu.isa", lambda: "amx" if amp == "none" else "avx512")
    assert len(fit(folder, model=_network(), resume=True, **options).history) == 1


def test_training_may_see_fewer_pixels_than_validation(folder: Path) -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    model = _network()
    model.register_forward_pre_hook(lambda module, args: seen[module.training].add(args[0].shape[-1]))
    result = fit(folder, model=model, train_size=24, **{**QUICK, "epochs": 1, "ema": 0.0})
    assert seen == {True: {24}, False: {32}}
    assert result.preprocessing.crop == 32
    assert "use at most that" in _refused(folder, train_size=4096)


def test_what_it_is_trained_on_by_default() -> None:
    assert all(usual_train_size(size, Recipe()) <= size for size in range(1, 300))
    sizes = (16, 32, 160, 224, 448)
    assert [usual_train_size(size, Recipe()) for size in sizes] == [16, 32, 128, 192, 384]
    for augment in ((), ("flip", "rotation")):  # nothing is larger than validation shows it
        assert [usual_train_size(size, Recipe(augment=augment)) for size in sizes] == list(sizes)


def test_what_is_left_open_is_settled_once(folder: Path, tmp_path: Path) -> None:
    """And kept; a run goes on with it where the same is left open again, given or not."""
    options = {**QUICK, "epochs": 1, "lr": None, "train_size": None}
    settled = {}
    for name, weights in (("tuned", "IMAGENET1K_V1"), ("new", None)):
        run = tmp_path / name
        fit(folder, model=_network(), weights=weights, out=run, **options)
        kept = yaml.safe_load((run / "args.yaml").read_text())
        settled[name] = [kept[key] for key in ("lr", "head_lr_factor", "weight_decay", "train_size")]
        again = fit(folder, model=_network(), weights=weights, out=run, resume=True, **options)
        assert len(again.history) == 1
    assert settled == {"tuned": [7.5e-5, 10.0, 0.05, 32], "new": [2.5e-4, 1.0, 0.05, 32]}
    said = _refused(folder, out=tmp_path / "new", weights=None, resume=True, lr=0.1, train_size=None)
    assert "lr is 0.1, not 0.00025" in said

"""A training that is ended and taken up again is one that was never ended, to the bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import colour_photos, one_thread  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, UserError, fit, photos, trainer
from mnv2_fast.errors import Interrupted
from mnv2_fast.train import FitResult
from mnv2_fast.weights import Preprocessing

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything that is drawn at random or has a state, and 6 steps of 2 batches an epoch.
OPTIONS: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 2,
    "accumulate": 2,
    "image_size": 32,
    "workers": 0,
    "progress": False,
    "lr": 2e-3,
    "mixup": 0.4,
    "cutmix": 1.0,
    "dropout": 0.5,
    "freeze_epochs": 1,
    "clip_grad": 1.0,
    "augment": ("crop", "flip", "randaugment", "erasing"),
}
TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 photos: 24 to train on, 6 to validate on."""
    return colour_photos(tmp_path_factory.mktemp("data") / "photos", 10)


def _network() -> MobileNetV2:
    """The same one each time, and torch's generator in another state each time."""
    torch.manual_seed(0)
    network = MobileNetV2(3, width_mult=0.25)
    torch.seed()
    return network


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """The run that was not ended."""
    torch.set_num_threads(1)
    return fit(folder, model=_network(), out=tmp_path_factory.mktemp("whole") / "run", **OPTIONS)


@pytest.fixture
def end_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sends this process a signal within the call of `Trainer._loss` with that number."""

    def plan(call: int, number: int) -> None:
        before, calls = trainer.Trainer._loss, [0]

        def loss(self: trainer.Trainer, *args: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), number)
            return before(self, *args)

        monkeypatch.setattr(trainer.Trainer, "_loss", loss)

    return plan


def _without_times(folder: Path) -> list[str]:
    return [line.rsplit(",", len(TIMES))[0] for line in (folder / "results.csv").read_text().splitlines()]


def _same(ours: Any, theirs: Any, where: str = "") -> None:
    """Both have the same tensors, bit for bit, and the same numbers, but for times."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            if key not in TIMES:
                _same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            _same(*pair, f"{where}.{i}")
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def _same_run(ours: Path, theirs: FitResult) -> None:
    assert theirs.folder is not None
    states = [torch.load(run / "last.pt", weights_only=True) for run in (ours, theirs.folder)]
    _same(*states)
    assert states[0]["optimizer"]["state"]
    assert _without_times(ours) == _without_times(theirs.folder)
    for name in ("final.safetensors", "best.safetensors"):
        _same(load_file(ours / name), load_file(theirs.folder / name), name)


# Calls of an epoch: 12. In its first step, in the middle of one, in the last one, when only the head trains.
@pytest.mark.parametrize(
    "where", [(5, signal.SIGTERM), (13, signal.SIGINT), (18, signal.SIGINT), (36, signal.SIGTERM)]
)
def test_ended_in_mid_epoch_and_resumed(
    folder: Path, whole: FitResult, tmp_path: Path, end_at: Callable[..., None], where: tuple[int, int]
) -> None:
    call, number = where
    out = tmp_path / "my run"
    end_at(call, number)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught:
        fit(folder, model=_network(), out=out, **OPTIONS)
    assert signal.getsignal(number) is before
    assert caught.value.exit_code == 128 + number
    step = -(-call // 2)
    epoch = (step - 1) // 6 + 1
    said = f"stopped after step {step} in epoch {epoch} of 3, go on with mnv2 finetune --resume --out '{out}'"
    assert str(caught.value) == said
    state = torch.load(out / "last.pt", weights_only=True)["progress"]
    assert (state["step"], state["epoch"]) == (step, epoch - 1)
    result = fit(folder, model=_network(), out=out, resume=True, progress=False)
    _same_run(out, whole)
    assert result.top1 == whole.top1


def test_a_model_that_no_command_knows_goes_on_by_fit(
    folder: Path, tmp_path: Path, end_at: Callable[..., None]
) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))
    end_at(1, signal.SIGTERM)
    with pytest.raises(Interrupted, match=re.escape("go on with fit(..., out='")):
        fit(folder, model=model, out=tmp_path / "run", **OPTIONS)
    result = fit(folder, model=model, out=tmp_path / "run", resume=True, progress=False)
    assert len(result.history) == OPTIONS["epochs"]


def test_ended_in_validation_and_between_epochs_and_resumed(
    folder: Path, whole: FitResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    before = trainer.Trainer._validate

    def validate(self: trainer.Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return before(self)

    monkeypatch.setattr(trainer.Trainer, "_validate", validate)
    with pytest.raises(Interrupted):
        fit(folder, model=_network(), out=out, **OPTIONS)
    monkeypatch.setattr(trainer.Trainer, "_validate", before)
    state = torch.load(out / "last.pt", weights_only=True)["progress"]
    assert (state["epoch"], state["batch"], state["history"]) == (0, 12, [])
    with pytest.raises(Interrupted):
        fit(
            folder,
            model=_network(),
            out=out,
            resume=True,
            progress=False,
            on_epoch_end=lambda row: os.kill(os.getpid(), signal.SIGINT),
        )
    state = torch.load(out / "last.pt", weights_only=True)["progress"]
    assert (state["epoch"], state["batch"], len(state["history"])) == (1, 0, 1)
    fit(folder, model=_network(), out=out, resume=True, progress=False)
    _same_run(out, whole)


def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path, end_at: Callable[..., None]) -> None:
    end_at(3, signal.SIGINT)

    class Impatient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(3072, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
            y: Tensor = self.layer(x.flatten(1))
            return y

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(folder, model=Impatient(), out=tmp_path / "run", **{**OPTIONS, "dropout": None})
    assert not isinstance(caught.value, Interrupted)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_without_a_folder_nothing_is_saved(folder: Path, end_at: Callable[..., None]) -> None:
    end_at(3, signal.SIGTERM)
    with pytest.raises(Interrupted, match="nothing is saved without a run folder"):
        fit(folder, model=_network(), **OPTIONS)


def test_no_parameter_stays_frozen(folder: Path, end_at: Callable[..., None]) -> None:
    """After an end in the epochs that train the last layer only; what the caller had frozen stays so."""
    end_at(3, signal.SIGTERM)
    model = _network()
    model.features[0].requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(Interrupted):
        fit(folder, model=model, **OPTIONS)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked


def test_the_first_weights_are_not_needed_again(
    folder: Path, tmp_path: Path, end_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither they nor their labels and preprocessing: all is in the run."""
    seen = json.dumps(Preprocessing(resize=48, crop=32, mean=(0.4, 0.5, 0.6)).to_dict())
    first = tmp_path / "first.safetensors"
    save_file(MobileNetV2(5, width_mult=0.25).state_dict(), first, {"preprocessing": seen})
    options = {**OPTIONS, "weights": first, "image_size": None}
    whole = fit(folder, out=tmp_path / "whole", **options)
    end_at(18, signal.SIGTERM)
    with pytest.raises(Interrupted):
        fit(folder, out=tmp_path / "run", **options)
    first.unlink()
    again = fit(folder, weights=first, out=tmp_path / "run", resume=True, progress=False)
    assert again.preprocessing == whole.preprocessing == Preprocessing.from_dict(json.loads(seen))
    _same_run(tmp_path / "run", whole)


def test_a_finished_run_is_there_again(folder: Path, whole: FitResult) -> None:
    """What changes no weight may be other than it was."""
    options = {"progress": False, "workers": 1, "threads": 1, "cache_gb": 1}
    again = fit(folder, model=_network(), out=whole.folder, resume=True, **options)
    assert again.history == whole.history
    assert (again.top1, again.best_epoch) == (whole.top1, whole.best_epoch)
    _same(dict(again.model.state_dict()), dict(whole.model.state_dict()))


@pytest.mark.filterwarnings("ignore:photo skipped")
def test_photos_that_could_not_be_used_stay_counted(
    folder: Path, tmp_path: Path, end_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the first epoch's first half, found anew in the second one; the folder has two names."""
    data = shutil.copytree(folder, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    options = {**OPTIONS, "epochs": 2, "freeze_epochs": 0}
    order = np.random.default_rng([0, 0]).permutation(24)
    photos.find(data).train[order[0]].path.write_bytes(b"")
    whole = fit(data, model=_network(), out=tmp_path / "whole", **options)
    end_at(8, signal.SIGTERM)
    with pytest.raises(Interrupted):
        fit("photos", model=_network(), out=tmp_path / "run", **options)
    again = fit(data, model=_network(), out=tmp_path / "run", resume=True, progress=False)
    assert [row["skipped"] for row in again.history] == [row["skipped"] for row in whole.history] == [1, 1]


@pytest.fixture
def copy(whole: FitResult, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, which has to stay as it is."""
    assert whole.folder is not None
    out = shutil.copytree(whole.folder, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    yield out
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def _refused(folder: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        fit(folder, out=out, resume=True, progress=False, **{"model": _network(), **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_arguments_are_named_and_refused(folder: Path, copy: Path) -> None:
    message = _refused(folder, copy, lr=0.5, epochs=3, mixup=0)
    assert "lr is 0.5, not 0.002; mixup is 0.0, not 0.4" in message
    assert "epochs" not in message
    assert "epochs is 9, not 3" in _refused(folder, copy, epochs=9)
    assert "model is 'Linear', not 'MobileNetV2'" in _refused(folder, copy, model=nn.Linear(3, 3))
    assert "weights is 'IMAGENET1K_V1', not None" in _refused(folder, copy, model=None)
    assert "data is " in _refused(folder.parent, copy)
    seen = Preprocessing(40, 32)
    assert "preprocessing is {'resize': 40" in _refused(folder, copy, preprocessing=seen)
    assert "no option 'lr_'" in _refused(folder, copy, lr_=1)


def test_another_model_of_the_same_kind_is_refused(folder: Path, copy: Path) -> None:
    wider = MobileNetV2(3, width_mult=0.5)
    assert "of another model, or trains other parameters of it (size mismatch" in _refused(
        folder, copy, model=wider
    )
    frozen = _network()
    frozen.features[0].requires_grad_(False)
    assert "of another model, or trains other parameters of it (loaded state dict" in _refused(
        folder, copy, model=frozen
    )


def test_other_photos_are_refused(folder: Path, whole: FitResult, tmp_path: Path) -> None:
    assert whole.folder is not None
    data, out = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(folder, data)
    shutil.copytree(whole.folder, out)
    args = (out / "args.yaml").read_text(encoding="utf-8")
    (out / "args.yaml").write_text(args.replace(str(folder), str(data)), encoding="utf-8")
    shutil.copy(data / "red" / "1.png", data / "red" / "99.png")
    assert "are not those of the run" in _refused(data, out)


def test_nothing_to_resume(folder: Path, whole: FitResult, tmp_path: Path) -> None:
    assert "has no run to resume" in _refused(folder, tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.yaml").write_text("data: photos\nlr: 0.1\n")
    assert "another program's" in _refused(folder, tmp_path / "other")
    assert whole.folder is not None
    out = shutil.copytree(whole.folder, tmp_path / "run")
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:999])
    assert "last.pt is damaged" in _refused(folder, out)
    torch.save({"a": 1}, out / "last.pt")
    assert "last.pt is damaged or not of a run (no training of this version is in it)" in _refused(
        folder, out
    )
    (out / "last.pt").unlink()
    message = _refused(folder, out)
    assert "has no last.pt" in message
    assert "--overwrite" in message

"""`evaluate`: which photos, which classes, which answers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from colours import LABELS, PREPROCESSING, picture, save_weights
from helpers import one_thread  # noqa: F401
from PIL import Image
from torch import Tensor, nn

import mnv2_fast
from mnv2_fast import (
    Evaluation,
    MobileNetV2,
    Predictor,
    UserError,
    evaluate,
    evaluation,
    fit,
    mobilenet_v2,
    photos,
    plots,
)
from mnv2_fast.loading import PhotoDataset

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_weights(tmp_path_factory.mktemp("weights") / "m.safetensors", 1.0)


@pytest.fixture
def model(weights: str) -> MobileNetV2:
    return mobilenet_v2(weights=weights).eval()


def write(folder: Path, counts: dict[str, int]) -> Path:
    """So many photos of each colour, of which one in `black` is really white; the network knows them all."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            colour = LABELS.index("white" if (name, i) == ("black", 0) else name)
            Image.fromarray(picture(5 * (i % 2) + colour)).save(folder / name / f"{i}.png")
    return folder


COUNTS = {"black": 3, "blue": 2, "green": 4, "red": 1, "white": 2}


def test_answers_are_a_predictors(model: MobileNetV2, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", COUNTS)
    found = evaluate(model, folder, batch_size=5, workers=0)
    assert found.classes == tuple(LABELS)
    assert (len(found), found.skipped) == (12, 0)
    assert found.confusion.sum(1).tolist() == [COUNTS[name] for name in LABELS]
    predictor = Predictor(model, threads=1)
    for path, row in zip(found.paths, found.probabilities, strict=True):
        expected = {best["label"]: best["score"] for best in predictor(path)}
        assert dict(zip(LABELS, row.tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)
    (wrong,) = found.mistakes()
    assert found.paths[wrong] == folder / "black" / "0.png"
    assert found.classes[found.predicted[wrong]] == "white"
    assert found.top1 == pytest.approx(11 / 12)


def test_engines_answer_as_their_model(model: MobileNetV2, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", COUNTS)
    expected = evaluate(model, folder, workers=0)
    for dtype in ("fp32", "bf16", "int8"):
        calibration = folder if dtype == "int8" else None
        engine = mnv2_fast.compile(model, dtype, calibration=calibration)
        engine.save(tmp_path / "e.safetensors")
        found = evaluate(mnv2_fast.load(tmp_path / "e.safetensors"), folder, workers=0)
        assert found.classes == expected.classes
        assert (found.predicted == expected.predicted).double().mean() > 0.9
        assert (found.probabilities - expected.probabilities).abs().max() < (1e-5 if dtype == "fp32" else 0.2)


def test_photos_go_to_the_engines_device(
    model: MobileNetV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, places = mnv2_fast.compile(model), []
    engine.device = torch.device("meta")  # in the place of a GPU

    def call(self: mnv2_fast.Engine, x: Tensor) -> Tensor:
        places.append(x.device.type)
        return torch.zeros(len(x), len(LABELS))

    monkeypatch.setattr(mnv2_fast.Engine, "__call__", call)
    evaluate(engine, write(tmp_path / "photos", COUNTS), workers=0)
    assert places == ["meta"]


def test_which_photos(model: MobileNetV2, tmp_path: Path) -> None:
    write(tmp_path / "both" / "train", {**COUNTS, "red": 7})
    write(tmp_path / "both" / "val", COUNTS)
    assert len(evaluate(model, tmp_path / "both", workers=0)) == 12
    assert len(evaluate(model, tmp_path / "both" / "train", workers=0)) == 18
    split = photos.find(tmp_path / "both")
    assert len(evaluate(model, split, workers=0)) == 12
    dataset = PhotoDataset(split.train, split.classes, PREPROCESSING)
    assert len(evaluate(model, dataset, workers=0)) == 18
    with pytest.warns(UserWarning, match="4 of the model's 5 classes have no folder"):
        assert len(evaluate(model, write(tmp_path / "one", {"red": 2}), workers=0)) == 2
    write(tmp_path / "half" / "train", COUNTS)
    with pytest.raises(UserError, match="has train/ and no val/"):
        evaluate(model, tmp_path / "half")
    with pytest.raises(UserError, match="does not exist"):
        evaluate(model, tmp_path / "nowhere")


def test_a_module_is_left_as_it_was(model: MobileNetV2, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", COUNTS)
    expected = evaluate(model, folder, workers=0)
    model.train()
    model.features[0].eval()  # a frozen part
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate(model, folder, workers=0)
    assert torch.equal(found.probabilities, expected.probabilities)
    assert model.training
    assert not model.features[0].training
    assert model.features[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_damaged_photos_are_named_once_and_counted(model: MobileNetV2, tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", COUNTS)
    (folder / "green" / "1.png").write_bytes(b"no photo")
    (folder / "white" / "1.png").write_bytes(b"")
    done: list[tuple[int, int]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evaluate(model, folder, batch_size=4, workers=1, progress=lambda *at: done.append(at))
    assert (len(found), found.skipped) == (10, 2)
    assert found.confusion.sum(1).tolist() == [1, 3, 2, 1, 3]
    assert not {folder / "green" / "1.png", folder / "white" / "1.png"} & set(found.paths)
    assert all(
        path.parent.name == found.classes[t] for path, t in zip(found.paths, found.targets, strict=True)
    )
    assert sorted(Path(str(w.message).split()[2]).parent.name for w in caught) == ["green", "white"]
    assert done[-1] == (11, 12)  # the last photo of all is one of the two

    for name in COUNTS:
        for path in (folder / name).iterdir():
            path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="none of the photos can be used"):
            evaluate(model, folder, workers=0)


TRAINING = {"epochs": 1, "batch_size": 4, "workers": 0, "progress": False, "augment": ()}


def test_a_training_draws_its_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the photos and the weights that its top-1 is of."""
    seen: list[Evaluation] = []
    draw = plots.run_plots

    def watched(folder: Path, history: plots.History, found: Evaluation) -> None:
        seen.append(found)
        draw(folder, history, found)

    monkeypatch.setattr(plots, "run_plots", watched)
    folder = write(tmp_path / "photos", {"black": 9, "white": 9, "red": 9})
    result = fit(folder, model=Colours(), preprocessing=PREPROCESSING, out=tmp_path / "run", **TRAINING)
    (found,) = seen
    assert found.top1 == pytest.approx(result.top1)
    assert set(found.paths) == {photo.path for photo in result.photos.val}
    assert {"curves.png", "confusion.png", "mistakes.png"} <= {p.name for p in (tmp_path / "run").iterdir()}

    more = {**TRAINING, "out": tmp_path / "plain", "charts": False}
    fit(folder, model=Colours(), preprocessing=PREPROCESSING, **more)
    assert not list((tmp_path / "plain").glob("*.png"))


def test_a_training_without_matplotlib_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "photos", {"black": 9, "white": 9, "red": 9})
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="not all charts of the run are drawn: charts need matplotlib"):
        fit(folder, model=Colours(), preprocessing=PREPROCESSING, out=tmp_path / "run", **TRAINING)
    assert (tmp_path / "run" / "final.safetensors").exists()


class Colours(nn.Sequential):
    """Three classes by the mean colour."""

    def __init__(self) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


class Shades(nn.Module):
    """Two outputs: how dark a photo is, and how bright."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def test_without_labels_folders_are_taken_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", {"black": 3, "white": 2})
    with pytest.warns(UserWarning, match="no labels: its 2 outputs are taken for the folders in their order"):
        found = evaluate(Shades(), folder, preprocessing=PREPROCESSING, workers=0)
    assert found.confusion.tolist() == [[2, 1], [0, 2]]
    named = evaluate(Shades(), folder, preprocessing=PREPROCESSING, labels=["white", "black"], workers=0)
    assert named.classes == ("white", "black")
    assert named.confusion.tolist() == [[0, 2], [2, 1]]
    with pytest.raises(UserError, match="no labels, and 2 outputs for 5 folders"):
        evaluate(Shades(), write(tmp_path / "more", COUNTS), preprocessing=PREPROCESSING, workers=0)
    with pytest.raises(UserError, match="Shades has no preprocessing"):
        evaluate(Shades(), folder)


def test_nan_is_no_answer(tmp_path: Path, model: MobileNetV2) -> None:
    folder = write(tmp_path / "photos", COUNTS)
    nn.init.constant_(model.classifier[1].bias, float("nan"))
    with pytest.raises(UserError, match=r"gives NaN for .*black/0.png"):
        evaluate(model, folder, workers=0)


def test_matching_by_name() -> None:
    found = evaluation.match(["b", "crane", "a", "crane"], 4, ["a", "b", "crane"])
    assert found == (("b", "crane", "a"), [0, 1, 2, 1], [2, 0, 1])
    with pytest.raises(
        UserError, match="no class for 'x', 'y', of 3 folders; its 2 classes are 'a', 'b': rename"
    ):
        evaluation.match(["a", "b"], 2, ["a", "x", "y"])
    with pytest.raises(UserError, match=r"no class for '0', '1', '2' and 7 more, of 10 folders"):
        evaluation.match(["a", "b"], 2, [str(i) for i in range(10)])
    with pytest.raises(UserError, match="2 labels for 3 outputs"):
        evaluation.match(["a", "b"], 3, ["a", "b"])


def test_outputs_of_one_name_are_one_class(tmp_path: Path) -> None:
    """Black gets a bit less than half of each photo as an output, and more in two."""

    class Three(nn.Module):
        labels = ("black", "white", "black")

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[0.3, 0.4, 0.3]]).log().expand(len(x), 3)

    folder = write(tmp_path / "photos", {"black": 2, "white": 1})
    found = evaluate(Three(), folder, preprocessing=PREPROCESSING, workers=0)
    assert found.classes == ("black", "white")
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.6, 0.4]]).double().expand(3, 2))

"""Predictor: every kind of model and of photo, alone, in lists and in folders."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mnv2_fast import MobileNetV2, Predictor, UserError, compile, data, predict, weights
from mnv2_fast._torchvision import torchvision

SMALL = weights.Preprocessing(resize=40, crop=32)
LABELS = ["ant", "bee", "cat", "dog", "eel"]


def _model(num_classes: int = 5) -> MobileNetV2:
    """A network whose answers differ from photo to photo, as a fresh one's hardly do."""
    model = MobileNetV2(num_classes, width_mult=0.35).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # take the statistics of the batch below
    with torch.no_grad():
        model(torch.randn(16, 3, 32, 32))
        model.classifier[1].weight.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def model() -> MobileNetV2:
    """A small network with labels, for small photos."""
    model = _model()
    model.labels = LABELS
    model.preprocessing = SMALL
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven photos, a text file, and a photo in a subfolder."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    (root / "more").mkdir(parents=True)
    for name in [*(f"{i:02}.png" for i in range(10)), "more/x.jpg"]:
        values = rng.integers(0, 256, (50 + rng.integers(20), 60, 3), dtype=np.uint8)
        Image.fromarray(values).save(root / name)
    (root / "notes.txt").write_text("no photo")
    return root


def _expected(model: MobileNetV2, path: Path) -> list[dict[str, object]]:
    """The slow and plain way."""
    pixels = data.resize_and_crop(data.read_image(path), SMALL)
    x = torch.from_numpy(pixels.copy())[None]
    with torch.no_grad():
        scores = model.double()._forward_impl(data.normalize(x, SMALL).double()).softmax(1)[0]
    model.float()
    order = scores.argsort(descending=True).tolist()
    return [{"label": LABELS[i], "score": float(scores[i])} for i in order]


def _same(got: list[dict[str, object]], expected: list[dict[str, object]]) -> None:
    assert [row["label"] for row in got] == [row["label"] for row in expected]
    for ours, theirs in zip(got, expected, strict=True):
        assert set(ours) == {"label", "score"}
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_one_photo_in_every_form(model: MobileNetV2, folder: Path) -> None:
    path = folder / "03.png"
    expected = _expected(model, path)
    predictor = Predictor(model)
    values = np.asarray(Image.open(path))
    for source in (
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        values,
        torch.from_numpy(values.copy()),
    ):
        _same(predictor(source), expected)
    _same(predictor(path, top_k=2), expected[:2])
    _same(predictor(path, top_k=99), expected)
    _same(Predictor(model, top_k=1)(path), expected[:1])
    assert sum(row["score"] for row in predictor(path)) == pytest.approx(1)


def test_lists_folders_patterns_and_batches_give_lists_of_lists(model: MobileNetV2, folder: Path) -> None:
    paths = data.expand_inputs([folder])
    assert len(paths) == 11
    expected = [_expected(model, path) for path in paths]
    assert len({answer[0]["label"] for answer in expected}) > 1
    for batch_size in (1, 3, 11, 64):
        predictor = Predictor(model, batch_size=batch_size)
        for source in (folder, paths, tuple(map(str, paths)), str(folder / "**" / "*.[jp][pn]g")):
            results = predictor(source)
            assert len(results) == 11
            for got, wanted in zip(results, expected, strict=True):
                _same(got, wanted)
    stack = np.stack([np.asarray(Image.open(path).resize((60, 50))) for path in paths[:4]])
    one_by_one = [predictor(image) for image in stack]
    for got, wanted in zip(predictor(stack), one_by_one, strict=True):
        _same(got, wanted)
    assert predictor([]) == []
    _same(predictor([paths[0]])[0], expected[0])


def test_engine_its_file_and_a_weights_file_answer_as_the_model(
    model: MobileNetV2, folder: Path, tmp_path: Path
) -> None:
    path = folder / "05.png"
    expected = _expected(model, path)
    engine = compile(model)
    engine.save(tmp_path / "engine.safetensors")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    _same(Predictor(engine)(path), expected)
    _same(Predictor(tmp_path / "engine.safetensors")(path), expected)
    _same(Predictor(str(tmp_path / "engine.safetensors"), threads=1)(path), expected)
    for name in ("plain.safetensors", "plain.pth"):
        _same(Predictor(tmp_path / name, labels=LABELS, preprocessing=SMALL)(path), expected)


def test_torchvisions_model_is_taken_too(folder: Path) -> None:
    theirs = torchvision().models.mobilenet_v2(num_classes=5, width_mult=0.35).eval()
    torch.nn.init.normal_(theirs.classifier[1].weight)
    ours = _model()
    ours.load_state_dict(theirs.state_dict())
    keywords = {"labels": LABELS, "preprocessing": SMALL}
    _same(Predictor(theirs, **keywords)(folder / "00.png"), _expected(ours, folder / "00.png"))


def test_a_plain_file_without_labels_numbers_its_classes(tmp_path: Path, folder: Path) -> None:
    save_file(_model().state_dict(), tmp_path / "m.safetensors")
    predictor = Predictor(tmp_path / "m.safetensors", preprocessing=SMALL)
    assert {row["label"] for row in predictor(folder / "00.png")} == set("01234")


def test_labels_and_preprocessing_in_a_plain_files_metadata_are_used(tmp_path: Path) -> None:
    metadata = {"labels": '["a", "b", "c", "d", "e"]', "preprocessing": '{"resize": 48, "crop": 33}'}
    save_file(_model().state_dict(), tmp_path / "m.safetensors", metadata)
    predictor = Predictor(tmp_path / "m.safetensors")
    assert predictor.labels == list("abcde")
    assert predictor.preprocessing == weights.Preprocessing(48, 33)


def test_another_mean_than_the_engine_has_folded_in(model: MobileNetV2, folder: Path) -> None:
    other = weights.Preprocessing(40, 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model.preprocessing = other
    expected = Predictor(model)(folder / "01.png")
    model.preprocessing = SMALL
    _same(Predictor(model, preprocessing=other)(folder / "01.png"), expected)
    scores = {row["label"]: row["score"] for row in Predictor(model)(folder / "01.png")}
    assert max(abs(scores[row["label"]] - row["score"]) for row in expected) > 0.01


def test_a_bad_photo_raises_in_a_call_and_is_passed_by_a_stream(model: MobileNetV2, folder: Path) -> None:
    bad = folder / "notes.txt"
    sources = [folder / "00.png", bad, folder / "missing.png", folder / "01.png"]
    predictor = Predictor(model)
    with pytest.raises(data.ImageError, match=r"notes\.txt"):
        predictor(sources)
    with pytest.raises(data.ImageError, match=r"notes\.txt"):
        predictor(bad)
    for batch_size in (1, 2, 3, 8):
        pairs = list(Predictor(model, batch_size=batch_size).stream(sources))
        assert [source for source, _ in pairs] == sources
        _same(pairs[0][1], _expected(model, sources[0]))
        assert "notes.txt is no image" in str(pairs[1][1])
        assert isinstance(pairs[2][1], FileNotFoundError)
        _same(pairs[3][1], _expected(model, sources[3]))


def test_a_stream_reads_only_a_few_batches_ahead(model: MobileNetV2, folder: Path) -> None:
    taken = 0

    def sources() -> Iterator[Path]:
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield folder / "00.png"

    stream = Predictor(model, batch_size=3, threads=1).stream(sources())
    for _ in range(7):
        next(stream)
    assert taken <= 7 + 2 * 3
    stream.close()
    reached = taken
    assert next(iter(stream), None) is None
    assert taken == reached


def test_memory_of_a_stream_does_not_grow_with_its_length(model: MobileNetV2) -> None:
    big = weights.Preprocessing(200, 200)
    predictor = Predictor(model, preprocessing=big, batch_size=2)
    image = Image.new("RGB", (200, 200), (90, 20, 200))
    for _ in predictor.stream([image] * 4):
        pass
    tracemalloc.start()
    try:
        assert sum(len(result) for _, result in predictor.stream(image for _ in range(60))) == 60 * 5
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * 200 * 200 * 3  # 60 photos' pixels are three times that


def test_a_stream_on_two_threads_keeps_the_order(model: MobileNetV2, folder: Path) -> None:
    names = [f"{i:02}.png" for i in range(10)]
    expected = {name: _expected(model, folder / name) for name in names}
    order = [names[i * 7 % 10] for i in range(60)]
    for batch_size in (1, 4, 7):
        predictor = Predictor(compile(model, threads=2), batch_size=batch_size)
        pairs = list(predictor.stream(iter([folder / name for name in order])))
        assert [path.name for path, _ in pairs] == order
        for path, got in pairs:
            _same(got, expected[path.name])


def test_sources_that_fail_end_the_stream_with_their_error(model: MobileNetV2, folder: Path) -> None:
    def sources() -> Iterator[Path]:
        yield folder / "00.png"
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(Predictor(model, batch_size=1).stream(sources()))


def test_names_are_listed_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A huge folder that is not there: its names are kept, nothing for each photo done."""
    count = 200_000

    class Entry:
        def __init__(self, name: str) -> None:
            self.name = name

        def is_dir(self, *, follow_symlinks: bool = True) -> bool:
            return False

    @contextmanager
    def scandir(_: object) -> Iterator[Iterator[Entry]]:
        yield (Entry(f"{i:07}.jpg") for i in range(count))

    monkeypatch.setattr(data.os, "scandir", scandir)
    assert sum(1 for _ in data.iterate_inputs([tmp_path])) == count  # Python's table of strings grows once
    tracemalloc.start()
    try:
        assert sum(1 for _ in data.iterate_inputs([tmp_path])) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150 * count  # a list of Paths is several times that


def test_arguments_that_make_no_sense(model: MobileNetV2, folder: Path, tmp_path: Path) -> None:
    path = folder / "00.png"
    for keywords, words in (
        ({"top_k": 0}, "top_k=0"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"threads": 0}, "threads=0"),
        ({"threads": -1}, "threads=-1"),
        ({"dtype": "fp8"}, "fp32"),
        ({"labels": ["a"]}, "1 labels for 5 classes"),
    ):
        with pytest.raises(UserError, match=words):
            Predictor(model, **keywords)
    predictor = Predictor(model)
    with pytest.raises(UserError, match="top_k=0"):
        predictor(path, top_k=0)
    with pytest.raises(UserError, match="top_k=-3"):
        predictor.stream([path], top_k=-3)
    with pytest.raises(TypeError, match="an image is a path"):
        predictor(7)
    with pytest.raises(TypeError, match="a model is a path, a name"):
        Predictor(7)
    with pytest.raises(FileNotFoundError, match="IMAGENET1K_V1"):
        Predictor(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="threads"):
        Predictor(compile(model, threads=2), threads=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no photos"):
        predictor(empty)


def test_weights_that_give_nan_are_said_to_be_damaged(model: MobileNetV2, folder: Path) -> None:
    with torch.no_grad():
        model.classifier[1].bias[0] = float("nan")
    with pytest.raises(UserError, match=r"NaN.*fetch them again"):
        Predictor(model)(folder / "00.png")


def test_an_engine_has_no_model(model: MobileNetV2, tmp_path: Path) -> None:
    compile(model).save(tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="is an engine, which has no model"):
        predict.load_model(tmp_path / "e.safetensors")


def test_real_weights_on_real_photos_agree_with_torchvision(weights_v1: Path, photos: list[Path]) -> None:
    predictor = Predictor(weights_v1, batch_size=5)
    assert predictor.preprocessing == weights.WEIGHTS[0].preprocessing
    assert predictor.labels == weights.imagenet_labels()
    reference = torchvision().models.mobilenet_v2()
    reference.load_state_dict(weights.load_state_dict(weights_v1)[0])
    reference.eval()
    preset = torchvision().models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    chosen = photos[::10]
    with torch.inference_mode():
        x = torch.stack([preset(Image.open(path).convert("RGB")) for path in chosen])
        scores = reference(x).double().softmax(1)
    right = 0
    for path, result, wanted in zip(chosen, predictor(chosen), scores, strict=True):
        best = wanted.topk(5)
        assert result[0]["label"] == predictor.labels[int(best.indices[0])]
        np.testing.assert_allclose([row["score"] for row in result], best.values.numpy(), atol=1e-4)
        right += path.stem.partition("_")[2].replace("_", " ").lower() in result[0]["label"].lower()
    assert right >= 10  # of 20; the file names are not always the labels' words


@pytest.mark.parametrize("value", [1.5, "3", None, True, 0])
@pytest.mark.parametrize("name", ["top_k", "batch_size"])
def test_counts_that_are_no_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{name}=.*: give a whole number of at least 1"):
        Predictor("IMAGENET1K_V1", **{name: value})  # type: ignore[arg-type]

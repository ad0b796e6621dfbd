"""Weights by name and by path: what is found, what is refused, and in which words."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mnv2_fast import UserError, arch, weights
from mnv2_fast._torchvision import torchvision

V1, V2 = weights.WEIGHTS


def _state(num_classes: int = 1000, width: float = 1.0) -> dict[str, torch.Tensor]:
    shapes = weights.expected_shapes(num_classes, width)
    return {
        key: torch.zeros(shape, dtype=torch.long) if key.endswith("tracked") else torch.zeros(shape)
        for key, shape in shapes.items()
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, no MNV2_WEIGHTS, and downloads that fail as without a network."""
    folder = tmp_path / "hub"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder))
    monkeypatch.delenv("MNV2_WEIGHTS", raising=False)
    rows = tuple(replace(row, url=(tmp_path / "nowhere" / row.file).as_uri()) for row in weights.WEIGHTS)
    monkeypatch.setattr(weights, "WEIGHTS", rows)
    return folder / "checkpoints"


@pytest.fixture
def folder(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that MNV2_WEIGHTS names."""
    path = tmp_path / "weights"
    path.mkdir()
    monkeypatch.setenv("MNV2_WEIGHTS", str(path))
    return path


def _error(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_are_torchvisions() -> None:
    theirs = torchvision().models.MobileNet_V2_Weights
    assert len(theirs) == len(weights.WEIGHTS)
    for row in weights.WEIGHTS:
        entry = theirs[row.name]
        preset = entry.transforms()
        assert entry.url == row.url
        assert entry.meta["_metrics"]["ImageNet-1K"]["acc@1"] == row.top1
        assert list(weights.imagenet_labels()) == entry.meta["categories"]
        assert (preset.resize_size, preset.crop_size) == (
            [row.preprocessing.resize],
            [row.preprocessing.crop],
        )
        assert (tuple(preset.mean), tuple(preset.std)) == (row.preprocessing.mean, row.preprocessing.std)
        assert preset.interpolation.value == row.preprocessing.interpolation
        assert weights.row(entry) is row
        assert weights.row(str(entry)) is row
    assert weights.row("DEFAULT") is weights.row(theirs.DEFAULT)
    assert weights.row("DEFAULT") is V2


def test_expected_shapes_are_torchvisions_keys_in_order() -> None:
    for width in (0.35, 1.0, 1.4):
        theirs = torchvision().models.mobilenet_v2(num_classes=7, width_mult=width).state_dict()
        shapes = {key: tuple(value.shape) for key, value in theirs.items()}
        assert list(weights.expected_shapes(7, width).items()) == list(shapes.items())


def test_a_path_comes_first_and_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(_state(3, 0.35), path, {"note": "mine"})
    assert weights.find_weights(path) == path
    state, metadata = weights.load_state_dict(str(path))
    assert weights.num_classes(state) == 3
    assert metadata == {"note": "mine"}


@pytest.mark.parametrize("stem", V1.stems)
@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_a_folder_serves_a_name_by_file_name(folder: Path, stem: str, suffix: str) -> None:
    path = folder / f"{stem}{suffix}"
    if suffix == ".safetensors":
        save_file(_state(), path)
    else:
        torch.save(_state(), path)
    assert weights.find_weights("IMAGENET1K_V1") == path
    assert weights.load_state_dict("IMAGENET1K_V1")[1]["weights"] == "IMAGENET1K_V1"
    with pytest.raises(weights.MissingWeightsError):
        weights.find_weights("IMAGENET1K_V2")
    with pytest.raises(weights.MissingWeightsError):
        weights.find_weights("DEFAULT")


@pytest.mark.parametrize(
    "metadata",
    [{"weights": "IMAGENET1K_V2"}, {"source": "torchvision mobilenet_v2 IMAGENET1K_V2; BN folded"}],
)
def test_a_folder_serves_a_name_by_the_files_own_metadata(folder: Path, metadata: dict[str, str]) -> None:
    save_file(_state(), folder / "network.safetensors", metadata)
    (folder / "aaa.safetensors").write_text("damaged, and of no concern here")
    assert weights.find_weights("DEFAULT") == folder / "network.safetensors"
    with pytest.raises(weights.MissingWeightsError):
        weights.find_weights("IMAGENET1K_V1")


def test_metadata_overrules_a_misleading_file_name(folder: Path) -> None:
    save_file(_state(), folder / f"{V1.stems[0]}.safetensors", {"weights": "IMAGENET1K_V2"})
    assert weights.find_weights("IMAGENET1K_V2").name == f"{V1.stems[0]}.safetensors"
    assert "IMAGENET1K_V1 is not here" in _error(weights.find_weights, "IMAGENET1K_V1")


def test_a_file_tuned_from_published_weights_is_not_taken_for_them(folder: Path) -> None:
    save_file(_state(), folder / "tuned.safetensors", {"source": "tuned from IMAGENET1K_V1 on flowers"})
    with pytest.raises(weights.MissingWeightsError):
        weights.find_weights("IMAGENET1K_V1")


def test_the_folder_comes_before_the_hub_cache(folder: Path, hub: Path) -> None:
    hub.mkdir(parents=True)
    torch.save(_state(), hub / V1.file)
    assert weights.find_weights("IMAGENET1K_V1") == hub / V1.file
    save_file(_state(), folder / f"{V1.stems[0]}.safetensors")
    assert weights.find_weights("IMAGENET1K_V1").parent == folder


def test_a_variable_that_names_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MNV2_WEIGHTS", str(tmp_path / "none"))
    assert "is no folder" in _error(weights.find_weights, "IMAGENET1K_V1")


def test_a_download_lands_in_the_hub_cache(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "server" / "file.pth"
    source.parent.mkdir()
    torch.save(_state(), source)
    digest = _sha256(source)
    file = f"mobilenet_v2-{digest[:8]}.pth"
    row = replace(V1, file=file, url=source.as_uri())
    monkeypatch.setattr(weights, "WEIGHTS", (row, V2))
    assert weights.find_weights("IMAGENET1K_V1") == hub / file
    assert "100%" in capsys.readouterr().err
    source.unlink()
    state, metadata = weights.load_state_dict("IMAGENET1K_V1")
    assert weights.num_classes(state) == 1000
    assert metadata == {"weights": "IMAGENET1K_V1"}


def test_a_download_that_is_not_what_was_asked_leaves_nothing(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "file.pth"
    source.write_bytes(b"an error page")
    monkeypatch.setattr(weights, "WEIGHTS", (replace(V1, url=source.as_uri()), V2))
    assert "cannot be downloaded" in _error(weights.find_weights, "IMAGENET1K_V1", False)
    assert list(hub.iterdir()) == []


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_a_network_one_line_names_the_cure(folder: Path) -> None:
    message = _error(weights.find_weights, "IMAGENET1K_V2")
    assert f"put {V2.file} in a folder and set MNV2_WEIGHTS to it" in message
    assert "found here" not in message
    save_file(_state(), folder / f"{V1.stems[0]}.safetensors")
    assert "or ask for IMAGENET1K_V1, found here" in _error(weights.find_weights, "DEFAULT")


def test_a_network_that_says_nothing_is_waited_for_a_moment_only(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever hangs, the look-up of a name too, on which urllib's own limit has no hold."""
    end = threading.Event()
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda *args, **more: end.wait(60))
    monkeypatch.setattr(weights, "_PATIENCE", 0.1)
    begin = time.perf_counter()
    message = _error(weights.find_weights, "IMAGENET1K_V1")
    end.set()
    assert time.perf_counter() - begin < 10
    assert f"cannot be downloaded from {weights.WEIGHTS[0].url} (no answer in 0.1 s)" in message
    assert not hub.exists()


def test_names_of_what_is_in_the_package_are_no_paths() -> None:
    for engine in weights.BOXED:
        assert weights.find_weights(engine.name) == engine.path
        assert engine.path.is_file()
        assert weights.boxed(Path(engine.name)) is weights.boxed(f"./{engine.name}") is None
        assert weights.row(engine.name) is None


@pytest.mark.parametrize("width", [1.0, 0.35, 1.4, 0.5])
def test_the_width_of_layers(width: float) -> None:
    found = weights.width_of(arch.network(7, width))
    assert found is not None
    assert arch.network(7, found) == arch.network(7, width)
    assert weights.width_of(arch.network(7, width)[:-2] + arch.network(7, width)[-1:]) is None


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT" in _error(weights.find_weights, tmp_path / "none.pth")
    assert "is a folder" in _error(weights.find_weights, tmp_path)
    with pytest.raises(FileNotFoundError):
        weights.find_weights("IMAGENET1K_V3")
    with pytest.raises(TypeError, match=r"a name .* or a path is wanted, not int"):
        weights.find_weights(5)


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"m{suffix}"
    if suffix == ".safetensors":
        save_file(_state(), path)
    else:
        torch.save(_state(), path)
    os.truncate(path, int(path.stat().st_size * kept))
    message = _error(weights.load_state_dict, path)
    assert str(path) in message
    assert "truncated" in message
    assert "fetch it again" in message


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_a_file_of_another_format(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_text("<html>404 not found</html>")
    assert "not a weights file" in _error(weights.load_state_dict, path)


class _Payload:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("how", ["torch.save", "legacy", "pickle"])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, how: str) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "m.pth"
    content = {**_state(2, 0.35), "x": _Payload(str(marker))}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"x": _Payload(str(marker))}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    message = _error(weights.load_state_dict, path)
    assert ("may run code" if how == "pickle" else "wants to run code (posix.mkdir)") in message
    assert "safetensors" in message
    assert not marker.exists()


def test_a_whole_model_is_refused_and_a_wrapped_state_dict_is_not(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "state_dict()" in _error(weights.load_state_dict, path)
    torch.save({"epoch": 3}, path)
    assert "holds no state dict" in _error(weights.load_state_dict, path)
    state = _state(2, 0.35)
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    assert list(weights.load_state_dict(path)[0]) == list(state)


def test_other_architecture_says_which_keys_differ(folder: Path) -> None:
    save_file(
        {"conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)}, folder / f"{V1.stems[0]}.safetensors"
    )
    message = _error(weights.load_state_dict, "IMAGENET1K_V1")
    assert "no features.0.0.weight, features.0.1.weight, features.0.1.bias and 259 more" in message
    assert "unknown conv1.weight, fc.bias" in message


def test_other_shapes_and_class_counts_are_named() -> None:
    expected = weights.expected_shapes(1000)
    message = _error(weights.check_state_dict, _state(5), expected, "m.pth")
    assert message == (
        "m.pth has 5 classes, 1000 are wanted: classifier.1.weight is (5, 1280); use num_classes=5"
    )
    message = _error(weights.check_state_dict, _state(1000, 0.5), expected, "m.pth")
    assert "features.0.0.weight is (16, 3, 3, 3), wanted (32, 3, 3, 3)" in message
    state = _state()
    state["classifier.1.weight"] = torch.zeros(1000, 640)
    message = _error(weights.check_state_dict, state, expected, "m.pth")
    assert "classifier.1.weight is (1000, 640), wanted (1000, 1280)" in message
    old = {key: value for key, value in _state().items() if not key.endswith("num_batches_tracked")}
    weights.check_state_dict(old, expected, "m.pth")


def test_the_head_can_be_left_behind() -> None:
    state = _state(5)
    kept = weights.trunk(state)
    assert len(kept) == len(state) - 2
    assert weights.num_classes(kept) is None
    assert weights.num_classes(state) == 5


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.5, 0.62, 0.75, 1.0, 1.4, 2.0])
def test_the_width_is_read_off_the_shapes(width: float) -> None:
    found = weights.infer_width(_state(4, width), "m.pth")
    assert arch.network(4, found) == arch.network(4, width)


def test_no_width_fits() -> None:
    state = _state()
    del state["features.3.conv.1.0.weight"]
    assert "no features.3.conv.1.0.weight" in _error(weights.infer_width, state, "m.pth")
    state = _state()
    state["features.3.conv.1.0.weight"] = torch.zeros(143, 1, 3, 3)
    message = _error(weights.infer_width, state, "m.pth")
    assert "features.3.conv.1.0.weight is (143, 1, 3, 3), wanted (144, 1, 3, 3)" in message
    assert "no features.0.0.weight" in _error(weights.infer_width, {"w": torch.zeros(1)}, "m.pth")


def test_preprocessing_round_trip_and_refusals() -> None:
    value = weights.Preprocessing(232, 200, (0.5, 0.4, 0.3), (1, 1, 1), "bicubic")
    assert weights.Preprocessing.from_dict(json.loads(json.dumps(value.to_dict()))) == value
    assert weights.Preprocessing.from_dict({}) == weights.Preprocessing()
    for fields, words in (
        ({"crops": 3}, "unknown crops"),
        ({"crop": 0}, "crop=0"),
        ({"mean": [1, 2]}, "mean="),
        ({"std": [0, 1, 1]}, "std="),
        ({"std": "abc"}, "std="),
        ({"interpolation": "magic"}, "nearest, bilinear, bicubic"),
    ):
        assert words in _error(weights.Preprocessing.from_dict, fields)


def test_labels_and_preprocessing_of_a_file() -> None:
    assert weights.labels_of({}, 5) is None
    assert weights.labels_of({"labels": '["a", "b"]'}, 2) == ["a", "b"]
    assert weights.labels_of({}, 1000) == weights.imagenet_labels()
    assert len(weights.imagenet_labels()) == 1000
    assert "one per class" in _error(weights.labels_of, {"labels": '["a", "b"]'}, 3)
    assert "one per class" in _error(weights.labels_of, {"labels": "a,b"}, 2)
    assert weights.preprocessing_of({"weights": "IMAGENET1K_V2"}).resize == 232
    assert weights.preprocessing_of({}) == weights.Preprocessing()
    stored = {"weights": "IMAGENET1K_V2", "preprocessing": '{"resize": 100, "crop": 96}'}
    assert weights.preprocessing_of(stored) == weights.Preprocessing(100, 96)
    assert "no JSON object" in _error(weights.preprocessing_of, {"preprocessing": "[1]"})


def test_the_shared_weights_say_what_they_are(weights_v1: Path, folder: Path) -> None:
    shutil.copy(weights_v1, folder / "renamed.safetensors")
    state, metadata = weights.load_state_dict("IMAGENET1K_V1")
    assert metadata["weights"] == "IMAGENET1K_V1"
    torchvision().models.mobilenet_v2().load_state_dict(state, strict=True)
    with pytest.raises(weights.MissingWeightsError):
        weights.load_state_dict("DEFAULT")


def test_torchvision_is_imported_once_asked_for_and_then_whole() -> None:
    code = (
        "import sys; from mnv2_fast import _torchvision; assert 'torchvision' not in sys.modules\n"
        "tv = _torchvision.torchvision(); import torchvision.transforms.v2\n"
        "assert tv is sys.modules['torchvision'] is _torchvision.torchvision()\n"
        "tv.models.mobilenet_v2; tv.datasets.ImageFolder; tv.transforms.Resize"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_torchvision_one_line_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from mnv2_fast import _torchvision

    monkeypatch.setattr(_torchvision, "installed", lambda: False)
    _torchvision.torchvision.cache_clear()
    try:
        assert "pip install torchvision" in _error(_torchvision.torchvision)
    finally:
        _torchvision.torchvision.cache_clear()

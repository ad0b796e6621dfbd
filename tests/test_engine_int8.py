"""Engines of dtype int8: made from images, kept in a file, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, calibrate
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import mnv2_fast
from mnv2_fast import Engine, MobileNetV2, UserError, data
from mnv2_fast.weights import Preprocessing

PREPROCESSING = Preprocessing(40, 32)


@pytest.fixture(scope="module")
def model() -> MobileNetV2:
    torch.manual_seed(0)
    model = calibrate(MobileNetV2(**SMALL))
    model.preprocessing = PREPROCESSING
    return model


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """uint8 [8, 32, 32, 3]."""
    return torch.randint(0, 256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture(scope="module")
def engine(model: MobileNetV2, pixels: Tensor) -> Engine:
    return mnv2_fast.compile(model, "int8", calibration=pixels)


@pytest.fixture
def file(engine: Engine, tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, str], Path]:
    """Tensors and metadata of a saved engine, and a path for a damaged one."""
    path = tmp_path / "good.safetensors"
    engine.save(path)
    with safe_open(path, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata(), tmp_path / "bad.safetensors"


def test_answers_as_the_definition(engine: Engine, model: MobileNetV2, pixels: Tensor) -> None:
    assert (engine.dtype, engine.backend) == ("int8", "cpu")
    assert engine.isa
    slow = copy.deepcopy(model)
    slow.backend = "eager"
    twin = mnv2_fast.compile(slow, "int8", calibration=pixels)
    assert (twin.backend, twin.isa) == ("eager", "")
    x = data.normalize(pixels, PREPROCESSING)
    for images in (x, x.contiguous(), pixels, x[:, :, 1::2, ::3], pixels[:, 3:, 5:9], x[:0], pixels[:0]):
        y = engine(images)
        assert y.dtype == torch.float32
        assert y.shape == (len(images), 7)
        assert torch.equal(y, twin(images))
    assert torch.equal(engine(pixels), engine(x))  # bytes and floats alike
    assert twin.workspace_bytes(2, 32, 32) > 0


def test_near_the_float_network(engine: Engine, model: MobileNetV2, pixels: Tensor) -> None:
    exact = mnv2_fast.compile(model)(pixels)
    assert (engine(pixels) - exact).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_values_that_are_not_finite(
    model: MobileNetV2, pixels: Tensor, monkeypatch: pytest.MonkeyPatch, value: float, backend: str
) -> None:
    monkeypatch.setenv("MNV2_BACKEND", backend)
    engine = mnv2_fast.compile(model, "int8", calibration=pixels)
    x = torch.zeros(2, 3, 32, 32)
    x[1, 2, 31, 31] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        engine(x)


def test_save_and_load_without_calibration(engine: Engine, pixels: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    engine.save(path)
    loaded = mnv2_fast.load(path, threads=1)
    assert loaded.dtype == "int8"
    assert loaded.preprocessing == PREPROCESSING
    assert torch.equal(loaded(pixels), engine(pixels))
    for other in (pickle.loads(pickle.dumps(engine)), copy.deepcopy(engine), engine.with_threads(1)):
        assert torch.equal(other(pixels), engine(pixels))
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["dtype"] == "int8"
        assert opened.get_tensor("classifier.1.weight").dtype == torch.int8


def test_the_file_is_a_quarter_of_the_float_ones(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="few"):
        engine = mnv2_fast.compile(
            MobileNetV2().eval(), "int8", calibration=torch.randn(1, 3, 32, 32).clamp(-2, 2)
        )
    engine.save(tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < 3.9e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.3.conv.1.0.scale": None}, r"no features\.3\.conv\.1\.0\.scale"),
        ({"features.3.conv.2.output_scale": None}, r"no features\.3\.conv\.2\.output_scale"),
        ({"input.scale": None}, r"no input\.scale"),
        ({"classifier.1.scale": 0.0}, r"classifier\.1\.scale is zero, negative or not finite"),
        ({"features.0.0.scale": -1.0}, r"features\.0\.0\.scale is zero, negative"),
        ({"features.2.conv.2.output_scale": float("nan")}, r"output_scale is zero, negative or not finite"),
        ({"input.scale": float("inf")}, r"input\.scale is zero, negative or not finite"),
        ({"features.0.0.scale": 1e30}, r"features\.0\.0\.scale or \.bias is too large"),
        ({"features.0.0.weight": torch.float32}, r"features\.0\.0\.weight is torch\.float32"),
        ({"features.1.conv.1.output_zero": torch.int8}, r"output_zero is torch\.int8"),
        ({"more": 1.0}, "unknown more"),
    ],
)
def test_files_that_make_no_sense(
    file: tuple[dict[str, Tensor], dict[str, str], Path], change: dict[str, Any], message: str
) -> None:
    tensors, metadata, bad = file
    for key, value in change.items():
        if value is None:
            del tensors[key]
        elif isinstance(value, torch.dtype):
            tensors[key] = tensors[key].to(value)
        else:
            tensors[key] = torch.full_like(tensors.get(key, torch.zeros(1)), value)
    save_file(tensors, bad, metadata)
    with pytest.raises(UserError, match=rf"bad\.safetensors.*{message}") as caught:
        mnv2_fast.load(bad)
    assert "\n" not in str(caught.value)


def test_files_of_the_wrong_kind(
    file: tuple[dict[str, Tensor], dict[str, str], Path], model: MobileNetV2
) -> None:
    tensors, metadata, bad = file
    save_file(tensors, bad, {**metadata, "dtype": "fp32"})
    with pytest.raises(UserError, match="unknown"):
        mnv2_fast.load(bad)
    floats = bad.parent / "floats.safetensors"
    mnv2_fast.compile(model).save(floats)
    with safe_open(floats, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        save_file(tensors, bad, {**opened.metadata(), "dtype": "int8"})
    with pytest.raises(UserError, match=r"no input\.scale"):
        mnv2_fast.load(bad)
    good = bad.parent / "good.safetensors"
    bad.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        mnv2_fast.load(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "needs calibration images: give calibration="),
        ({"dtype": "int8", "calibration": []}, "there are no calibration images"),
        ({"dtype": "int8", "calibration": torch.full((2, 3, 32, 32), float("nan"))}, "NaN or infinite"),
        ({"dtype": "int8", "calibration": torch.zeros(2, 1, 32, 32)}, r"\[2, 1, 32, 32\]: give float32"),
        ({"dtype": "int8", "calibration": torch.zeros(2, 3, 32, 32).double()}, r"\.float\(\)"),
        ({"dtype": "fp32", "calibration": torch.zeros(2, 3, 32, 32)}, "leave it out with dtype='fp32'"),
    ],
)
def test_wrong_arguments_of_compile(model: MobileNetV2, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        mnv2_fast.compile(model, **arguments)
    assert "\n" not in str(caught.value)

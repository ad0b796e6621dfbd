"""From a folder of photos to an int8 engine, and how far its answers are from the float network's.

Half of the photos calibrate, the others judge: on what it was fitted to, a network looks better than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import calibration, data, int8, quant
from .calibration import Skip
from .engine import Engine, compile
from .errors import UserError
from .int8 import QuantizedNetwork
from .model import MobileNetV2

# Called with what is counted, how many are done, and of how many.
Progress = Callable[[str, int, int], object]

IMAGES = 200  # by default: more to calibrate on gain little

_BATCH = 16  # photos judged in one call
_LAYER_PHOTOS = 4  # that per-layer errors are taken on: the slow twin runs, in float64


@dataclass(frozen=True)
class Judgement:
    """How an int8 engine answers beside the float network, on photos it was not calibrated on.

    agreement: share of the photos with the same first class. top1: of the float network and of the engine,
    over the `labelled` photos, those in a folder that has the name of a class; None without any. layers: name
    and SQNR in dB of each layer, if asked for.
    """

    photos: int
    agreement: float
    labelled: int
    top1: tuple[float, float] | None
    layers: list[tuple[str, float]]


def split(folder: str | Path, images: int = IMAGES) -> tuple[list[Path], list[Path]]:
    """Photos to calibrate on and photos to judge by, the same ones each time.

    Of `images` photos spread evenly over the folder, every second one calibrates, `calibration.MOST_IMAGES`
    at most, and the others judge: neighbours, so each class of a folder of classes is on both sides.

    Raises:
        UserError: there is no such folder, or it has fewer than two photos.
    """
    if not data.is_many(folder):
        raise UserError(f"there is no folder {str(folder)!r}: give one with photos, about {IMAGES}")
    taken = calibration.spread(data.expand_inputs([folder]), images)
    if len(taken) < 2:
        raise UserError(
            f"{len(taken)} photo is too few, one half calibrates and the other judges: give about {IMAGES}"
        )
    return calibration.spread(taken[::2]), taken[1::2]


def quantize(model: MobileNetV2, photos: Sequence[Path], skip: Skip, progress: Progress) -> Engine:
    """The int8 engine of a model.

    Args:
        model: in float32, on the CPU.
        photos: to calibrate on; they are cropped as the model expects.
        skip: called with the error of each photo that cannot be used.
        progress: called as the work goes on.

    Raises:
        UserError: no photo can be used, or int8 cannot run the model.
    """
    read: list[Tensor] = []
    progress("calibration photos read", 0, len(photos))
    for i, path in enumerate(photos):
        read += calibration.photos([path], model.preprocessing, skip)
        progress("calibration photos read", i + 1, len(photos))
    if not read:
        raise UserError("none of the calibration photos can be used: give others")
    return compile(
        model, "int8", calibration=torch.cat(read), progress=lambda i, of: progress("steps quantized", i, of)
    )


def judge(
    model: MobileNetV2,
    engine: Engine,
    photos: Sequence[Path],
    skip: Skip,
    progress: Progress,
    *,
    per_layer: bool = False,
) -> Judgement:
    """Run the float network and an engine made of it on photos.

    Args:
        model: the float network.
        engine: of int8.
        photos: to judge by.
        skip: called with the error of each photo that cannot be used.
        progress: called as the work goes on.
        per_layer: the error of each layer too.

    Raises:
        UserError: no photo can be used.
    """
    exact = compile(model)
    of_float: list[int] = []
    of_int8: list[int] = []
    names: list[str] = []
    first: list[Tensor] = []
    for paths, images in _batches(photos, engine, skip, progress):
        of_float += exact(images).argmax(1).tolist()
        of_int8 += engine(images).argmax(1).tolist()
        names += [path.parent.name for path in paths]
        if per_layer and not first:
            first.append(data.normalize(images[:_LAYER_PHOTOS], engine.preprocessing))
    if not names:
        raise UserError("none of the photos to judge by can be used: give others")
    # By name, not by number: two of ImageNet's classes are both called "crane".
    labels = engine.labels or []
    known = [i for i, name in enumerate(names) if name in labels]
    top1 = None
    if known:
        right = [[labels[found[i]] == names[i] for i in known] for found in (of_float, of_int8)]
        top1 = (sum(right[0]) / len(known), sum(right[1]) / len(known))
    layers = layer_errors(exact, engine, first[0]) if per_layer else []
    agreed = sum(a == b for a, b in zip(of_float, of_int8, strict=True))
    return Judgement(len(names), agreed / len(names), len(known), top1, layers)


def _batches(
    photos: Sequence[Path], engine: Engine, skip: Skip, progress: Progress
) -> Iterator[tuple[list[Path], Tensor]]:
    """Usable photos with their pixels, uint8 [N, crop, crop, 3]: what is held does not grow with `photos`."""
    paths: list[Path] = []
    images: list[Tensor] = []
    progress("photos judged", 0, len(photos))
    for i, path in enumerate(photos):
        found = list(calibration.photos([path], engine.preprocessing, skip))
        images += found
        paths += [path] * len(found)
        if images and (len(images) == _BATCH or i + 1 == len(photos)):
            yield paths, torch.cat(images)
            paths, images = [], []
        progress("photos judged", i + 1, len(photos))


@torch.no_grad()
def layer_errors(exact: Engine, engine: Engine, x: Tensor) -> list[tuple[str, float]]:
    """Name and signal-to-quantization-noise ratio, in dB, of each layer's output: all error up to it counts.

    What a uint8 behind ReLU6 stands for is in the layer after it; here each channel's step is the one that
    fits best.

    Args:
        exact: the float engine.
        engine: the int8 engine of the same model.
        x: float32 images [N, 3, H, W], normalized.
    """
    network = engine.tensors
    assert isinstance(network, QuantizedNetwork)
    assert not isinstance(exact.tensors, QuantizedNetwork)
    outputs = quant.walk(exact.layers, exact.tensors, x)
    found = []

    def observe(spec: object, output: Tensor) -> None:
        layer, _, wanted = next(outputs)
        signal, got = wanted.double().flatten(2), output.double().reshape(*wanted.shape[:2], -1)
        if output.dtype == torch.uint8:
            got = got * ((got * signal).sum((0, 2)) / got.square().sum((0, 2)).clamp(min=1))[:, None]
        noise = (got - signal).square().sum()
        found.append((layer.conv, float(10 * torch.log10(signal.square().sum() / noise))))

    int8.reference(network, x, observe)
    return found

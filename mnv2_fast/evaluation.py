"""A network on labelled photos: `evaluate(model, "photos/")`."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import photos
from .engine import Engine
from .errors import UserError
from .loading import EpochSampler, Loader, PhotoDataset, worker_errors
from .metrics import Evaluation
from .photos import LabelledFolder
from .weights import Preprocessing

Progress = Callable[[int, int], object]

_NAMED = 3  # classes that a message names


class Matching(NamedTuple):
    """Which outputs of a network and which folders are which class.

    classes: their names, each once. of_output: the number of each output's class. of_folder: that of each
    folder's.
    """

    classes: tuple[str, ...]
    of_output: list[int]
    of_folder: list[int]


def match(labels: Sequence[str] | None, outputs: int, folders: Sequence[str]) -> Matching:
    """Find the classes of a network in the folders of photos, by their names.

    Each folder needs a class of its name. Classes may go without a folder, which a warning says: photos may
    still be taken for them. Outputs of the same name are one class, their probabilities added. Without labels
    the outputs are taken for the folders in their order, which a warning says, and there have to be as many.

    Args:
        labels: of the network's outputs.
        outputs: how many there are.
        folders: names, sorted.

    Raises:
        UserError: a folder has no class, or there are no labels and another number of outputs.
    """
    if labels is None:
        if outputs != len(folders):
            raise UserError(
                f"the model has no labels, and {outputs} outputs for {len(folders)} folders: give weights "
                "with labels in their metadata, or one folder for each output"
            )
        warnings.warn(
            f"the model has no labels: its {outputs} outputs are taken for the folders in their order, "
            f"{_some(folders)}",
            stacklevel=2,
        )
        labels = folders
    if len(labels) != outputs:
        raise UserError(f"{len(labels)} labels for {outputs} outputs: give one for each")
    numbers = {name: i for i, name in enumerate(dict.fromkeys(labels))}
    strange = [name for name in folders if name not in numbers]
    if strange:
        raise UserError(
            f"the model has no class for {_some(strange)}, of {len(folders)} folders; its {len(numbers)} "
            f"classes are {_some(list(numbers))}: rename those folders, or take them away"
        )
    missing = [name for name in numbers if name not in folders]
    if missing:
        warnings.warn(
            f"{len(missing)} of the model's {len(numbers)} classes have no folder: {_some(missing)}",
            stacklevel=2,
        )
    return Matching(tuple(numbers), [numbers[name] for name in labels], [numbers[name] for name in folders])


def _some(names: Sequence[str]) -> str:
    """The names, of many the first ones."""
    text = ", ".join(map(repr, names[:_NAMED]))
    return f"{text} and {len(names) - _NAMED} more" if len(names) > _NAMED else text


def evaluate(
    model: Engine | nn.Module,
    data: str | os.PathLike[str] | LabelledFolder | PhotoDataset,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 32,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """What a network answers on labelled photos.

    A photo that cannot be used is left out, warned of once and counted.

    Args:
        model: an Engine, or any module from float32 [N, 3, H, W] to logits, on any device. A module answers
            in eval mode, and is then as it was.
        data: a folder, as `photos.find_labelled` takes it; a `LabelledFolder`, whose validation photos are
            taken; or a dataset, which has its own preprocessing.
        labels: names of the outputs, instead of the model's; see `match`.
        preprocessing: of photos, instead of the model's.
        batch_size: photos in one call.
        workers: processes that read photos, as `Loader` takes them.
        progress: called with the number of photos done and of all.

    Raises:
        UserError: there are no such photos, the model's labels do not fit them, it has no preprocessing, or
            it gives NaN.
    """
    dataset = data if isinstance(data, PhotoDataset) else _dataset(model, data, preprocessing)
    if labels is None:
        labels = getattr(model, "labels", None)
    loader = Loader(dataset, EpochSampler(len(dataset), batch_size, training=False), workers)
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    device = next((parameter.device for parameter in parameters), getattr(model, "device", None))
    matching: Matching | None = None
    probabilities: list[Tensor] = []
    targets: list[Tensor] = []
    numbers: list[int] = []
    with worker_errors(), _eval_mode(model), torch.no_grad():
        for batch in loader.epoch():
            logits = model(batch.images.to(device)).double().cpu()
            if matching is None:
                matching = match(labels, logits.shape[1], dataset.classes)
            wrong = (~logits.isfinite().all(1)).nonzero()
            if len(wrong):
                path = dataset.photos[int(batch.indices[wrong[0]])].path
                raise UserError(
                    f"the network gives NaN for {path}: its weights are damaged, fetch them again"
                )
            merged = torch.zeros(len(logits), len(matching.classes), dtype=torch.double)
            probabilities.append(merged.index_add_(1, torch.tensor(matching.of_output), logits.softmax(1)))
            targets.append(torch.tensor(matching.of_folder)[batch.labels])
            numbers += batch.indices.tolist()
            if progress is not None:
                progress(numbers[-1] + 1, len(dataset))
    if matching is None:
        raise UserError("none of the photos can be used: give others")
    return Evaluation(
        matching.classes,
        torch.cat(targets),
        torch.cat(probabilities),
        tuple(dataset.photos[i].path for i in numbers),
        len(dataset) - len(numbers),
    )


def _dataset(
    model: object, data: str | os.PathLike[str] | LabelledFolder, preprocessing: Preprocessing | None
) -> PhotoDataset:
    folder = data if isinstance(data, LabelledFolder) else photos.find_labelled(data)
    preprocessing = preprocessing or getattr(model, "preprocessing", None)
    if preprocessing is None:
        raise UserError(f"{type(model).__name__} has no preprocessing: give one")
    return PhotoDataset(folder.val, folder.classes, preprocessing)


@contextlib.contextmanager
def _eval_mode(model: object) -> Iterator[None]:
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    if training:
        modules[0].eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

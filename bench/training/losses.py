"""`python -m bench.training --losses`: the losses of 50 steps from one seed, ours beside torch's.

Everyone begins with the same weights and sees the same photos in the same order. Torch trains in both of its
layouts: what lies between the two is what rounding alone makes of a loss.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mnv2_fast import UserError, data, mobilenet_v2, photos
from mnv2_fast.weights import Preprocessing

from .. import limits, material, results
from ..contenders import environment
from ..workers import Worker, WorkerError, isa
from .contenders import CHANNELS_LAST, CLASSES, OURS, PLAIN, TUNED, Contender, find
from .loops import Loop

OUTPUT = results.FOLDER / "losses.csv"
STEPS = 50
CURVES = (PLAIN, CHANNELS_LAST, OURS)  # the first one is what the others are compared with
WHERE = "by default data/flowers in MNV2_SHARED or ../shared, else noise"
_IMAGES, _LABELS, _WEIGHTS = "images.npy", "labels.npy", "start.safetensors"


def prepare(folder: Path, where: Path | None, count: int, size: int) -> str:
    """Write `count` images, uint8 [N, size, size, 3] in the order of the steps, their labels and the weights
    to begin with.

    Args:
        folder: where to.
        where: labelled photos; None: those of the shared folder, or noise where there are none.
        count: images; photos come again where there are fewer.
        size: their height and width.

    Returns:
        What they are, for readers.

    Raises:
        UserError: `where` has no labelled photos, or more classes than the network here.
    """
    from safetensors.torch import save_file

    random = np.random.default_rng(0)
    shared = material.shared_data("flowers")
    where = where or (shared if shared.is_dir() else None)
    if where is None:
        images = random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        labels, said = random.integers(0, CLASSES, count), "noise"
    else:
        found = photos.find(where)
        if len(found.classes) > CLASSES:
            raise UserError(f"{where} has {len(found.classes)} classes: give a folder of at most {CLASSES}")
        order = itertools.cycle(random.permutation(len(found.train)).tolist())
        taken = [found.train[i] for i in itertools.islice(order, count)]
        preprocessing = Preprocessing(resize=round(size * 256 / 224), crop=size)
        images = np.stack([data.resize_and_crop(data.read_image(path), preprocessing) for path, _ in taken])
        labels = np.array([label for _, label in taken])
        said = f"{len(found.train)} photos of {found.root.name}"
    np.save(folder / _IMAGES, images)
    np.save(folder / _LABELS, labels)
    torch.manual_seed(0)
    source = material.source()
    model = mobilenet_v2(weights=None if source == "seeded" else source)
    model.classifier[1] = nn.Linear(model.last_channel, CLASSES)
    save_file({key: t.contiguous() for key, t in model.state_dict().items()}, folder / _WEIGHTS)
    return said


def serve(name: str, dtype: str, folder: str, batch: int) -> Callable[[str], Callable[[], object]]:
    """For bench.workers: `losses`, a number for each batch of the folder's images; `why_not` as of `Loop`."""
    torch.set_grad_enabled(True)  # a worker has them off
    images = np.load(Path(folder) / _IMAGES, mmap_mode="r")
    labels = torch.from_numpy(np.load(Path(folder) / _LABELS)).split(batch)
    loop = Loop(find(name), dtype, weights=str(Path(folder) / _WEIGHTS))

    def batch_of(number: int) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(images[number * batch : (number + 1) * batch]))
        return loop.images(data.normalize(pixels, Preprocessing()))

    def losses() -> list[float]:
        torch.manual_seed(0)  # of dropout
        return [float(loop.step(batch_of(i), chosen)) for i, chosen in enumerate(labels)]

    calls = {"losses": losses, "why_not": lambda: loop.why_not(batch_of(0)), "isa": isa}
    return calls.__getitem__


def curve(
    contender: Contender, dtype: str, folder: str, options: argparse.Namespace
) -> tuple[list[float], str, str]:
    """One contender's losses, why our kernels did not serve it, and their instruction set.

    Raises:
        WorkerError: it could not be started or died.
    """
    request = {"name": contender.name, "dtype": dtype, "folder": folder, "batch": options.batch}
    env = environment(contender.env if contender.ours else TUNED, folder)  # which is only faster
    worker = Worker("training.losses", request, limits.cores(options.threads), env)
    try:
        worker.ready()
        return worker.ask("losses"), worker.ask("why_not"), worker.ask("isa")
    finally:
        worker.close()


def compare(rows: Sequence[results.Row]) -> list[str]:
    """For each precision, how far every curve gets from the first one's."""
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        curves = {
            name: [row.loss or 0.0 for row in rows if (row.contender, row.dtype) == (name, dtype)]
            for name in CURVES
        }
        first = curves.pop(CURVES[0])
        for name, values in curves.items():
            if first and values:
                apart = [abs(a - b) for a, b in zip(first, values, strict=True)]
                lines.append(
                    f"{dtype}: {name} is {np.mean(apart):.4f} from {CURVES[0]} in the mean of {len(apart)} "
                    f"steps, {max(apart):.4f} at most; losses go from {first[0]:.3f} to {first[-1]:.3f}"
                )
    return lines


def main(options: argparse.Namespace, folder: str, shared: Mapping[str, str]) -> int:
    """Train, print, and add the rows to the CSV file as they come.

    Raises:
        UserError: as `prepare`.
    """
    steps = options.steps or STEPS
    said = prepare(Path(folder), options.data, steps * options.batch, options.size)
    rows: list[results.Row] = []
    for dtype, name in itertools.product(options.dtype, CURVES):
        contender = find(name)
        if contender not in options.only:
            continue
        try:
            losses, why_not, used = curve(contender, dtype, folder, options)
        except WorkerError as error:
            print(f"left out: {name}, {dtype}: {error}", flush=True)
            continue
        print(f"{dtype}, {name}: {losses[0]:.3f} to {losses[-1]:.3f}  {why_not}".rstrip(), flush=True)
        rows += [
            results.Row(
                bench="training",
                name="losses",
                contender=name,
                dtype=dtype,
                isa=used,
                size=str(options.size),
                batch=options.batch,
                threads=options.threads,
                form=said,
                step=step,
                loss=loss,
                weights=material.source(),
                note=why_not,
            )
            for step, loss in enumerate(losses, start=1)
        ]
        results.save(options.output or OUTPUT, rows, shared)
    print("\n".join(compare(rows)))
    return 0

"""LeNet-5 and MobileNetV2 trained and judged alike: same photos, split, seeds and budget.

The output folder keeps one run folder for each contender and seed, with a `result.json` once it is done, so
that a comparison cut off goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from . import __version__, corruptions, costs, files, imagecache
from .contenders import CONTENDERS, Contender
from .corruptions import CORRUPTIONS
from .costs import Cost
from .data import ImageError
from .errors import Interrupted, UserError
from .evaluation import evaluate
from .imagecache import ImageCache
from .loading import PhotoDataset
from .model import mobilenet_v2
from .photos import LabelledFolder, Photo
from .recipe import DEFAULT_WEIGHTS, OPTIONS, Recipe
from .reporting import counting
from .runs import BEST, FINAL, LAST, Row, Run
from .train import FitResult, fit, on_threads
from .weights import Preprocessing, load_state_dict

RUNS, RESULT, SETTINGS, EPOCHS, COSTS = "runs", "result.json", "settings.json", "epochs.json", "costs.json"
CACHE = ".cache"
_OF_PHOTOS = ("train", "val", "photos")  # of `Settings`
_OPTIONS = {option.name for option in OPTIONS if not option.free}

Say = Callable[[str], object]


@dataclass(frozen=True)
class Settings:
    """What has to be the same in all runs.

    data, train, val, photos: the folder, how many photos there are, and which, by a digest. epochs: of each
    run, unless `seconds`, of wall time for training a run, says how many fit. Others: of `Recipe`, and the
    weights of `fit`. version: of this package, whose recipes and kernels may be others.
    """

    version: str
    data: str
    classes: tuple[str, ...]
    train: int
    val: int
    photos: str
    epochs: int
    seconds: float | None
    weights: str
    batch_size: int
    image_size: int | None


@dataclass(frozen=True)
class Result:
    """One run. Shares are from 0 to 1.

    recipe: the options that it was trained by, none left open. confusion: as `Evaluation.confusion`.
    robustness: corruption's name -> top-1 at each strength.
    """

    contender: str
    seed: int
    recipe: dict[str, Any]
    epochs: int
    top1: float
    loss: float
    calibration_error: float
    confusion: list[list[int]]
    robustness: dict[str, list[float]]
    history: list[Row]
    seconds: float
    file_bytes: int


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison: contender's name -> its results by seed; network's title -> its cost."""

    settings: Settings
    contenders: tuple[Contender, ...]
    results: dict[str, list[Result]]
    costs: dict[str, Cost]
    skipped: int


def compare(
    folder: LabelledFolder,
    out: Path,
    *,
    contenders: Sequence[Contender] = CONTENDERS,
    seeds: int = 3,
    epochs: int = Recipe().epochs,
    seconds: float | None = None,
    weights: str = DEFAULT_WEIGHTS,
    batch_size: int = Recipe().batch_size,
    image_size: int | None = None,
    workers: int | None = None,
    say: Say = print,
) -> Comparison:
    """Train and judge what has not been done yet, and give all results.

    Args:
        folder: from `photos.find`.
        out: a folder that is there; runs that are done in it are taken as they are.
        contenders: of `CONTENDERS`.
        seeds: 0 and up, of weights, order and augmentation; the split is the same for all.
        epochs: of each run.
        seconds: of wall time for training each run, in place of `epochs`: the whole epochs that fit, at least
            one, as the time of a first epoch tells.
        weights: that fine-tuning begins with.
        batch_size: photos in a step; all of them where there are fewer.
        image_size: of MobileNetV2's photos; by default what the weights were trained on.
        workers: as `Loader` takes them.
        say: called with a line before each step.

    Raises:
        UserError: `out` has a comparison with other settings, or a run fails.
        Interrupted: by Ctrl-C or SIGTERM; what is done is kept.
    """
    caches = _Caches(out / CACHE, folder)
    usable = _usable(folder, caches)
    settings = Settings(
        __version__,
        str(folder.root.absolute()),
        usable.classes,
        len(usable.train),
        len(usable.val),
        usable.digest(),
        epochs,
        seconds,
        weights,
        min(batch_size, len(usable.train)),
        image_size,
    )
    _keep_settings(out / SETTINGS, settings)
    results: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
    plan = [
        _Run(out, usable, settings, contender, seed, caches, workers)
        for seed in range(seeds)
        for contender in contenders
    ]
    if any(run.contender.pretrained and run.result() is None for run in plan):
        load_state_dict(weights)  # that they are not to be had is not said after an hour only
    for done, run in enumerate(plan):
        result = run.result()
        if result is None:
            say(f"run {done + 1} of {len(plan)}: {run.contender.title}, seed {run.seed}")
            with _told(run.contender, run.seed, done, len(plan)):
                result = run.work()
        results[run.contender.name].append(result)
    say("costs of one image")
    found = _costs(out, contenders, len(settings.classes))
    shutil.rmtree(out / CACHE, ignore_errors=True)
    skipped = len(folder.train) + len(folder.val) - len(usable.train) - len(usable.val)
    return Comparison(settings, tuple(contenders), results, found, skipped)


@contextmanager
def _told(contender: Contender, seed: int, done: int, of: int) -> Iterator[None]:
    """What ends a run says which one, and that the others are kept."""
    kept = f"{done} of {of} runs are done: the same command goes on from there"
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(kept, stop.exit_code - 128) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept) from None
    except UserError as error:
        raise UserError(f"{contender.title}, seed {seed}: {error} ({kept})") from error


class _Caches:
    """Resized photos, kept while the comparison lasts."""

    def __init__(self, place: Path, folder: LabelledFolder) -> None:
        self.place = place
        self._root, self._paths = folder.root, [photo.path for photo in (*folder.train, *folder.val)]
        self._open: dict[tuple[int, str], ImageCache | None] = {}

    def get(self, preprocessing: Preprocessing) -> ImageCache | None:
        key = (preprocessing.resize, preprocessing.interpolation)
        if key not in self._open:
            progress = counting("photos decoded", shown=True)
            self._open[key] = imagecache.open_cache(
                self.place, self._root, self._paths, preprocessing, progress=progress
            )
        return self._open[key]


def _usable(folder: LabelledFolder, caches: _Caches) -> LabelledFolder:
    """The folder without damaged photos: a warning names each once, and not in every run.

    Raises:
        UserError: a class is left without a photo to train on.
    """
    seen = corruptions.at_side(Preprocessing())
    cache = caches.get(seen)

    def good(photo: Photo) -> bool:
        try:
            if cache is None or cache.get(photo.path) is None:  # where there is no room
                imagecache.load_resized(photo.path, seen)
        except ImageError as error:
            warnings.warn(f"photo skipped: {error}", stacklevel=2)
            return False
        return True

    usable = replace(folder, train=tuple(filter(good, folder.train)), val=tuple(filter(good, folder.val)))
    empty = set(range(len(folder.classes))) - {photo.label for photo in usable.train}
    if empty or not usable.val:
        which = f"of class {folder.classes[min(empty)]!r} to train on" if empty else "to validate on"
        raise UserError(f"no photo {which} in {folder.root} can be used: fetch them again")
    return usable


def _keep_settings(file: Path, settings: Settings) -> None:
    """Raises UserError where the runs that are there have other settings."""
    now = json.loads(json.dumps(asdict(settings)))
    then = _read(file)
    if then is None:
        files.write_text(file, json.dumps(now, indent=2, ensure_ascii=False))
        return
    differ = [
        f"{name} is {value!r}, not {then.get(name)!r}"
        for name, value in now.items()
        if value != then.get(name) and name not in _OF_PHOTOS
    ]
    if any(now[name] != then.get(name) for name in _OF_PHOTOS):
        differ.append(_other_photos(now, then))
    if differ:
        raise UserError(
            f"{file.parent} has runs with other settings: {'; '.join(differ)}: give the same ones, or "
            "another folder"
        )


def _other_photos(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """In words, how the photos differ from those that a comparison began with."""
    differ = [
        f"{now[side]} to {what} on instead of {then.get(side)}"
        for side, what in (("train", "train"), ("val", "validate"))
        if now[side] != then.get(side)
    ]
    if not differ:
        return "the same numbers of photos, but others"
    return f"other photos, {' and '.join(differ)}"


def _read(file: Path) -> Any:
    """What is in a JSON file; None where it is not there or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _Run:
    """One contender with one seed, in a folder of its own."""

    out: Path
    photos: LabelledFolder
    settings: Settings
    contender: Contender
    seed: int
    caches: _Caches
    workers: int | None

    @property
    def folder(self) -> Path:
        return self.out / RUNS / f"{self.contender.name}-seed{self.seed}"

    def result(self) -> Result | None:
        """What `work` found; None where it has not come to its end."""
        found = _read(self.folder / RESULT)
        return None if found is None else Result(**found)

    def work(self) -> Result:
        """Train, or go on training, and judge."""
        with on_threads(self.contender.network.options.get("threads")):
            epochs = self._epochs()
            self.folder.parent.mkdir(exist_ok=True)
            resume = (self.folder / LAST).exists()
            trained = self._fit(epochs, out=self.folder, resume=resume, overwrite=not resume)
            result = self._judge(trained)
        files.write_text(self.folder / RESULT, json.dumps(asdict(result), ensure_ascii=False))
        for name in (LAST, BEST):  # large, and of no more use
            (self.folder / name).unlink(missing_ok=True)
        return result

    def _fit(self, epochs: int, **keep: Any) -> FitResult:
        """A training of so many epochs."""
        contender, settings = self.contender, self.settings
        network, model, size = contender.network, None, settings.image_size
        if network.make is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model, size = network.make(len(settings.classes)), None
        return fit(
            self.photos,
            model=model,
            weights=settings.weights if contender.pretrained else None,
            preprocessing=network.preprocessing,
            epochs=epochs,
            seed=self.seed,
            batch_size=settings.batch_size,
            image_size=size,
            augment=contender.augment,
            workers=self.workers,
            charts=False,
            cache=str(self.caches.place),
            **network.options,
            **keep,
        )

    def _epochs(self) -> int:
        """How many the budget allows: where it is time, as a first epoch tells, once for all seeds."""
        if self.settings.seconds is None:
            return self.settings.epochs
        known: dict[str, int] = _read(self.out / EPOCHS) or {}
        name = self.contender.name
        if name not in known:
            known[name] = max(1, int(self.settings.seconds / self._fit(1, progress=False).seconds))
            files.write_text(self.out / EPOCHS, json.dumps(known, indent=2))
        return known[name]

    def _judge(self, trained: FitResult) -> Result:
        classes, seen = self.settings.classes, trained.preprocessing

        def answers(dataset: PhotoDataset) -> Any:
            return evaluate(trained.model, dataset, labels=classes, workers=self.workers)

        found = answers(PhotoDataset(self.photos.val, classes, seen, cache=self.caches.get(seen)))
        robustness: dict[str, list[float]] = {}
        if not self.contender.ablation:
            cache = self.caches.get(corruptions.at_side(seen))
            for corruption in CORRUPTIONS:
                worse = (
                    corruptions.dataset(self.photos.val, classes, seen, corruption, level, cache=cache)
                    for level in corruption.levels
                )
                robustness[corruption.name] = [answers(dataset).top1 for dataset in worse]
        return Result(
            contender=self.contender.name,
            seed=self.seed,
            recipe={name: value for name, value in Run(self.folder).args().items() if name in _OPTIONS},
            epochs=len(trained.history),
            top1=found.top1,
            loss=found.loss,
            calibration_error=found.calibration_error(),
            confusion=found.confusion.tolist(),
            robustness=robustness,
            history=trained.history,
            seconds=trained.seconds,
            file_bytes=(self.folder / FINAL).stat().st_size,
        )


def _costs(out: Path, contenders: Sequence[Contender], classes: int) -> dict[str, Cost]:
    """Of each network, as its first contender was trained with the first seed."""
    known: dict[str, Any] = _read(out / COSTS) or {}
    for contender in contenders:
        network = contender.network
        if network.title in known:
            continue
        file = out / RUNS / f"{contender.name}-seed0" / FINAL
        model: nn.Module
        if network.make is None:
            model = mobilenet_v2(weights=file)
            size = model.preprocessing.crop
        else:
            model = network.make(classes)
            model.load_state_dict(load_file(file))
            assert network.preprocessing is not None
            size = network.preprocessing.crop
        known[network.title] = asdict(costs.measure(model, size))
        files.write_text(out / COSTS, json.dumps(known, indent=2))
    titles = {contender.network.title for contender in contenders}
    return {title: Cost(**found) for title, found in known.items() if title in titles}

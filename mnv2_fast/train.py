"""Training on a labelled folder of photos: `fit("photos/", out="run")`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import arch, distributed, loading, machine, optim, photos, plots
from .backends import cpu_train
from .distributed import Group
from .errors import UserError
from .evaluation import evaluate
from .loading import Loader
from .model import MobileNetV2, mobilenet_v2
from .photos import LabelledFolder
from .reading import Declined
from .recipe import DEFAULT_WEIGHTS, OPTIONS, Recipe
from .reporting import Reporter
from .runs import FINAL, Row, Run, summary_writer, top1_of
from .trainer import Trainer
from .weights import Preprocessing


@dataclass(frozen=True)
class FitResult:
    """What a training gave.

    model: the trained network in eval mode, with the averaged weights of the last step; where the recipe
        keeps none, the module that was trained.
    classes: names of its outputs.
    preprocessing: of its photos.
    photos: which were trained on, and which validated on.
    history: the rows of `results.csv`.
    top1: of `model`, on the validation photos, 0 to 1.
    best_top1, best_epoch: of the best epoch, counted from 1.
    seconds: of all epochs.
    folder: of the run.
    """

    model: nn.Module
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    photos: LabelledFolder
    history: list[Row]
    top1: float
    best_top1: float
    best_epoch: int
    seconds: float
    folder: Path | None


def fit(
    data: str | os.PathLike[str] | LabelledFolder,
    *,
    model: nn.Module | None = None,
    weights: str | os.PathLike[str] | None = DEFAULT_WEIGHTS,
    preprocessing: Preprocessing | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    on_epoch_end: Callable[[Row], object] | None = None,
    progress: bool = True,
    charts: bool = True,
    **options: Any,
) -> FitResult:
    """Train a classifier on a folder of photos.

    Under `torchrun` all processes train one model, on the CPU, and the first one writes.

    Args:
        data: a folder in `ImageFolder` layout, as `photos.find` takes it, or what that returned.
        model: any module from [N, 3, H, W] to logits, one a class; it is trained in place. By default a
            MobileNetV2 with `weights`.
        weights: a name of published weights or a file, whose classifier is replaced where its classes are
            others; None: random weights.
        preprocessing: of photos; by default that of the weights or the model.
        out: the run folder, see `runs`; None: nothing is written.
        resume: go on with the run in `out`, from its last checkpoint. Options that are not given are as the
            run has them; the other arguments have to be the same.
        overwrite: replace a run in `out`.
        device: to train on.
        on_epoch_end: called with each new row of the history, in every process.
        progress: tell of it on stderr.
        charts: draw curves, confusion matrix and mistakes into the run folder, where matplotlib is installed.
        **options: of `Recipe`.

    Returns:
        Model and figures.

    Raises:
        UserError: an argument makes no sense, or training cannot go on; the message names the cure.
        Interrupted: by Ctrl-C or SIGTERM; where there is a run folder, all is saved.
    """
    recipe = Recipe.of(options)
    with distributed.joined() as group:
        say = partial(_say, shown=progress and group.first)
        run = None if out is None else Run(out)
        args = _args(data, model, weights, preprocessing)
        if resume:
            recipe = _resumed(run, args, options)
        folder = (
            data
            if isinstance(data, LabelledFolder)
            else photos.find(data, recipe.val_share, recipe.split_seed)
        )
        _check(recipe, folder, run, group, torch.device(device), overwrite=overwrite or resume)
        with on_threads(recipe.threads):
            network = _network(model, weights, recipe, folder.classes, say).to(device)
            seen = _preprocessing(network, preprocessing, recipe.image_size)
            if isinstance(network, MobileNetV2):
                network.labels, network.preprocessing = list(folder.classes), seen
            recipe = _settled(recipe, network)
            size = _train_size(recipe, seen)
            _check_memory(network, recipe.batch_size, size)
            state = run.state() if run is not None and resume else None
            if state is not None:
                _check_state(state, folder, group)
            trainer = Trainer(
                network,
                _loaders(folder, seen, recipe, group),
                recipe,
                preprocessing=seen,
                group=group,
                device=torch.device(device),
                run=run,
                reporter=partial(Reporter, progress and group.first, recipe.epochs),
                on_epoch_end=on_epoch_end,
                identity=_identity(folder, group),
            )
            if state is not None:
                trainer.load_state(state)
            elif run is not None:  # only now: what has failed so far leaves a run that was to be replaced
                group.on_first(partial(run.begin, {**args, **recipe.to_dict()}))
            trainer.train()
            if run is not None:
                group.on_first(partial(_save_end, run, trainer, charts))
            return _result(trainer, folder, run)


def _save_end(run: Run, trainer: Trainer, charts: bool) -> None:
    """Write what belongs to the end of a run. No chart that cannot be drawn spoils it."""
    run.save_weights(FINAL, trainer.result, trainer.classes, trainer.preprocessing)
    if not charts:
        return
    try:
        plots.check()
        found = evaluate(
            trainer.result,
            trainer.val_loader.dataset,
            labels=trainer.classes,
            batch_size=trainer.recipe.batch_size,
            workers=trainer.recipe.workers,
        )
        plots.run_plots(run.folder, trainer.progress.history, found)
    except (UserError, OSError) as error:
        warnings.warn(f"not all charts of the run are drawn: {error}", stacklevel=2)


def _result(trainer: Trainer, folder: LabelledFolder, run: Run | None) -> FitResult:
    done, model = trainer.progress, trainer.result
    return FitResult(
        model=model,
        classes=folder.classes,
        preprocessing=trainer.preprocessing,
        photos=folder,
        history=done.history,
        top1=top1_of(done.history[-1]),
        best_top1=done.best_top1,
        best_epoch=done.best_epoch,
        seconds=sum(row["seconds"] for row in done.history),
        folder=None if run is None else run.folder,
    )


def _say(text: str, shown: bool) -> None:
    if shown:
        print(text, file=sys.stderr, flush=True)


def _args(
    data: Any, model: nn.Module | None, weights: Any, preprocessing: Preprocessing | None
) -> dict[str, Any]:
    """What a run is of, besides its recipe."""
    root = data.root if isinstance(data, LabelledFolder) else Path(data).expanduser()
    of = None if model is not None or weights is None else str(getattr(weights, "name", weights))
    return {
        "data": os.path.abspath(root),
        "model": MobileNetV2.__name__ if model is None else type(model).__name__,
        "weights": of,
        "preprocessing": None if preprocessing is None else preprocessing.to_dict(),
    }


def _resumed(run: Run | None, args: Mapping[str, Any], options: Mapping[str, Any]) -> Recipe:
    """The recipe of a run that goes on: its own, with such `options` as may be others.

    Raises:
        UserError: other ones, or `args`, are not as the run has them.
    """
    if run is None:
        raise UserError("resume needs the run's folder: give it as out")
    then = run.args()
    before = Recipe.of({option.name: then[option.name] for option in OPTIONS if option.name in then})
    given = {name: value for name, value in options.items() if (name, value) != ("amp", "auto")}
    recipe = replace(before, **given)
    now, was = {**args, **recipe.to_dict()}, {**then, **before.to_dict()}
    fixed = [*args, *(option.name for option in OPTIONS if not option.free)]
    differ = [
        f"{name} is {now[name]!r}, not {was.get(name)!r}" for name in fixed if now[name] != was.get(name)
    ]
    if differ:
        raise UserError(
            f"{run.folder} began with other arguments: {'; '.join(differ)}: give the same ones, or another "
            "folder"
        )
    return recipe


def _check(
    recipe: Recipe,
    folder: LabelledFolder,
    run: Run | None,
    group: Group,
    device: torch.device,
    *,
    overwrite: bool,
) -> None:
    """Refuse before the work what cannot end well.

    Raises:
        UserError: as said there.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(device)!r}: torch finds no GPU here, use cpu")
    if group.world > 1 and device.type != "cpu":
        raise UserError(f"device={str(device)!r}: several processes train on the CPU only, use cpu")
    count, most = len(folder.train), len(folder.train) // group.world
    if recipe.batch_size > most:
        processes = f" of {group.world} processes" if group.world > 1 else ""
        raise UserError(
            f"batch_size={recipe.batch_size}{processes} for {count} photos to train on: use at most {most}"
        )
    if recipe.tensorboard:
        if run is None:
            raise UserError("tensorboard needs a run folder: give out")
        summary_writer()
    if run is not None:
        group.on_first(lambda: run.check_free(overwrite))


def _network(
    model: nn.Module | None,
    weights: Any,
    recipe: Recipe,
    classes: Sequence[str],
    say: Callable[[str], None],
) -> nn.Module:
    """What to train.

    Raises:
        UserError: weights are not to be had, or the model's outputs are not one a class.
    """
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = MobileNetV2(len(classes)) if weights is None else _reheaded(weights, classes, say)
    head = optim.head_of(model)
    if head is not None and head.out_features != len(classes):
        raise UserError(
            f"the model has {head.out_features} outputs for {len(classes)} classes: replace its last layer "
            f"first, as by model.classifier[-1] = torch.nn.Linear({head.in_features}, {len(classes)})"
        )
    if head is None and recipe.freeze_epochs:
        raise UserError("freeze_epochs trains the last linear layer alone, and the model has none: use 0")
    if recipe.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = recipe.dropout
    return model


def _settled(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe with the arithmetic that it leaves open, so that a run goes on with it on any machine."""
    if recipe.amp != "auto":
        return recipe
    try:
        if isinstance(model, MobileNetV2):
            model.decline_backend()
            return replace(recipe, amp="bf16" if cpu_train.prefers_bfloat16() else "none")
    except Declined:  # torch trains it
        pass
    return replace(recipe, amp="none")


def _preprocessing(model: nn.Module, given: Preprocessing | None, size: int | None) -> Preprocessing:
    """Of the photos: as given, else the model's, at `size` pixels where that is not None."""
    found = given or getattr(model, "preprocessing", None) or Preprocessing()
    if size is None:
        return found
    return replace(found, crop=size, resize=max(size, round(found.resize * size / found.crop)))


def _train_size(recipe: Recipe, preprocessing: Preprocessing) -> int:
    """Height and width of what is trained on.

    Raises:
        UserError: photos are not that large.
    """
    size = recipe.train_size or preprocessing.crop
    if size > preprocessing.resize:
        raise UserError(
            f"train_size={size} for photos of {preprocessing.resize} pixels: use at most that, or raise "
            "image_size"
        )
    return size


def _reheaded(weights: Any, classes: Sequence[str], say: Callable[[str], None]) -> MobileNetV2:
    """The network of some weights, with a new classifier unless it is for the same classes."""
    model = mobilenet_v2(weights)
    head = optim.head_of(model)
    assert head is not None
    if model.labels == list(classes) or (model.labels is None and head.out_features == len(classes)):
        say(f"{weights}: its classifier is for these {len(classes)} classes and is kept")
        return model
    say(
        f"{weights}: its classifier of {head.out_features} classes is replaced by a new one of {len(classes)}"
    )
    fresh = nn.Linear(head.in_features, len(classes))
    nn.init.normal_(fresh.weight, 0, 0.01)
    nn.init.zeros_(fresh.bias)
    model.classifier[-1] = fresh
    return model


def _check_memory(model: nn.Module, batch: int, size: int) -> None:
    """Refuse a batch whose convolutions' outputs, which backward needs, exceed the memory there is.

    Linux would end the process in the first step instead.

    Raises:
        UserError: it does not fit.
    """
    if not isinstance(model, MobileNetV2):
        return
    try:
        specs = [link.spec for link, _ in model.eval().read().parts]  # in train mode it tells nothing
    except Declined:
        return
    need = (
        4
        * batch
        * sum(layer.ho * layer.wo * layer.spec.cout for layer in arch.layers(size=size, specs=specs))
    )
    if not machine.fits_memory(need):
        have = machine.available_memory() or 0
        raise UserError(
            f"batch_size={batch} at {size} x {size} pixels needs more than {need / 1e9:.1f} GB, "
            f"{have / 1e9:.1f} GB are left: lower batch_size, and raise accumulate for steps as large"
        )


def _loaders(
    folder: LabelledFolder, preprocessing: Preprocessing, recipe: Recipe, group: Group
) -> tuple[Loader, Loader]:
    with warnings.catch_warnings():
        if not group.first:  # all would say the same of the cache
            warnings.simplefilter("ignore")
        return loading.make_loaders(
            folder,
            preprocessing,
            recipe.batch_size,
            transform=loading.augmentation(
                replace(preprocessing, crop=_train_size(recipe, preprocessing)),
                recipe.augment,
                (recipe.crop_scale, 1.0),
            ),
            seed=recipe.seed,
            cache_folder=recipe.cache,
            cache_bytes=round(recipe.cache_gb * 1e9),
            workers=recipe.workers,
            drop_last=True,
            rank=group.rank,
            world=group.world,
        )


def _identity(folder: LabelledFolder, group: Group) -> dict[str, Any]:
    """What has to be the same for the numbers of photos and processes to mean the same."""
    return {"photos": folder.digest(), "world": group.world}


def _check_state(state: Mapping[str, Any], folder: LabelledFolder, group: Group) -> None:
    """Raises UserError where a checkpoint is of other photos or another number of processes."""
    now, then = _identity(folder, group), state["identity"]
    if now["photos"] != then["photos"]:
        raise group.error(
            f"the photos in {folder.root} are not those of the run: put back what it began with"
        )
    if now["world"] != then["world"]:
        raise group.error(f"the run had {then['world']} processes, not {now['world']}: start as many")


@contextlib.contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch's within; None: as it is."""
    before = torch.get_num_threads()
    if count is not None:
        machine.warn_of_threads(count)
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

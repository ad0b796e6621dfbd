"""Training on a labelled folder of photos: `fit("photos/", out="run")`."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from . import distributed, loading, machine, optim, photos, plots, settle
from .distributed import Group
from .errors import UserError
from .evaluation import evaluate
from .loading import Loader
from .model import MobileNetV2, mobilenet_v2
from .photos import LabelledFolder
from .recipe import DEFAULT_WEIGHTS, OPTIONS, Recipe
from .reporting import Reporter, counting
from .runs import FINAL, LAST, Row, Run, check_storable, summary_writer, top1_of
from .trainer import Trainer
from .training import release_training_memory
from .weights import Preprocessing, infer_width


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
            others; None: random weights, which a `model` then has too: its learning rates are for that.
        preprocessing: of photos; by default that of the weights or the model.
        out: the run folder, see `runs`; None: nothing is written.
        resume: go on with the run in `out`, from its last checkpoint, for which `weights` are not read again.
            Options that are not given are as the run has them; the other arguments have to be the same.
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
    with distributed.joined() as group:
        say = partial(_say, shown=progress and group.first)
        args = _args(data, model, weights, preprocessing)
        device = machine.device(device)
        begin = partial(_begin, data, args, options, out, group, device, resume=resume)
        recipe, folder, run, state = group.together(begin)
        if run is not None:
            group.on_first(partial(run.check_free, overwrite or resume))
        with on_threads(recipe.threads):
            network = group.together(partial(_network, model, weights, recipe, folder.classes, state, say))
            network.to(device)
            group.copy(chain(network.parameters(), network.buffers()))
            seen = _preprocessing(network, preprocessing, recipe.image_size, state)
            if isinstance(network, MobileNetV2):
                network.labels, network.preprocessing = list(folder.classes), seen
            recipe = settle.settled(recipe, network, seen.crop, group, device, new=weights is None)

            def make() -> Trainer:
                _check_model(network, recipe, folder.classes, run)
                settle.check_batch(network, recipe, seen.resize, group.here)
                return Trainer(
                    network,
                    _loaders(folder, seen, recipe, group, shown=progress and group.first),
                    recipe,
                    preprocessing=seen,
                    group=group,
                    device=device,
                    run=run,
                    reporter=partial(Reporter, progress and group.first, recipe.epochs),
                    on_epoch_end=on_epoch_end,
                    identity=_identity(folder, group),
                )

            trainer = group.together(make)
            if state is not None:
                group.together(partial(trainer.load_state, state))
            elif run is not None:  # only now: what has failed so far leaves a run that was to be replaced
                group.on_first(partial(run.begin, {**args, **recipe.to_dict()}))
            try:
                trainer.train()
                if run is not None:
                    group.on_first(partial(_save_end, run, trainer, charts))
            finally:
                release_training_memory()
            return _result(trainer, folder, run)


class _Begin(NamedTuple):
    """What a training begins with; `state` of one that goes on."""

    recipe: Recipe
    folder: LabelledFolder
    run: Run | None
    state: dict[str, Any] | None


def _begin(  # noqa: PLR0917 (the arguments of `fit`)
    data: Any,
    args: Mapping[str, Any],
    options: Mapping[str, Any],
    out: str | os.PathLike[str] | None,
    group: Group,
    device: torch.device,
    *,
    resume: bool,
) -> _Begin:
    """Look at what was asked for, before the work.

    Raises:
        UserError: it cannot end well.
    """
    recipe, run, state = Recipe.of(options), None if out is None else Run(out), None
    if resume:
        recipe = _resumed(run, args, options)
    folder = data
    if not isinstance(folder, LabelledFolder):
        folder = photos.find(data, recipe.val_share, recipe.split_seed)
    elif folder.split is not None:
        share, seed = folder.split
        for name, value in (("val_share", share), ("split_seed", seed)):
            if options.get(name, value) != value:
                raise UserError(f"the photos are split by {name}={value} already: leave {name} out")
        recipe = replace(recipe, val_share=share, split_seed=seed)
    _check(recipe, folder, run, group, device)
    if resume and run is not None:
        state = run.state()
        _check_state(state, folder, group)
    return _Begin(recipe, folder, run, state)


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
    except Exception as error:  # whatever it is: the network is trained and saved
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
    chosen_by_fit = {option.name: option.default for option in OPTIONS if option.open}
    given = {name: v for name, v in options.items() if name not in chosen_by_fit or v != chosen_by_fit[name]}
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
    recipe: Recipe, folder: LabelledFolder, run: Run | None, group: Group, device: torch.device
) -> None:
    """Refuse before the work what cannot end well.

    Raises:
        UserError: as said there.
    """
    folder.refuse_within(out=None if run is None else run.folder, cache=recipe.cache)
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


def _network(  # noqa: PLR0917 (the arguments of `fit`)
    model: nn.Module | None,
    weights: Any,
    recipe: Recipe,
    classes: Sequence[str],
    state: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> nn.Module:
    """What to train. One that goes on has its weights in `state`, and asks for no others.

    Raises:
        UserError: weights are not to be had.
    """
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            if state is not None:
                model = MobileNetV2(len(classes), infer_width(state["model"], LAST))
            elif weights is None:
                model = MobileNetV2(len(classes))
            else:
                model = _reheaded(weights, classes, say)
    if recipe.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = recipe.dropout
    return model


def _check_model(model: nn.Module, recipe: Recipe, classes: Sequence[str], run: Run | None) -> None:
    """Refuse a model that cannot be trained so, or not be saved.

    Raises:
        UserError: as said there.
    """
    head = optim.head_of(model)
    if head is not None and head.out_features != len(classes):
        raise UserError(
            f"the model has {head.out_features} outputs for {len(classes)} classes: replace its last layer "
            f"first, as by model.classifier[-1] = torch.nn.Linear({head.in_features}, {len(classes)})"
        )
    if head is None and recipe.freeze_epochs:
        raise UserError("freeze_epochs trains the last linear layer alone, and the model has none: use 0")
    for part, what in ((model, "the model"), (head if recipe.freeze_epochs else None, "its last layer")):
        if part is not None and not any(parameter.requires_grad for parameter in part.parameters()):
            raise UserError(f"no parameter of {what} asks for a gradient: call requires_grad_() on some")
    if run is not None:
        check_storable(model)


def _preprocessing(
    model: nn.Module, given: Preprocessing | None, size: int | None, state: Mapping[str, Any] | None
) -> Preprocessing:
    """Of the photos: that of a run that goes on, as given, else the model's; at `size` pixels if not None."""
    if state is not None:
        return Preprocessing.from_dict(state["preprocessing"])
    found = given or getattr(model, "preprocessing", None) or Preprocessing()
    if size is None:
        return found
    return replace(found, crop=size, resize=max(size, round(found.resize * size / found.crop)))


def _reheaded(weights: Any, classes: Sequence[str], say: Callable[[str], None]) -> MobileNetV2:
    """The network of some weights, with a new classifier unless it is for the same classes."""
    model = mobilenet_v2(weights)
    head = optim.head_of(model)
    assert head is not None
    if model.labels == list(classes):
        say(f"{weights}: its classifier is for these {len(classes)} classes and is kept")
        return model
    if model.labels is None and head.out_features == len(classes):
        say(
            f"{weights}: its classifier has {len(classes)} outputs, as many as there are classes, and is kept"
        )
        return model
    say(
        f"{weights}: its classifier of {head.out_features} classes is replaced by a new one of {len(classes)}"
    )
    model.classifier[-1] = optim.new_head(head, len(classes))
    return model


def _loaders(
    folder: LabelledFolder, preprocessing: Preprocessing, recipe: Recipe, group: Group, *, shown: bool
) -> tuple[Loader, Loader]:
    assert recipe.train_size is not None
    with warnings.catch_warnings():
        if not group.first:  # all would say the same of the cache
            warnings.simplefilter("ignore")
        return loading.make_loaders(
            folder,
            preprocessing,
            recipe.batch_size,
            transform=loading.augmentation(
                replace(preprocessing, crop=recipe.train_size),
                recipe.augment,
                (recipe.crop_scale, 1.0),
            ),
            seed=recipe.seed,
            cache_folder=recipe.cache,
            cache_bytes=round(recipe.cache_gb * 1e9),
            workers=loading.default_workers(group.here) if recipe.workers is None else recipe.workers,
            drop_last=True,
            rank=group.rank,
            world=group.world,
            progress=counting("photos decoded", shown),
        )


def _identity(folder: LabelledFolder, group: Group) -> dict[str, Any]:
    """What has to be the same for the numbers of photos and processes to mean the same."""
    return {"photos": folder.digest(), "world": group.world}


def _check_state(state: Mapping[str, Any], folder: LabelledFolder, group: Group) -> None:
    """Raises UserError where a checkpoint is of other photos or another number of processes."""
    now, then = _identity(folder, group), state["identity"]
    if now["photos"] != then["photos"]:
        raise UserError(f"the photos in {folder.root} are not those of the run: put back what it began with")
    if now["world"] != then["world"]:
        raise UserError(f"the run had {then['world']} processes, not {now['world']}: start as many")


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

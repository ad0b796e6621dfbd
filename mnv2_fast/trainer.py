"""The training loop: epochs of steps, validation, checkpoints, and stopping anywhere between two steps.

Everything random follows from the seed and where it is needed: order and augmentation as `loading` has it,
dropout and mixing from (seed, step, process). So no state of a generator is kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import loading, optim
from .distributed import Group, LostError
from .errors import Interrupted, UserError
from .loading import Batch, Loader, random_seed, worker_errors
from .recipe import Recipe
from .reporting import Reporter
from .runs import BEST, LAST, Row, Run, top1_of
from .stopping import Stop
from .weights import Preprocessing

LONE_VALUE = (
    "batch norms find one value a channel, which has no variance: raise batch_size or image_size, or use "
    "freeze_bn"
)


@dataclass
class Sums:
    """Of the photos of an epoch so far, in all processes; `seconds` is the time that training them took."""

    loss: float = 0.0
    correct: float = 0.0
    photos: float = 0.0
    seconds: float = 0.0


@dataclass
class Progress:
    """How far a training is; all of it is in a checkpoint.

    epoch: epochs done. batch: batches done of the next one. step: steps of the optimizer. lr: the last one's
    learning rate. best_epoch: counted from 1.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    lr: float = 0.0
    sums: Sums = field(default_factory=Sums)
    best_top1: float = -1.0
    best_epoch: int = 0
    history: list[Row] = field(default_factory=list)


class Trainer:
    """Trains a model; `result` are its averaged weights, or itself where none are kept.

    Args:
        model: on `device`.
        loaders: of training and validation photos.
        recipe: how to train, nothing left open.
        preprocessing: of the photos, for checkpoints.
        group: the processes that train together.
        run: where to save; None: nowhere.
        reporter: makes what says how far it is, of the batches of an epoch and those done before.
        on_epoch_end: called with each row of the history.
        identity: kept with checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        loaders: tuple[Loader, Loader],
        recipe: Recipe,
        *,
        preprocessing: Preprocessing,
        group: Group,
        device: torch.device,
        run: Run | None,
        reporter: Callable[[int, int], Reporter],
        on_epoch_end: Callable[[Row], object] | None,
        identity: dict[str, Any],
    ) -> None:
        self.model, self.recipe, self.preprocessing = model, recipe, preprocessing
        self.train_loader, self.val_loader = loaders
        self.group, self.device, self.run = group, device, run
        self.on_epoch_end, self.identity = on_epoch_end, identity
        self.progress = Progress()
        self.classes = self.train_loader.dataset.classes
        self.batches = self.train_loader.sampler.batches
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optim.make_optimizer(model, recipe)
        self.schedule = optim.make_schedule(self.optimizer, recipe, -(-self.batches // recipe.accumulate))
        self.average = optim.make_average(model, recipe.ema)
        labels = torch.tensor([photo.label for photo in self.train_loader.dataset.photos])
        counts = labels.bincount(minlength=len(self.classes)).tolist()
        self.loss = optim.make_loss(recipe, counts).to(device)
        self.mixing = optim.make_mixing(recipe, len(self.classes))
        self._make_reporter = reporter
        self._skipped: set[str] = set()  # in all processes, and before the training was resumed
        self._named: set[str] = set()  # at first by the loaders, while there was nobody to ask
        if group.world > 1:
            for loader in loaders:
                loader.dataset.says = False
                self._named |= {os.path.abspath(path) for path in loader.dataset.skipped}
        self._stop = Stop()

    @property
    def result(self) -> nn.Module:
        """What training is for, in eval mode."""
        return self.model.eval() if self.average is None else self.average.module

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or early stopping has ended it."""
        done, patience = self.progress, self.recipe.patience
        early = patience is not None and done.epoch - done.best_epoch >= patience
        return done.epoch >= self.recipe.epochs or early

    def state(self) -> dict[str, Any]:
        """All that `load_state` needs to go on to the bit."""
        return {
            "identity": self.identity,
            "preprocessing": self.preprocessing.to_dict(),
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "skipped": sorted(self._skipped),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up where `state` was saved.

        Raises:
            UserError: it is of another model, or of other parameters that are trained.
        """
        found = dict(state["progress"])
        self.progress = Progress(**{**found, "sums": Sums(**found["sums"])})
        try:
            self.model.load_state_dict(state["model"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            differs = str(error).splitlines()[-1].strip()
            raise UserError(
                f"the run is of another model, or trains other parameters of it ({differs}): give the model "
                "that it began with, or another folder"
            ) from error
        self.schedule.load_state_dict(state["schedule"])
        self._skipped = set(state["skipped"])

    def train(self) -> None:
        """Train to the end.

        Raises:
            UserError: a loss is not finite, memory or disk is full, a class has no usable photo, a process
                that makes batches or another one that trains is gone.
            Interrupted: by Ctrl-C or SIGTERM, after saving.
        """
        done = self.progress.epoch * self.batches + self.progress.batch
        self.reporter = self._make_reporter(self.batches, done)
        with (
            worker_errors(),
            self._stop.listening(),
            contextlib.closing(self.reporter),
            self.reporter.warnings_above(),
        ):
            try:
                while not self.finished:
                    self._epoch()
            except LostError:
                self._save_alone()
                if self._stop.asked:  # the signal has ended the other process first
                    self._interrupt()
                raise
            finally:
                optim.set_trainable(self.model, self.trainable, head_only=False)

    def _epoch(self) -> None:
        done = self.progress
        self._train_epoch()
        begin = time.perf_counter()
        found = self._validate()
        self._skip_as_others()
        sums = done.sums
        row: Row = {
            "epoch": done.epoch + 1,
            "step": done.step,
            "lr": done.lr,
            "train_loss": sums.loss / sums.photos,
            "train_top1": sums.correct / sums.photos,
            **found,
            "skipped": len(self._skipped),
            "images_per_second": sums.photos / sums.seconds,
            "seconds": sums.seconds + time.perf_counter() - begin,
        }
        done.epoch, done.batch, done.sums = done.epoch + 1, 0, Sums()
        done.history.append(row)
        self._end_epoch(row)
        self.reporter.epoch(row)
        if self.on_epoch_end is not None:
            self.group.together(partial(self.on_epoch_end, row))
        if self.group.sum([self._stop.asked])[0]:
            self._interrupt()

    def _end_epoch(self, row: Row) -> None:
        """Take note of the best epoch, and write what belongs to an epoch."""
        done, run = self.progress, self.run
        top1 = top1_of(row)
        better = top1 > done.best_top1
        if better:
            done.best_top1, done.best_epoch = top1, done.epoch
        if run is None:
            return

        def write() -> None:
            if better:
                run.save_weights(BEST, self.result, self.classes, self.preprocessing)
            run.save_results(done.history)
            run.save_state(self.state())
            if self.recipe.tensorboard:
                run.log(row)

        self.group.on_first(write)

    def _train_epoch(self) -> None:
        done, recipe = self.progress, self.recipe
        head_only = done.epoch < recipe.freeze_epochs
        optim.set_trainable(self.model, self.trainable, head_only=head_only)
        optim.set_mode(self.model, freeze_bn=recipe.freeze_bn, head_only=head_only)
        batches = self.train_loader.epoch(done.epoch, done.batch)
        while done.batch < self.batches:
            begin = time.perf_counter()
            count = min(recipe.accumulate, self.batches - done.batch)
            try:
                with _whole_or_undone(self.model):
                    found = self.group.together(partial(self._gradients, batches, count))
                    self.group.average_gradients(self.trainable)
                    stop = self._step(found)
            except _WorkerEndedError:
                self._stop_here()
            done.batch += count
            sums = done.sums
            sums.seconds += time.perf_counter() - begin
            self.reporter.batch(
                done.epoch + 1,
                done.batch,
                sums.loss / sums.photos,
                sums.correct / sums.photos,
                sums.photos / sums.seconds,
            )
            if stop:
                self._stop_here()

    def _gradients(self, batches: Iterator[Batch], count: int) -> Sums | None:
        """Leave the gradients of the mean loss of `count` batches; the sums over this process's photos.

        None where there are no batches, since a signal has ended the worker that makes them.
        """
        self.optimizer.zero_grad()
        try:
            found = list(islice(batches, count))
        except RuntimeError:
            if not self._stop.asked:
                raise
            return None
        sums = Sums()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed(self.recipe.seed, self.progress.step, self.group.rank))
            for batch in found:
                with _mistakes(batch):
                    loss, correct = self._loss(batch)
                    (loss / count).backward()
                sums.loss += loss.item() * len(batch.labels)
                sums.correct += correct
                sums.photos += len(batch.labels)
        return sums

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The mean loss of a batch, and of how many photos the label that weighs most was found."""
        images, labels = batch.images.to(self.device), batch.labels.to(self.device)
        if self.mixing is not None:
            images, labels = self.mixing(images, labels)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp == "bf16"):
            logits = self.model(images)
        correct = logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
        return self.loss(logits.float(), labels), int(correct.sum())

    def _step(self, found: Sums | None) -> bool:
        """A step on the gradients that are there. Returns whether the user wants to stop after it.

        Raises:
            _WorkerEndedError: a process had no batches, so that there was no step.
        """
        done, recipe = self.progress, self.recipe
        mine = found or Sums()
        loss, correct, photos, stop, ended = self.group.sum(
            [mine.loss, mine.correct, mine.photos, self._stop.asked, found is None]
        )
        if ended:
            raise _WorkerEndedError
        done.lr = self.optimizer.param_groups[0]["lr"]
        norm = nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        self._check_finite("loss", loss, done.step + 1)
        self._check_finite("gradient", norm.item(), done.step + 1)
        if recipe.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.trainable, recipe.clip_grad, norm)
        self.optimizer.step()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        sums = done.sums
        sums.loss, sums.correct, sums.photos = sums.loss + loss, sums.correct + correct, sums.photos + photos
        done.step += 1
        return stop > 0

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Loss and top-1 on the validation photos, of the weights as trained and of the averaged ones."""
        models = {"val": self.model.eval()}
        if self.average is not None:
            models["ema_val"] = self.average.module
        for model in models.values():
            self.group.copy(model.buffers())
        photos, ended, *found = self.group.sum(
            self.group.together(partial(self._judge, list(models.values())))
        )
        if ended:
            self._stop_here()
        if not photos:
            raise self.group.error("none of the photos to validate on can be used: give others")
        row = {}
        for i, name in enumerate(models):
            row[f"{name}_loss"], row[f"{name}_top1"] = found[2 * i] / photos, found[2 * i + 1] / photos
            self._check_finite("validation loss", row[f"{name}_loss"], self.progress.step)
        return row

    def _judge(self, models: Sequence[nn.Module]) -> list[float]:
        """How many photos, whether a signal has ended it, and the loss and the hits of each model in sum."""
        sums = [0.0] * (2 + 2 * len(models))
        try:
            for batch in self.val_loader.epoch():
                if self._stop.asked:
                    sums[1] = 1
                    break
                images, labels = batch.images.to(self.device), batch.labels.to(self.device)
                sums[0] += len(labels)
                for i, model in enumerate(models):
                    with _mistakes(batch):
                        logits = model(images)
                    sums[2 + 2 * i] += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                    sums[3 + 2 * i] += int((logits.argmax(1) == labels).sum())
        except RuntimeError:
            if not self._stop.asked:
                raise
            sums[1] = 1
        return sums

    def _note_skipped(self) -> dict[str, str]:
        """What any process has found unusable, and why; the first process names it, once."""
        # Absolute: a training that is resumed may be given its folder by another path.
        mine = {
            os.path.abspath(path): why
            for loader in (self.train_loader, self.val_loader)
            for path, why in loader.dataset.skipped.items()
        }
        everyones = {path: why for skipped in self.group.gather(mine) for path, why in skipped.items()}
        if self.group.world > 1 and self.group.first:
            for path in sorted(everyones.keys() - self._named):
                loading.warn_of(everyones[path])
        self._named |= everyones.keys()
        self._skipped |= everyones.keys()
        return everyones

    def _skip_as_others(self) -> None:
        """Leave out what any process has found unusable."""
        everyones = self._note_skipped()
        if self.group.world > 1:
            for loader in (self.train_loader, self.val_loader):
                self.group.together(partial(loader.dataset.skip_as_others, everyones))

    def _check_finite(self, what: str, value: float, step: int) -> None:
        if math.isfinite(value):
            return
        done = self.progress
        kept = ""
        if self.run is not None and (self.run.folder / LAST).exists():
            kept = f"; the last good checkpoint is kept in {self.run.folder}: give --out another folder"
        raise self.group.error(
            f"the {what} is {value:g} in epoch {done.epoch + 1}, step {step}, at a learning rate of "
            f"{done.lr:.3g}: begin anew with a lower lr, or bound gradients with clip_grad{kept}"
        )

    def _stop_here(self) -> NoReturn:
        """Save between two steps, and end; all processes together."""
        run = self.run
        self._note_skipped()
        if run is not None:
            self.group.on_first(lambda: run.save_state(self.state()))
        self._interrupt()

    def _save_alone(self) -> None:
        """Save what the last step left; the other processes are gone."""
        if self.run is not None and self.group.first:
            self.run.save_state(self.state())

    def _interrupt(self) -> NoReturn:
        done, run, epochs = self.progress, self.run, self.recipe.epochs
        how = "nothing is saved without a run folder"
        if run is not None and not run.command_knows():
            how = f"go on with fit(..., out={str(run.folder)!r}, resume=True)"
        elif run is not None:
            several = f"torchrun --nproc-per-node {self.group.here} -m mnv2_fast"
            command = "mnv2" if self.group.world == 1 else several
            how = f"go on with {command} finetune --resume --out {shlex.quote(str(run.folder))}"
        raise Interrupted(
            f"stopped after step {done.step} in epoch {min(done.epoch + 1, epochs)} of {epochs}, {how}"
            if self.group.first
            else "",
            self._stop.asked or signal.SIGTERM,  # asked of another process
        )


class _WorkerEndedError(Exception):
    """The signal by which the user wants to stop has ended a worker process of some loader."""


@contextlib.contextmanager
def _whole_or_undone(model: nn.Module) -> Iterator[None]:
    """A step within: where it is not made to its end, running statistics are as they were."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BaseException:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.detach().copy_(value)
        raise


@contextlib.contextmanager
def _mistakes(batch: Batch) -> Iterator[None]:
    """A batch that is too large for the memory, or too small for a batch norm, is a mistake of the user's."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        if "more than 1 value per channel" in str(error):
            raise UserError(LONE_VALUE) from error
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not known:
            raise
        raise UserError(
            f"no memory to train on {len(batch.labels)} photos at a time: lower batch_size, and raise "
            "accumulate for steps as large"
        ) from error

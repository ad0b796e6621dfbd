"""The options of a training, in one table.

`Recipe` alone rules the options of `mnv2 finetune`, the keywords of `fit`, what is in `args.yaml`, and what
has to be the same where a run is resumed.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .errors import UserError
from .machine import MAX_THREADS

DEFAULT_WEIGHTS = "IMAGENET1K_V1"
AUGMENTATIONS = ("crop", "flip", "rotation", "colour", "randaugment", "erasing")
# What an optimizer has where nothing is given. Learning rates are for 32 photos a step.
_LR = {"adamw": 3e-4, "sgd": 1e-2}
_LR_OF_NEW = {"adamw": 1e-3, "sgd": 1e-2}  # where all weights are random
_LR_PHOTOS = 32
_HEAD_LR_FACTOR, _HEAD_LR_FACTOR_OF_NEW = 10.0, 1.0
_WEIGHT_DECAY = {"adamw": 0.05, "sgd": 1e-4}

Check = Callable[[Any], Any]  # of a value or a word of the command line; ValueError with the cure


@dataclass(frozen=True)
class Number:
    """A number of `kind` within limits; with `above`, `least` itself is not among them."""

    kind: type[int] | type[float]
    least: float
    most: float = math.inf
    above: bool = False

    def __call__(self, value: Any) -> int | float:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = (
                self.kind(value) if isinstance(value, str) or self.kind is float else operator.index(value)
            )
        except (TypeError, ValueError):
            raise ValueError(self._cure) from None
        inside = self.least < number if self.above else self.least <= number
        if not inside or not number <= self.most or number == math.inf:
            raise ValueError(self._cure)
        return number

    @property
    def _cure(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        if self.most < math.inf:
            least = f"above {self.least:g} and at most" if self.above else f"from {self.least:g} to"
            most = f"{self.most:g}" if self.kind is float else str(self.most)
            return f"give {what} {least} {most}"
        return f"give {what} {'above' if self.above else 'of at least'} {self.least:g}"


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def __call__(self, value: Any) -> str:
        if value not in self.names:
            raise ValueError(f"give one of {', '.join(self.names)}")
        return str(value)


@dataclass(frozen=True)
class Several:
    """Some of some names, in their order; on the command line with commas, `none` for none."""

    names: tuple[str, ...]

    def __call__(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [] if value == "none" else value.split(",")
        if not isinstance(value, Iterable) or not set(value) <= set(self.names):
            raise ValueError(f"give some of {','.join(self.names)}, or none")
        return tuple(name for name in self.names if name in value)


def switch(value: Any) -> bool:
    """Yes or no."""
    if not isinstance(value, bool):
        raise ValueError("give True or False")
    return value


def folder(value: Any) -> str:
    """The path of a folder."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError("give the path of a folder")
    return os.fspath(value)


VAL_SHARE = Number(float, 0, 0.9, above=True)
_COUNT = Number(int, 1)
_SHARE = Number(float, 0, 1)


@dataclass(frozen=True)
class Option:
    """One field of `Recipe`.

    help: what it is; the default is added to it.
    check: makes a value of what was given, or raises ValueError with the cure. None passes where it is the
        default.
    section: of the help.
    free: may be another where a run is resumed, since it is of the machine. Of these only another number of
        threads changes weights, in their last bits.
    open: its default leaves the choice to `fit`, which makes it once for the whole run.
    """

    name: str
    default: Any
    help: str
    check: Check
    section: str
    free: bool
    open: bool

    @property
    def metavar(self) -> str:
        """What stands for a value in the help."""
        if isinstance(self.check, Choice):
            return "|".join(self.check.names)
        if isinstance(self.check, Number):
            return "N" if self.check.kind is int else "X"
        return "NAMES" if isinstance(self.check, Several) else "DIR"


def _option(
    default: Any, check: Check, text: str, section: str, *, free: bool = False, open: bool = False
) -> Any:
    metadata = {"help": text, "check": check, "section": section, "free": free, "open": open}
    return field(default=default, metadata=metadata)


def _by_optimizer(values: Mapping[str, float]) -> str:
    return ", ".join(f"{value:g} with {name}" for name, value in values.items())


_TRAINING, _PHOTOS, _MACHINE = "training", "photos and augmentation", "machine"


@dataclass(frozen=True)
class Recipe:
    """How to train. A value that makes no sense is a `UserError`."""

    epochs: int = _option(8, _COUNT, "times that every photo is seen", _TRAINING)
    batch_size: int = _option(32, _COUNT, "photos of one process at a time", _TRAINING)
    accumulate: int = _option(1, _COUNT, "batches whose gradients make one step", _TRAINING)
    optimizer: str = _option("adamw", Choice(("adamw", "sgd")), "what steps by the gradients", _TRAINING)
    lr: float | None = _option(
        None,
        Number(float, 0, above=True),
        f"peak learning rate; by default, for {_LR_PHOTOS} photos a step and in proportion to them, "
        f"{_by_optimizer(_LR)}, from random weights {_by_optimizer(_LR_OF_NEW)}",
        _TRAINING,
        open=True,
    )
    head_lr_factor: float | None = _option(
        None,
        Number(float, 0, above=True),
        f"the last layer learns as many times as fast; by default {_HEAD_LR_FACTOR:g}, from random weights "
        f"{_HEAD_LR_FACTOR_OF_NEW:g}",
        _TRAINING,
        open=True,
    )
    weight_decay: float | None = _option(
        None,
        Number(float, 0),
        f"of weights, by default {_by_optimizer(_WEIGHT_DECAY)}; norms and biases have none",
        _TRAINING,
        open=True,
    )
    momentum: float = _option(0.9, Number(float, 0, 1), "of sgd, with Nesterov's form", _TRAINING)
    warmup_epochs: float = _option(
        1.0, Number(float, 0), "in which the learning rate rises; then it falls to 0 as a cosine", _TRAINING
    )
    label_smoothing: float = _option(0.1, _SHARE, "share of a label given to all classes", _TRAINING)
    class_weights: str = _option(
        "none", Choice(("none", "balanced")), "balanced: photos of rare classes weigh more", _TRAINING
    )
    ema: float = _option(
        0.99,
        _SHARE,
        "decay of the averaged weights, which are the result; 0: the last weights are",
        _TRAINING,
    )
    freeze_epochs: int = _option(0, Number(int, 0), "first epochs that train the last layer only", _TRAINING)
    freeze_bn: bool = _option(False, switch, "batch norms keep their running statistics", _TRAINING)
    dropout: float | None = _option(None, _SHARE, "instead of the model's own", _TRAINING)
    clip_grad: float | None = _option(
        None, Number(float, 0, above=True), "largest norm of the gradient; by default any", _TRAINING
    )
    patience: int | None = _option(
        None, _COUNT, "stop after as many epochs without a better top-1; by default never", _TRAINING
    )
    amp: str = _option(
        "auto",
        Choice(("auto", "bf16", "none")),
        "bf16: train under autocast to it; auto: if the network is a MobileNetV2 and the processor "
        "multiplies bf16 fast (Intel with AMX, AMD from Zen 4 on)",
        _TRAINING,
        open=True,
    )
    seed: int = _option(0, Number(int, 0, 2**63 - 1), "of everything random but the split", _TRAINING)

    image_size: int | None = _option(
        None, _COUNT, "height and width; by default what the weights were trained on", _PHOTOS
    )
    train_size: int | None = _option(
        None,
        _COUNT,
        "height and width in training; by default for a MobileNetV2 trained on crops 6/7 of validation's, in "
        "whole 32, else the same. Crops enlarge what is on a photo, so that fewer pixels answer as well "
        "(arXiv:1906.06423)",
        _PHOTOS,
        open=True,
    )
    val_share: float = _option(0.2, VAL_SHARE, "of photos without train/ and val/ to validate on", _PHOTOS)
    split_seed: int = _option(0, Number(int, 0), "which ones those are", _PHOTOS)
    augment: tuple[str, ...] = _option(
        ("crop", "flip", "rotation", "colour"),
        Several(AUGMENTATIONS),
        f"some of {','.join(AUGMENTATIONS)}, or none",
        _PHOTOS,
    )
    crop_scale: float = _option(
        0.2, Number(float, 0, 1, above=True), "least share of a photo's area in a crop", _PHOTOS
    )
    mixup: float = _option(
        0.0, Number(float, 0), "blend pairs of photos, shares from Beta(X, X); 0: do not", _PHOTOS
    )
    cutmix: float = _option(
        0.0, Number(float, 0), "paste pairs of photos, shares from Beta(X, X); 0: do not", _PHOTOS
    )

    workers: int | None = _option(
        None, Number(int, 0), "processes that make batches; by default one for two cores", _MACHINE, free=True
    )
    threads: int | None = _option(
        None,
        Number(int, 1, MAX_THREADS),
        "of the network; torch's number by default",
        _MACHINE,
        free=True,
    )
    cache: str | None = _option(
        None, folder, "where to keep decoded photos; by default nowhere", _MACHINE, free=True
    )
    cache_gb: float = _option(
        4.0, Number(float, 0, above=True), "of decoded photos at most", _MACHINE, free=True
    )
    tensorboard: bool = _option(False, switch, "write for TensorBoard, too", _MACHINE, free=True)

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if value is None and option.default is None:
                continue
            try:
                object.__setattr__(self, option.name, option.check(value))
            except ValueError as error:
                raise UserError(f"{option.name}={value!r}: {error}") from None
        for name in ("warmup_epochs", "freeze_epochs"):
            if getattr(self, name) > self.epochs:
                raise UserError(f"{name}={getattr(self, name):g} is more than epochs={self.epochs}: lower it")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Recipe:
        """The recipe with these options, by name.

        Raises:
            UserError: one is unknown, or has a value that makes no sense.
        """
        known = [option.name for option in OPTIONS]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1) or known
                raise UserError(f"there is no option {name!r}: use {', '.join(near)}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """The options, ready for YAML."""
        values = {option.name: getattr(self, option.name) for option in OPTIONS}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def with_rates(self, photos: int, *, new: bool = False) -> Recipe:
        """With numbers for `lr`, `head_lr_factor` and `weight_decay`, where it leaves them open.

        Args:
            photos: that a step sees.
            new: whether all weights are random.
        """
        rate, factor = (_LR_OF_NEW, _HEAD_LR_FACTOR_OF_NEW) if new else (_LR, _HEAD_LR_FACTOR)
        usual: dict[str, Any] = {
            "lr": rate[self.optimizer] * photos / _LR_PHOTOS,
            "head_lr_factor": factor,
            "weight_decay": _WEIGHT_DECAY[self.optimizer],
        }
        return replace(self, **{name: v for name, v in usual.items() if getattr(self, name) is None})


OPTIONS = tuple(Option(f.name, f.default, **f.metadata) for f in fields(Recipe))

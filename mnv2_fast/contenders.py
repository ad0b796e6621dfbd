"""Who takes part in a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from . import lenet
from .errors import UserError
from .recipe import Recipe
from .weights import Preprocessing


@dataclass(frozen=True)
class Network:
    """An architecture.

    make: from the number of classes; None: the MobileNetV2 that `fit` makes. preprocessing: of its photos;
    None: that of the weights. options: of its `Recipe`.
    """

    title: str
    make: Callable[[int], nn.Module] | None = None
    preprocessing: Preprocessing | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


# A step on one thread takes 6 ms; two that wait for each other take longer wherever a core is busy.
LENET = Network("LeNet-5", lenet.LeNet5, lenet.PREPROCESSING, {"threads": 1})
MOBILENET = Network("MobileNetV2")


@dataclass(frozen=True)
class Contender:
    """A network and how it is trained.

    name: on the command line and of its folders. augment: as `Recipe` has it. pretrained: it begins with
    weights, and its head learns faster than the rest. ablation: it shows what one augmentation does, no more.
    """

    name: str
    title: str
    network: Network
    augment: tuple[str, ...]
    pretrained: bool = False
    ablation: bool = False


AUGMENT = ("crop", "flip", "rotation", "colour", "erasing")
USUAL = Recipe().augment
PLAIN, AUGMENTED = "lenet", "lenet-augmented"

CONTENDERS: tuple[Contender, ...] = (
    Contender(PLAIN, "LeNet-5", LENET, ()),
    Contender(AUGMENTED, "LeNet-5 with augmentation", LENET, AUGMENT),
    Contender("mobilenetv2-scratch", "MobileNetV2 from scratch", MOBILENET, USUAL),
    Contender("mobilenetv2-finetuned", "MobileNetV2 fine-tuned", MOBILENET, USUAL, pretrained=True),
    *(
        Contender(f"lenet-with-{name}", f"LeNet-5 with {name}", LENET, (name,), ablation=True)
        for name in AUGMENT
    ),
    *(
        Contender(
            f"lenet-without-{name}",
            f"LeNet-5 with all but {name}",
            LENET,
            tuple(other for other in AUGMENT if other != name),
            ablation=True,
        )
        for name in AUGMENT
    ),
)


def choose(patterns: Sequence[str]) -> tuple[Contender, ...]:
    """The contenders whose names match one of some patterns (`lenet*`); all of them without any.

    Raises:
        UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(contender.name, pattern) for contender in CONTENDERS):
            names = ", ".join(contender.name for contender in CONTENDERS)
            raise UserError(f"no contender is called {pattern!r}: use {names}")
    wanted = patterns or ["*"]
    return tuple(c for c in CONTENDERS if any(fnmatchcase(c.name, pattern) for pattern in wanted))

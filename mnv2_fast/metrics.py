"""How good answers are: what an evaluation holds, and the figures that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError

BINS = 15  # of the calibration error, as in Guo et al.


class ClassScore(NamedTuple):
    """Of one class, shares from 0 to 1.

    precision: of the photos taken for it, those that are; NaN where none is taken for it. recall: of its
    photos, those taken for it; NaN where it has none. f1: harmonic mean of the two, 2 TP / (2 TP + FP + FN);
    NaN where the class has no photo and none is taken for it. support: its photos.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class Bin(NamedTuple):
    """The answers whose score is above `low` and at most `high`: how many, their mean score, share right.

    The two means are NaN where there are none.
    """

    low: float
    high: float
    photos: int
    confidence: float
    accuracy: float


class Confusion(NamedTuple):
    """How many photos of a class are taken for another one."""

    true: str
    predicted: str
    photos: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network answered on labelled photos.

    Args:
        classes: C names.
        targets: int64 [N], the number of each photo's class. N is at least 1.
        probabilities: float64 [N, C], rows that sum to 1.
        paths: of the N photos, where they have any.
        skipped: photos that could not be used and are not among the N.

    Raises:
        UserError: there are no photos.
        ValueError: the shapes do not belong together.
    """

    classes: tuple[str, ...]
    targets: Tensor
    probabilities: Tensor
    paths: tuple[Path, ...] = ()
    skipped: int = 0

    def __post_init__(self) -> None:
        n, c = len(self.targets), len(self.classes)
        if self.targets.shape != (n,) or self.probabilities.shape != (n, c):
            raise ValueError(
                f"targets {list(self.targets.shape)} and probabilities {list(self.probabilities.shape)} "
                f"are not [N] and [N, {c}]"
            )
        if self.paths and len(self.paths) != n:
            raise ValueError(f"{len(self.paths)} paths for {n} photos")
        if not n:
            raise UserError("there is no photo to evaluate on: give some that can be read")

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def predicted(self) -> Tensor:
        """int64 [N], the class with the highest probability, the first of equal ones."""
        return self.probabilities.argmax(1)

    @cached_property
    def scores(self) -> Tensor:
        """float64 [N], the probability of the predicted class."""
        return self.probabilities.amax(1)

    @property
    def right(self) -> Tensor:
        """bool [N], whether the predicted class is the photo's."""
        return self.predicted == self.targets

    @property
    def top1(self) -> float:
        """Share of photos whose class comes first."""
        return self.right.double().mean().item()

    def top_k(self, k: int) -> float:
        """Share of photos whose class is among the first k."""
        best = self.probabilities.topk(min(k, len(self.classes)), 1).indices
        return (best == self.targets[:, None]).any(1).double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats. A probability that has become 0 counts as the least float64 (708)."""
        of_target = self.probabilities.gather(1, self.targets[:, None])
        return -of_target.clamp(min=torch.finfo(of_target.dtype).tiny).log().mean().item()

    @cached_property
    def confusion(self) -> Tensor:
        """int64 [C, C]: entry [i, j] counts the photos of class i that are taken for class j."""
        c = len(self.classes)
        return torch.bincount(self.targets * c + self.predicted, minlength=c * c).view(c, c)

    def per_class(self) -> list[ClassScore]:
        """Precision, recall, F1 and support of each class, in the order of `classes`."""
        hits = self.confusion.diag().tolist()
        taken, support = self.confusion.sum(0).tolist(), self.confusion.sum(1).tolist()
        return [
            ClassScore(name, _share(hit, of), _share(hit, own), _share(2 * hit, of + own), own)
            for name, hit, of, own in zip(self.classes, hits, taken, support, strict=True)
        ]

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have photos: each counts the same, however many it has."""
        recalls = [score.recall for score in self.per_class() if score.support]
        return math.fsum(recalls) / len(recalls)

    def reliability(self, bins: int = BINS) -> list[Bin]:
        """Answers by their score, in bins of equal width over (0, 1]."""
        edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        numbers = torch.bucketize(self.scores, edges[1:-1])
        found = []
        for i in range(bins):
            inside = numbers == i
            count = int(inside.sum())
            confidence = self.scores[inside].mean().item() if count else math.nan
            accuracy = self.right[inside].double().mean().item() if count else math.nan
            found.append(Bin(edges[i].item(), edges[i + 1].item(), count, confidence, accuracy))
        return found

    def calibration_error(self, bins: int = BINS) -> float:
        """Expected calibration error: the mean distance of score and share right over the answers.

        Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", arXiv:1706.04599,
        equation 3: bins of equal width over the score of the predicted class, weighted by their answers.
        """
        found = [row for row in self.reliability(bins) if row.photos]
        return math.fsum(row.photos * abs(row.accuracy - row.confidence) for row in found) / len(self)

    def mistakes(self) -> list[int]:
        """The numbers of the photos taken for another class, those with the highest score first."""
        wrong = (~self.right).nonzero().flatten()
        return wrong[self.scores[wrong].argsort(descending=True, stable=True)].tolist()

    def most_confused(self, most: int = 10) -> list[Confusion]:
        """The pairs of classes taken for each other most often, at most this many."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[:most].tolist()
        pairs = [divmod(at, len(self.classes)) for at in order]
        return [
            Confusion(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]
        ]


def _share(part: int, of: int) -> float:
    return part / of if of else math.nan

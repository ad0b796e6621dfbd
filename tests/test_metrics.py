"""The figures of an evaluation, beside slow twins and cases small enough to count by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import from_logits
from torch import Tensor, nn

from mnv2_fast import UserError
from mnv2_fast.metrics import ClassScore, Confusion, Evaluation

CLASSES = ("a", "b", "c", "d")


def by_hand() -> Evaluation:
    """Six photos of three classes; `d` has none, and nothing is taken for it."""
    probabilities = torch.tensor(
        [
            [0.7, 0.1, 0.1, 0.1],  # a, right
            [0.2, 0.6, 0.1, 0.1],  # a, taken for b
            [0.1, 0.5, 0.3, 0.1],  # b, right
            [0.9, 0.04, 0.03, 0.03],  # b, taken for a
            [0.8, 0.1, 0.06, 0.04],  # b, taken for a
            [0.4, 0.3, 0.2, 0.1],  # c, taken for a
        ],
        dtype=torch.float64,
    )
    return Evaluation(CLASSES, torch.tensor([0, 0, 1, 1, 1, 2]), probabilities)


def random(n: int = 300, c: int = 7) -> tuple[Evaluation, Tensor]:
    """Answers that are right about as often as not, and their logits."""
    targets = torch.randint(c, (n,))
    logits = torch.randn(n, c) + 1.5 * nn.functional.one_hot(targets, c)
    return from_logits([f"class {i}" for i in range(c)], targets, logits), logits


def test_counted_by_hand() -> None:
    found = by_hand()
    assert len(found) == 6
    assert found.predicted.tolist() == [0, 1, 1, 0, 0, 0]
    assert found.top1 == pytest.approx(2 / 6)
    assert found.top_k(2) == pytest.approx(5 / 6)
    assert found.top_k(3) == 1
    assert found.top_k(9) == 1
    assert found.confusion.tolist() == [[1, 1, 0, 0], [2, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    a, b, c, d = found.per_class()
    assert a == ClassScore("a", 1 / 4, 1 / 2, 2 / 6, 2)
    assert b == ClassScore("b", 1 / 2, 1 / 3, 2 / 5, 3)
    assert math.isnan(c.precision)  # nothing is taken for it
    assert (c.recall, c.f1, c.support) == (0, 0, 1)
    assert all(map(math.isnan, d[1:4]))
    assert d.support == 0
    assert found.balanced_accuracy == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert found.loss == pytest.approx(-sum(map(math.log, (0.7, 0.2, 0.5, 0.04, 0.1, 0.2))) / 6)
    assert found.mistakes() == [3, 4, 1, 5]
    assert found.most_confused(2) == [Confusion("b", "a", 2), Confusion("a", "b", 1)]
    assert len(found.most_confused()) == 3


def test_calibration_error_by_hand() -> None:
    """Two bins: (0, 0.5] has scores 0.5 (right) and 0.4; (0.5, 1] has 0.7 (right), 0.6, 0.9 and 0.8."""
    found = by_hand()
    low, high = found.reliability(2)
    assert (low.low, low.high, low.photos, high.low, high.high, high.photos) == (0, 0.5, 2, 0.5, 1, 4)
    assert (low.confidence, low.accuracy) == pytest.approx((0.45, 1 / 2))
    assert (high.confidence, high.accuracy) == pytest.approx((0.75, 1 / 4))
    assert found.calibration_error(2) == pytest.approx((2 * 0.05 + 4 * 0.5) / 6)
    # Score 1 is in the last bin, and an answer that is always right then has no error.
    certain = Evaluation(("a", "b"), torch.tensor([1]), torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert certain.reliability()[-1].photos == 1
    assert certain.calibration_error() == 0
    assert all(math.isnan(row.accuracy) and row.photos == 0 for row in certain.reliability()[:-1])


def test_slow_twins() -> None:
    found, logits = random()
    rows, targets = logits.double().numpy(), found.targets.tolist()
    ranks = [int((row > row[target]).sum()) for row, target in zip(rows, targets, strict=True)]
    for k in (1, 2, 5):
        assert found.top_k(k) == pytest.approx(np.mean([rank < k for rank in ranks]))
    assert found.top1 == found.top_k(1)
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, found.targets).item(), rel=1e-6)

    confusion = np.zeros((7, 7), int)
    for row, target in zip(rows, targets, strict=True):
        confusion[target, row.argmax()] += 1
    assert found.confusion.tolist() == confusion.tolist()
    for i, score in enumerate(found.per_class()):
        tp = confusion[i, i]
        precision, recall = tp / confusion[:, i].sum(), tp / confusion[i].sum()
        expected = (precision, recall, 2 * precision * recall / (precision + recall), confusion[i].sum())
        assert score[1:] == pytest.approx(expected)


def test_calibration_error_by_a_slow_twin() -> None:
    found, _ = random()
    bins: dict[int, list[tuple[float, bool]]] = {}
    for score, right in zip(found.scores.tolist(), found.right.tolist(), strict=True):
        bins.setdefault(math.ceil(score * 15), []).append((score, right))
    distances = [
        len(b) / 300 * abs(np.mean([r for _, r in b]) - np.mean([s for s, _ in b])) for b in bins.values()
    ]
    assert found.calibration_error() == pytest.approx(sum(distances))
    assert sum(row.photos for row in found.reliability()) == 300


def test_a_probability_of_0_is_no_infinite_loss() -> None:
    found = from_logits(("a", "b"), torch.tensor([1]), torch.tensor([[1e4, 0.0]]))
    assert found.loss == pytest.approx(708.4, abs=0.1)


def test_what_does_not_belong_together() -> None:
    with pytest.raises(UserError, match="no photo to evaluate on"):
        from_logits(("a", "b"), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="are not"):
        from_logits(("a", "b"), torch.zeros(1, dtype=torch.long), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="2 paths for 1"):
        from_logits(("a", "b"), torch.zeros(1, dtype=torch.long), torch.zeros(1, 2), [Path("x")] * 2)

"""Parameters, multiply-accumulates and times, beside what can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import one_thread  # noqa: F401
from torch import Tensor, nn

from mnv2_fast import MobileNetV2, arch, costs
from mnv2_fast.lenet import LeNet5

pytestmark = pytest.mark.usefixtures("one_thread")


def test_mobilenetv2(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MobileNetV2(5, width_mult=0.35).train()
    found = costs.measure(model, 64)
    layers = arch.layers(size=64, specs=arch.network(5, 0.35))
    assert found.macs == sum(layer.macs for layer in layers)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert list(found.milliseconds) == [costs.ENGINE]
    assert 0 < (found.milliseconds[costs.ENGINE] or 0) < 1000
    assert model.training
    assert model.backend == "auto"


def test_lenet_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def pretend(network: nn.Module) -> nn.Module:
        compiled.append(network)
        return network

    monkeypatch.setattr(torch, "compile", pretend)  # the real one takes half a minute
    found = costs.measure(LeNet5(5), 32)
    c1, c3, c5 = 28 * 28 * 6 * 75, 10 * 10 * 16 * 150, 120 * 400
    assert found.macs == c1 + c3 + c5 + 120 * 84 + 84 * 5
    assert found.parameters == 61_625
    assert list(found.milliseconds) == [costs.EAGER, costs.COMPILED]
    assert all(found.milliseconds.values())
    assert len(compiled) == 1


def test_where_torch_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(network: nn.Module) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Any:
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    found = costs.measure(LeNet5(5), 32)
    assert found.milliseconds[costs.COMPILED] is None
    assert found.milliseconds[costs.EAGER]


@pytest.mark.slow
def test_compiled_by_torch() -> None:
    assert costs.measure(LeNet5(5), 32).milliseconds[costs.COMPILED]

"""A GPU for tests where there is none: tensors on the CPU go the way of CUDA tensors.

The kernels' launchers are plain torch, CUDA graphs run anew, and no value of a weight is looked at.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

from mnv2_fast import MobileNetV2
from mnv2_fast.backends import chains, eager, replay
from mnv2_fast.backends import triton as backend


def graph(run: replay.Run, x: Tensor, lane: replay.Lane) -> replay.Graph:
    """In a CUDA graph's place: a replay computes anew in the memory of its own.

    As in a shared pool, it writes into the answers that the lane's other graphs have left behind.
    """
    y = run(x)

    def again() -> None:
        for other in list(lane.graphs):
            other.y.fill_(torch.nan)
        y.copy_(run(x))

    made = replay.Graph(again, x, y)
    lane.graphs.add(made)
    return made


class Captured:
    """A stand-in of CUDA graphs: captures are counted. `capturing`: whether the caller captures one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.stream = 0
        self.capturing = False
        monkeypatch.setattr(replay, "_lanes", {})
        monkeypatch.setattr(replay, "place", lambda x: self.stream)
        monkeypatch.setattr(replay, "capturing", lambda device: self.capturing)
        monkeypatch.setattr(replay, "capture", self.capture)

    def capture(self, run: replay.Run, x: Tensor, lane: replay.Lane) -> replay.Graph:
        self.sizes.append(len(x))
        return graph(run, x, lane)


# Why modules in train mode are torch's; tests/test_triton_train_modules.py trains.
NO_TRAINING = "the stand-in trains nothing"


class StandIn:
    """`launches`: name of each kernel launched, with ":tf32" where float32 is multiplied so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.captured, self.launches = Captured(monkeypatch), list[str]()
        monkeypatch.setenv("MNV2_BACKEND", "triton")
        monkeypatch.setattr(backend, "_device_reason", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        row = chains.KERNELS["cuda"]
        declines = backend.network_declines
        monkeypatch.setitem(
            chains.KERNELS,
            "cpu",
            dataclasses.replace(
                row,
                unavailable=lambda: "",
                declines=declines,
                declines_training=lambda device, asked: NO_TRAINING,
            ),
        )
        launch_in_torch(monkeypatch, self.launches)


def launch_in_torch(patch: pytest.MonkeyPatch, launches: list[str]) -> None:
    """Have the launchers of a network in eval mode compute in plain torch, and note their launches."""
    from mnv2_fast.kernels import network

    def launcher(name: str, make: Any) -> Any:
        def launch(*args: Any, tf32: bool = False, norm: Tensor | None = None) -> Tensor:
            assert norm is None
            launches.append(name + ":tf32" * tf32)
            with torch.autocast("cpu", enabled=False):  # as no kernel knows of it
                return make(*args)

        return launch

    patch.setattr(network, "stem", launcher("stem", eager.stem))
    patch.setattr(network, "depthwise", launcher("depthwise", eager.depthwise))
    patch.setattr(network.pointwise, "pointwise", launcher("pointwise", eager.pointwise))
    patch.setattr(network.head, "head", launcher("head", eager.head))
    patch.setattr(network.head, "features", launcher("features", _features))


@pytest.fixture(name="gpu")
def stand_in(one_thread: None, model: MobileNetV2, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """After `model`, which is calibrated in train mode."""
    return StandIn(monkeypatch)


def near(model: MobileNetV2, x: Tensor, dtype: torch.dtype) -> None:
    """Served, in the dtype that torch answers in, and at most 1.5 times as far from float64 as torch."""
    assert model.why_not(x) is None, model.why_not(x)
    x = torch.cat([x * scale for scale in torch.linspace(0.5, 2, 3).to(x.dtype)])
    with torch.autocast("cpu", enabled=False):
        exact = copy.deepcopy(model).double()._forward_impl(x.double())
    ours, torchs = model(x), helpers.eager(model, x)
    assert ours.dtype == torchs.dtype == model._plan(x).pack._network.run(x).dtype == dtype
    assert (ours - exact).norm() <= 1.5 * (torchs - exact).norm() + 1e-5 * exact.norm()


def _features(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return eager.pointwise(x, weight, bias, None, True).mean((2, 3))

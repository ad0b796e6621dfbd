"""The launches of a training step of the network on a GPU, without one, and without the memory for it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from mnv2_fast.kernels import (
    aot,
    norm,
    train_depthwise,
    train_pointwise,
    train_pointwise_gradient,
    train_stem,
)
from torch import nn

from mnv2_fast import MobileNetV2, training
from mnv2_fast.backends import chains, triton_train

UNITS = 132  # of an H200, which share the pixels
# What asks how many there are.
LAUNCHERS = (norm, train_depthwise, train_pointwise, train_pointwise_gradient, train_stem)


class Launches(NamedTuple):
    forward: list[aot.Launch]
    backward: list[aot.Launch]


@functools.cache
def launches(
    dtype: torch.dtype, *, tf32: bool = False, frozen: str = "", batch: int = 256, size: int = 224
) -> Launches:
    """The launches of a step, features alone, photos of float32.

    Args:
        dtype: of the tensors between layers.
        tf32: float32 is multiplied as TF32.
        frozen: "norms" that are in eval mode, "weights" of convolutions that want no gradient, or "".
        batch: images.
        size: of an image, height and width.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in LAUNCHERS:
            patch.setattr(module, "device_of", lambda device: ("", UNITS))
        patch.setitem(chains.KERNELS, "meta", chains.KERNELS["cuda"])  # type: ignore[arg-type]
        patch.setattr(training, "_kernels", lambda x: triton_train)
        patch.setattr(training, "_dtype", lambda device: dtype)
        patch.setattr(triton_train, "multiplies_tf32", lambda: tf32)
        with torch.device("meta"):
            model = MobileNetV2().train()
            for module in model.modules():
                if frozen == "norms" and isinstance(module, nn.BatchNorm2d):
                    module.eval()
                if frozen == "weights" and isinstance(module, nn.Conv2d):
                    module.requires_grad_(False)
            chain = training.read_chain(model, model._read_features(any_mode=True))
            with aot.launches() as forward:
                y = training.run_joined(torch.empty(batch, 3, size, size), chain)
            with aot.launches() as backward:
                y.backward(torch.empty_like(y))
    assert y.shape[:2] == (batch, 1280)
    assert y.dtype == dtype
    assert all(p.grad is not None for p in model.features.parameters() if p.requires_grad)
    return Launches(forward, backward)


def name(launch: aot.Launch) -> tuple[str, str]:
    """Module and function of a launch's kernel, as `train_traffic.COUNTS` has it."""
    return launch.kernel.fn.__module__.rpartition(".")[2], launch.kernel.__name__


def binaries(made: list[aot.Launch]) -> dict[tuple[Any, ...], aot.Launch]:
    """One launch for each binary that some launches need."""
    return {(*name(launch), launch.warps, launch.stages, *_specialised(launch)): launch for launch in made}


def _specialised(launch: aot.Launch) -> list[Any]:
    """What a launch is compiled for."""
    found = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            value = value.dtype
        elif not parameter.is_constexpr:
            free = isinstance(value, int) and not parameter.do_not_specialize
            value = (free and value == 1, free and value % 16 == 0, value >= 2**31)
        found.append(value)
    return found

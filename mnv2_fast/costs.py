"""What a network costs: parameters, multiply-accumulates, and the time of one image."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import demo
from .engine import compile
from .model import MobileNetV2

ENGINE, EAGER, COMPILED = "mnv2_fast engine, fp32", "torch eager", "torch.compile"


@dataclass(frozen=True)
class Cost:
    """Of one network.

    parameters: numbers that are trained. macs: multiply-accumulates of one image, in convolutions and linear
    layers. milliseconds: what runs it -> median time of one image on one core; None where it does
    not run here.
    """

    parameters: int
    macs: int
    milliseconds: dict[str, float | None]


def measure(model: nn.Module, size: int) -> Cost:
    """Count and time a network on one image of size x size, on one thread.

    A MobileNetV2 is timed on our engine, any other network in torch, as it is and compiled.
    """
    network = copy.deepcopy(model).eval()
    x = torch.randn((1, 3, size, size), generator=torch.Generator().manual_seed(0))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, _macs(network, x), _times(network, x))


def _macs(network: nn.Module, x: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    if isinstance(network, MobileNetV2):
        network = copy.deepcopy(network)
        network.backend = "eager"  # the counter knows torch's operators
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return int(counter.get_total_flops()) // 2


def _times(network: nn.Module, x: Tensor) -> dict[str, float | None]:
    calls: dict[str, Callable[[], Tensor]]
    missing: dict[str, float | None] = {}
    if isinstance(network, MobileNetV2):
        engine = compile(network, threads=1)
        calls = {ENGINE: lambda: engine(x)}
    else:
        calls = {EAGER: lambda: network(x)}
        compiled = _compiled(network, x)
        if compiled is None:
            missing = {COMPILED: None}
        else:
            calls[COMPILED] = lambda: compiled(x)
    return {name: statistics.median(times) for name, times in demo.race(calls, threads=1).items()} | missing


def _compiled(network: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """By torch.compile; None where that fails, as without a C++ compiler."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(network)
    try:
        with torch.inference_mode():
            compiled(x)
    except RuntimeError:  # what its own errors are
        return None
    return compiled

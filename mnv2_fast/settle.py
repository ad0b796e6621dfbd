"""What a recipe leaves open follows from the network, the processor and the photos; and whether that fits."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import chain

import torch
from torch import nn

from . import arch, machine
from .arch import LayerSpec
from .backends import cpu_train
from .distributed import Group
from .errors import UserError
from .model import MobileNetV2
from .nn import Trained
from .reading import Declined
from .recipe import Recipe
from .trainer import LONE_VALUE
from .training import kept_bytes


def settled(
    recipe: Recipe, model: nn.Module, size: int, group: Group, device: torch.device, *, new: bool
) -> Recipe:
    """The recipe with what it leaves open, so that a run goes on with the same on any machine.

    Args:
        recipe: as it was given.
        model: to train.
        size: height and width in validation.
        group: in which all do the same.
        device: to train on.
        new: whether all weights are random.
    """
    amp, train_size, cache = recipe.amp, recipe.train_size, recipe.cache
    if amp == "auto":
        amp = "bf16" if all(group.gather(_prefers_bfloat16(model, device))) else "none"
    if train_size is None:
        train_size = usual_train_size(size, recipe) if isinstance(model, MobileNetV2) else size
    photos = recipe.batch_size * recipe.accumulate * group.world
    if cache is not None:
        cache = os.path.abspath(os.path.expanduser(cache))  # a run may go on from another folder
    return replace(recipe.with_rates(photos, new=new), amp=amp, train_size=train_size, cache=cache)


def usual_train_size(size: int, recipe: Recipe) -> int:
    """Height and width to train a MobileNetV2 on that is validated on `size`: 192 of 224, if on crops.

    On the flower photos it is as accurate so as with 224, in three quarters of the time.
    """
    if "crop" not in recipe.augment:  # which alone makes things larger than validation shows them
        return size
    step = 32  # the network's stride
    return min(size, max(step, round(size * 6 / 7 / step) * step))


def _prefers_bfloat16(model: nn.Module, device: torch.device) -> bool:
    """Whether all of it trains on our kernels, and these are fastest in bfloat16."""
    if device.type != "cpu" or not isinstance(model, MobileNetV2):
        return False
    try:
        model.decline_backend(device.type)
    except Declined:
        return False
    return cpu_train.prefers_bfloat16() and _nodes(model.train()) is not None


def check_batch(model: nn.Module, recipe: Recipe, side: int, processes: int) -> None:
    """Refuse pixels that photos do not have, and a batch that does not fit or gives a batch norm one value.

    Of other models the first step tells of batches. Without memory Linux would end the process there instead.

    Args:
        model: to train.
        recipe: with all that it leaves open settled.
        side: pixels of a resized photo's shorter one.
        processes: that train such a batch each, on this machine.

    Raises:
        UserError: as said there.
    """
    size = recipe.train_size
    assert size is not None
    if size > side:
        raise UserError(
            f"train_size={size} for photos of {side} pixels: use at most that, or raise image_size"
        )
    if not isinstance(model, MobileNetV2) or recipe.freeze_epochs == recipe.epochs:
        return
    nodes = _nodes(model.train())
    if nodes is None:
        return
    last = arch.layers(size=size, specs=list(chain(*nodes)))[-1]
    if recipe.batch_size * last.ho * last.wo == 1 and not recipe.freeze_bn:
        raise UserError(LONE_VALUE)
    dtype = torch.bfloat16 if recipe.amp == "bf16" else torch.float32
    need = kept_bytes(nodes, recipe.batch_size, size, dtype)
    need -= kept_bytes(nodes[: _frozen(model)], recipe.batch_size, size, dtype)
    need += recipe.accumulate * recipe.batch_size * 3 * size**2 * torch.float32.itemsize  # waits for its step
    if not machine.fits_memory(processes * need):
        have = machine.available_memory() or 0
        need_of = f"{need / 1e9:.1f} GB" + (f" in each of {processes} processes" if processes > 1 else "")
        raise UserError(
            f"batch_size={recipe.batch_size} at {size} x {size} pixels needs more than {need_of}, "
            f"{have / 1e9:.1f} GB are left: lower batch_size, and raise accumulate for steps as large"
        )


def _nodes(model: MobileNetV2) -> list[list[LayerSpec]] | None:
    """The layers of each element of `features`; None where one of them trains in plain torch."""
    nodes = []
    for block in model.features:
        if not isinstance(block, Trained):
            return None
        try:
            nodes.append([layer.spec for layer in block.train_chain().layers])
        except Declined:
            return None
    return nodes


def _frozen(model: MobileNetV2) -> int:
    """Elements of `features` in front of the first one that asks for a gradient: nothing is kept of them."""
    asks = [any(p.requires_grad for p in block.parameters()) for block in model.features]
    return asks.index(True) if True in asks else len(asks)

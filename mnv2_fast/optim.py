"""What a training step is made of: torch's and torchvision's parts, put together as a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ._torchvision import transforms_v2
from .recipe import Recipe

_WARMUP_FROM = 0.01  # of the peak learning rate

TensorList = tuple[Tensor, ...] | list[Tensor]
Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def head_of(model: nn.Module) -> nn.Linear | None:
    """The last linear layer, which gives the logits; None where there is none."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def new_head(head: nn.Linear, classes: int) -> nn.Linear:
    """One for so many classes in its place, initialised as torchvision does it."""
    fresh = nn.Linear(head.in_features, classes)
    nn.init.normal_(fresh.weight, 0, 0.01)
    nn.init.zeros_(fresh.bias)
    return fresh


def _of_head(model: nn.Module) -> set[nn.Parameter]:
    head = head_of(model)
    return set() if head is None else set(head.parameters())


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The optimizer: the head has a learning rate of its own, norms and biases have no weight decay.

    Args:
        model: to train, with all parameters that are to be trained at some time.
        recipe: says which optimizer, and its rates, as `Recipe.with_rates` gives it.
    """
    lr, factor, weight_decay = recipe.lr, recipe.head_lr_factor, recipe.weight_decay
    assert lr is not None
    assert factor is not None
    assert weight_decay is not None
    of_head = _of_head(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = lr * factor if parameter in of_head else lr
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    rows = [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
    # Fused: one pass over each parameter, several times as fast as the loop on CPUs.
    if recipe.optimizer == "sgd":
        return SGD(rows, lr, recipe.momentum, nesterov=recipe.momentum > 0, fused=True)
    return AdamW(rows, lr, fused=True)


def make_schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> LRScheduler:
    """Learning rates that rise, then fall to 0 as a cosine; one for each of the `steps` of each epoch."""
    total = recipe.epochs * steps
    warmup = round(recipe.warmup_epochs * steps)
    cosine = CosineAnnealingLR(optimizer, max(1, total - warmup))
    if not warmup:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, _WARMUP_FROM, total_iters=warmup), cosine], [warmup])


def make_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of weights and buffers, in eval mode; None where decay is 0.

    After n steps the decay is at most (1 + n) / (10 + n), so that a short training is not held back by the
    weights it began with.
    """
    if not decay:
        return None

    def average(mean: TensorList, now: TensorList, count: Tensor | int) -> None:
        n = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(mean, now, count)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True).eval()


def make_loss(recipe: Recipe, counts: Sequence[int]) -> nn.CrossEntropyLoss:
    """The loss in training, of logits and labels or shares of classes.

    Args:
        recipe: says how labels are smoothed and classes weigh.
        counts: photos of each class; balanced classes weigh in inverse proportion, 1 in the mean of photos.
    """
    weight = None
    if recipe.class_weights == "balanced":
        photos = torch.tensor(counts, dtype=torch.float32)
        weight = photos.sum() / (len(counts) * photos)
    return nn.CrossEntropyLoss(weight, label_smoothing=recipe.label_smoothing)


def make_mixing(recipe: Recipe, classes: int) -> Mixing | None:
    """Mixup, CutMix or one of them by chance, for (images, labels) -> (images, shares of classes)."""
    if not recipe.mixup and not recipe.cutmix:
        return None
    v2 = transforms_v2()
    found = []
    if recipe.mixup:
        found.append(v2.MixUp(alpha=recipe.mixup, num_classes=classes))
    if recipe.cutmix:
        found.append(v2.CutMix(alpha=recipe.cutmix, num_classes=classes))
    mixing: Mixing = v2.RandomChoice(found)
    return mixing


def set_trainable(model: nn.Module, trainable: Sequence[nn.Parameter], *, head_only: bool) -> None:
    """Of the parameters that may be trained, take gradients of all, or of the head's."""
    of_head = _of_head(model)
    for parameter in trainable:
        parameter.requires_grad_(not head_only or parameter in of_head)


def set_mode(model: nn.Module, *, freeze_bn: bool, head_only: bool) -> None:
    """Train mode, but for what is frozen: that stays in eval mode, so that its running statistics do.

    Args:
        model: to train.
        freeze_bn: batch norms stay in eval mode; their scales and shifts are trained.
        head_only: all but the head does, and dropout in front of it.
    """
    model.train()
    head = head_of(model)
    if head_only and head is not None:
        _freeze_beside(model, head)
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _freeze_beside(module: nn.Module, head: nn.Module) -> None:
    for child in module.children():
        if head in child.modules():
            _freeze_beside(child, head)
        elif not isinstance(child, nn.Dropout):
            child.eval()

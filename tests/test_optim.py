"""The parts of a training step, against what they are meant to be."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import one_thread  # noqa: F401 (a fixture)
from torch import nn

from mnv2_fast import MobileNetV2, optim
from mnv2_fast.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network() -> MobileNetV2:
    """A small one."""
    return MobileNetV2(3, width_mult=0.25)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_groups_of_parameters(network: MobileNetV2, name: str) -> None:
    recipe = Recipe(optimizer=name, lr=0.01, head_lr_factor=5, weight_decay=0.1)
    network.features[0].requires_grad_(False)
    groups = optim.make_optimizer(network, recipe).param_groups
    names = {parameter: key for key, parameter in network.named_parameters()}
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            key = names[parameter]
            seen.add(key)
            assert group["lr"] == pytest.approx(0.05 if key.startswith("classifier") else 0.01)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0)
    assert seen == {key for key in names.values() if not key.startswith("features.0.")}


@pytest.mark.parametrize("warmup", [0, 1, 1.5, 3])
def test_the_schedule_rises_then_falls_as_a_cosine(network: MobileNetV2, warmup: float) -> None:
    recipe, steps = Recipe(epochs=3, warmup_epochs=warmup, lr=0.1, head_lr_factor=2).with_rates(32), 10
    optimizer = optim.make_optimizer(network, recipe)
    schedule = optim.make_schedule(optimizer, recipe, steps)
    rates = []
    for _ in range(30):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    rise = round(warmup * steps)
    for i, found in enumerate(rates):
        falling = (1 + math.cos(math.pi * (i - rise) / max(1, 30 - rise))) / 2
        share = 0.01 + 0.99 * i / rise if i < rise else falling
        assert max(found) == pytest.approx(0.2 * share, abs=1e-7), i
        assert min(found) == pytest.approx(0.1 * share, abs=1e-7), i


def test_the_average_is_the_slow_twin(network: MobileNetV2) -> None:
    average = optim.make_average(network, 0.9)
    assert average is not None
    assert not average.module.training
    slow: dict[str, torch.Tensor] = {}
    for n in range(30):
        with torch.no_grad():
            for value in network.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn_like(value))
        average.update_parameters(network)
        decay = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        for key, value in network.state_dict().items():
            mean = slow.get(key, value.double())
            slow[key] = mean + (1 - decay) * (value.double() - mean)
    for key, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, slow[key].float(), rtol=1e-4, atol=1e-4)
    assert optim.make_average(network, 0) is None


def test_balanced_classes_weigh_one_in_the_mean_of_photos() -> None:
    counts = [2, 6, 4]
    weight = optim.make_loss(Recipe(class_weights="balanced"), counts).weight
    assert weight is not None
    assert (weight * torch.tensor(counts)).tolist() == pytest.approx([4, 4, 4])
    assert optim.make_loss(Recipe(), counts).weight is None
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    plain = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.equal(optim.make_loss(Recipe(label_smoothing=0.2), counts)(logits, labels), plain)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_shares_labels_as_it_shares_pixels(options: dict[str, float]) -> None:
    mixing = optim.make_mixing(Recipe(**options), 4)
    assert mixing is not None
    labels = torch.arange(4)
    images = torch.zeros(4, 4, 8, 8)
    images[labels, labels] = 1  # channel k is the share of photo k
    for _ in range(5):
        mixed, shares = mixing(images, labels)
        torch.testing.assert_close(mixed.mean((2, 3)), shares)
    assert optim.make_mixing(Recipe(), 4) is None


def test_the_head_alone_trains(network: MobileNetV2) -> None:
    trainable = list(network.parameters())
    optim.set_trainable(network, trainable, head_only=True)
    optim.set_mode(network, freeze_bn=False, head_only=True)
    before = copy.deepcopy(network.state_dict())
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    moved = [key for key, parameter in network.named_parameters() if parameter.grad is not None]
    assert moved == ["classifier.1.weight", "classifier.1.bias"]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.classifier[0].training  # dropout
    optim.set_trainable(network, trainable, head_only=False)
    optim.set_mode(network, freeze_bn=False, head_only=False)
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_frozen_batch_norms_keep_their_statistics_and_learn(network: MobileNetV2) -> None:
    optim.set_mode(network, freeze_bn=True, head_only=False)
    before = network.features[0][1].running_mean.clone()
    network(torch.randn(4, 3, 32, 32)).sum().backward()
    assert torch.equal(network.features[0][1].running_mean, before)
    assert network.features[0][1].weight.grad is not None
    assert network.training
    assert network.features[1].training

"""The table of options: what each takes, and that everything else follows from it."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from mnv2_fast import UserError, cli_train
from mnv2_fast.machine import MAX_THREADS
from mnv2_fast.recipe import OPTIONS, Recipe, switch

# Where 1 and True are no values.
VALUES: dict[str, Any] = {
    "optimizer": "sgd",
    "class_weights": "balanced",
    "amp": "bf16",
    "val_share": 0.5,
    "augment": ("flip",),
    "cache": "there",
}


def _options(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cli_train.add_options(parser)
    found = vars(parser.parse_args(["--out", "run", *words]))
    return {name: value for name, value in found.items() if name in {option.name for option in OPTIONS}}


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_is_the_same_as_a_keyword_and_on_the_command_line(option: Any) -> None:
    value = VALUES.get(option.name, True if option.check is switch else 1)
    word = ",".join(value) if isinstance(value, tuple) else str(value)
    flag = f"--{option.name.replace('_', '-')}"
    found = _options(flag) if value is True else _options(flag, word)
    assert found == {option.name: value}
    assert getattr(Recipe.of(found), option.name) == value
    assert type(found[option.name]) is type(getattr(Recipe(**{option.name: value}), option.name))
    assert option.help


def test_nothing_given_is_nothing_said() -> None:
    assert _options() == {}


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        ({"epochs": 0}, "epochs=0: give a whole number of at least 1"),
        ({"epochs": 1.5}, "whole number"),
        ({"batch_size": True}, "whole number"),
        ({"lr": 0}, "lr=0: give a number above 0"),
        ({"lr": float("nan")}, "above 0"),
        ({"lr": float("inf")}, "above 0"),
        ({"ema": 1.5}, "ema=1.5: give a number from 0 to 1"),
        ({"optimizer": "adam"}, "give one of adamw, sgd"),
        ({"augment": ("crop", "blur")}, "give some of crop,flip"),
        ({"augment": 3}, "give some of crop,flip"),
        ({"freeze_bn": 1}, "give True or False"),
        ({"cache": ""}, "path of a folder"),
        ({"epochs": None}, "epochs=None"),
        ({"epochs": 2, "warmup_epochs": 3}, "warmup_epochs=3 is more than epochs=2"),
        ({"epochs": 2, "freeze_epochs": 3}, "freeze_epochs=3 is more than epochs=2"),
        ({"learning_rate": 1}, "no option 'learning_rate'"),
        ({"batchsize": 1}, "use batch_size"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_cure(options: dict[str, Any], cure: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.of(options)
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_learning_rate_grows_with_the_photos_of_a_step() -> None:
    assert Recipe().with_rates(64).lr == pytest.approx(6e-4)
    assert Recipe(optimizer="sgd").with_rates(16).lr == pytest.approx(5e-3)
    assert Recipe(lr=0.3).with_rates(64).lr == 0.3


def test_random_weights_learn_faster_and_their_last_layer_no_faster_than_the_rest() -> None:
    tuned, new = Recipe().with_rates(32), Recipe().with_rates(32, new=True)
    assert (tuned.lr, tuned.head_lr_factor) == (pytest.approx(3e-4), 10)
    assert (new.lr, new.head_lr_factor) == (pytest.approx(1e-3), 1)
    given = Recipe(lr=0.5, head_lr_factor=2, weight_decay=0.0)
    assert given.with_rates(32, new=True) == given


def test_a_recipe_survives_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    recipe = Recipe(lr=1e-5, augment=(), cache="über uns")
    assert Recipe.of(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_the_weight_decay_is_the_optimizers_own() -> None:
    assert Recipe().with_rates(32).weight_decay == pytest.approx(0.05)
    assert Recipe(optimizer="sgd").with_rates(32).weight_decay == pytest.approx(1e-4)
    assert Recipe(optimizer="sgd", weight_decay=0).with_rates(32).weight_decay == 0
    (option,) = [option for option in OPTIONS if option.name == "weight_decay"]
    assert "0.05 with adamw, 0.0001 with sgd" in option.help


def test_threads_are_bounded() -> None:
    assert Recipe(threads=MAX_THREADS).threads == MAX_THREADS
    with pytest.raises(UserError, match="threads=100000: give a whole number from 1 to 1024"):
        Recipe(threads=100_000)

"""CONTENDERS: who fine-tunes. Each takes the command line of `mnv2 finetune`, in a process of its own.

Torch's side is torchvision's model in the same `fit`: photos, order, augmentation, loader, optimizer,
schedule, averaging and validation are the same code, and the kernels are torch's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..training.contenders import BEST, OURS, TUNED


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune.

    Attributes:
        name: of the way; with `amp` it is one contender's.
        module: that `python -m` runs with the words of `mnv2 finetune`.
        amp: what it is told of arithmetic; None: nothing.
        env: environment of its processes.
    """

    name: str
    module: tuple[str, ...]
    amp: str | None = None
    env: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Of its files."""
        return "ours" if self.name == OURS else f"torch-{self.amp}"

    def command(self, words: Sequence[str]) -> list[str]:
        """Its process's command line."""
        arithmetic = [] if self.amp is None else ["--amp", self.amp]
        return [sys.executable, "-m", *self.module, *words, *arithmetic]


_TORCHS = ("bench.flowers.contenders",)
CONTENDERS = (
    Contender(OURS, ("mnv2_fast", "finetune")),
    *(Contender(BEST, _TORCHS, amp, TUNED) for amp in ("none", "bf16")),
)


def torchs(weights: str, classes: int, seed: int) -> Any:
    """torchvision's model in channels_last, with `weights` and the new classifier that `fit` gives ours.

    Args:
        weights: a name or a file, as for `fit`.
        classes: outputs.
        seed: of the classifier.
    """
    import torch

    from mnv2_fast import optim
    from mnv2_fast._torchvision import torchvision
    from mnv2_fast.weights import load_state_dict

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = torchvision().models.mobilenet_v2()
        model.load_state_dict(load_state_dict(weights)[0])
        model.classifier[-1] = optim.new_head(model.classifier[-1], classes)
    return model.to(memory_format=torch.channels_last)


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The words of `mnv2 finetune`, and those of its recipe that are given."""
    from mnv2_fast import cli_train

    parser = argparse.ArgumentParser(prog="mnv2 finetune", allow_abbrev=False)
    cli_train.add_options(parser)
    args = parser.parse_args(words)
    return args, cli_train.given(args)


def main(words: Sequence[str]) -> int:
    """Fine-tune torchvision's model as `mnv2 finetune` would ours."""
    from mnv2_fast import fit, photos
    from mnv2_fast.recipe import Recipe
    from mnv2_fast.settle import usual_train_size
    from mnv2_fast.weights import Preprocessing

    from ..workers import isa

    args, given = parse(words)
    recipe = Recipe.of(given)
    given.setdefault("train_size", usual_train_size(recipe.image_size or Preprocessing().crop, recipe))
    folder = photos.find(args.data, recipe.val_share, recipe.split_seed)
    model = torchs(args.weights, len(folder.classes), recipe.seed)
    fit(folder, model=model, out=args.out, **given)
    if isa():
        raise RuntimeError("our kernels were loaded: the time is not torch's")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

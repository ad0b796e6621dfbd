"""Makes the flower classifier that comes with the package, and its model card: `make flowers-model`.

Fine-tunes from published weights, quantizes, and judges both networks on the photos that neither has seen.
Options that are not said here are those of `mnv2 finetune`. What has been trained in `--run` is not trained
again, and what was cut off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mnv2_fast import (
    Evaluation,
    UserError,
    __version__,
    cli,
    evaluate,
    files,
    flowers,
    info,
    load,
    photos,
    quantize,
    weights,
)
from mnv2_fast.photos import LabelledFolder
from mnv2_fast.predict import load_model
from mnv2_fast.recipe import DEFAULT_WEIGHTS, OPTIONS, Recipe
from mnv2_fast.runs import FINAL, LAST, Run

(BOX,) = weights.BOXED
_LEARNT_BY = [option.name for option in OPTIONS if not option.free]
CARD = """\
# {name}: five kinds of flowers, int8

<!-- Written by tools/flowers_model.py with the model beside it: `make flowers-model`. -->

MobileNetV2 1.0, {size}x{size}, that says which of five flowers is on a photo: {classes}.
It is in the package, so that `mnv2 predict flower.jpg` and `make demo` have trained weights without a
network. Its name is for `mnv2 predict --model {name}`, `Predictor("{name}")` and `mnv2_fast.load("{name}")`.
The file has {megabytes:.1f} MB, SHA-256
`{sha256}`.

## How well

| {val} photos that it was not trained on | |
|---|---:|
| top-1 of the float network | {float_top1:.1%} |
| top-1 of int8, this file | {int8_top1:.1%} |
| photos with the same first class | {agreement:.1%} |

| int8 | precision | recall | photos |
|---|---:|---:|---:|
{rows}

The network is that of the last epoch, not of the best. The default options of `mnv2 finetune` were tried on
these photos, which flatters a little.

## For what

For trying the package, its tests and demonstrations. It knows five flowers and nothing else: any other photo
gets one of the five names, often with a high score. It is no guide to plants, and none to what may be eaten.

## Photos

{photos} of the 3,670 photos of `tf_flowers`, the flower photos of TensorFlow's tutorials, which are from
Flickr: {train} to train on, {val} to validate. Digest of their names, classes and sides:
`{digest}`.
Each photo is CC BY 2.0 by its author; the archive's `LICENSE.txt` names them all. No photo is in the file.

## Recipe

`make flowers-model DATA=photos` makes model and card again, of the photos in a folder or, without `DATA`, of
all 3,670. The commands:

```sh
{commands}
```

`run/train` has links to the photos that were trained on; int8 was calibrated on {calibrated} of them.
Training began with {start}, SHA-256
`{start_sha256}`. Its options, in full:

{options}

Made on {date} with {versions}.

## Licence

Apache-2.0, as the package. The weights that training began with are torchvision's, BSD-3-Clause, trained on
ImageNet.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model and the card, and print what they reach; the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools/flowers_model.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--data", default=flowers.WORD, metavar="DIR", help="photos; flowers: fetch them")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/flowers"), metavar="DIR", help="of the training"
    )
    parser.add_argument("--out", type=Path, default=BOX.path.parent, metavar="DIR", help="of model and card")
    parser.add_argument(
        "--min-agreement", type=float, default=0.98, metavar="SHARE", help="of int8 with float"
    )
    options, more = parser.parse_known_args(arguments)
    try:
        return make(options, more)
    except UserError as error:
        print(f"flowers_model: error: {error}", file=sys.stderr)
        return 2


def make(options: argparse.Namespace, more: Sequence[str]) -> int:
    """Train, quantize, judge, and only then replace what is in `options.out`.

    Raises:
        UserError: photos or run cannot be used, or int8 is too far from its float network.
    """
    run, data = Run(options.run), options.data
    if flowers.meant(data):
        data = flowers.fetch()
    if (run.folder / FINAL).exists():
        if more:
            raise UserError(
                f"{run.folder} is trained already: leave {' '.join(more)} out, or give another --run"
            )
    else:
        begun = (run.folder / LAST).exists()
        start = ["--resume"] if begun else ["--data", str(data), "--weights", DEFAULT_WEIGHTS]
        if code := cli.main(["finetune", *start, "--out", str(run.folder), *more]):
            return code
    then = run.args()
    folder = photos.find(data, then["val_share"], then["split_seed"])
    if run.state()["identity"]["photos"] != folder.digest():
        raise UserError(f"{run.folder} was trained on other photos than {data}: give another --run")
    small = run.folder / BOX.file
    calibrate = ["quantize", "--data", str(_training_photos(folder, run.folder / "train"))]
    calibrate += ["--model", str(run.folder / FINAL), "--out", str(small)]
    if code := cli.main(calibrate):
        return code
    exact, quantized = evaluate(load_model(run.folder / FINAL), folder), evaluate(load(small), folder)
    facts = figures(exact, quantized)
    if facts["agreement"] < options.min_agreement:
        raise UserError(
            f"int8 has the float network's first class on {facts['agreement']:.1%} of the photos, "
            f"{options.min_agreement:.1%} are asked: nothing in {options.out} is replaced"
        )
    text = CARD.format(**facts, **_of_run(run, then, folder, small))
    with files.replacing(options.out / BOX.file) as beside:
        shutil.copyfile(small, beside)
    files.write_text((options.out / BOX.file).with_suffix(".md"), text)
    print(f"{options.out / BOX.file}: top-1 {facts['int8_top1']:.1%}, float {facts['float_top1']:.1%}")
    return 0


def _training_photos(folder: LabelledFolder, where: Path) -> Path:
    """A folder with links to the photos that were trained on: those that judge must not calibrate."""
    shutil.rmtree(where, ignore_errors=True)
    for path, label in folder.train:
        link = where / folder.classes[label] / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.absolute())
    return where


def figures(exact: Evaluation, quantized: Evaluation) -> dict[str, Any]:
    """What the card says of both networks' answers to the same photos."""
    return {
        "float_top1": exact.top1,
        "int8_top1": quantized.top1,
        "agreement": (exact.predicted == quantized.predicted).double().mean().item(),
        "rows": "\n".join(
            f"| {score.name} | {score.precision:.1%} | {score.recall:.1%} | {score.support} |"
            for score in quantized.per_class()
        ),
    }


def _of_run(run: Run, then: Mapping[str, Any], folder: LabelledFolder, model: Path) -> dict[str, Any]:
    """What the card says of how the model was made."""
    start = weights.find_weights(then["weights"])
    recipe = Recipe.of({name: then[name] for name in _LEARNT_BY})
    options = recipe.to_dict()
    said = ", ".join(f"{name} {_word(options[name])}" for name in _LEARNT_BY)
    preprocessing = weights.preprocessing_of(weights.read_metadata(model))
    found = info.collect()["versions"]
    versions = [f"{name} {found[name]}" for name in ("torch", "torchvision", "pillow", "numpy")]
    return {
        "name": BOX.name,
        "size": preprocessing.crop,
        "classes": ", ".join(folder.classes),
        "megabytes": model.stat().st_size / 1e6,
        "sha256": _sha256(model),
        "photos": len(folder.train) + len(folder.val),
        "train": len(folder.train),
        "val": len(folder.val),
        "digest": folder.digest(),
        "commands": "\n".join(_commands(then, folder.split)),
        "options": textwrap.fill(f"{said}.", 110),
        "start": then["weights"],
        "start_sha256": _sha256(start),
        "calibrated": len(quantize.split(run.folder / "train")[0]),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "versions": ", ".join([f"mnv2-fast {__version__}", *versions]),
    }


def _commands(then: Mapping[str, Any], split: tuple[float, int] | None) -> list[str]:
    """What makes the model, with every option that was not the default one; `split` as the photos have it."""
    photos_a_step = then["batch_size"] * then["accumulate"]
    usual = Recipe(optimizer=then["optimizer"]).with_rates(photos_a_step)
    defaults = {**usual.to_dict(), "optimizer": Recipe().optimizer}
    train = ["mnv2", "finetune", "--data", "photos", "--weights", str(then["weights"]), "--out", "run"]
    for name in _LEARNT_BY:
        if then[name] != defaults[name]:
            train += [f"--{name.replace('_', '-')}", *([] if then[name] is True else [_word(then[name])])]
    # Of photos that training split, all would be those that it has seen, too.
    left_out = "" if split is None else f" --val-share {split[0]:g} --split-seed {split[1]}"
    return [
        shlex.join(train),
        f"mnv2 quantize --data run/train --model run/{FINAL} --out {BOX.file}",
        f"mnv2 evaluate --data photos --model {BOX.file}{left_out}",
    ]


def _word(value: Any) -> str:
    """An option's value as the command line takes it."""
    return (",".join(value) or "none") if isinstance(value, list) else str(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())

"""The verb `mnv2 finetune`: its options are those of `recipe.OPTIONS`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .recipe import DEFAULT_WEIGHTS, OPTIONS, Option, switch
from .terminal import OK, USER_ERROR

if TYPE_CHECKING:
    from .distributed import Group

_NO_WEIGHTS = "none"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the verb its options."""
    parser.add_argument("--out", required=True, metavar="RUN", help="folder to write")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="photos in one subfolder a class, or those in train/ and val/; flowers: fetch the flower photos "
        "(229 MB)",
    )
    parser.add_argument(
        "--weights",
        "--model",
        metavar="NAME|FILE",
        help=f"to begin with: a weights file or published weights ({DEFAULT_WEIGHTS}); none: random ones",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run in --out")
    how.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    sections: dict[str, Any] = {}
    for option in OPTIONS:
        if option.section not in sections:
            sections[option.section] = parser.add_argument_group(option.section)
        _add_option(sections[option.section], option)


def _add_option(section: Any, option: Option) -> None:
    # Not given is not the default: a run that is resumed has its own.
    flag = f"--{option.name.replace('_', '-')}"
    if option.check is switch:
        section.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=option.help)
        return
    default = ",".join(option.default) if isinstance(option.default, tuple) else option.default
    section.add_argument(
        flag,
        type=_argument(option),
        default=argparse.SUPPRESS,
        metavar=option.metavar,
        help=option.help if default is None else f"{option.help} ({default})",
    )


def _argument(option: Option) -> Callable[[str], Any]:
    """The option's check, as argparse calls it."""

    def check(text: str) -> Any:
        try:
            return option.check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None

    return check


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a `Recipe` that the command line names."""
    return {option.name: getattr(args, option.name) for option in OPTIONS if hasattr(args, option.name)}


def finetune(args: argparse.Namespace) -> int:
    """Train as the command line says; the exit code."""
    from . import distributed

    with distributed.joined() as group:
        try:
            return _finetune(args, group)
        except distributed.SaidElsewhereError:
            return USER_ERROR


def _finetune(args: argparse.Namespace, group: Group) -> int:
    from . import flowers
    from .runs import BEST, FINAL, Run
    from .train import fit

    def asked() -> tuple[str, str]:
        data, weights = args.data, args.weights
        if args.resume:
            then = Run(args.out).args()
            data, weights = data or then["data"], weights or then["weights"] or _NO_WEIGHTS
        if data is None:
            raise UserError("finetune needs photos: give a folder with --data, or --data flowers")
        return data, weights or DEFAULT_WEIGHTS

    data, weights = group.together(asked)
    if flowers.meant(data):
        group.on_first(flowers.fetch)
        data = str(flowers.folder())
    result = fit(
        data,
        weights=None if weights == _NO_WEIGHTS else weights,
        out=args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        **given(args),
    )
    if group.first:
        print(
            f"{os.path.join(args.out, FINAL)}: top-1 {result.top1:.1%} on {len(result.photos.val)} photos, "
            f"after {len(result.history)} epochs in {result.seconds:.0f} s; {BEST}: {result.best_top1:.1%}, "
            f"after epoch {result.best_epoch}"
        )
    return OK
